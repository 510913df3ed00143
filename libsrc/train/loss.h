/* train/loss.h - classifier, soft-max cross-entropy, and their gradients on the host, each for the
 * columns of run.window. */
#ifndef ANEPY_TRAIN_LOSS_H
#define ANEPY_TRAIN_LOSS_H

#include "train/engine.h"

#define ANEPY_CHUNK_ROWS 1024 /* of the vocabulary whose gradients exist at once in bf16 */

int32_t anepy_loss_chunks(const anepy_engine *e); /* pieces of the vocabulary */

/* Columns that the logits have in a room of this width. They are needed together only for the
 * gradient of the classifier, or on a device; else they are made, and used up, some columns at a
 * time, as they are the largest buffer of a step. */
int32_t anepy_logits_width(const anepy_engine *e, int32_t width);
/* Goes on to the next columns of the run; 0: there are none. The first call starts anew. */
int anepy_logits_next(anepy_engine *e);
/* Whether the logits of all running columns exist together. */
static inline int anepy_logits_whole(const anepy_engine *e) {
    return e->room->logits_width == e->room->width;
}

void anepy_classifier(anepy_engine *e); /* xnorm -> logits */
/* float32 [tokens, vocab] of each running sequence, one after the other. */
void anepy_logits_copy(anepy_engine *e, float *out);

/* Whether a target of the window is counted; if not, its losses and the gradient of its xnorm are 0
 * now, without logits. */
int anepy_loss_any(anepy_engine *e);
/* Adds the losses of the targets that are counted; with gradient: logits -> dlogits. */
void anepy_loss(anepy_engine *e, int gradient, double *loss);

/* Joins the log-sum-exps of `parts` parts of the vocabulary, each log(sum) + max: float32 [parts,
 * width]; sum NULL: all are 1. room->lse becomes that of each column, and infinity where no target
 * is counted, so that exp(logit - lse) is 0 there. Adds what anepy_loss does. */
void anepy_loss_join(anepy_engine *e, const float *max, const float *sum, int32_t parts,
                     double *loss);
/* Subtracts 1, scaled, at the gradient of each counted target's logit. */
void anepy_loss_targets(anepy_engine *e);

void anepy_classifier_backward(anepy_engine *e); /* dlogits -> dxnorm */
void anepy_classifier_dw(anepy_engine *e);       /* dlogits, xnorm -> gradient of the classifier */

#endif
