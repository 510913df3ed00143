/* decode/decode.c - one token at a time with a key/value cache, for generation.
 *
 * Every product has one column, so the time is that of reading the weights once, as they lie in
 * memory: each thread goes through neighbouring rows, nothing is packed. Always fp32 on the CPU,
 * whatever device trained the model. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/weights.h"
#include "model/model.h"
#include "runtime/fpmode.h"
#include "runtime/memory.h"
#include "runtime/threads.h"

#define PIECE_BYTES 65536 /* of weights: 2 us, so that threads end together */

struct anepy_decoder {
    const anepy_model *model;
    const float *params;
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
};

/* ------------------------------------------------------------------------------------ products */

typedef struct {
    const anepy_decoder *d;
    float *y;
    anepy_storage w;
    const float *x;
    int32_t piece; /* rows of one */
} product;

static void product_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const product *p = context;
    int32_t first = index * p->piece, rows = anepy_min_i32(p->piece, p->w.rows - first);
    anepy_weights_gemv(p->d->kernels, p->y + first, anepy_storage_rows(p->w, first, rows), p->x);
}

static void multiply(const anepy_decoder *d, float *y, anepy_storage w, const float *x) {
    int64_t row_nbytes = w.cols * anepy_dtype_nbytes(w.dtype);
    int32_t piece = anepy_max_i32(1, (int32_t)(PIECE_BYTES / row_nbytes));
    product p = {d, y, w, x, piece};
    anepy_pool_stream(d->pool, (w.rows + piece - 1) / piece, product_rows, &p);
}

/* y: the outputs of `count` projections of x, one after the other, of which the weight of the first
 * has this role. Weights that lie behind each other are one product. */
static void project(const anepy_decoder *d, float *y, int32_t layer, int32_t role, int32_t count,
                    const float *x) {
    anepy_storage w = {0};
    float *out = y;
    for (int32_t i = 0; i < count; i++) {
        anepy_projection p = anepy_model_projection(d->model, layer, role + i);
        anepy_storage next = anepy_stored(p.weight, d->params);
        if (i > 0 && anepy_storage_extend(&w, next)) continue;
        if (i > 0) multiply(d, y, w, x);
        y += w.rows;
        w = next;
    }
    multiply(d, y, w, x);
    for (int32_t i = 0; i < count; i++) {
        anepy_projection p = anepy_model_projection(d->model, layer, role + i);
        if (p.bias != NULL)
            d->kernels->add(out, out, anepy_weights_vector(anepy_stored(p.bias, d->params)), p.out);
        out += p.out;
    }
}

static void rmsnorm(const anepy_decoder *d, float *y, const float *x, const float *weight,
                    int32_t n) {
    double sum = d->kernels->sum_squares(x, n);
    float r = (float)(1.0 / sqrt(sum / n + (double)d->model->norm_eps));
    for (int32_t c = 0; c < n; c++) y[c] = weight[c] * (x[c] * r);
}

static void normalize(const anepy_decoder *d, int32_t layer, int32_t role) {
    anepy_storage weight = anepy_stored(anepy_model_find(d->model, layer, role), d->params);
    rmsnorm(d, d->xnorm, d->x, anepy_weights_vector(weight), d->model->config.dim);
}

/* The heads of q or k, each by itself. */
static void normalize_heads(const anepy_decoder *d, float *x, int32_t layer, int32_t role,
                            int32_t heads) {
    const anepy_tensor *tensor = anepy_model_find(d->model, layer, role);
    int32_t head_dim = d->model->head_dim;
    if (tensor == NULL) return;
    const float *weight = anepy_weights_vector(anepy_stored(tensor, d->params));
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
    project(d, d->qkv, l, ANEPY_WQ, 3, d->xnorm);
    normalize_heads(d, d->qkv, l, ANEPY_Q_NORM, m->config.n_heads);
    normalize_heads(d, d->qkv + q, l, ANEPY_K_NORM, m->config.n_kv_heads);
    rotate(d, d->qkv, m->config.n_heads + m->config.n_kv_heads);
    remember(d, d->keys + cache, d->qkv + q);
    remember(d, d->values + cache, d->qkv + q + kv);
    attention a = {d, d->keys + cache, d->values + cache};
    anepy_pool_run(d->pool, m->config.n_heads, attend_head, &a);
    project(d, d->out, l, ANEPY_WO, 1, d->attn);
    d->kernels->add(d->x, d->x, d->out, dim);
    normalize(d, l, ANEPY_FFN_NORM);
    project(d, d->hidden, l, ANEPY_W1, 2, d->xnorm);
    d->kernels->swiglu(d->hidden, d->hidden, d->hidden + hidden, hidden);
    project(d, d->out, l, ANEPY_W2, 1, d->hidden);
    d->kernels->add(d->x, d->x, d->out, dim);
}

static int32_t forward(anepy_decoder *d, float *logits, int32_t token, int32_t position) {
    const anepy_config *c = &d->model->config;
    if (token < 0 || token >= c->vocab_size)
        return anepy_fail(ANEPY_E_TOKEN, "token %d, the vocabulary has 0 to %d", token,
                          c->vocab_size - 1);
    if (position != 0 && position != d->position + 1)
        return anepy_fail(ANEPY_E_STATE, "position %d after %d: positions follow each other",
                          position, d->position);
    if (position >= d->max_len)
        return anepy_fail(ANEPY_E_ARGUMENT, "position %d, this decoder has room for %d", position,
                          d->max_len);
    uint64_t fpmode = anepy_fpmode_enter();
    d->position = position;
    for (int32_t i = 0; i < d->model->head_dim / 2; i++) {
        double angle = position * anepy_rope_frequency(d->model, i);
        d->rotation[2 * i] = (float)cos(angle);
        d->rotation[2 * i + 1] = (float)sin(angle);
    }
    anepy_storage table = anepy_stored(anepy_model_find(d->model, 0, ANEPY_EMBEDDING), d->params);
    memcpy(d->x, anepy_storage_rows(table, token, 1).data, (size_t)c->dim * sizeof(float));
    for (int32_t l = 0; l < c->n_layers; l++) layer_forward(d, l);
    normalize(d, 0, ANEPY_FINAL_NORM);
    project(d, logits, 0, ANEPY_CLASSIFIER, 1, d->xnorm);
    anepy_fpmode_leave(fpmode);
    return ANEPY_OK;
}

int32_t anepy_decoder_forward(anepy_decoder *d, float *logits, int32_t token, int32_t position) {
    if (atomic_exchange(&d->busy, 1))
        return anepy_fail(ANEPY_E_BUSY, "this decoder is running in another thread");
    int32_t status = forward(d, logits, token, position);
    atomic_store(&d->busy, 0);
    return status;
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
                 {&d->values, cache}};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (base != NULL) *parts[i].at = base + used;
        used += anepy_round_up(parts[i].n, 16);
    }
    return used;
}

int32_t anepy_decoder_create(anepy_decoder **out, const anepy_model *model, const float *params,
                             int32_t max_len, int32_t threads) {
    const anepy_kernels *kernels = anepy_kernels_get();
    if (kernels == NULL) return ANEPY_E_NAME;
    if (max_len == 0) max_len = model->config.seq_len;
    if (max_len < 1 || max_len > model->config.seq_len)
        return anepy_fail(ANEPY_E_ARGUMENT, "%d positions, the model allows 1 to %d", max_len,
                          model->config.seq_len);
    anepy_decoder *d = calloc(1, sizeof *d);
    if (d == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for the decoder");
    *d = (anepy_decoder){.model = model, .params = params, .kernels = kernels, .max_len = max_len};
    d->position = -1;
    int32_t status = anepy_pool_create(&d->pool, threads);
    d->nbytes = (uint64_t)lay_out(d, NULL) * sizeof(float);
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
