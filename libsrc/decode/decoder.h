/* decode/decoder.h - what the two ways of a decoder share: decode.c computes one token, prefill.c
 * many of a prompt at once, project.c the projections of both. They fill one key/value cache. */
#ifndef ANEPY_DECODER_H
#define ANEPY_DECODER_H

#include "kernels/weights.h"
#include "model/model.h"
#include "runtime/threads.h"

struct anepy_decoder {
    const anepy_model *model;
    const void *params;
    const anepy_kernels *kernels;
    anepy_pool *pool;
    int32_t max_len, position;
    _Atomic int32_t busy; /* a call is running */
    float *memory;
    uint64_t nbytes;
    float *x, *xnorm, *out; /* [dim] */
    float *qkv;             /* [q_dim + 2 * kv_dim]: of this position */
    float *attn;            /* [q_dim] */
    float *hidden;          /* [2 * hidden_dim]: h1, h3 */
    float *scores;          /* [n_heads, max_len] */
    float *keys, *values;   /* [n_layers, n_kv_heads, max_len, head_dim] */
    float *rotation;        /* [head_dim]: cos, sin of this position, pair by pair */
    int32_t width;          /* tokens of a chunk at most, a multiple of 64 */
    anepy_gemm gemm;        /* of chunks */
    float *chunk;           /* anepy_prefill_n floats */
};

/* y [out, columns]: the outputs of `count` projections of x [in, columns], one after the other, of
 * which the weight of the first has this role. */
void anepy_decoder_project(const anepy_decoder *d, float *y, int32_t layer, int32_t role,
                           int32_t count, const float *x, int32_t columns);

static inline const float *anepy_decoder_vector(const anepy_decoder *d, int32_t layer,
                                                int32_t role) {
    return anepy_weights_vector(anepy_stored(anepy_model_find(d->model, layer, role), d->params));
}

/* Floats for the activations of a chunk. */
int64_t anepy_prefill_n(const anepy_decoder *d);
/* Floats per worker. */
int64_t anepy_prefill_scratch_n(const anepy_decoder *d);

/* Computes the layers for n tokens, 1 to width, from a position on: their keys and values, and in
 * d->x what comes out of the last layer for the last of them. */
void anepy_prefill_chunk(anepy_decoder *d, const int32_t *tokens, int32_t n, int32_t position);

#endif
