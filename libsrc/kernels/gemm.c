/* kernels/gemm.c - packing, blocking and the split into parallel pieces. */
#include "kernels/gemm.h"

#include <string.h>

#define COLS ANEPY_COLUMNS
#define DEPTH 1024      /* reduction length per packed block: 256 KiB per panel, fits L2 */
#define BLOCK_ROWS 48   /* rows of C per piece: 8 tiles, and 16 pieces for the smallest product */
#define PIECE_ROWS 1536 /* rows of C per background piece: amortises its transposition */
#define TILE_N (ANEPY_TILE_ROWS * COLS)

int64_t anepy_gemm_panels_n(int32_t columns) {
    return (int64_t)DEPTH * anepy_round_up(columns, COLS);
}

/* A tile, then a panel of B (pieces) or a block of A (run). */
int64_t anepy_gemm_scratch_n(int32_t k) {
    return TILE_N + (int64_t)anepy_max_i32(k * COLS, DEPTH * BLOCK_ROWS);
}

/* Rows [0, m) of up to 64 columns of C from one panel of B. Where C has fewer columns, whole tiles
 * are computed beside it and what exists is copied. */
static void multiply_panel(const anepy_kernels *kernels, const anepy_product *s, float *c,
                           const float *a, const float *panel, int64_t ldb, int32_t m,
                           int32_t columns, float *tile) {
    for (int32_t i = 0; i < m; i += ANEPY_TILE_ROWS) {
        int32_t rows = anepy_min_i32(ANEPY_TILE_ROWS, m - i);
        float *out = c + i * s->ldc;
        if (columns == COLS) {
            for (int32_t j = 0; j < COLS; j += kernels->gemm_cols)
                kernels->gemm_tile(out + j, s->ldc, a + i * s->a_row, s->a_row, s->a_step,
                                   panel + j, ldb, s->k, rows, s->accumulate);
            continue;
        }
        for (int32_t j = 0; j < COLS; j += kernels->gemm_cols)
            kernels->gemm_tile(tile + j, COLS, a + i * s->a_row, s->a_row, s->a_step, panel + j,
                               ldb, s->k, rows, 0);
        for (int32_t r = 0; r < rows; r++, out += s->ldc) {
            if (s->accumulate) kernels->add(out, out, tile + r * COLS, columns);
            else memcpy(out, tile + r * COLS, (size_t)columns * sizeof(float));
        }
    }
}

/* ------------------------------------------------------------------------ on all threads, now */

static void pack_panel(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_gemm_job *job = context;
    const anepy_product *s = &job->product;
    float *dst = job->gemm->panels + (int64_t)index * s->k * COLS;
    if (s->b_transposed) {
        job->gemm->kernels->transpose_panel(dst, s->b + (int64_t)index * COLS * s->ldb, s->ldb,
                                            anepy_min_i32(COLS, s->n - index * COLS), s->k);
        return;
    }
    const float *src = s->b + (int64_t)index * COLS;
    for (int32_t p = 0; p < s->k; p++)
        memcpy(dst + (int64_t)p * COLS, src + p * s->ldb, COLS * sizeof(float));
}

/* A block of A whose rows are strided, as [k][48]: the tile kernel then reads it in order. */
static void pack_block(float *dst, const anepy_product *s, int32_t first, int32_t rows) {
    const int64_t ahead = 16;
    for (int32_t p = 0; p < s->k; p++) {
        const float *src = s->a + first + p * s->a_step;
        for (int32_t line = 0; line < BLOCK_ROWS; line += 16)
            __builtin_prefetch(src + ahead * s->a_step + line);
        memcpy(dst + (int64_t)p * BLOCK_ROWS, src, (size_t)rows * sizeof(float));
    }
}

static void multiply_rows(void *context, int32_t index, int32_t worker) {
    const anepy_gemm_job *job = context;
    const anepy_gemm *gemm = job->gemm;
    anepy_product s = job->product;
    float *tile = gemm->scratch + worker * gemm->scratch_n, *block = tile + TILE_N;
    int32_t first = index * BLOCK_ROWS, rows = anepy_min_i32(BLOCK_ROWS, s.m - first);
    const float *a = s.a + first * s.a_row;
    if (s.a_step != 1) {
        pack_block(block, &s, first, rows);
        a = block;
        s.a_row = 1;
        s.a_step = BLOCK_ROWS;
    }
    for (int32_t j = 0; j < s.n; j += COLS)
        multiply_panel(gemm->kernels, &s, s.c + first * s.ldc + j, a,
                       gemm->panels + (int64_t)j * s.k, COLS, rows, anepy_min_i32(COLS, s.n - j),
                       tile);
}

void anepy_gemm_run(const anepy_gemm *gemm, const anepy_product *product) {
    for (int32_t p = 0; p < product->k; p += DEPTH) {
        anepy_gemm_job job = {gemm, *product};
        anepy_product *s = &job.product;
        s->a += p * s->a_step;
        s->b += s->b_transposed ? p : p * s->ldb;
        s->k = anepy_min_i32(DEPTH, product->k - p);
        s->accumulate = product->accumulate || p > 0;
        anepy_pool_run(gemm->pool, (s->n + COLS - 1) / COLS, pack_panel, &job);
        anepy_pool_run(gemm->pool, (s->m + BLOCK_ROWS - 1) / BLOCK_ROWS, multiply_rows, &job);
    }
}

/* ------------------------------------------------------------------------- in the background */

static int32_t row_pieces(const anepy_product *s) { return (s->m + PIECE_ROWS - 1) / PIECE_ROWS; }

int32_t anepy_gemm_pieces(const anepy_product *product) {
    return row_pieces(product) * ((product->n + COLS - 1) / COLS);
}

void anepy_gemm_piece(void *context, int32_t index, int32_t worker) {
    const anepy_gemm_job *job = context;
    const anepy_product *s = &job->product;
    const anepy_gemm *gemm = job->gemm;
    int32_t pieces = row_pieces(s);
    int32_t first = index % pieces * PIECE_ROWS, column = index / pieces * COLS;
    int32_t columns = anepy_min_i32(COLS, s->n - column);
    float *tile = gemm->scratch + worker * gemm->scratch_n, *panel = tile + TILE_N;
    gemm->kernels->transpose_panel(panel, s->b + column * s->ldb, s->ldb, columns, s->k);
    multiply_panel(gemm->kernels, s, s->c + first * s->ldc + column, s->a + first * s->a_row, panel,
                   COLS, anepy_min_i32(PIECE_ROWS, s->m - first), columns, tile);
}

/* ------------------------------------------------------------------------------ in the cache */

void anepy_gemm_small(const anepy_kernels *kernels, float *c, int64_t ldc, const float *a,
                      int64_t a_row, int64_t a_step, const float *b, int64_t ldb, int32_t m,
                      int32_t n, int32_t k, int32_t accumulate) {
    anepy_product s = {
        .ldc = ldc, .a_row = a_row, .a_step = a_step, .k = k, .accumulate = accumulate};
    for (int32_t j = 0; j < n; j += COLS)
        multiply_panel(kernels, &s, c + j, a, b + j, ldb, m, COLS, NULL);
}
