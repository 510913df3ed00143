/* decode/prefill.c - many tokens of a prompt at once: products in place of one gemv per token.
 *
 * Activations are [channels, columns], one column per token, as in training. Attention reads keys
 * and values where the cache has them, in blocks of 64 queries by 64 keys (see
 * device/cpu/attention.c). */
#include <math.h>
#include <string.h>

#include "decode/decoder.h"

#define COLS ANEPY_COLUMNS

/* n tokens from `position` on, padded with zeros to `columns`. */
typedef struct {
    anepy_decoder *d;
    const int32_t *tokens;
    int32_t n, columns, position, layer;
    float *x, *xnorm, *out; /* [dim, columns] */
    float *qkv, *attn;      /* [q_dim + 2 * kv_dim, columns], [q_dim, columns] */
    float *hidden;          /* [2 * hidden_dim, columns] */
    float *cosine, *sine;   /* [head_dim / 2, columns] */
} chunk;

int64_t anepy_prefill_n(const anepy_decoder *d) {
    const anepy_model *m = d->model;
    int64_t channels = 3 * (int64_t)m->config.dim + 2 * (int64_t)m->q_dim + 2 * (int64_t)m->kv_dim +
                       2 * (int64_t)m->config.hidden_dim + m->head_dim;
    return channels * d->width;
}

static void lay_out(chunk *c) {
    const anepy_model *m = c->d->model;
    int64_t dim = m->config.dim, columns = c->columns;
    c->x = c->d->chunk;
    c->xnorm = c->x + dim * columns;
    c->out = c->xnorm + dim * columns;
    c->qkv = c->out + dim * columns;
    c->attn = c->qkv + (m->q_dim + 2 * (int64_t)m->kv_dim) * columns;
    c->hidden = c->attn + m->q_dim * columns;
    c->cosine = c->hidden + 2 * m->config.hidden_dim * columns;
    c->sine = c->cosine + m->head_dim / 2 * columns;
}

/* ------------------------------------------------------------------------------ columns, panels */

/* 64 channels of 64 tokens. */
static void embed_block(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const chunk *c = context;
    const anepy_decoder *d = c->d;
    int32_t dim = d->model->config.dim, panels = c->columns / COLS;
    int32_t first = index % panels * COLS, from = index / panels * COLS;
    int32_t tokens = anepy_min_i32(COLS, c->n - first), channels = anepy_min_i32(COLS, dim - from);
    anepy_storage table = anepy_stored(anepy_model_find(d->model, 0, ANEPY_EMBEDDING), d->params);
    float rows[COLS * COLS], columns[COLS * COLS];
    for (int32_t t = 0; t < tokens; t++)
        anepy_weights_read(d->kernels, rows + t * COLS, table, c->tokens[first + t], from,
                           channels);
    d->kernels->transpose_panel(columns, rows, COLS, tokens, channels);
    for (int32_t i = 0; i < channels; i++)
        memcpy(c->x + (int64_t)(from + i) * c->columns + first, columns + i * COLS,
               COLS * sizeof(float));
}

/* One channel pair of every position. */
static void rotation_pair(void *context, int32_t pair, int32_t worker) {
    (void)worker;
    const chunk *c = context;
    double frequency = anepy_rope_frequency(c->d->model, pair);
    for (int32_t t = 0; t < c->columns; t++) {
        double angle = (c->position + t) * frequency;
        c->cosine[(int64_t)pair * c->columns + t] = (float)cos(angle);
        c->sine[(int64_t)pair * c->columns + t] = (float)sin(angle);
    }
}

/* RMSNorm down the channels of each column, over all panels. y may be x. */
static void normalize(const chunk *c, float *y, const float *x, const float *weight,
                      int32_t channels, int32_t panel) {
    const anepy_model *m = c->d->model;
    float rstd[COLS];
    int32_t at = panel * COLS;
    c->d->kernels->rmsnorm(y + at, c->columns, rstd, x + at, weight, m->norm_eps, channels,
                           c->columns);
}

static void attention_norm(void *context, int32_t panel, int32_t worker) {
    (void)worker;
    const chunk *c = context;
    normalize(c, c->xnorm, c->x, anepy_decoder_vector(c->d, c->layer, ANEPY_ATTENTION_NORM),
              c->d->model->config.dim, panel);
}

static void ffn_norm(void *context, int32_t panel, int32_t worker) {
    (void)worker;
    const chunk *c = context;
    normalize(c, c->xnorm, c->x, anepy_decoder_vector(c->d, c->layer, ANEPY_FFN_NORM),
              c->d->model->config.dim, panel);
}

static void add_rows(void *context, int32_t row, int32_t worker) {
    (void)worker;
    const chunk *c = context;
    int64_t at = (int64_t)row * c->columns;
    c->d->kernels->add(c->x + at, c->x + at, c->out + at, c->columns);
}

static void gate_rows(void *context, int32_t row, int32_t worker) {
    (void)worker;
    const chunk *c = context;
    float *h1 = c->hidden + (int64_t)row * c->columns;
    const float *h3 = h1 + (int64_t)c->d->model->config.hidden_dim * c->columns;
    c->d->kernels->swiglu(h1, h1, h3, c->columns);
}

/* ----------------------------------------------------------------------------------- attention */

/* Puts a head of the chunk, [head_dim, columns], into the cache, [positions, head_dim]. */
static void remember(const chunk *c, float *cache, const float *x) {
    int32_t head_dim = c->d->model->head_dim;
    float rows[COLS * COLS];
    cache += (int64_t)c->position * head_dim;
    for (int32_t from = 0; from < head_dim; from += COLS) {
        int32_t channels = anepy_min_i32(COLS, head_dim - from);
        for (int32_t first = 0; first < c->n; first += COLS) {
            int32_t tokens = anepy_min_i32(COLS, c->n - first);
            c->d->kernels->transpose_panel(rows, x + (int64_t)from * c->columns + first, c->columns,
                                           channels, tokens);
            for (int32_t t = 0; t < tokens; t++)
                memcpy(cache + (int64_t)(first + t) * head_dim + from, rows + t * COLS,
                       (size_t)channels * sizeof(float));
        }
    }
}

/* Of the heads of this layer, where a cache has this one. */
static float *cached(const chunk *c, float *cache, int32_t kv_head) {
    const anepy_model *m = c->d->model;
    int64_t head = (int64_t)c->layer * m->config.n_kv_heads + kv_head;
    return cache + head * c->d->max_len * m->head_dim;
}

/* A head of q, k or v as the products left it: its norm, its rotation, its place in the cache. */
static void finish_head(void *context, int32_t head, int32_t worker) {
    (void)worker;
    const chunk *c = context;
    const anepy_decoder *d = c->d;
    int32_t heads = d->model->config.n_heads, kv_heads = d->model->config.n_kv_heads;
    int32_t head_dim = d->model->head_dim, role = head < heads ? ANEPY_Q_NORM : ANEPY_K_NORM;
    float *x = c->qkv + (int64_t)head * head_dim * c->columns;
    if (head >= heads + kv_heads) {
        remember(c, cached(c, d->values, head - heads - kv_heads), x);
        return;
    }
    for (int32_t panel = 0; d->model->config.qk_norm && panel < c->columns / COLS; panel++)
        normalize(c, x, x, anepy_decoder_vector(d, c->layer, role), head_dim, panel);
    for (int64_t i = 0; i < head_dim / 2; i++) {
        float *pair = x + 2 * i * c->columns;
        d->kernels->rope(pair, pair + c->columns, c->cosine + i * c->columns,
                         c->sine + i * c->columns, 1.0f, c->columns);
    }
    if (head >= heads) remember(c, cached(c, d->keys, head - heads), x);
}

/* Soft-max of 64 queries as far as their keys were seen. */
typedef struct {
    float *scores, *out; /* [64 keys, 64], [head_dim, 64] */
    float max[COLS], sum[COLS];
} attended;

/* The next `rows` keys and values, those of the queries themselves if causal. */
static void attend(const chunk *c, attended *a, const float *q, const float *keys,
                   const float *values, int32_t rows, int32_t causal, int32_t accumulate) {
    const anepy_kernels *kernels = c->d->kernels;
    int32_t head_dim = c->d->model->head_dim;
    float shrink[COLS], scale = 1.44269504f / sqrtf((float)head_dim);
    anepy_gemm_small(kernels, NULL, a->scores, COLS, keys, head_dim, 1, q, c->columns, rows, COLS,
                     head_dim, 0);
    kernels->softmax_step(a->scores, a->max, a->sum, shrink, rows, scale, causal);
    if (accumulate) kernels->scale_columns(a->out, COLS, a->out, shrink, head_dim);
    anepy_gemm_small(kernels, NULL, a->out, COLS, values, 1, head_dim, a->scores, COLS, head_dim,
                     COLS, rows, accumulate);
}

/* 64 queries of a head, those with most keys first, so that the last pieces are short. */
static void attend_block(void *context, int32_t index, int32_t worker) {
    const chunk *c = context;
    const anepy_decoder *d = c->d;
    const anepy_config *config = &d->model->config;
    int32_t head = index % config->n_heads, head_dim = d->model->head_dim;
    int32_t first = (c->columns / COLS - 1 - index / config->n_heads) * COLS;
    int32_t kv_head = head / (config->n_heads / config->n_kv_heads), before = c->position + first;
    const float *q = c->qkv + (int64_t)head * head_dim * c->columns + first;
    const float *keys = cached(c, d->keys, kv_head), *values = cached(c, d->values, kv_head);
    float *scores = d->gemm.scratch + worker * d->gemm.scratch_n, factor[COLS];
    attended a = {.scores = scores, .out = scores + COLS * COLS};
    for (int32_t j = 0; j < COLS; j++) a.max[j] = -INFINITY;
    for (int32_t at = 0; at < before; at += COLS)
        attend(c, &a, q, keys + (int64_t)at * head_dim, values + (int64_t)at * head_dim,
               anepy_min_i32(COLS, before - at), 0, at > 0);
    attend(c, &a, q, keys + (int64_t)before * head_dim, values + (int64_t)before * head_dim,
           anepy_min_i32(COLS, c->n - first), 1, before > 0);
    for (int32_t j = 0; j < COLS; j++) factor[j] = 1.0f / a.sum[j];
    d->kernels->scale_columns(c->attn + (int64_t)head * head_dim * c->columns + first, c->columns,
                              a.out, factor, head_dim);
}

int64_t anepy_prefill_scratch_n(const anepy_decoder *d) {
    return anepy_max_i64(anepy_gemm_scratch_n(1), (int64_t)COLS * (COLS + d->model->head_dim));
}

/* -------------------------------------------------------------------------------------- layers */

static void layer_forward(chunk *c) {
    const anepy_decoder *d = c->d;
    const anepy_config *config = &d->model->config;
    int32_t panels = c->columns / COLS, heads = config->n_heads;
    anepy_pool_run(d->pool, panels, attention_norm, c);
    anepy_decoder_project(d, c->qkv, c->layer, ANEPY_WQ, 3, c->xnorm, c->columns);
    anepy_pool_run(d->pool, heads + 2 * config->n_kv_heads, finish_head, c);
    anepy_pool_run(d->pool, heads * panels, attend_block, c);
    anepy_decoder_project(d, c->out, c->layer, ANEPY_WO, 1, c->attn, c->columns);
    anepy_pool_run(d->pool, config->dim, add_rows, c);
    anepy_pool_run(d->pool, panels, ffn_norm, c);
    anepy_decoder_project(d, c->hidden, c->layer, ANEPY_W1, 2, c->xnorm, c->columns);
    anepy_pool_run(d->pool, config->hidden_dim, gate_rows, c);
    anepy_decoder_project(d, c->out, c->layer, ANEPY_W2, 1, c->hidden, c->columns);
    anepy_pool_run(d->pool, config->dim, add_rows, c);
}

void anepy_prefill_chunk(anepy_decoder *d, const int32_t *tokens, int32_t n, int32_t position) {
    const anepy_model *m = d->model;
    chunk c = {d, tokens, n, (int32_t)anepy_round_up(n, COLS), .position = position};
    lay_out(&c);
    anepy_pool_run(d->pool, anepy_pieces(m->config.dim, COLS) * (c.columns / COLS), embed_block,
                   &c);
    anepy_pool_run(d->pool, m->head_dim / 2, rotation_pair, &c);
    for (c.layer = 0; c.layer < m->config.n_layers; c.layer++) layer_forward(&c);
    for (int64_t i = 0; i < m->config.dim; i++) d->x[i] = c.x[i * c.columns + n - 1];
}
