/* device/cpu/attention.c - causal attention per head and sequence, in blocks of 64 queries that
 * skip the empty half.
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
    int32_t n;         /* tokens of a sequence */
    int32_t blocks;    /* of 64 tokens, that a sequence has */
    int32_t sequences; /* beside each other */
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
                       .blocks = (n + COLS - 1) / COLS,
                       .sequences = columns / (int32_t)anepy_round_up(n, COLS),
                       .scale = 1.0f / sqrtf((float)o->model->head_dim)};
}

/* One block of 64 tokens of a sequence, for one head. */
typedef struct {
    int32_t head;
    int32_t first; /* its first token in the sequence */
    int64_t start; /* the sequence's first column */
} place;

/* As keys: the first blocks are seen by most queries, so that the last pieces of a loop are short.
 */
static place locate_keys(const attention *a, int32_t index) {
    int32_t sequence = index / a->blocks % a->sequences;
    return (place){.head = index / a->blocks / a->sequences,
                   .first = index % a->blocks * COLS,
                   .start = (int64_t)sequence * a->blocks * COLS};
}

/* As queries: later ones see more keys. */
static place locate_queries(const attention *a, int32_t index) {
    place p = locate_keys(a, index);
    p.first = (a->blocks - 1) * COLS - p.first;
    return p;
}

/* The sequence's channels of a head. */
static float *head_of(const attention *a, float *tensor, int32_t head, place p) {
    return tensor + (int64_t)head * a->head_dim * a->width + p.start;
}

/* Where the scores of a block of queries begin, in [heads * program width, width]. */
static int64_t scores_at(const attention *a, place p, int32_t head) {
    return ((int64_t)head * a->kernel->program.width + p.first) * a->width + p.start;
}

static void run(const attention *a, int32_t heads, anepy_loop_fn fn) {
    anepy_pool_run(a->cpu->base.options.gemm->pool, heads * a->sequences * a->blocks, fn,
                   (void *)a);
}

/* ---------------------------------------------------------------------------------------- RoPE */

typedef struct {
    const anepy_cpu *cpu;
    float *x;
    int32_t stride, columns; /* of one sequence, of all */
    float sign;
} rotation;

/* Channels 2i and 2i+1 of a head rotate by position * theta^(-2i/head_dim) (Su et al. 2021, the
 * interleaved pairs of llama2.c). */
static void rotate_head(void *context, int32_t head, int32_t worker) {
    (void)worker;
    const rotation *r = context;
    const anepy_device_options *o = &r->cpu->base.options;
    int64_t width = o->width, positions = r->cpu->positions;
    int32_t head_dim = o->model->head_dim;
    float *x = r->x + (int64_t)head * head_dim * width;
    for (int32_t i = 0; i < head_dim / 2; i++)
        for (int32_t start = 0; start < r->columns; start += r->stride)
            o->gemm->kernels->rope(x + 2 * i * width + start, x + (2 * i + 1) * width + start,
                                   r->cpu->cosine + i * positions, r->cpu->sine + i * positions,
                                   r->sign, r->stride);
}

void anepy_cpu_rope(const anepy_cpu *cpu, float *x, int32_t heads, int32_t n, int32_t columns,
                    float sign) {
    rotation r = {cpu, x, (int32_t)anepy_round_up(n, COLS), columns, sign};
    anepy_pool_run(cpu->base.options.gemm->pool, heads, rotate_head, &r);
}

/* ------------------------------------------------------------------------------------- forward */

static void forward_block(void *context, int32_t index, int32_t worker) {
    const attention *a = context;
    place p = locate_queries(a, index);
    int32_t keys = p.first + COLS;
    float *const *t = a->kernel->tensors;
    const float *q = head_of(a, t[SDPA_FWD_Q], p.head, p) + p.first;
    const float *k = head_of(a, t[SDPA_FWD_K], p.head / a->group, p);
    const float *v = head_of(a, t[SDPA_FWD_V], p.head / a->group, p);
    float *out = head_of(a, t[SDPA_FWD_ATTN], p.head, p) + p.first;
    float *scores = a->cpu->scratch + worker * a->cpu->scratch_n; /* [keys][64] */
    float inverse[COLS];
    anepy_gemm_small(a->kernels, scores, COLS, k, 1, a->width, q, a->width, keys, COLS, a->head_dim,
                     0);
    a->kernels->softmax_columns(scores, inverse, keys, p.first, a->scale);
    anepy_gemm_small(a->kernels, out, a->width, v, a->width, 1, scores, COLS, a->head_dim, COLS,
                     keys, 0);
    for (int32_t d = 0; d < a->head_dim; d++)
        for (int32_t j = 0; j < COLS; j++) out[d * a->width + j] *= inverse[j];
}

void anepy_cpu_attention(const anepy_kernel *kernel, int32_t n, int32_t columns) {
    attention a = begin(kernel, n, columns);
    run(&a, a.heads, forward_block);
}

/* ------------------------------------------------------------- backward, to the probabilities */

/* Rows [first, first + 64) of one head: probabilities, and the gradients that reach them. Keys
 * beyond the block stay zero since the surface was made. */
static void probabilities_block(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const attention *a = context;
    place p = locate_queries(a, index);
    int32_t keys = p.first + COLS;
    float *const *t = a->kernel->tensors;
    int64_t at = scores_at(a, p, p.head);
    float *probs = t[SDPA_BWD1_P] + at, *dprobs = t[SDPA_BWD1_DP] + at;
    const float *q = head_of(a, t[SDPA_BWD1_Q], p.head, p) + p.first;
    const float *k = head_of(a, t[SDPA_BWD1_K], p.head / a->group, p);
    const float *v = head_of(a, t[SDPA_BWD1_V], p.head / a->group, p);
    const float *dattn = head_of(a, a->cpu->dattn, p.head, p) + p.first;
    anepy_gemm_small(a->kernels, probs, a->width, q, 1, a->width, k, a->width, COLS, keys,
                     a->head_dim, 0);
    for (int32_t i = 0; i < COLS; i++)
        a->kernels->softmax_row(probs + i * a->width, p.first + i + 1, keys, a->scale);
    anepy_gemm_small(a->kernels, dprobs, a->width, dattn, 1, a->width, v, a->width, COLS, keys,
                     a->head_dim, 0);
}

/* One block of keys of one KV head: out[d, t] = sum over queries q >= t of left[d, q] right[q, t],
 * summed over the query heads it serves. left is [heads * head_dim, width], right holds scores. */
static void sum_over_queries(const attention *a, int32_t index, float *out, float *left,
                             const float *right) {
    place p = locate_keys(a, index);
    out = head_of(a, out, p.head, p) + p.first;
    for (int32_t g = 0; g < a->group; g++) {
        int32_t head = p.head * a->group + g;
        anepy_gemm_small(a->kernels, out, a->width, head_of(a, left, head, p) + p.first, a->width,
                         1, right + scores_at(a, p, head) + p.first, a->width, a->head_dim, COLS,
                         a->n - p.first, g > 0);
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
    run(&a, a.heads, probabilities_block);
    run(&a, a.kv_heads, values_block);
}

/* ------------------------------------------------------------ backward, to queries and keys */

/* ds = p * (dp - sum p dp) * scale for 64 queries, and dq[d, q] = sum_t k[d, t] ds[q, t]. */
static void queries_block(void *context, int32_t index, int32_t worker) {
    const attention *a = context;
    place p = locate_queries(a, index);
    int32_t keys = p.first + COLS;
    float *const *t = a->kernel->tensors;
    int64_t at = scores_at(a, p, p.head);
    const float *probs = t[SDPA_BWD2_P] + at, *dprobs = t[SDPA_BWD2_DP] + at;
    const float *k = head_of(a, t[SDPA_BWD2_K], p.head / a->group, p);
    float *dscores = a->cpu->dscores + at;
    float *transposed = a->cpu->scratch + worker * a->cpu->scratch_n; /* [keys][64] */
    for (int32_t i = 0; i < COLS; i++)
        a->kernels->softmax_row_backward(dscores + i * a->width, probs + i * a->width,
                                         dprobs + i * a->width, a->scale, keys);
    a->kernels->transpose_panel(transposed, dscores, a->width, COLS, keys);
    anepy_gemm_small(a->kernels, head_of(a, t[SDPA_BWD2_DQ], p.head, p) + p.first, a->width, k,
                     a->width, 1, transposed, COLS, a->head_dim, COLS, keys, 0);
}

static void keys_block(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const attention *a = context;
    float *const *t = a->kernel->tensors;
    sum_over_queries(a, index, t[SDPA_BWD2_DK], t[SDPA_BWD2_Q], a->cpu->dscores);
}

void anepy_cpu_attention_backward2(const anepy_kernel *kernel, int32_t n, int32_t columns) {
    attention a = begin(kernel, n, columns);
    run(&a, a.heads, queries_block);
    run(&a, a.kv_heads, keys_block);
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
    place p = locate_queries(a, index);
    int32_t first = p.first, keys = first + COLS;
    int64_t row = p.head * a->width + p.start + first;
    float *const *t = a->kernel->tensors;
    float *probs = a->cpu->scratch + worker * a->cpu->scratch_n;
    float *ds = probs + keys * COLS, *q = ds + keys * COLS, sum[COLS];
    float *lse = a->cpu->lse + row, *dot = a->cpu->dot + row;
    const float *k = head_of(a, t[SDPA_BWD2_K], p.head / a->group, p);
    const float *v = head_of(a, a->cpu->bwd1->tensors[SDPA_BWD1_V], p.head / a->group, p);
    copy_block(a, q, head_of(a, t[SDPA_BWD2_Q], p.head, p) + first, a->scale);
    anepy_gemm_small(a->kernels, probs, COLS, k, 1, a->width, q, COLS, keys, COLS, a->head_dim, 0);
    for (int32_t i = 1; i < COLS; i++) /* key first + i is later than queries before it */
        for (int32_t j = 0; j < i; j++) probs[(first + i) * COLS + j] = -INFINITY;
    a->kernels->logsumexp_columns(lse, sum, probs, COLS, keys);
    for (int32_t j = 0; j < COLS; j++) lse[j] += logf(sum[j]);
    a->kernels->softmax_gradient(probs, lse, 1.0f, COLS, keys);
    copy_block(a, q, head_of(a, a->cpu->dattn, p.head, p) + first, 1.0f);
    anepy_gemm_small(a->kernels, ds, COLS, v, 1, a->width, q, COLS, keys, COLS, a->head_dim, 0);
    a->kernels->softmax_columns_backward(ds, dot, probs, a->scale, keys);
    anepy_gemm_small(a->kernels, head_of(a, t[SDPA_BWD2_DQ], p.head, p) + first, a->width, k,
                     a->width, 1, ds, COLS, a->head_dim, COLS, keys, 0);
}

/* One block of 64 keys of a KV head against all later queries, 64 at a time:
 * dv[d, t] = sum_q dattn[d, q] p[q, t] and dk[d, t] = sum_q q[d, q] ds[q, t]. */
static void keys_again(void *context, int32_t index, int32_t worker) {
    const attention *a = context;
    place p = locate_keys(a, index);
    int32_t kv_head = p.head, first = p.first;
    int32_t block = a->head_dim * COLS, head_dim = a->head_dim;
    float *const *t = a->kernel->tensors, *const *t1 = a->cpu->bwd1->tensors;
    float *probs = a->cpu->scratch + worker * a->cpu->scratch_n, *ds = probs + COLS * COLS;
    float *k = ds + COLS * COLS, *v = k + block, *q = v + block, *dattn = q + block;
    float *dk = dattn + block, *dv = dk + block;
    copy_block(a, k, head_of(a, t[SDPA_BWD2_K], kv_head, p) + first, a->scale);
    copy_block(a, v, head_of(a, t1[SDPA_BWD1_V], kv_head, p) + first, 1.0f);
    memset(dk, 0, 2 * (size_t)block * sizeof(float));
    for (int32_t head = kv_head * a->group; head < (kv_head + 1) * a->group; head++) {
        for (int32_t at = first; at < a->blocks * COLS; at += COLS) {
            const float *lse = a->cpu->lse + head * a->width + p.start + at;
            const float *dot = a->cpu->dot + head * a->width + p.start + at;
            copy_block(a, q, head_of(a, t[SDPA_BWD2_Q], head, p) + at, 1.0f);
            copy_block(a, dattn, head_of(a, a->cpu->dattn, head, p) + at, 1.0f);
            anepy_gemm_small(a->kernels, probs, COLS, q, 1, COLS, k, COLS, COLS, COLS, head_dim, 0);
            anepy_gemm_small(a->kernels, ds, COLS, dattn, 1, COLS, v, COLS, COLS, COLS, head_dim,
                             0);
            for (int32_t i = 0; i < COLS; i++) {
                float *x = probs + i * COLS, *d = ds + i * COLS;
                int32_t valid = at == first ? i + 1 : COLS;
                a->kernels->softmax_row_again(x, d, lse[i], dot[i], a->scale, COLS);
                memset(x + valid, 0, (size_t)(COLS - valid) * sizeof(float));
                memset(d + valid, 0, (size_t)(COLS - valid) * sizeof(float));
            }
            anepy_gemm_small(a->kernels, dv, COLS, dattn, COLS, 1, probs, COLS, head_dim, COLS,
                             COLS, 1);
            anepy_gemm_small(a->kernels, dk, COLS, q, COLS, 1, ds, COLS, head_dim, COLS, COLS, 1);
        }
    }
    paste_block(a, head_of(a, t[SDPA_BWD2_DK], kv_head, p) + first, dk);
    paste_block(a, head_of(a, t1[SDPA_BWD1_DV], kv_head, p) + first, dv);
}

void anepy_cpu_attention_backward(const anepy_kernel *kernel, int32_t n, int32_t columns) {
    attention a = begin(kernel, n, columns);
    run(&a, a.heads, queries_again);
    run(&a, a.kv_heads, keys_again);
}
