/* train/compile.h - the weights that programs hold. */
#ifndef ANEPY_TRAIN_COMPILE_H
#define ANEPY_TRAIN_COMPILE_H

#include "train/engine.h"

int32_t anepy_compile_open(anepy_engine *e); /* for a new room; compiles nothing yet */
void anepy_compile_close(anepy_room *room);

/* Programs for the weights as they are now. */
int32_t anepy_compile(anepy_engine *e);

/* After the weights have changed: compiles where they are baked, with background_compile beside the
 * next steps, unless at_once. A failure shows later: the room stays stale, and the next call that
 * needs the programs compiles again. */
void anepy_recompile(anepy_engine *e, int at_once);

/* Before the weights change, or are evaluated: waits for what compiles in the background and takes
 * it over. If it failed, the weights it was to replace stay in use. */
int32_t anepy_compile_settle(anepy_engine *e);

uint64_t anepy_compile_nbytes(const anepy_room *room); /* of copies of the weights */

#endif
