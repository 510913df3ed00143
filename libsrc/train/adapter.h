/* train/adapter.h - gradients of adapters, from the factors of the weight that each belongs to. */
#ifndef ANEPY_TRAIN_ADAPTER_H
#define ANEPY_TRAIN_ADAPTER_H

#include "train/engine.h"

/* The pieces of the gradients of all A and B of these projections; any thread may compute any. */
int32_t anepy_adapter_pieces(const anepy_dw *dw);
void anepy_adapter_piece(const anepy_dw *dw, int32_t index, int32_t worker);

#endif
