/* train/norm.h - RMSNorm outside the programs, and residual sums. */
#ifndef ANEPY_TRAIN_NORM_H
#define ANEPY_TRAIN_NORM_H

#include "train/engine.h"

void anepy_final_norm(anepy_engine *e); /* x_final -> xnorm */

/* dx = residual (NULL: 0) + gradient through RMSNorm of x with the weight of this role; its row of
 * norm_gradients becomes the weight's own gradient. through: the gradient through the norm where a
 * device computed it; NULL: it is computed here. */
void anepy_norm_backward(anepy_engine *e, float *dx, const float *residual, const float *dy,
                         const float *x, const float *through, int32_t layer, int32_t role);

/* The same for the norms of q (ANEPY_Q_NORM) or k of a layer, over the channels of each head; their
 * row of head_gradients is the weight's gradient. dx may be dy. */
void anepy_heads_backward(anepy_engine *e, float *dx, const float *dy, const float *x,
                          int32_t layer, int32_t role);

/* Adds both to the arena: those of a layer, or, with n_layers, that of the final norm. */
void anepy_norm_accumulate(anepy_engine *e, int32_t layer);

void anepy_residual_add(anepy_engine *e, float *out, const float *a, const float *b);

#endif
