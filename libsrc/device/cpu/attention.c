/* device/cpu/attention.c - causal attention of each head and sequence in blocks of 64 queries by 64
 * keys, without the half that the mask empties.
 *
 * A piece has 64 queries (forward) or 64 keys (backward) and visits all blocks that they take part
 * in. Few blocks are in use at once and no score is kept (Dao et al. 2022, arXiv 2205.14135). The
 * forward pass keeps one number per query, the log-sum-exp of its scores; from it the backward pass
 * computes each probability again, once.
 *
 * Of documents packed into a sequence the blocks of keys before the first document of a block of
 * queries are left out, and in the others what lies before a query's own is masked.
 *
 * Factors of products are copied into the layout of the matrix kernels, and in bf16 rounded there:
 * only `load` and `panel_of` depend on the precision. Scores and soft-max are float32. KV head k
 * serves the query heads k*g to k*g+g-1. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "device/cpu/cpu.h"

#define COLS ANEPY_COLUMNS
#define SQUARE (COLS * COLS)

typedef struct {
    const anepy_executable *executable;
    const anepy_cpu *cpu;
    const anepy_kernels *kernels;
    const anepy_bf16_kernels *bf16; /* NULL: products are float32 */
    int64_t width;
    int32_t head_dim, heads, kv_heads, group;
    int32_t n;                /* tokens of a sequence */
    int32_t blocks;           /* blocks of 64 tokens in a sequence */
    int32_t sequences;        /* how many run side by side */
    const int32_t *documents; /* of each column: where its document begins; NULL: at 0 */
    /* Units of a reduction over a head's channels, and over a block's columns. */
    int32_t channel_units, column_units;
    float factor; /* 1 / sqrt(head_dim) */
    float scale;  /* factor * log2(e), for soft-max in powers of two */
} attention;

static attention begin(const anepy_executable *executable, int32_t n, int32_t columns) {
    const anepy_device_options *o = &executable->cpu->base.options;
    const anepy_config *c = &o->model->config;
    int32_t pair = o->gemm->bf16 != NULL ? 2 : 1;
    float factor = 1.0f / sqrtf((float)o->model->head_dim);
    return (attention){.executable = executable,
                       .cpu = executable->cpu,
                       .kernels = o->gemm->kernels,
                       .bf16 = o->gemm->bf16,
                       .width = o->width,
                       .head_dim = o->model->head_dim,
                       .heads = c->n_heads,
                       .kv_heads = c->n_kv_heads,
                       .group = c->n_heads / c->n_kv_heads,
                       .n = n,
                       .blocks = (n + COLS - 1) / COLS,
                       .sequences = columns / (int32_t)anepy_round_up(n, COLS),
                       .documents = executable->cpu->base.documents,
                       .channel_units = (o->model->head_dim + pair - 1) / pair,
                       .column_units = COLS / pair,
                       .factor = factor,
                       .scale = factor * 1.44269504f};
}

/* 64 tokens of a sequence, for one head. */
typedef struct {
    int32_t head, sequence, block;
} piece;

/* Index runs over the blocks of a sequence first, then sequences, then heads. */
static piece piece_at(const attention *a, int32_t index) {
    return (piece){index / a->blocks / a->sequences, index / a->blocks % a->sequences,
                   index % a->blocks};
}

static int32_t index_of(const attention *a, piece p) {
    return (p.head * a->sequences + p.sequence) * a->blocks + p.block;
}

/* First element of a block of a tensor with `channels` per head. */
static float *block_of(const attention *a, float *tensor, piece p, int32_t channels) {
    return tensor + (int64_t)p.head * channels * a->width +
           ((int64_t)p.sequence * a->blocks + p.block) * COLS;
}

static void run(const attention *a, int32_t heads, anepy_loop_fn fn) {
    anepy_pool_run(a->cpu->base.options.gemm->pool, heads * a->sequences * a->blocks, fn,
                   (void *)a);
}

/* ---------------------------------------------------------------------------------------- RoPE */

typedef struct {
    const anepy_cpu *cpu;
    float *x;
    int32_t stride, columns; /* columns of one sequence; of all */
    float sign;
} rotation;

/* The column behind the document that begins at this one, or behind the sequence. */
static int32_t document_end(const rotation *r, int32_t start) {
    const int32_t *documents = r->cpu->base.documents;
    int32_t behind = (start / r->stride + 1) * r->stride, end = start + 1;
    if (/* mutate: packed-positions */ documents == NULL) return behind;
    while (end < behind && documents[end] == documents[start]) end++;
    return end;
}

/* Channels 2i and 2i+1 of a head rotate by position * theta^(-2i/head_dim) (Su et al. 2021, the
 * interleaved pairs of llama2.c). */
static void rotate_head(void *context, int32_t head, int32_t worker) {
    (void)worker;
    const rotation *r = context;
    const anepy_device_options *o = &r->cpu->base.options;
    int64_t width = o->width, positions = r->cpu->positions;
    int32_t head_dim = o->model->head_dim;
    float *x = r->x + (int64_t)head * head_dim * width;
    for (int32_t start = 0, end; start < r->columns; start = end) {
        end = document_end(r, start);
        for (int32_t i = 0; i < head_dim / 2; i++)
            o->gemm->kernels->rope(x + 2 * i * width + start, x + (2 * i + 1) * width + start,
                                   r->cpu->cosine + i * positions, r->cpu->sine + i * positions,
                                   r->sign, end - start);
    }
}

void anepy_cpu_rope(const anepy_cpu *cpu, float *x, int32_t heads, int32_t n, int32_t columns,
                    float sign) {
    rotation r = {cpu, x, (int32_t)anepy_round_up(n, COLS), columns, sign};
    anepy_pool_run(cpu->base.options.gemm->pool, heads, rotate_head, &r);
}

/* ------------------------------------------------------------------------------------ products */

/* A block [head_dim][64] as factors: `steps` is [channel units][64], for reductions over channels,
 * on either side; `rows` is [head_dim][column units], the left side of reductions over columns. In
 * float32 both are the same numbers. */
typedef struct {
    float *steps, *rows;
} factors;

int64_t anepy_cpu_factors_n(int32_t head_dim) { return (head_dim + 1) * (int64_t)COLS; }

static factors factors_in(const attention *a, float *memory) {
    return (factors){memory, a->bf16 != NULL ? memory + a->channel_units * COLS : memory};
}

/* Memory for factors of a block: each block has two slots. */
static factors shared(const attention *a, piece p, int32_t slot) {
    int64_t at = 2 * (int64_t)index_of(a, p) + slot;
    return factors_in(a, a->cpu->factors + at * anepy_cpu_factors_n(a->head_dim));
}

enum { STEPS = 1, ROWS = 2 };

static void load(const attention *a, factors f, const float *src, int64_t ld, int32_t which) {
    if (a->bf16 == NULL) {
        for (int32_t d = 0; d < a->head_dim; d++)
            memcpy(f.steps + d * COLS, src + d * ld, COLS * sizeof(float));
        return;
    }
    if (which & STEPS)
        a->bf16->pack_pairs((uint32_t *)(void *)f.steps, COLS, src, ld, a->head_dim, COLS);
    for (int32_t d = 0; d < a->head_dim && which & ROWS; d++)
        a->bf16->to_bf16((uint16_t *)(void *)(f.rows + d * a->column_units), src + d * ld, COLS);
}

/* A square [64][64] as second factor of a reduction over its rows. copy has room for one square. */
static const float *panel_of(const attention *a, float *copy, const float *square) {
    if (a->bf16 == NULL) return square;
    a->bf16->pack_pairs((uint32_t *)(void *)copy, COLS, square, COLS, COLS, COLS);
    return copy;
}

/* The transposed square, as second factor of a reduction over its columns. copy has room for two.
 */
static const float *transposed_of(const attention *a, float *copy, const float *square) {
    const float *rows = square;
    if (a->bf16 != NULL) {
        a->bf16->to_bf16((uint16_t *)(void *)(copy + SQUARE), square, SQUARE);
        rows = copy + SQUARE;
    }
    a->kernels->transpose_panel(copy, rows, a->column_units, COLS, a->column_units);
    return copy;
}

/* c[i][j] = sum_d left[d][i] right[d][j]. */
static void over_channels(const attention *a, float *c, factors left, factors right) {
    anepy_gemm_small(a->kernels, a->bf16, c, COLS, left.steps, 1, COLS, right.steps, COLS, COLS,
                     COLS, a->channel_units, 0);
}

/* c[d][j] = or += sum_i left[d][i] panel[i][j]. */
static void over_columns(const attention *a, float *c, factors left, const float *panel,
                         int32_t accumulate) {
    anepy_gemm_small(a->kernels, a->bf16, c, COLS, left.rows, a->column_units, 1, panel, COLS,
                     a->head_dim, COLS, a->column_units, accumulate);
}

/* ----------------------------------------------------------------------------------- documents
 *
 * In a sequence they begin at ascending positions, so what a block may not see is a corner of it.
 */

/* The first block of keys that a block of queries sees. */
static int32_t first_block(const attention *a, piece p) {
    if (a->documents == NULL) return 0;
    return a->documents[(p.sequence * a->blocks + p.block) * COLS] / COLS;
}

/* A score that is lower than all others, but finite: a query may see nothing of the first blocks
 * that its neighbours see, and what it makes of them must shrink to zero, not become NaN. A power
 * of two, so that its product with a scale is exact. */
#define UNSEEN (-0x1p96f)

/* Masks the scores [query][key], or [key][query], of keys in block `keys` that lie before the
 * documents of their queries. */
static void mask_others(const attention *a, float *scores, piece queries, int32_t keys,
                        int32_t key_step, int32_t query_step) {
    if (a->documents == NULL) return;
    const int32_t *documents = a->documents + (queries.sequence * a->blocks + queries.block) * COLS;
    for (int32_t q = COLS - 1; q >= 0 && documents[q] > keys * COLS; q--) {
        int32_t before = /* mutate: packed-mask */ anepy_min_i32(COLS, documents[q] - keys * COLS);
        for (int32_t t = 0; t < before; t++) scores[t * key_step + q * query_step] = UNSEEN;
    }
}

/* ------------------------------------------------------------------------------------- forward */

static void load_keys(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const attention *a = context;
    piece p = piece_at(a, index);
    float *const *t = a->executable->tensors;
    load(a, shared(a, p, 0), block_of(a, t[SDPA_FWD_K], p, a->head_dim), a->width, STEPS);
    load(a, shared(a, p, 1), block_of(a, t[SDPA_FWD_V], p, a->head_dim), a->width, ROWS);
}

/* Scores [key][query], so that soft-max runs down columns. Earlier sums shrink when a larger score
 * appears (Milakov & Gimelshein 2018, arXiv 1805.02867). */
static void forward_block(void *context, int32_t index, int32_t worker) {
    const attention *a = context;
    piece p = piece_at(a, index);
    /* Pieces with more keys first, so that the last ones are short. */
    p.block = a->blocks - 1 - p.block;
    float *const *t = a->executable->tensors;
    float *scores = anepy_cpu_scratch(a->cpu, worker), *copy = scores + SQUARE;
    float *out = copy + SQUARE, max[COLS], sum[COLS], factor[COLS];
    factors q = factors_in(a, out + a->head_dim * COLS);
    load(a, q, block_of(a, t[SDPA_FWD_Q], p, a->head_dim), a->width, STEPS);
    for (int32_t j = 0; j < COLS; j++) {
        max[j] = -INFINITY;
        sum[j] = 0.0f;
    }
    int32_t first = first_block(a, p);
    for (piece k = {p.head / a->group, p.sequence, first}; k.block <= p.block; k.block++) {
        over_channels(a, scores, shared(a, k, 0), q);
        mask_others(a, scores, p, k.block, COLS, 1);
        a->kernels->softmax_step(scores, max, sum, factor, COLS, a->scale, k.block == p.block);
        if (k.block > first) a->kernels->scale_columns(out, COLS, out, factor, a->head_dim);
        over_columns(a, out, shared(a, k, 1), panel_of(a, copy, scores), k.block > first);
    }
    for (int32_t j = 0; j < COLS; j++) {
        max[j] += log2f(sum[j]);
        factor[j] = 1.0f / sum[j];
    }
    if (t[SDPA_FWD_LSE] != NULL) memcpy(block_of(a, t[SDPA_FWD_LSE], p, 1), max, sizeof max);
    a->kernels->scale_columns(block_of(a, t[SDPA_FWD_ATTN], p, a->head_dim), a->width, out, factor,
                              a->head_dim);
}

void anepy_cpu_attention(const anepy_executable *executable, int32_t n, int32_t columns) {
    attention a = begin(executable, n, columns);
    run(&a, a.kv_heads, load_keys);
    run(&a, a.heads, forward_block);
}

/* ------------------------------------------------------------------------------------ backward */

/* Loads queries and the gradients of their outputs, zero beyond the last token, and computes dot[q]
 * = sum_d dattn[d, q] attn[d, q], which equals sum_t p[q, t] dp[q, t]. */
static void load_queries(void *context, int32_t index, int32_t worker) {
    const attention *a = context;
    piece p = piece_at(a, index);
    float *dattn = anepy_cpu_scratch(a->cpu, worker);
    int32_t valid = anepy_min_i32(COLS, a->n - p.block * COLS);
    const float *from = block_of(a, a->cpu->dattn, p, a->head_dim);
    for (int32_t d = 0; d < a->head_dim; d++) {
        memcpy(dattn + d * COLS, from + d * a->width, (size_t)valid * sizeof(float));
        memset(dattn + d * COLS + valid, 0, (size_t)(COLS - valid) * sizeof(float));
    }
    load(a, shared(a, p, 0), block_of(a, a->executable->tensors[SDPA_BWD2_Q], p, a->head_dim),
         a->width, STEPS | ROWS);
    load(a, shared(a, p, 1), dattn, COLS, STEPS | ROWS);
    if (a->bf16 != NULL) /* rounded as in the products that give dp */
        a->kernels->from_bf16(dattn, (const uint16_t *)(const void *)shared(a, p, 1).rows,
                              a->head_dim * COLS);
    a->kernels->dot_columns(block_of(a, a->cpu->dot, p, 1), dattn,
                            block_of(a, a->executable->tensors[SDPA_BWD2_ATTN], p, a->head_dim),
                            a->width, a->head_dim);
    atomic_store_explicit(&a->cpu->turns[index], first_block(a, p), memory_order_relaxed);
}

static void paste(const attention *a, float *dst, const float *src) {
    for (int32_t d = 0; d < a->head_dim; d++)
        memcpy(dst + d * a->width, src + d * COLS, COLS * sizeof(float));
}

/* Data of a piece of the backward pass: 64 keys of a KV head. */
typedef struct {
    piece at;
    factors k, v;
    float *dk, *dv; /* [head_dim][64] */
    float *squares; /* room for four */
} keys_block;

/* The scratch of a keys_block; the forward pass needs less. */
int64_t anepy_cpu_attention_scratch_n(int32_t head_dim) {
    return 4 * SQUARE + 2 * (int64_t)head_dim * COLS + 2 * anepy_cpu_factors_n(head_dim);
}

/* Adds one block: p and ds = p * (dp - dot) / sqrt(head_dim) as [query][key], then dv[d, t] +=
 * dattn[d, q] p[q, t], dk[d, t] += q[d, q] ds[q, t] and dq[d, q] += k[d, t] ds[q, t]. */
static void backward_pair(const attention *a, const keys_block *b, piece p, int32_t accumulate) {
    float *probs = b->squares, *ds = probs + SQUARE, *copy = ds + SQUARE;
    factors q = shared(a, p, 0), dattn = shared(a, p, 1);
    over_channels(a, probs, q, b->k);
    over_channels(a, ds, dattn, b->v);
    mask_others(a, probs, p, b->at.block, 1, COLS);
    int32_t last = p.block == b->at.block; /* the last block of keys that these queries see */
    a->kernels->softmax_again(probs, ds, block_of(a, a->executable->tensors[SDPA_BWD2_LSE], p, 1),
                              block_of(a, a->cpu->dot, p, 1), COLS, a->scale, a->factor, last);
    over_columns(a, b->dv, dattn, panel_of(a, copy, probs), accumulate);
    over_columns(a, b->dk, q, panel_of(a, copy, ds), accumulate);
    const float *transposed = transposed_of(a, copy, ds);
    int32_t index = index_of(a, p);
    float *dq = a->cpu->dq + (int64_t)index * a->head_dim * COLS;
    /* Threads add to dq in the order of keys. */
    anepy_pool_await(&a->cpu->turns[index], b->at.block);
    over_columns(a, dq, b->k, transposed,
                 /* mutate: packed-first */ b->at.block > first_block(a, p));
    if (last) paste(a, block_of(a, a->executable->tensors[SDPA_BWD2_DQ], p, a->head_dim), dq);
    atomic_store_explicit(&a->cpu->turns[index], b->at.block + 1, memory_order_release);
}

/* All queries that see 64 keys. The first keys of all heads come first: most queries see them, and
 * pieces of one head, which would wait for each other, rarely run at once. */
static void backward_block(void *context, int32_t index, int32_t worker) {
    const attention *a = context;
    int32_t others = a->kv_heads * a->sequences, size = a->head_dim * COLS;
    float *const *t = a->executable->tensors;
    keys_block b = {.at = {index % others / a->sequences, index % a->sequences, index / others},
                    .squares = anepy_cpu_scratch(a->cpu, worker)};
    b.dk = b.squares + 4 * SQUARE;
    b.dv = b.dk + size;
    b.k = factors_in(a, b.dv + size);
    b.v = factors_in(a, b.k.steps + anepy_cpu_factors_n(a->head_dim));
    load(a, b.k, block_of(a, t[SDPA_BWD2_K], b.at, a->head_dim), a->width, STEPS | ROWS);
    load(a, b.v, block_of(a, t[SDPA_BWD2_V], b.at, a->head_dim), a->width, STEPS);
    piece p = b.at;
    int32_t first = b.at.head * a->group;
    for (p.head = first; p.head < first + a->group; p.head++)
        for (p.block = b.at.block; p.block < a->blocks && first_block(a, p) <= b.at.block;
             p.block++)
            backward_pair(a, &b, p, p.head > first || p.block > b.at.block);
    paste(a, block_of(a, t[SDPA_BWD2_DK], b.at, a->head_dim), b.dk);
    paste(a, block_of(a, t[SDPA_BWD2_DV], b.at, a->head_dim), b.dv);
}

void anepy_cpu_attention_backward(const anepy_executable *executable, int32_t n, int32_t columns) {
    attention a = begin(executable, n, columns);
    run(&a, a.heads, load_queries);
    run(&a, a.kv_heads, backward_block);
}
