/* train/update.h - the optimizer step. */
#ifndef ANEPY_TRAIN_UPDATE_H
#define ANEPY_TRAIN_UPDATE_H

#include "train/engine.h"

#define ANEPY_UPDATE_PIECE 65536 /* elements per piece: 1 MiB over the four arenas */

/* Options are valid and e->accumulated > 0. */
void anepy_update(anepy_engine *e, anepy_update_stats *stats, const anepy_update_options *options);

#endif
