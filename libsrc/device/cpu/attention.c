/* device/cpu/attention.c - causal attention per head, in blocks of 64 queries that skip the empty
 * half.
 *
 * Forward computes transposed scores [key, query], so that soft-max runs down columns without
 * horizontal sums and the next product needs no transposition. Backward keeps probabilities as
 * [query, key], the layout the program table promises; of its products only that of dq reduces over
 * keys and transposes. For long sequences it keeps none and computes them twice (Dao et al. 2022,
 * arXiv 2205.14135). KV head k serves query heads k*g .. k*g+g-1. */
#include <math.h>
#include <string.h>

#include "device/cpu/cpu.h"

#define COLS ANEPY_COLUMNS

typedef struct {
    const anepy_kernel *kernel;
    const anepy_cpu *cpu;
    const anepy_kernels *kernels;
    int64_t width;
    int32_t head_dim, heads, kv_heads, group;
    int32_t n;      /* tokens */
    int32_t blocks; /* blocks of 64 tokens */
    float scale;
} attention;

static attention begin(const anepy_kernel *kernel, int32_t n, int32_t columns) {
    const anepy_device_options *o = &kernel->cpu->base.options;
    const anepy_config *c = &o->model->config;
    return (attention){.kernel = kernel,
                       .cpu = kernel->cpu,
                       .kernels = o->gemm->kernels,
                       .width = o->width,
                       .head_dim = o->model->head_dim,
                       .heads = c->n_heads,
                       .kv_heads = c->n_kv_heads,
                       .group = c->n_heads / c->n_kv_heads,
                       .n = n,
                       .blocks = columns / COLS,
                       .scale = 1.0f / sqrtf((float)o->model->head_dim)};
}

static float *head_of(const attention *a, float *tensor, int32_t head) {
    return tensor + (int64_t)head * a->head_dim * a->width;
}

/* Later blocks see more keys and come first, so that the last pieces of a loop are short. */
static int32_t block_of(const attention *a, int32_t index) {
    return a->blocks - 1 - index % a->blocks;
}

static void run(const attention *a, int32_t count, anepy_loop_fn fn) {
    anepy_pool_run(a->cpu->base.options.gemm->pool, count, fn, (void *)a);
}

/* ---------------------------------------------------------------------------------------- RoPE */

typedef struct {
    const anepy_cpu *cpu;
    float *x;
    int32_t columns;
    float sign;
} rotation;

/* Channels 2i and 2i+1 of a head rotate by position * theta^(-2i/head_dim) (Su et al. 2021, the
 * interleaved pairs of llama2.c). */
static void rotate_head(void *context, int32_t head, int32_t worker) {
    (void)worker;
    const rotation *r = context;
    const anepy_device_options *o = &r->cpu->base.options;
    int64_t width = o->width;
    int32_t head_dim = o->model->head_dim;
    float *x = r->x + (int64_t)head * head_dim * width;
    for (int32_t i = 0; i < head_dim / 2; i++)
        o->gemm->kernels->rope(x + 2 * i * width, x + (2 * i + 1) * width,
                               r->cpu->cosine + i * width, r->cpu->sine + i * width, r->sign,
                               r->columns);
}

void anepy_cpu_rope(const anepy_cpu *cpu, float *x, int32_t heads, int32_t columns, float sign) {
    rotation r = {cpu, x, columns, sign};
    anepy_pool_run(cpu->base.options.gemm->pool, heads, rotate_head, &r);
}

/* ------------------------------------------------------------------------------------- forward */

static void forward_block(void *context, int32_t index, int32_t worker) {
    const attention *a = context;
    int32_t head = index / a->blocks, block = block_of(a, index);
    int32_t first = block * COLS, keys = first + COLS;
    float *const *t = a->kernel->tensors;
    const float *q = head_of(a, t[SDPA_FWD_Q], head) + first;
    const float *k = head_of(a, t[SDPA_FWD_K], head / a->group);
    const float *v = head_of(a, t[SDPA_FWD_V], head / a->group);
    float *out = head_of(a, t[SDPA_FWD_ATTN], head) + first;
    float *scores = a->cpu->scratch + worker * a->cpu->scratch_n; /* [keys][64] */
    float inverse[COLS];
    anepy_gemm_small(a->kernels, scores, COLS, k, 1, a->width, q, a->width, keys, COLS, a->head_dim,
                     0);
    a->kernels->softmax_columns(scores, inverse, keys, first, a->scale);
    anepy_gemm_small(a->kernels, out, a->width, v, a->width, 1, scores, COLS, a->head_dim, COLS,
                     keys, 0);
    for (int32_t d = 0; d < a->head_dim; d++)
        for (int32_t j = 0; j < COLS; j++) out[d * a->width + j] *= inverse[j];
}

void anepy_cpu_attention(const anepy_kernel *kernel, int32_t columns) {
    attention a = begin(kernel, columns, columns);
    run(&a, a.heads * a.blocks, forward_block);
}

/* ------------------------------------------------------------- backward, to the probabilities */

/* Rows [first, first + 64) of one head: probabilities, and the gradients that reach them. Keys
 * beyond the block stay zero since the surface was made. */
static void probabilities_block(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const attention *a = context;
    int32_t head = index / a->blocks, block = block_of(a, index);
    int32_t first = block * COLS, keys = first + COLS;
    float *const *t = a->kernel->tensors;
    int64_t row = (int64_t)head * a->width + first;
    float *probs = t[SDPA_BWD1_P] + row * a->width, *dprobs = t[SDPA_BWD1_DP] + row * a->width;
    const float *q = head_of(a, t[SDPA_BWD1_Q], head) + first;
    const float *k = head_of(a, t[SDPA_BWD1_K], head / a->group);
    const float *v = head_of(a, t[SDPA_BWD1_V], head / a->group);
    const float *dattn = head_of(a, a->cpu->dattn, head) + first;
    anepy_gemm_small(a->kernels, probs, a->width, q, 1, a->width, k, a->width, COLS, keys,
                     a->head_dim, 0);
    for (int32_t i = 0; i < COLS; i++)
        a->kernels->softmax_row(probs + i * a->width, first + i + 1, keys, a->scale);
    anepy_gemm_small(a->kernels, dprobs, a->width, dattn, 1, a->width, v, a->width, COLS, keys,
                     a->head_dim, 0);
}

/* One block of keys of one KV head: out[d, t] = sum over queries q >= t of left[d, q] right[q, t],
 * summed over the query heads it serves. left is [heads * head_dim, width], right [heads * width,
 * width]. */
static void sum_over_queries(const attention *a, int32_t index, float *out, float *left,
                             const float *right) {
    int32_t kv_head = index / a->blocks, first = index % a->blocks * COLS;
    out = head_of(a, out, kv_head) + first;
    for (int32_t g = 0; g < a->group; g++) {
        int32_t head = kv_head * a->group + g;
        anepy_gemm_small(a->kernels, out, a->width, head_of(a, left, head) + first, a->width, 1,
                         right + ((int64_t)head * a->width + first) * a->width + first, a->width,
                         a->head_dim, COLS, a->n - first, g > 0);
    }
}

static void values_block(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const attention *a = context;
    float *const *t = a->kernel->tensors;
    sum_over_queries(a, index, t[SDPA_BWD1_DV], a->cpu->dattn, t[SDPA_BWD1_P]);
}

void anepy_cpu_attention_backward1(const anepy_kernel *kernel, int32_t n, int32_t columns) {
    attention a = begin(kernel, n, columns);
    run(&a, a.heads * a.blocks, probabilities_block);
    run(&a, a.kv_heads * a.blocks, values_block);
}

/* ------------------------------------------------------------ backward, to queries and keys */

/* ds = p * (dp - sum p dp) * scale for 64 queries, and dq[d, q] = sum_t k[d, t] ds[q, t]. */
static void queries_block(void *context, int32_t index, int32_t worker) {
    const attention *a = context;
    int32_t head = index / a->blocks, block = block_of(a, index);
    int32_t first = block * COLS, keys = first + COLS;
    float *const *t = a->kernel->tensors;
    int64_t row = ((int64_t)head * a->width + first) * a->width;
    const float *probs = t[SDPA_BWD2_P] + row, *dprobs = t[SDPA_BWD2_DP] + row;
    const float *k = head_of(a, t[SDPA_BWD2_K], head / a->group);
    float *dscores = a->cpu->dscores + row;
    float *transposed = a->cpu->scratch + worker * a->cpu->scratch_n; /* [keys][64] */
    for (int32_t i = 0; i < COLS; i++)
        a->kernels->softmax_row_backward(dscores + i * a->width, probs + i * a->width,
                                         dprobs + i * a->width, a->scale, keys);
    a->kernels->transpose_panel(transposed, dscores, a->width, COLS, keys);
    anepy_gemm_small(a->kernels, head_of(a, t[SDPA_BWD2_DQ], head) + first, a->width, k, a->width,
                     1, transposed, COLS, a->head_dim, COLS, keys, 0);
}

static void keys_block(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const attention *a = context;
    float *const *t = a->kernel->tensors;
    sum_over_queries(a, index, t[SDPA_BWD2_DK], t[SDPA_BWD2_Q], a->cpu->dscores);
}

void anepy_cpu_attention_backward2(const anepy_kernel *kernel, int32_t n, int32_t columns) {
    attention a = begin(kernel, n, columns);
    run(&a, a.heads * a.blocks, queries_block);
    run(&a, a.kv_heads * a.blocks, keys_block);
}

/* ------------------------------------------------- backward without scores in memory: both halves
 */

/* A block of 64 columns of a head, [head_dim][64], times a factor. */
static float *copy_block(const attention *a, float *dst, const float *src, float factor) {
    for (int32_t d = 0; d < a->head_dim; d++)
        memcpy(dst + d * COLS, src + d * a->width, COLS * sizeof(float));
    if (factor != 1.0f) a->kernels->scale(dst, factor, (int64_t)a->head_dim * COLS);
    return dst;
}

static void paste_block(const attention *a, float *dst, const float *src) {
    for (int32_t d = 0; d < a->head_dim; d++)
        memcpy(dst + d * a->width, src + d * COLS, COLS * sizeof(float));
}

/* Probabilities of 64 queries as [key][query], the two numbers per query that give them back, and
 * dq[d, q] = sum_t k[d, t] ds[t, q]. */
static void queries_again(void *context, int32_t index, int32_t worker) {
    const attention *a = context;
    int32_t head = index / a->blocks, first = block_of(a, index) * COLS, keys = first + COLS;
    float *const *t = a->kernel->tensors;
    float *probs = a->cpu->scratch + worker * a->cpu->scratch_n;
    float *ds = probs + keys * COLS, *q = ds + keys * COLS, sum[COLS];
    float *lse = a->cpu->lse + head * a->width + first,
          *dot = a->cpu->dot + head * a->width + first;
    const float *k = head_of(a, t[SDPA_BWD2_K], head / a->group);
    const float *v = head_of(a, a->cpu->bwd1->tensors[SDPA_BWD1_V], head / a->group);
    copy_block(a, q, head_of(a, t[SDPA_BWD2_Q], head) + first, a->scale);
    anepy_gemm_small(a->kernels, probs, COLS, k, 1, a->width, q, COLS, keys, COLS, a->head_dim, 0);
    for (int32_t i = 1; i < COLS; i++) /* key first + i is later than queries before it */
        for (int32_t j = 0; j < i; j++) probs[(first + i) * COLS + j] = -INFINITY;
    a->kernels->logsumexp_columns(lse, sum, probs, COLS, keys);
    for (int32_t j = 0; j < COLS; j++) lse[j] += logf(sum[j]);
    a->kernels->softmax_gradient(probs, lse, 1.0f, COLS, keys);
    copy_block(a, q, head_of(a, a->cpu->dattn, head) + first, 1.0f);
    anepy_gemm_small(a->kernels, ds, COLS, v, 1, a->width, q, COLS, keys, COLS, a->head_dim, 0);
    a->kernels->softmax_columns_backward(ds, dot, probs, a->scale, keys);
    anepy_gemm_small(a->kernels, head_of(a, t[SDPA_BWD2_DQ], head) + first, a->width, k, a->width,
                     1, ds, COLS, a->head_dim, COLS, keys, 0);
}

/* One block of 64 keys of a KV head against all later queries, 64 at a time:
 * dv[d, t] = sum_q dattn[d, q] p[q, t] and dk[d, t] = sum_q q[d, q] ds[q, t]. */
static void keys_again(void *context, int32_t index, int32_t worker) {
    const attention *a = context;
    int32_t kv_head = index / a->blocks, first = index % a->blocks * COLS;
    int32_t block = a->head_dim * COLS, head_dim = a->head_dim;
    float *const *t = a->kernel->tensors, *const *t1 = a->cpu->bwd1->tensors;
    float *probs = a->cpu->scratch + worker * a->cpu->scratch_n, *ds = probs + COLS * COLS;
    float *k = ds + COLS * COLS, *v = k + block, *q = v + block, *dattn = q + block;
    float *dk = dattn + block, *dv = dk + block;
    copy_block(a, k, head_of(a, t[SDPA_BWD2_K], kv_head) + first, a->scale);
    copy_block(a, v, head_of(a, t1[SDPA_BWD1_V], kv_head) + first, 1.0f);
    memset(dk, 0, 2 * (size_t)block * sizeof(float));
    for (int32_t head = kv_head * a->group; head < (kv_head + 1) * a->group; head++) {
        for (int32_t at = first; at < a->blocks * COLS; at += COLS) {
            const float *lse = a->cpu->lse + head * a->width + at;
            const float *dot = a->cpu->dot + head * a->width + at;
            copy_block(a, q, head_of(a, t[SDPA_BWD2_Q], head) + at, 1.0f);
            copy_block(a, dattn, head_of(a, a->cpu->dattn, head) + at, 1.0f);
            anepy_gemm_small(a->kernels, probs, COLS, q, 1, COLS, k, COLS, COLS, COLS, head_dim, 0);
            anepy_gemm_small(a->kernels, ds, COLS, dattn, 1, COLS, v, COLS, COLS, COLS, head_dim,
                             0);
            for (int32_t i = 0; i < COLS; i++) {
                float *p = probs + i * COLS, *d = ds + i * COLS;
                int32_t valid = at == first ? i + 1 : COLS;
                a->kernels->softmax_row_again(p, d, lse[i], dot[i], a->scale, COLS);
                memset(p + valid, 0, (size_t)(COLS - valid) * sizeof(float));
                memset(d + valid, 0, (size_t)(COLS - valid) * sizeof(float));
            }
            anepy_gemm_small(a->kernels, dv, COLS, dattn, COLS, 1, probs, COLS, head_dim, COLS,
                             COLS, 1);
            anepy_gemm_small(a->kernels, dk, COLS, q, COLS, 1, ds, COLS, head_dim, COLS, COLS, 1);
        }
    }
    paste_block(a, head_of(a, t[SDPA_BWD2_DK], kv_head) + first, dk);
    paste_block(a, head_of(a, t1[SDPA_BWD1_DV], kv_head) + first, dv);
}

void anepy_cpu_attention_backward(const anepy_kernel *kernel, int32_t columns) {
    attention a = begin(kernel, columns, columns);
    run(&a, a.heads * a.blocks, queries_again);
    run(&a, a.kv_heads * a.blocks, keys_again);
}
