/* train/update.h - the optimizer step. */
#ifndef ANEPY_TRAIN_UPDATE_H
#define ANEPY_TRAIN_UPDATE_H

#include "train/engine.h"

/* Options are valid and e->counted > 0. Recompiles where weights are baked; if that fails the
 * weights are updated but the programs still hold the old ones. */
int32_t anepy_update(anepy_engine *e, anepy_update_stats *stats,
                     const anepy_update_options *options);

#endif
