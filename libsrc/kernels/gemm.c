/* kernels/gemm.c - packing, blocking and the split into parallel pieces. */
#include "kernels/gemm.h"

#include <string.h>

#include "kernels/blas.h"
#include "kernels/weights.h"
#include "runtime/machine.h"

#define COLS ANEPY_COLUMNS
#define PANEL_DEPTH 2048      /* units of the reduction that panels of B have room for */
#define MULTIPLY_DEPTH 1024   /* units of the reduction that are multiplied at once */
#define LARGE_CACHE (3 << 19) /* bytes of a second cache that keeps the panels of */
#define CACHED_DEPTH 768      /* so many units: 768 KiB for 256 columns */
#define BLOCK_ROWS 48         /* rows of a block: 8 tiles; the smallest product has 16 blocks */
#define BACKGROUND_ROWS 384   /* rows of a background piece: its rows of A stay in L2 */
#define BLAS_ROWS 192 /* rows per call of the system's library: 4 to 170 calls in stories110M */
#define BLAS_ROUND 16 /* rows of its background pieces: multiples of the side of a matrix unit */
#define FEW_BLOCKS 4  /* below, columns are cut as well */
#define THIN_PIECES 8 /* into so many pieces */
#define TURN_UNITS 64 /* units that are packed before a matrix unit has them turned into rows */
#define LINE 64       /* bytes of a cache line */
#define TILE_N (BLOCK_ROWS * COLS)

int64_t anepy_gemm_panels_n(int32_t columns) {
    return (int64_t)PANEL_DEPTH * anepy_round_up(columns, COLS);
}

/* Scratch of a worker: a tile, then either what a background piece packs (a panel of B, in bf16 of
 * half size and followed by the rows that it is transposed from, then a block of A), or what
 * anepy_gemm_run packs (64 rows of B, or a block of A). */
int64_t anepy_gemm_scratch_n(int32_t k) {
    return TILE_N + (int64_t)COLS * anepy_max_i32(k + 1, PANEL_DEPTH);
}

static int32_t steps_per_unit(const anepy_gemm *gemm) { return gemm->bf16 != NULL ? 2 : 1; }

static int32_t units_of(const anepy_gemm *gemm, int32_t k) {
    return (k + steps_per_unit(gemm) - 1) / steps_per_unit(gemm);
}

/* Rows of a factor as matrix kernels read them; strides are in units. */
typedef struct {
    const float *data;
    int64_t row, step;
} units;

/* Prefetches the next tile of C while one is computed: C is large, and the hardware does not
 * foresee its columns. */
static void prefetch_tile(const float *c, int64_t ldc, int32_t rows) {
    for (int32_t r = 0; r < anepy_min_i32(ANEPY_TILE_ROWS, rows); r++)
        for (int32_t line = 0; line < COLS; line += 16) __builtin_prefetch(c + r * ldc + line, 1);
}

/* Memory that a worker will read next. It is prefetched line by line while tiles with reductions of
 * n units are computed: one line per unit, in every tile that takes part. */
typedef struct {
    const char *at;
    int64_t stride; /* bytes from a line to the one below */
    int32_t n, rows, row, columns, column;
    int32_t tile, every; /* tiles so far; every how many of them take part */
    const float *right;  /* C of the next panel, if it is added to; else NULL */
} upcoming;

static anepy_lines take_lines(upcoming *u, const void *elsewhere) {
    if (u == NULL || u->column >= u->columns || u->tile++ % u->every != 0)
        return (anepy_lines){elsewhere, 0};
    anepy_lines taken = {u->at + u->row * u->stride + (int64_t)u->column * LINE, u->stride};
    u->row += u->n;
    if (u->row >= u->rows) {
        u->row = 0;
        u->column++;
    }
    return taken;
}

/* Whether a matrix unit multiplies, which reads A by rows only. */
static int by_panels(const anepy_bf16_kernels *bf16) {
    return bf16 != NULL && bf16->dot_panel != NULL;
}

/* Computes rows [0, m) of up to 64 columns of C from one panel of B with n units. If C has fewer
 * than 64 columns, whole tiles are computed in `tile` and its columns copied. bf16 == NULL:
 * float32. */
static void multiply_panel(const anepy_kernels *kernels, const anepy_bf16_kernels *bf16, float *c,
                           int64_t ldc, units a, const float *panel, int64_t ldb, int32_t n,
                           int32_t m, int32_t columns, int32_t accumulate, upcoming *next,
                           float *tile) {
    int whole = columns == COLS, unit = by_panels(bf16);
    int32_t most = !unit ? ANEPY_TILE_ROWS : whole ? m : BLOCK_ROWS;
    for (int32_t i = 0; i < m; i += most, c += most * ldc) {
        int32_t rows = anepy_min_i32(most, m - i);
        const float *block = a.data + i * a.row;
        float *out = whole ? c : tile;
        int64_t ld = whole ? ldc : COLS;
        anepy_lines lines = take_lines(next, block);
        if (unit)
            bf16->dot_panel(out, ld, (const uint32_t *)(const void *)block, a.row,
                            (const uint32_t *)(const void *)panel, ldb, n, rows,
                            whole && accumulate);
        else if (accumulate && m - i > ANEPY_TILE_ROWS)
            prefetch_tile(c + ANEPY_TILE_ROWS * ldc, ldc, m - i - ANEPY_TILE_ROWS);
        else if (next != NULL && next->right != NULL) prefetch_tile(next->right, ldc, m);
        for (int32_t j = 0; j < COLS && !unit; j += kernels->gemm_cols) {
            if (bf16 != NULL)
                bf16->dot_tile(out + j, ld, (const uint32_t *)(const void *)block, a.row, a.step,
                               (const uint32_t *)(const void *)(panel + j), ldb, n, rows,
                               whole && accumulate, lines);
            else
                kernels->gemm_tile(out + j, ld, block, a.row, a.step, panel + j, ldb, n, rows,
                                   whole && accumulate, lines);
            lines = (anepy_lines){block, 0};
        }
        for (int32_t r = 0; r < rows && !whole; r++) {
            float *to = c + r * ldc;
            if (accumulate) kernels->add(to, to, tile + r * COLS, columns);
            else memcpy(to, tile + r * COLS, (size_t)columns * sizeof(float));
        }
    }
}

/* ------------------------------------------------------------------------------------ packing */

/* Rounds float32 rows [rows, k] to bf16, in rows of n units. */
static void round_rows(const anepy_bf16_kernels *bf16, float *dst, const float *src, int64_t ld,
                       int32_t rows, int32_t k, int32_t n) {
    for (int32_t i = 0; i < rows; i++) {
        uint16_t *row = (uint16_t *)(void *)(dst + (int64_t)i * n);
        bf16->to_bf16(row, src + i * ld, k);
        if (/* mutate: gemm-odd-row */ k % 2 != 0) row[k] = 0;
    }
}

/* Packs 64 columns of B from `column` on as [units][64]. rounded has room for 64 rows of units. */
static void pack_columns(const anepy_gemm *gemm, const anepy_product *s, float *panel,
                         int32_t column, float *rounded) {
    const anepy_bf16_kernels *bf16 = gemm->bf16;
    int64_t first = s->b_transposed ? column * s->ldb : column;
    int32_t n = units_of(gemm, s->k), columns = anepy_min_i32(COLS, s->n - column);
    uint32_t *pairs = (uint32_t *)(void *)panel;
    if (bf16 == NULL && !s->b_transposed) {
        for (int32_t p = 0; p < s->k; p++)
            memcpy(panel + (int64_t)p * COLS, s->b + first + p * s->ldb, COLS * sizeof(float));
    } else if (bf16 == NULL) {
        gemm->kernels->transpose_panel(panel, s->b + first, s->ldb, columns, s->k);
    } else if (!s->b_transposed && s->b16 != NULL) {
        bf16->zip_pairs(pairs, COLS, s->b16 + first, s->ldb, s->k, COLS);
    } else if (!s->b_transposed) {
        bf16->pack_pairs(pairs, COLS, s->b + first, s->ldb, s->k, COLS);
    } else if (s->b16 != NULL) {
        gemm->kernels->transpose_panel(panel, (const float *)(const void *)(s->b16 + first),
                                       s->ldb / 2, columns, n);
        for (int32_t j = 0; j < COLS && /* mutate: gemm-odd-column */ s->k % 2 != 0; j++)
            pairs[(n - 1) * COLS + j] &= 0xffff;
    } else {
        round_rows(bf16, rounded, s->b + first, s->ldb, columns, s->k, n);
        gemm->kernels->transpose_panel(panel, rounded, n, columns, n);
    }
}

/* Steps [p, p + k) of A for `rows` rows as [units][BLOCK_ROWS], where A is stored by columns; p is
 * even. */
static void pack_steps(const anepy_gemm *gemm, const anepy_product *s, float *block, int32_t first,
                       int32_t rows, int32_t p, int32_t k) {
    const anepy_bf16_kernels *bf16 = gemm->bf16;
    int64_t start = first * s->a_row + p * s->a_step;
    uint32_t *pairs = (uint32_t *)(void *)block;
    float wide[2 * BLOCK_ROWS];
    if (s->stored.data != NULL) {
        for (int32_t i = 0; i < k; i++) {
            float *step = bf16 != NULL ? wide + i % 2 * BLOCK_ROWS : block + i * BLOCK_ROWS;
            anepy_weights_read(gemm->kernels, step, s->stored, s->from + p + i, first, rows);
            if (bf16 != NULL && (i % 2 != 0 || i == k - 1))
                bf16->pack_pairs(pairs + i / 2 * BLOCK_ROWS, BLOCK_ROWS, wide, BLOCK_ROWS,
                                 i % 2 + 1, rows);
        }
    } else if (bf16 == NULL) {
        for (int32_t i = 0; i < k; i++)
            memcpy(block + (int64_t)i * BLOCK_ROWS, s->a + start + i * s->a_step,
                   (size_t)rows * sizeof(float));
    } else if (s->a16 != NULL) {
        bf16->zip_pairs(pairs, BLOCK_ROWS, s->a16 + start, s->a_step, k, rows);
    } else {
        bf16->pack_pairs(pairs, BLOCK_ROWS, s->a + start, s->a_step, k, rows);
    }
}

static units pack_by_columns(const anepy_gemm *gemm, const anepy_product *s, float *block,
                             int32_t first, int32_t rows) {
    int32_t n = units_of(gemm, s->k);
    float part[TURN_UNITS * BLOCK_ROWS];
    if (!by_panels(gemm->bf16)) {
        pack_steps(gemm, s, block, first, rows, 0, s->k);
        return (units){block, 1, BLOCK_ROWS};
    }
    for (int32_t u = 0; u < n; u += TURN_UNITS) {
        int32_t k = anepy_min_i32(2 * TURN_UNITS, s->k - 2 * u);
        pack_steps(gemm, s, part, first, rows, 2 * u, k);
        gemm->bf16->turn((uint32_t *)(void *)(block + u), n, (const uint32_t *)(const void *)part,
                         BLOCK_ROWS, rows, units_of(gemm, k));
    }
    return (units){block, n, 1};
}

/* bf16 in pairs that a kernel reads where they lie. */
static int pairs_in_place(const anepy_gemm *gemm, const anepy_product *s) {
    return gemm->bf16 != NULL && s->stored.dtype == ANEPY_BF16 && s->stored.cols % 2 == 0;
}

/* Rows of weights that are stored smaller. */
static units pack_stored(const anepy_gemm *gemm, const anepy_product *s, float *block,
                         int32_t first, int32_t rows) {
    const uint16_t *halves = s->stored.data;
    int32_t n = units_of(gemm, s->k);
    float *wide = block + BLOCK_ROWS * MULTIPLY_DEPTH;
    if (pairs_in_place(gemm, s)) {
        const void *at = halves + (int64_t)first * s->stored.cols + s->from;
        return (units){at, s->stored.cols / 2, 1};
    }
    for (int32_t i = 0; i < rows; i++) {
        float *row = block + (int64_t)i * n;
        anepy_weights_read(gemm->kernels, gemm->bf16 != NULL ? wide : row, s->stored, first + i,
                           s->from, s->k);
        if (gemm->bf16 != NULL) round_rows(gemm->bf16, row, wide, s->k, 1, s->k, n);
    }
    return (units){block, n, 1};
}

/* Rows [first, first + rows) of A with the whole reduction: in place if the kernel reads them in
 * order there, else packed into block. */
static units pack_rows(const anepy_gemm *gemm, const anepy_product *s, float *block, int32_t first,
                       int32_t rows) {
    int32_t n = units_of(gemm, s->k);
    int64_t start = first * s->a_row;
    if (s->a_step != 1) return pack_by_columns(gemm, s, block, first, rows);
    if (s->stored.data != NULL) return pack_stored(gemm, s, block, first, rows);
    if (gemm->bf16 == NULL) return (units){s->a + start, s->a_row, 1};
    if (s->a16 != NULL)
        return (units){(const float *)(const void *)(s->a16 + start), s->a_row / 2, 1};
    round_rows(gemm->bf16, block, s->a + start, s->a_row, rows, s->k, n);
    return (units){block, n, 1};
}

void anepy_gemm_row_squares(const anepy_gemm *gemm, const anepy_product *s, int32_t first,
                            int32_t rows) {
    for (int32_t r = first; r < first + rows && s->squares != NULL; r++)
        s->squares[r] = gemm->kernels->sum_squares(s->c + r * s->ldc, s->n);
}

/* -------------------------------------------------------------------- by the system's library */

/* Rows [first, first + rows) of C, on the calling thread. */
static void blas_rows(const anepy_blas *blas, const anepy_product *s, int32_t first, int32_t rows) {
    int by_columns = s->a_step != 1; /* A is stored transposed */
    int64_t lda = by_columns ? s->a_step : s->a_row;
    /* A single row or column may have any stride, but the library wants a plausible one. */
    int32_t least = by_columns ? rows : s->k, least_b = s->b_transposed ? s->k : s->n;
    blas->sgemm(by_columns, s->b_transposed, rows, s->n, s->k,
                s->a + /* mutate: blas-first-row */ first * s->a_row,
                anepy_max_i32((int32_t)lda, least), s->b, anepy_max_i32((int32_t)s->ldb, least_b),
                /* mutate: blas-accumulate */ s->accumulate ? 1.0f : 0.0f, s->c + first * s->ldc,
                (int32_t)s->ldc);
}

/* The same with weights that are stored smaller: as many rows at a time as there is room for. */
static void blas_stored(const anepy_gemm *gemm, const anepy_product *whole, int32_t first,
                        int32_t rows, float *room) {
    int32_t most = anepy_max_i32(1, (int32_t)(gemm->scratch_n / whole->k));
    if (most > BLAS_ROUND) most = most / BLAS_ROUND * BLAS_ROUND;
    for (int32_t end = first + rows; first < end; first += most) {
        anepy_product s = *whole;
        int32_t n = anepy_min_i32(most, end - first), by_rows = s.a_step == 1;
        for (int32_t i = 0; i < (by_rows ? n : s.k); i++)
            anepy_weights_read(gemm->kernels, room + (int64_t)i * (by_rows ? s.k : n), s.stored,
                               by_rows ? first + i : s.from + i, by_rows ? s.from : first,
                               by_rows ? s.k : n);
        s.a = room;
        s.a_row = by_rows ? s.k : 1;
        s.a_step = by_rows ? 1 : n;
        s.c += first * s.ldc;
        blas_rows(gemm->blas, &s, 0, n);
    }
}

static void blas_block(void *context, int32_t index, int32_t worker) {
    const anepy_gemm_job *job = context;
    const anepy_product *s = &job->product;
    int32_t first = index * BLAS_ROWS, rows = anepy_min_i32(BLAS_ROWS, s->m - first);
    if (s->stored.data != NULL)
        blas_stored(job->gemm, s, first, rows, job->gemm->scratch + worker * job->gemm->scratch_n);
    else blas_rows(job->gemm->blas, s, first, rows);
    /* mutate: blas-row-squares */ anepy_gemm_row_squares(job->gemm, s, first, rows);
}

static int by_blas(const anepy_gemm *gemm) { return gemm->blas != NULL && gemm->bf16 == NULL; }

int anepy_gemm_packs(const anepy_gemm *gemm) { return !by_blas(gemm); }

/* ------------------------------------------------------------------------ on all threads, now */

static void pack_panel(void *context, int32_t index, int32_t worker) {
    const anepy_gemm_job *job = context;
    const anepy_gemm *gemm = job->gemm;
    int64_t panel_n = (int64_t)units_of(gemm, job->product.k) * COLS;
    pack_columns(gemm, &job->product, gemm->panels + index * panel_n, index * COLS,
                 gemm->scratch + worker * gemm->scratch_n + TILE_N);
}

anepy_product anepy_gemm_part(const anepy_product *whole, int32_t p, int32_t k) {
    anepy_product s = *whole;
    int64_t a = p * s.a_step, b = s.b_transposed ? p : p * s.ldb;
    if (s.stored.data != NULL) s.from += p;
    else if (s.a16 != NULL) s.a16 += a;
    else s.a += a;
    if (s.b16 != NULL) s.b16 += b;
    else if (s.b != NULL) s.b += b; /* B may be packed already */
    s.k = anepy_min_i32(k, whole->k - p);
    s.accumulate = whole->accumulate || /* mutate: gemm-later-part-adds */ p > 0;
    if (/* mutate: gemm-squares-of-last-part */ p + s.k < whole->k) s.squares = NULL;
    if (p + s.k < whole->k) s.also = NULL;
    return s;
}

/* A of piece `index` as memory to prefetch; an empty one if there is no such piece. */
static upcoming rows_ahead(const anepy_gemm *gemm, const anepy_product *s, int32_t index) {
    int32_t first = index * BLOCK_ROWS, rows = anepy_min_i32(BLOCK_ROWS, s->m - first);
    int32_t by_rows = s->a_step == 1, halves = gemm->bf16 != NULL && s->a16 != NULL;
    int64_t size = halves ? sizeof *s->a16 : sizeof *s->a, start = first * s->a_row;
    int32_t tiles = BLOCK_ROWS / ANEPY_TILE_ROWS * anepy_pieces(s->n, COLS);
    upcoming u = {.n = units_of(gemm, s->k), .every = 1};
    if (rows <= 0 || s->stored.data != NULL) return u;
    u.at = halves ? (const char *)(s->a16 + start) : (const char *)(s->a + start);
    if (!by_rows) {
        u.stride = s->a_step * size;
        u.rows = s->k;
        u.columns = (int32_t)((rows * size + LINE - 1) / LINE);
        int32_t wanted = u.columns * ((u.rows + u.n - 1) / u.n);
        u.every = anepy_max_i32(1, tiles / wanted);
    } else if (s->a_row == s->k) { /* contiguous memory, spread over all tiles */
        int64_t steps = (int64_t)tiles * u.n;
        u.stride = (rows * s->k * size + steps - 1) / steps;
        u.rows = tiles * u.n;
        u.columns = 1;
    }
    return u;
}

/* Adds the further product of a block of C: [rows, columns] from `first`, `column` on. */
static void add_further(const anepy_gemm *gemm, const anepy_product *whole, int32_t first,
                        int32_t rows, int32_t column, int32_t columns, float *tile) {
    const anepy_product *s = whole->also;
    int32_t n = units_of(gemm, s->k), end = column + columns;
    units a = pack_rows(gemm, s, tile + TILE_N, first, rows);
    for (int32_t j = column; j < end; j += COLS)
        multiply_panel(gemm->kernels, gemm->bf16, whole->c + first * whole->ldc + j, whole->ldc, a,
                       s->panels + (int64_t)n * j, COLS, n, rows, anepy_min_i32(COLS, end - j), 1,
                       NULL, tile);
}

/* How many pieces the columns of a block of rows are cut into: a product with few rows has few
 * blocks, and sums of squares take whole rows. */
static int32_t column_pieces(const anepy_product *s) {
    int32_t blocks = anepy_pieces(s->m, BLOCK_ROWS), panels = anepy_pieces(s->n, COLS);
    if (blocks >= FEW_BLOCKS || s->squares != NULL) return 1;
    return anepy_min_i32(panels, THIN_PIECES);
}

/* Computes a block of rows of C, one part of the reduction after another, so that the panels of a
 * part and C stay in the cache. Meanwhile A is prefetched: of the next part, or of the piece that
 * this worker will probably take next. */
static void multiply_rows(void *context, int32_t index, int32_t worker) {
    const anepy_gemm_job *job = context;
    const anepy_gemm *gemm = job->gemm;
    const anepy_product *whole = &job->product;
    float *tile = gemm->scratch + worker * gemm->scratch_n;
    int32_t cuts = column_pieces(whole), block = index / cuts,
            panels = anepy_pieces(whole->n, COLS);
    int32_t column = index % cuts * panels / cuts * COLS;
    int32_t end = anepy_min_i32(whole->n, (index % cuts + 1) * panels / cuts * COLS);
    int32_t first = block * BLOCK_ROWS, rows = anepy_min_i32(BLOCK_ROWS, whole->m - first);
    int32_t n = units_of(gemm, whole->packed_k > 0 ? whole->packed_k : whole->k),
            most = MULTIPLY_DEPTH * steps_per_unit(gemm);
    int32_t parts = anepy_pieces(whole->k, most);
    int32_t k = (int32_t)anepy_round_up(anepy_pieces(whole->k, parts), 16);
    for (int32_t p = 0; p < whole->k; p += k) {
        int last = p + k >= whole->k, ahead = last ? anepy_pool_threads(gemm->pool) : 0;
        anepy_product s = anepy_gemm_part(whole, p, k),
                      after = anepy_gemm_part(whole, last ? 0 : p + k, k);
        upcoming next = {0};
        if (cuts == 1) next = rows_ahead(gemm, &after, index + ahead);
        units a = pack_rows(gemm, &s, tile + TILE_N, first, rows);
        const float *panel =
            gemm->panels + (int64_t)n * column + (int64_t)units_of(gemm, whole->b_row + p) * COLS;
        for (int32_t j = column; j < end; j += COLS, panel += (int64_t)n * COLS) {
            float *c = s.c + first * s.ldc + j;
            next.right = s.accumulate && j + 2 * COLS <= s.n ? c + COLS : NULL;
            multiply_panel(gemm->kernels, gemm->bf16, c, s.ldc, a, panel, COLS, units_of(gemm, s.k),
                           rows, anepy_min_i32(COLS, s.n - j), s.accumulate, &next, tile);
        }
    }
    if (whole->also != NULL) add_further(gemm, whole, first, rows, column, end - column, tile);
    anepy_gemm_row_squares(gemm, whole, first, rows);
}

int32_t anepy_gemm_depth(const anepy_gemm *gemm) { return PANEL_DEPTH * steps_per_unit(gemm); }

void anepy_gemm_pack(const anepy_gemm *gemm, const anepy_product *product) {
    anepy_gemm_job job = {gemm, *product};
    anepy_pool_run(gemm->pool, anepy_pieces(product->n, COLS), pack_panel, &job);
}

void anepy_gemm_pack_rows(const anepy_gemm *gemm, int32_t k, const float *src, int64_t ld,
                          int32_t row, int32_t rows, int32_t column, int32_t columns) {
    int64_t n = units_of(gemm, k);
    for (int32_t j = 0; j < columns; j += COLS) {
        float *to = gemm->panels + (column + j) * n + row / 2 * COLS;
        gemm->bf16->pack_pairs((uint32_t *)(void *)to, COLS, src + j, ld, rows, COLS);
    }
}

/* A large second cache keeps the panels of a part of the reduction, so all rows are multiplied by
 * one part after the other; else each piece goes through all parts, and its C stays in the cache.
 */
void anepy_gemm_multiply(const anepy_gemm *gemm, const anepy_product *product) {
    int32_t k = product->k, most = CACHED_DEPTH * steps_per_unit(gemm);
    if (anepy_machine_second_cache() >= LARGE_CACHE)
        k = (int32_t)anepy_round_up(anepy_pieces(k, anepy_pieces(k, most)), 16);
    for (int32_t p = 0; p < product->k; p += k) {
        anepy_gemm_job job = {gemm, anepy_gemm_part(product, p, k)};
        job.product.b_row += p;
        job.product.packed_k = product->packed_k > 0 ? product->packed_k : product->k;
        int32_t blocks = anepy_pieces(product->m, BLOCK_ROWS);
        anepy_pool_run(gemm->pool, blocks * column_pieces(&job.product), multiply_rows, &job);
    }
}

void anepy_gemm_run(const anepy_gemm *gemm, const anepy_product *product) {
    if (by_blas(gemm)) {
        anepy_gemm_job job = {gemm, *product};
        anepy_pool_run(gemm->pool, anepy_pieces(product->m, BLAS_ROWS), blas_block, &job);
        if (product->also == NULL) return;
        job.product.stored = product->also->stored;
        job.product.a = product->also->a;
        job.product.a_row = product->also->a_row;
        job.product.a_step = product->also->a_step;
        job.product.b = product->also->b;
        job.product.ldb = product->also->ldb;
        job.product.k = product->also->k;
        job.product.accumulate = 1;
        anepy_pool_run(gemm->pool, anepy_pieces(product->m, BLAS_ROWS), blas_block, &job);
        return;
    }
    int32_t depth = anepy_gemm_depth(gemm);
    for (int32_t p = 0; p < product->k; p += depth) {
        anepy_product s = anepy_gemm_part(product, p, depth);
        anepy_gemm_pack(gemm, &s);
        anepy_gemm_multiply(gemm, &s);
    }
}

/* ------------------------------------------------------------------------- in the background */

static int32_t row_pieces(const anepy_product *s) { return anepy_pieces(s->m, BACKGROUND_ROWS); }

int32_t anepy_gemm_pieces(const anepy_product *product) {
    return row_pieces(product) * anepy_pieces(product->n, COLS);
}

/* The area of C that a background piece computes. With the system's library there are as many
 * pieces, of whole rows. */
typedef struct {
    int32_t row, rows, column, columns;
} area;

static area area_of(const anepy_gemm *gemm, const anepy_product *s, int32_t index) {
    int32_t panels = anepy_pieces(s->n, COLS), pieces = row_pieces(s) * panels;
    int32_t row = index / panels * BACKGROUND_ROWS, column = index % panels * COLS;
    if (by_blas(gemm)) {
        int32_t most = (s->m + /* mutate: blas-last-piece */ pieces - 1) / pieces;
        int32_t rows = (int32_t)anepy_round_up(most, BLAS_ROUND);
        row = anepy_min_i32(s->m, index * rows);
        return (area){row, anepy_min_i32(rows, s->m - row), 0, s->n};
    }
    return (area){row, anepy_min_i32(BACKGROUND_ROWS, s->m - row), column,
                  anepy_min_i32(COLS, s->n - column)};
}

void anepy_gemm_piece_squares(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_gemm_job *job = context;
    const anepy_product *s = &job->product;
    area p = area_of(job->gemm, s, index);
    const float *c = s->c + p.row * s->ldc + p.column;
    double sum = 0.0;
    for (int32_t r = 0; r < p.rows; r++)
        sum += job->gemm->kernels->sum_squares(c + r * s->ldc, p.columns);
    s->squares[index] = /* mutate: gemm-piece-squares */ sum;
}

/* A is read in place, or packed a block at a time. */
static void multiply_piece(const anepy_gemm *gemm, const anepy_product *s, area p, float *tile) {
    int32_t n = units_of(gemm, s->k), end = p.row + p.rows;
    float *panel = tile + TILE_N, *block = panel + (int64_t)n * COLS;
    pack_columns(gemm, s, panel, p.column, block);
    int in_place = gemm->bf16 == NULL || (s->a16 != NULL && s->a_step == 1);
    int32_t step = in_place ? BACKGROUND_ROWS : BLOCK_ROWS;
    for (int32_t first = p.row; first < end; first += step) {
        int32_t rows = anepy_min_i32(step, end - first);
        units a = gemm->bf16 != NULL ? pack_rows(gemm, s, block, first, rows)
                                     : (units){s->a + first * s->a_row, s->a_row, s->a_step};
        multiply_panel(gemm->kernels, gemm->bf16, s->c + first * s->ldc + p.column, s->ldc, a,
                       panel, COLS, n, rows, p.columns, s->accumulate, NULL, tile);
    }
}

void anepy_gemm_piece(void *context, int32_t index, int32_t worker) {
    const anepy_gemm_job *job = context;
    const anepy_gemm *gemm = job->gemm;
    area p = area_of(gemm, &job->product, index);
    if (!by_blas(gemm))
        multiply_piece(gemm, &job->product, p, gemm->scratch + worker * gemm->scratch_n);
    else if (p.rows > 0) blas_rows(gemm->blas, &job->product, p.row, p.rows);
    if (job->product.squares != NULL) anepy_gemm_piece_squares(context, index, worker);
}

/* ------------------------------------------------------------------------------ in the cache */

void anepy_gemm_small(const anepy_kernels *kernels, const anepy_bf16_kernels *bf16, float *c,
                      int64_t ldc, const float *a, int64_t a_row, int64_t a_step, const float *b,
                      int64_t ldb, int32_t m, int32_t n, int32_t k, int32_t accumulate) {
    uint32_t turned[COLS * COLS];
    if (by_panels(bf16) && a_step != 1) {
        for (int32_t p = 0; p < k; p += COLS) {
            int32_t part = anepy_min_i32(COLS, k - p);
            bf16->turn(turned, COLS, (const uint32_t *)(const void *)(a + p * a_step), a_step, m,
                       part);
            for (int32_t j = 0; j < n; j += COLS)
                bf16->dot_panel(c + j, ldc, turned, COLS,
                                (const uint32_t *)(const void *)(b + p * ldb + j), ldb, part, m,
                                accumulate || p > 0);
        }
        return;
    }
    for (int32_t j = 0; j < n; j += COLS)
        multiply_panel(kernels, bf16, c + j, ldc, (units){a, a_row, a_step}, b + j, ldb, k, m, COLS,
                       accumulate, NULL, NULL);
}
