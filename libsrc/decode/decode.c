/* decode/decode.c - logits with a key/value cache, for generation: one token here, the chunks of a
 * prompt in prefill.c.
 *
 * Always fp32 on the CPU, whatever device trained the model. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "decode/decoder.h"
#include "kernels/blas.h"
#include "runtime/fpmode.h"
#include "runtime/memory.h"

#define CHUNK 256 /* tokens of a prompt at once: the weights are read once for them */
#define FEW 4     /* tokens that cost less one by one than together */

static void rmsnorm(const anepy_decoder *d, float *y, const float *x, const float *weight,
                    int32_t n) {
    double sum = d->kernels->sum_squares(x, n);
    float r = (float)(1.0 / sqrt(sum / n + (double)d->model->norm_eps));
    for (int32_t c = 0; c < n; c++) y[c] = weight[c] * (x[c] * r);
}

static void normalize(const anepy_decoder *d, int32_t layer, int32_t role) {
    rmsnorm(d, d->xnorm, d->x, anepy_decoder_vector(d, layer, role), d->model->config.dim);
}

/* The heads of q or k, each by itself. */
static void normalize_heads(const anepy_decoder *d, float *x, int32_t layer, int32_t role,
                            int32_t heads) {
    int32_t head_dim = d->model->head_dim;
    if (!d->model->config.qk_norm) return;
    const float *weight = anepy_decoder_vector(d, layer, role);
    for (int32_t h = 0; h < heads; h++, x += head_dim) rmsnorm(d, x, x, weight, head_dim);
}

static void rotate(const anepy_decoder *d, float *x, int32_t heads) {
    int32_t head_dim = d->model->head_dim;
    for (int32_t h = 0; h < heads; h++, x += head_dim) {
        for (int32_t i = 0; i < head_dim; i += 2) {
            float cosine = d->rotation[i], sine = d->rotation[i + 1], re = x[i], im = x[i + 1];
            x[i] = re * cosine - im * sine;
            x[i + 1] = re * sine + im * cosine;
        }
    }
}

/* ----------------------------------------------------------------------------------- attention */

/* Puts the heads of this position, [kv_dim], into a cache: each head reads its own in one stream.
 */
static void remember(const anepy_decoder *d, float *cache, const float *x) {
    int32_t head_dim = d->model->head_dim;
    for (int32_t h = 0; h < d->model->config.n_kv_heads; h++)
        memcpy(cache + ((int64_t)h * d->max_len + d->position) * head_dim, x + h * head_dim,
               (size_t)head_dim * sizeof(float));
}

typedef struct {
    const anepy_decoder *d;
    const float *keys, *values; /* of this layer */
} attention;

static void attend_head(void *context, int32_t head, int32_t worker) {
    (void)worker;
    const attention *a = context;
    const anepy_decoder *d = a->d;
    const anepy_model *m = d->model;
    int32_t head_dim = m->head_dim, n = d->position + 1;
    int64_t kv_head = head / (m->config.n_heads / m->config.n_kv_heads);
    int64_t offset = kv_head * d->max_len * head_dim;
    float *scores = d->scores + (int64_t)head * d->max_len, *out = d->attn + head * head_dim;
    d->kernels->gemv(scores, a->keys + offset, head_dim, d->qkv + head * head_dim, n, head_dim);
    d->kernels->softmax_row(scores, n, n, 1.0f / sqrtf((float)head_dim));
    d->kernels->sum_rows(out, a->values + offset, head_dim, scores, n, head_dim);
}

static void layer_forward(anepy_decoder *d, int32_t l) {
    const anepy_model *m = d->model;
    int32_t dim = m->config.dim, hidden = m->config.hidden_dim, q = m->q_dim, kv = m->kv_dim;
    int64_t cache = (int64_t)l * d->max_len * kv;
    normalize(d, l, ANEPY_ATTENTION_NORM);
    anepy_decoder_project(d, d->qkv, l, ANEPY_WQ, 3, d->xnorm, 1);
    normalize_heads(d, d->qkv, l, ANEPY_Q_NORM, m->config.n_heads);
    normalize_heads(d, d->qkv + q, l, ANEPY_K_NORM, m->config.n_kv_heads);
    rotate(d, d->qkv, m->config.n_heads + m->config.n_kv_heads);
    remember(d, d->keys + cache, d->qkv + q);
    remember(d, d->values + cache, d->qkv + q + kv);
    attention a = {d, d->keys + cache, d->values + cache};
    anepy_pool_run(d->pool, m->config.n_heads, attend_head, &a);
    anepy_decoder_project(d, d->out, l, ANEPY_WO, 1, d->attn, 1);
    d->kernels->add(d->x, d->x, d->out, dim);
    normalize(d, l, ANEPY_FFN_NORM);
    anepy_decoder_project(d, d->hidden, l, ANEPY_W1, 2, d->xnorm, 1);
    d->kernels->swiglu(d->hidden, d->hidden, d->hidden + hidden, hidden);
    anepy_decoder_project(d, d->out, l, ANEPY_W2, 1, d->hidden, 1);
    d->kernels->add(d->x, d->x, d->out, dim);
}

static void token_forward(anepy_decoder *d, int32_t token, int32_t position) {
    const anepy_config *c = &d->model->config;
    d->position = position;
    for (int32_t i = 0; i < d->model->head_dim / 2; i++) {
        double angle = position * anepy_rope_frequency(d->model, i);
        d->rotation[2 * i] = (float)cos(angle);
        d->rotation[2 * i + 1] = (float)sin(angle);
    }
    anepy_storage table = anepy_stored(anepy_model_find(d->model, 0, ANEPY_EMBEDDING), d->params);
    anepy_weights_read(d->kernels, d->x, table, token, 0, c->dim);
    for (int32_t l = 0; l < c->n_layers; l++) layer_forward(d, l);
}

static int32_t check(const anepy_decoder *d, const int32_t *tokens, int32_t n, int32_t position) {
    int32_t vocab = d->model->config.vocab_size;
    if (n < 1) return anepy_fail(ANEPY_E_ARGUMENT, "%d tokens, expected 1 or more", n);
    for (int32_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= vocab)
            return anepy_fail(ANEPY_E_TOKEN, "token %d, the vocabulary has 0 to %d", tokens[i],
                              vocab - 1);
    if (position != 0 && position != d->position + 1)
        return anepy_fail(ANEPY_E_STATE, "position %d after %d: positions follow each other",
                          position, d->position);
    if (position >= d->max_len || n > d->max_len - position)
        return anepy_fail(ANEPY_E_ARGUMENT, "position %lld, this decoder has room for %d",
                          (long long)position + n - 1, d->max_len);
    return ANEPY_OK;
}

static int32_t forward(anepy_decoder *d, float *logits, const int32_t *tokens, int32_t n,
                       int32_t position) {
    ANEPY_TRY(check(d, tokens, n, position));
    uint64_t fpmode = anepy_fpmode_enter();
    while (n > 0) {
        int32_t count = n < FEW ? 1 : anepy_min_i32(n, d->width);
        if (count == 1) token_forward(d, *tokens, position);
        else anepy_prefill_chunk(d, tokens, count, position);
        tokens += count;
        n -= count;
        position += count;
    }
    d->position = position - 1;
    if (logits != NULL) {
        normalize(d, 0, ANEPY_FINAL_NORM);
        anepy_decoder_project(d, logits, 0, ANEPY_CLASSIFIER, 1, d->xnorm, 1);
    }
    anepy_fpmode_leave(fpmode);
    return ANEPY_OK;
}

int32_t anepy_decoder_prefill(anepy_decoder *d, float *logits, const int32_t *tokens, int32_t n,
                              int32_t position) {
    if (atomic_exchange(&d->busy, 1))
        return anepy_fail(ANEPY_E_BUSY, "this decoder is running in another thread");
    int32_t status = forward(d, logits, tokens, n, position);
    atomic_store(&d->busy, 0);
    return status;
}

int32_t anepy_decoder_forward(anepy_decoder *d, float *logits, int32_t token, int32_t position) {
    return anepy_decoder_prefill(d, logits, &token, 1, position);
}

/* ----------------------------------------------------------------------------- make and unmake */

/* base NULL: measures. Returns the number of floats. */
static int64_t lay_out(anepy_decoder *d, float *base) {
    const anepy_model *m = d->model;
    int64_t dim = m->config.dim, used = 0;
    int64_t cache = (int64_t)m->config.n_layers * d->max_len * m->kv_dim;
    struct {
        float **at;
        int64_t n;
    } parts[] = {{&d->x, dim},
                 {&d->xnorm, dim},
                 {&d->qkv, m->q_dim + 2 * (int64_t)m->kv_dim},
                 {&d->attn, m->q_dim},
                 {&d->out, dim},
                 {&d->hidden, 2 * (int64_t)m->config.hidden_dim},
                 {&d->scores, (int64_t)m->config.n_heads * d->max_len},
                 {&d->rotation, m->head_dim},
                 {&d->keys, cache},
                 {&d->values, cache},
                 {&d->chunk, anepy_prefill_n(d)},
                 {&d->gemm.panels, anepy_gemm_panels_n(d->width)},
                 {&d->gemm.scratch, d->gemm.scratch_n * anepy_pool_threads(d->pool)}};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (base != NULL) *parts[i].at = base + used;
        used += anepy_round_up(parts[i].n, 16);
    }
    return used;
}

int32_t anepy_decoder_create(anepy_decoder **out, const anepy_model *model, const void *params,
                             int32_t max_len, int32_t threads) {
    const anepy_kernels *kernels = anepy_kernels_get();
    const anepy_blas *blas;
    if (kernels == NULL) return ANEPY_E_NAME;
    ANEPY_TRY(anepy_blas_get(&blas));
    if (max_len == 0) max_len = model->config.seq_len;
    if (max_len < 1 || max_len > model->config.seq_len)
        return anepy_fail(ANEPY_E_ARGUMENT, "%d positions, the model allows 1 to %d", max_len,
                          model->config.seq_len);
    anepy_decoder *d = calloc(1, sizeof *d);
    if (d == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for the decoder");
    *d = (anepy_decoder){.model = model, .params = params, .kernels = kernels, .max_len = max_len};
    d->position = -1;
    d->width = (int32_t)anepy_min_i64(CHUNK, anepy_round_up(max_len, ANEPY_COLUMNS));
    int32_t status = anepy_pool_create(&d->pool, threads);
    d->gemm = (anepy_gemm){
        .kernels = kernels, .blas = blas, .pool = d->pool, .scratch_n = anepy_prefill_scratch_n(d)};
    if (status == ANEPY_OK) d->nbytes = (uint64_t)lay_out(d, NULL) * sizeof(float);
    if (status == ANEPY_OK && (d->memory = anepy_map(d->nbytes)) == NULL)
        status = anepy_fail(ANEPY_E_MEMORY, "no memory for a key/value cache of %llu bytes",
                            (unsigned long long)d->nbytes);
    if (status != ANEPY_OK) {
        anepy_decoder_free(d);
        return status;
    }
    lay_out(d, d->memory);
    *out = d;
    return ANEPY_OK;
}

void anepy_decoder_free(anepy_decoder *d) {
    if (d == NULL) return;
    anepy_pool_free(d->pool);
    anepy_unmap(d->memory, d->nbytes);
    free(d);
}
