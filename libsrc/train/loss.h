/* train/loss.h - classifier, soft-max cross-entropy, and their gradients on the host. */
#ifndef ANEPY_TRAIN_LOSS_H
#define ANEPY_TRAIN_LOSS_H

#include "train/engine.h"

#define ANEPY_CHUNK_ROWS 1024 /* of the vocabulary whose gradients exist at once in bf16 */

int32_t anepy_loss_chunks(const anepy_engine *e); /* pieces of the vocabulary */

void anepy_classifier(anepy_engine *e);              /* xnorm -> logits */
void anepy_logits_copy(anepy_engine *e, float *out); /* [tokens, vocab] of one sequence */

/* Sum over the running sequences of their mean losses; with gradient: logits -> dlogits. */
double anepy_loss(anepy_engine *e, int gradient);
void anepy_loss_padding(anepy_engine *e); /* so that exp(logit - lse) is 0 beyond the tokens */
void anepy_loss_targets(anepy_engine *e); /* subtracts 1, scaled, at each target's gradient */

void anepy_classifier_backward(anepy_engine *e); /* dlogits -> dxnorm */
void anepy_classifier_dw(anepy_engine *e);       /* dlogits, xnorm -> gradient of the classifier */

#endif
