/* train/pass.h - forward, loss and backward of the sequences that run side by side. */
#ifndef ANEPY_TRAIN_PASS_H
#define ANEPY_TRAIN_PASS_H

#include "train/engine.h"

int32_t anepy_forward(anepy_engine *e); /* ids -> logits */
/* Sum of the losses of the running targets that are counted; with gradient: logits -> dlogits. */
int32_t anepy_pass_loss(anepy_engine *e, int gradient, double *loss);
/* dlogits -> gradients; with a loss scale nothing if one is not finite, and stats.skipped is set.
 */
int32_t anepy_backward(anepy_engine *e);

#endif
