/* train/create.h - the engine's state from a checkpoint; creating and freeing are public (anepy.h).
 */
#ifndef ANEPY_TRAIN_CREATE_H
#define ANEPY_TRAIN_CREATE_H

#include "train/engine.h"

/* Takes over what info says of the arenas, and recompiles where weights are baked. */
void anepy_restore(anepy_engine *e, const anepy_engine_info *info);

#endif
