/* train/pass.h - forward, loss and backward of the sequences that run side by side. */
#ifndef ANEPY_TRAIN_PASS_H
#define ANEPY_TRAIN_PASS_H

#include "train/engine.h"

int32_t anepy_forward(anepy_engine *e); /* ids -> xnorm, and logits if they exist as a whole */
/* float32 [tokens, vocab] of each running sequence, one after the other. */
void anepy_pass_logits(anepy_engine *e, float *out);
/* Sum of the losses of the running targets that are counted; with gradient: logits -> dlogits, or
 * xnorm -> dxnorm where no logits exist as a whole. */
int32_t anepy_pass_loss(anepy_engine *e, int gradient, double *loss);
/* These -> gradients; with a loss scale nothing if one is not finite, and stats.skipped is set.
 */
int32_t anepy_backward(anepy_engine *e);

#endif
