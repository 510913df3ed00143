/* train/scaling.h - dynamic loss scaling. */
#ifndef ANEPY_TRAIN_SCALING_H
#define ANEPY_TRAIN_SCALING_H

#include "train/engine.h"

/* Whether the gradient that the backward pass ended with is finite, and those of the norms. In IEEE
 * arithmetic a NaN or infinity anywhere upstream reaches them, so this one check is enough. */
int anepy_input_gradient_finite(anepy_engine *e);
/* Whether every gradient of the running step is, before anything is added. */
int anepy_gradients_finite(anepy_engine *e);

#define ANEPY_LOSS_SCALE_LIMIT 0x1p40

/* Before a step. The first since an update sets the unit of the gradients; the very first takes
 * loss_scale as that of a step in which every target is counted. Gradients that were restored
 * without a unit are taken for those of steps with as many targets. */
void anepy_scale_begin(anepy_engine *e);
void anepy_scale_step(anepy_engine *e, int skipped); /* after a step */
void anepy_scale_grow(anepy_engine *e); /* after an update, when nothing is accumulated */

/* Several engines train as one: their gradients are about to be added. counted: targets of all;
 * scale: what the gradient of each is to carry; reduced: it does. Gradients that must not reach an
 * update become NaN, so that no engine makes one. counted 0: none does. */
void anepy_scale_join(anepy_engine *e, int64_t counted, double scale, int reduced);

void anepy_scale_forget(anepy_engine *e);  /* there was no step since the last update */
void anepy_scale_discard(anepy_engine *e); /* and gradients are zero */

#endif
