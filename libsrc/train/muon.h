/* train/muon.h - the update of matrices by their orthogonalized momentum. */
#ifndef ANEPY_TRAIN_MUON_H
#define ANEPY_TRAIN_MUON_H

#include "train/engine.h"

typedef struct {
    float lr, momentum;
    float decay;      /* 1 - lr * weight_decay */
    float grad_scale; /* multiplies every gradient first */
    int clear;        /* write zeros to the gradients */
} anepy_muon_rates;

/* Whether muon is for this tensor: trainable matrices of the layers. */
static inline int anepy_muon_takes(const anepy_tensor *tensor) {
    return tensor->layer >= 0 && anepy_tensor_has(tensor, ANEPY_TENSOR_MATRIX) &&
           anepy_tensor_has(tensor, ANEPY_TENSOR_TRAINABLE);
}

/* Makes e->muon: memory for the largest of them. */
int32_t anepy_muon_open(anepy_engine *e);
void anepy_muon_close(anepy_engine *e);
uint64_t anepy_muon_nbytes(const anepy_engine *e);

/* Updates all of them. */
void anepy_muon_update(anepy_engine *e, const anepy_muon_rates *rates);

#endif
