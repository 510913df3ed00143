/* train/loss.h - classifier, soft-max cross-entropy, and their gradients on the host. */
#ifndef ANEPY_TRAIN_LOSS_H
#define ANEPY_TRAIN_LOSS_H

#include "train/engine.h"

#define ANEPY_CHUNK_ROWS 1024 /* of the vocabulary whose gradients exist at once in bf16 */

int32_t anepy_loss_chunks(const anepy_engine *e); /* pieces of the vocabulary */

void anepy_classifier(anepy_engine *e); /* xnorm -> logits */
/* float32 [tokens, vocab] of each running sequence, one after the other. */
void anepy_logits_copy(anepy_engine *e, float *out);

/* Sum of the losses of the running targets that are counted; with gradient: logits -> dlogits. */
double anepy_loss(anepy_engine *e, int gradient);

/* Joins the log-sum-exps of `parts` parts of the vocabulary, each log(sum) + max: float32 [parts,
 * width]; sum NULL: all are 1. room->lse becomes that of each column, and infinity where no target
 * is counted, so that exp(logit - lse) is 0 there. Returns what anepy_loss does. */
double anepy_loss_join(anepy_engine *e, const float *max, const float *sum, int32_t parts);
/* Subtracts 1, scaled, at the gradient of each counted target's logit. */
void anepy_loss_targets(anepy_engine *e);

void anepy_classifier_backward(anepy_engine *e); /* dlogits -> dxnorm */
void anepy_classifier_dw(anepy_engine *e);       /* dlogits, xnorm -> gradient of the classifier */

#endif
