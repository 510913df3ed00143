/* device/sim/multiply.c - matrix products of any size over the GEMM kernels. */
#include "device/sim/interpreter_internal.h"

#include <string.h>

#define COLS ANEPY_COLUMNS
#define PRODUCT_ROWS 48 /* rows of C in a piece of a batched product: 8 tiles */
#define MOST_DEPTH 1024 /* longer reductions are faster with the blocking of anepy_gemm_run */
#define MOST_PACKED ((int64_t)16 << 20) /* floats */

/* --------------------------------------------------------------------------------- one product */

/* B is padded where its rows are no multiple of the panel width. */
int64_t mil_multiply_scratch_n(const anepy_mil *mil, int64_t m, int64_t n, int64_t k,
                               int32_t b_transposed) {
    if (mil->numerics->fixed) return mil_fixed_scratch_n(n, k);
    return b_transposed || n % ANEPY_COLUMNS == 0 ? 0 : (m + k) * anepy_round_up(n, ANEPY_COLUMNS);
}

/* C += bias */
static void add_bias(const mil_matmul *s) {
    for (int64_t i = 0; s->bias != NULL && i < s->m; i++)
        for (int64_t j = 0; j < s->n; j++)
            s->c[i * s->ldc + j] += s->bias[s->bias_by_column ? j : i];
}

void mil_multiply(mil_run *r, const mil_matmul *s, float *pad) {
    if (r->mil->numerics->fixed) {
        mil_fixed_multiply(r, s, pad);
        return;
    }
    anepy_product p = {.c = s->c,
                       .a = s->a,
                       .b = s->b,
                       .ldc = s->ldc,
                       .a_row = s->a_row,
                       .a_step = s->a_step,
                       .ldb = s->ldb,
                       .b_transposed = s->b_transposed,
                       .m = (int32_t)s->m,
                       .k = (int32_t)s->k};
    int64_t n = s->n;
    int padded = mil_multiply_scratch_n(r->mil, s->m, n, s->k, s->b_transposed) > 0;
    if (padded) {
        n = anepy_round_up(n, ANEPY_COLUMNS);
        for (int64_t i = 0; i < s->k; i++) {
            memcpy(pad + i * n, s->b + i * s->ldb, (size_t)s->n * sizeof *pad);
            memset(pad + i * n + s->n, 0, (size_t)(n - s->n) * sizeof *pad);
        }
        p.b = pad;
        p.c = pad + s->k * n;
        p.ldb = p.ldc = n;
    }
    const float *b = p.b;
    float *c = p.c;
    for (int64_t j = 0; j < n; j += MIL_COLUMNS) {
        p.n = (int32_t)(n - j < MIL_COLUMNS ? n - j : MIL_COLUMNS);
        p.b = b + (p.b_transposed ? j * p.ldb : j);
        p.c = c + j;
        anepy_gemm_run(&r->gemm, &p);
    }
    for (int64_t i = 0; padded && i < s->m; i++)
        memcpy(s->c + i * s->ldc, c + i * n, (size_t)s->n * sizeof *c);
    add_bias(s);
}

void mil_round_sums(mil_run *r, float *p, int64_t n) {
    if (!r->mil->numerics->fixed) mil_round_all(r, p, n);
}

/* ------------------------------------------------------------------------------ many of one size
 */

/* Many small products: all are packed, then all multiplied, so that threads meet twice and not at
 * each product. */
static int64_t packed_n(const mil_batch *s) {
    return s->count * s->one.k * anepy_round_up(s->one.n, COLS);
}

static int is_packable(const mil_batch *s) {
    return s->count > 1 && s->one.k <= MOST_DEPTH &&
           (double)s->count * (double)s->one.k * (double)(s->one.n + COLS) < (double)MOST_PACKED;
}

static int is_vector(const mil_batch *s) {
    return s->one.n == 1 && s->one.a_step == 1 && s->one.ldc == 1;
}

int64_t mil_multiply_batch_scratch_n(const anepy_mil *mil, const mil_batch *s) {
    if (!mil->numerics->fixed && is_vector(s)) return 0;
    if (!mil->numerics->fixed && is_packable(s)) return packed_n(s);
    return mil_multiply_scratch_n(mil, s->one.m, s->one.n, s->one.k, s->one.b_transposed);
}

typedef struct {
    mil_run *run;
    const mil_batch *batch;
    float *packed;
} batch_job;

/* Product number i of the batch. */
static mil_matmul product_at(const mil_batch *s, int64_t i) {
    mil_matmul one = s->one;
    int64_t rest = i, x = 0, y = 0;
    for (int64_t d = 0; d < s->dim_n; d++) {
        const int64_t *dim = s->dims + 3 * d;
        x += rest % dim[0] * dim[1];
        y += rest % dim[0] * dim[2];
        rest /= dim[0];
    }
    one.a += x * one.m * one.k;
    one.b += y * one.k * one.n;
    one.c += i * one.m * one.n;
    return one;
}

/* Packs 64 columns of one B as [k][64]; index counts panels over all products. */
static void pack_columns(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const batch_job *job = context;
    int64_t panels = (job->batch->one.n + COLS - 1) / COLS, first = index % panels * COLS;
    mil_matmul s = product_at(job->batch, index / panels);
    int64_t columns = s.n - first < COLS ? s.n - first : COLS;
    float *panel = job->packed + (int64_t)index * s.k * COLS;
    if (s.b_transposed) {
        job->run->mil->kernels->transpose_panel(panel, s.b + first * s.ldb, s.ldb, (int32_t)columns,
                                                (int32_t)s.k);
        return;
    }
    for (int64_t p = 0; p < s.k; p++) {
        memcpy(panel + p * COLS, s.b + p * s.ldb + first, (size_t)columns * sizeof *panel);
        memset(panel + p * COLS + columns, 0, (size_t)(COLS - columns) * sizeof *panel);
    }
}

/* Computes 48 rows of one C; index counts such pieces over all products. */
static void multiply_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const batch_job *job = context;
    int64_t pieces = (job->batch->one.m + PRODUCT_ROWS - 1) / PRODUCT_ROWS, batch = index / pieces;
    mil_matmul s = product_at(job->batch, batch);
    int64_t first = index % pieces * PRODUCT_ROWS,
            rows = s.m - first < PRODUCT_ROWS ? s.m - first : PRODUCT_ROWS;
    const float *a = s.a + first * s.a_row;
    float *c = s.c + first * s.ldc, tile[PRODUCT_ROWS * COLS];
    const float *panel = job->packed + batch * s.k * anepy_round_up(s.n, COLS);
    for (int64_t j = 0; j < s.n; j += COLS, panel += s.k * COLS) {
        int whole = s.n - j >= COLS;
        anepy_gemm_small(job->run->mil->kernels, NULL, whole ? c + j : tile, whole ? s.ldc : COLS,
                         a, s.a_row, s.a_step, panel, COLS, (int32_t)rows, COLS, (int32_t)s.k, 0);
        for (int64_t i = 0; !whole && i < rows; i++)
            memcpy(c + i * s.ldc + j, tile + i * COLS, (size_t)(s.n - j) * sizeof *c);
    }
}

/* Computes 48 elements of one matrix-vector product. */
static void multiply_vector(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const batch_job *job = context;
    int64_t pieces = (job->batch->one.m + PRODUCT_ROWS - 1) / PRODUCT_ROWS;
    mil_matmul s = product_at(job->batch, index / pieces);
    int64_t first = index % pieces * PRODUCT_ROWS,
            rows = s.m - first < PRODUCT_ROWS ? s.m - first : PRODUCT_ROWS;
    job->run->mil->kernels->gemv(s.c + first, s.a + first * s.a_row, s.a_row, s.b, (int32_t)rows,
                                 (int32_t)s.k);
}

void mil_multiply_batch(mil_run *r, const mil_batch *batch, float *scratch) {
    const mil_matmul *s = &batch->one;
    batch_job job = {r, batch, scratch};
    int64_t pieces = batch->count * ((s->m + PRODUCT_ROWS - 1) / PRODUCT_ROWS);
    if (!r->mil->numerics->fixed && is_vector(batch)) {
        mil_each(r, pieces, multiply_vector, &job);
    } else if (!r->mil->numerics->fixed && is_packable(batch)) {
        mil_each(r, batch->count * ((s->n + COLS - 1) / COLS), pack_columns, &job);
        mil_each(r, pieces, multiply_rows, &job);
    } else {
        for (int64_t i = 0; i < batch->count; i++) {
            mil_matmul one = product_at(batch, i);
            mil_multiply(r, &one, scratch);
        }
    }
}
