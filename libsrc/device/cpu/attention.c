/* device/cpu/attention.c - causal attention per head, in blocks of 64 queries that skip the empty
 * half.
 *
 * Forward computes transposed scores [key, query], so that soft-max runs down columns without
 * horizontal sums and the next product needs no transposition. Backward keeps probabilities as
 * [query, key], the layout the program table promises; of its products only that of dq reduces over
 * keys and transposes. KV head k serves query heads k*g .. k*g+g-1. */
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
