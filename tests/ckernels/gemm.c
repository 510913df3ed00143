/* gemm.c - blocked products of every instruction set against a plain triple loop: whole numbers,
 * whose sums are exact in any order, then real numbers for rounding and for equal bits on any
 * number of threads. Operands, packed panels and scratch all stand between guards. */
#include "kernels/gemm.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "groups.h"
#include "guard.h"
#include "kernels/blas.h"

#define COLS ANEPY_COLUMNS
#define LARGEST (1 << 18) /* elements of the largest C here */
#define LARGEST_M 4096    /* more than the rows of any */

typedef struct {
    int32_t m, n, k;
} shape;

/* One pool per thread count, and the memory products need. */
static const int32_t THREADS[] = {1, 2, 3, 5};
enum { POOL_N = sizeof THREADS / sizeof THREADS[0] };
static anepy_pool *pools[POOL_N];

/* ------------------------------------------------------------------------------------- operands */

typedef struct {
    anepy_product product;
    float *c;
    int64_t c_n;             /* floats from its first to its last */
    double *expected, *size; /* [m, n]: sums of products and of their absolute values */
    int place;
} problem;

static double a_at(const anepy_product *s, int64_t i, int64_t p) {
    return s->a[i * s->a_row + p * s->a_step];
}

static double b_at(const anepy_product *s, int64_t p, int64_t j) {
    return s->b[s->b_transposed ? j * s->ldb + p : p * s->ldb + j];
}

static double *doubles(int64_t n) {
    double *x = calloc((size_t)n, sizeof *x);
    if (x == NULL) abort();
    return x;
}

/* a_by_columns: A stands as [k, m]. slack: how much longer rows are than they must be. */
static problem pose(shape d, int a_by_columns, int b_transposed, int64_t slack, int place,
                    float (*next)(void)) {
    int64_t lda = (a_by_columns ? d.m : d.k) + slack, ldb = (b_transposed ? d.k : d.n) + slack;
    problem q = {.place = place};
    float *a = a_by_columns ? guard_matrix(d.k, d.m, lda, place, next)
                            : guard_matrix(d.m, d.k, lda, place, next);
    float *b = b_transposed ? guard_matrix(d.n, d.k, ldb, place, next)
                            : guard_matrix(d.k, d.n, ldb, place, next);
    q.product = (anepy_product){.a = a,
                                .b = b,
                                .ldc = d.n + slack,
                                .a_row = a_by_columns ? 1 : lda,
                                .a_step = a_by_columns ? lda : 1,
                                .ldb = ldb,
                                .b_transposed = b_transposed,
                                .m = d.m,
                                .n = d.n,
                                .k = d.k};
    q.c_n = span(d.m, d.n, q.product.ldc);
    q.expected = doubles((int64_t)d.m * d.n);
    q.size = doubles((int64_t)d.m * d.n);
    for (int64_t i = 0; i < d.m; i++) {
        for (int64_t p = 0; p < d.k; p++) {
            double x = a_at(&q.product, i, p);
            for (int64_t j = 0; j < d.n; j++) {
                double term = x * b_at(&q.product, p, j);
                q.expected[i * d.n + j] += term;
                q.size[i * d.n + j] += fabs(term);
            }
        }
    }
    return q;
}

/* Before each product: C holds j - i, which counts if accumulating, else NaN. */
static void prepare(problem *q, int32_t accumulate) {
    anepy_product *s = &q->product;
    s->c = q->c;
    s->accumulate = accumulate;
    for (int64_t i = 0; i < s->m; i++)
        for (int64_t j = 0; j < s->n; j++)
            q->c[i * s->ldc + j] = accumulate ? (float)(j % 7 - i % 5) : NAN;
}

/* exact: whole numbers. Otherwise any order of summation is within k roundings of its terms,
 * which bf16 products may do to odd: by one unit, not half of one. */
static int right(const problem *q, int exact) {
    const anepy_product *s = &q->product;
    for (int64_t i = 0; i < s->m; i++) {
        for (int64_t j = 0; j < s->n; j++) {
            double start = s->accumulate ? (double)(j % 7 - i % 5) : 0.0;
            double expected = q->expected[i * s->n + j] + start, actual = q->c[i * s->ldc + j];
            double size = q->size[i * s->n + j] + fabs(start);
            if (exact ? actual != expected : !is_close(actual, expected, 2.0 * s->k + 2.0, size))
                return 0;
        }
    }
    return gaps_intact(q->c, s->m, s->n, s->ldc) && guard_intact();
}

static void done(problem *q) {
    free(q->expected);
    free(q->size);
    guard_reset();
}

/* ------------------------------------------------------------------------------ the three forms */

enum { RUN, PIECES, SMALL };
static const char *const FORMS[] = {"run", "piece", "small"};

/* Kinds of factors: float32, rounded to bf16 on the way, rounded before. */
enum { FLOATS, ROUNDED, HALVES, KINDS };
static const char *const FACTORS[] = {"float32", "bf16 from float32", "bf16"};

static void compute(anepy_gemm *gemm, int form, const anepy_product *s) {
    anepy_gemm_job job = {gemm, *s};
    switch (form) {
    case RUN: anepy_gemm_run(gemm, s); break;
    case PIECES: anepy_pool_run(gemm->pool, anepy_gemm_pieces(s), anepy_gemm_piece, &job); break;
    default:
        anepy_gemm_small(gemm->kernels, NULL, s->c, s->ldc, s->a, s->a_row, s->a_step, s->b, s->ldb,
                         s->m, s->n, s->k, s->accumulate);
    }
}

/* Pieces take B transposed, small products take it as it is. */
static int fits(int form, int b_transposed) {
    return form == RUN || (form == PIECES ? b_transposed : !b_transposed);
}

/* Memory of exactly the promised size: the guards tell if more is used. */
static anepy_gemm make_gemm(const anepy_kernels *set, anepy_pool *pool, shape d, int form,
                            int kind) {
    anepy_gemm gemm = {.kernels = set, .pool = pool, .bf16 = kind == FLOATS ? NULL : set->bf16};
    if (kind == FLOATS) CHECK(anepy_blas_get(&gemm.blas) == ANEPY_OK, "ANEPY_BLAS");
    gemm.scratch_n = anepy_gemm_scratch_n(form == PIECES ? d.k : 1);
    gemm.panels = guard_take(anepy_gemm_panels_n(d.n), GUARD_END);
    gemm.scratch = guard_take(gemm.scratch_n * anepy_pool_threads(pool), GUARD_END);
    return gemm;
}

/* The rows of a factor in bf16, rows an even number of elements apart; behind each, and in the
 * padding of rows of odd length, stands 3. */
static uint16_t *halves_of(const float *x, int64_t rows, int64_t columns, int64_t ld,
                           int64_t *half_ld, int place) {
    *half_ld = anepy_round_up(columns, 2) + 2 * (ld - columns);
    int64_t n = (rows - 1) * *half_ld + anepy_round_up(columns, 2);
    uint16_t *halves = guard_halves(n, place);
    for (int64_t i = 0; i < n; i++) halves[i] = 0x4040;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++)
            halves[i * *half_ld + j] = (uint16_t)(to_bits(x[i * ld + j]) >> 16);
    return halves;
}

/* The same problem with factors that bf16 holds exactly. */
static anepy_product in_halves(const problem *q) {
    anepy_product s = q->product;
    int by_columns = s.a_step != 1;
    int64_t lda = by_columns ? s.a_step : s.a_row;
    s.a16 = halves_of(s.a, by_columns ? s.k : s.m, by_columns ? s.m : s.k, lda, &lda, q->place);
    if (by_columns) s.a_step = lda;
    else s.a_row = lda;
    s.b16 = halves_of(s.b, s.b_transposed ? s.n : s.k, s.b_transposed ? s.k : s.n, s.ldb, &s.ldb,
                      q->place);
    s.a = s.b = NULL;
    return s;
}

static double squares[LARGEST_M];

/* Those of a run, row by row; those of pieces together. All are there, and no more. */
static void check_squares(const anepy_gemm *gemm, const problem *q, int form) {
    const anepy_product *s = &q->product;
    int32_t count = form == RUN ? s->m : anepy_gemm_pieces(s), wrong = squares[count] != -1.0;
    double sum = 0.0, expected = 0.0;
    for (int32_t i = 0; i < count; i++) {
        sum += squares[i];
        wrong += !(squares[i] >= 0.0);
    }
    for (int32_t i = 0; i < s->m; i++) {
        double row = KERNEL(gemm->kernels, sum_squares)(q->c + i * s->ldc, s->n);
        expected += row;
        wrong += form == RUN && row != squares[i];
    }
    CHECK(wrong == 0 && is_close(sum, expected, 0.0, 0.0),
          "gemm_%s: squares of m %d, n %d, k %d: %d are wrong, the sum is %g, not %g", FORMS[form],
          s->m, s->n, s->k, wrong, sum, expected);
}

static void check_kind(problem *q, shape d, int form, int kind, const anepy_kernels *set) {
    anepy_gemm gemm = make_gemm(set, pools[1], d, form, kind);
    anepy_product halves = kind == HALVES ? in_halves(q) : q->product;
    for (int32_t accumulate = 0; accumulate < 2; accumulate++) {
        prepare(q, accumulate);
        halves.c = q->c;
        halves.accumulate = accumulate;
        halves.squares = q->product.squares = accumulate ? NULL : squares;
        for (int32_t i = 0; i < LARGEST_M; i++) squares[i] = -1.0;
        compute(&gemm, form, kind == HALVES ? &halves : &q->product);
        if (!accumulate && form != SMALL) check_squares(&gemm, q, form);
        CHECK(right(q, 1),
              "gemm_%s %s, %s: m %d, n %d, k %d, a_row %lld, transposed %d, "
              "accumulate %d, place %d",
              FORMS[form], set->isa, FACTORS[kind], d.m, d.n, d.k, (long long)q->product.a_row,
              q->product.b_transposed, accumulate, q->place);
    }
}

static void check_form(problem *q, shape d, int form, int kind) {
    const anepy_kernels *set;
    for (int32_t i = 0; (set = anepy_kernels_at(i)) != NULL; i++)
        if (kind == FLOATS || (set->bf16 != NULL && form != SMALL))
            check_kind(q, d, form, kind, set);
}

/* Columns of a product with B as it is come in whole panels. */
static void check_shape(shape d, int a_by_columns, int b_transposed, int64_t slack, int place) {
    if (!b_transposed) d.n = (int32_t)anepy_round_up(d.n, COLS);
    for (int form = RUN; form <= SMALL; form++) {
        if (!fits(form, b_transposed)) continue;
        for (int kind = FLOATS; kind < KINDS; kind++) {
            problem q = pose(d, a_by_columns, b_transposed, slack, place, random_whole);
            q.c = guard_take(q.c_n, place);
            check_form(&q, d, form, kind);
            done(&q);
        }
    }
}

static void check_shapes(void) {
    static const shape shapes[] = {
        {1, 1, 1},     {1, 64, 1},    {2, 3, 5},     {5, 63, 7},    {6, 64, 64},    {7, 65, 63},
        {12, 128, 65}, {47, 33, 16},  {48, 64, 100}, {49, 130, 31}, {95, 1, 64},    {96, 96, 2},
        {97, 64, 1},   {1, 64, 1023}, {6, 64, 1024}, {7, 63, 1025}, {13, 66, 2048}, {50, 65, 2100},
        {7, 64, 4100}, {1535, 2, 3},  {1536, 64, 2}, {1537, 65, 1}, {3079, 5, 2},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i += brief ? 5 : 1)
        for (int form = 0; form < 4; form++)
            check_shape(shapes[i], form & 1, form >> 1, (int64_t)(i + (size_t)form) % 3 * 5,
                        (int)(i + (size_t)form) % GUARD_PLACES);
}

static void check_random_shapes(void) {
    for (int i = 0; i < (brief ? 15 : 60); i++) {
        shape d = {1 + random_below(110), 1 + random_below(140), 1 + random_below(150)};
        check_shape(d, random_below(2), random_below(2), random_below(9),
                    random_below(GUARD_PLACES));
    }
}

/* ------------------------------------------------------------------------- rounding and threads */

static float random_real(void) { return random_float(-1.0f, 1.0f); }
static float random_bf16(void) { return from_bits(to_bits(random_real()) & 0xffff0000u); }

/* Real numbers: within the rounding any order may have, and the same bits from every pool. */
static void check_threads(const anepy_kernels *set, shape d, int a_by_columns, int b_transposed,
                          int kind) {
    static float first[LARGEST];
    if (kind == ROUNDED && set->bf16 == NULL) return;
    for (int form = RUN; form <= PIECES; form++) {
        if (!fits(form, b_transposed)) continue;
        problem q = pose(d, a_by_columns, b_transposed, 3, GUARD_END,
                         kind == FLOATS ? random_real : random_bf16);
        q.c = guard_take(q.c_n, GUARD_END);
        for (int t = 0; t < POOL_N; t++) {
            anepy_gemm gemm = make_gemm(set, pools[t], d, form, kind);
            for (int repeat = 0; repeat < 3; repeat++) {
                prepare(&q, 1);
                compute(&gemm, form, &q.product);
                if (t == 0 && repeat == 0) {
                    CHECK(right(&q, 0), "gemm_%s %s: rounding, m %d, n %d, k %d", FORMS[form],
                          set->isa, d.m, d.n, d.k);
                    memcpy(first, q.c, (size_t)q.c_n * sizeof(float));
                }
                CHECK(all_same(q.c, first, q.c_n),
                      "gemm_%s %s: other bits with %d threads, m %d, "
                      "n %d, k %d",
                      FORMS[form], set->isa, THREADS[t], d.m, d.n, d.k);
            }
        }
        done(&q);
    }
}

/* NaN in one row of A is NaN in that row of C and nowhere else. */
static void check_nan(const anepy_kernels *set) {
    shape d = {100, 64, 70};
    problem q = pose(d, 0, 0, 0, GUARD_END, random_real);
    q.c = guard_take(q.c_n, GUARD_END);
    anepy_gemm gemm = make_gemm(set, pools[1], d, RUN, FLOATS);
    ((float *)(uintptr_t)q.product.a)[51 * 70 + 69] = NAN;
    prepare(&q, 0);
    compute(&gemm, RUN, &q.product);
    int kept = 1;
    for (int64_t i = 0; i < d.m; i++)
        for (int64_t j = 0; j < d.n; j++) kept &= (isnan(q.c[i * d.n + j]) != 0) == (i == 51);
    CHECK(kept, "gemm_run %s: NaN is lost or spread", set->isa);
    done(&q);
}

void checks_gemm(void) {
    const anepy_kernels *set;
    for (int t = 0; t < POOL_N; t++)
        if (!CHECK(anepy_pool_create(&pools[t], THREADS[t]) == ANEPY_OK, "no pool")) return;
    check_shapes();
    check_random_shapes();
    for (int32_t i = 0; (set = anepy_kernels_at(i)) != NULL; i++) {
        for (int kind = FLOATS; kind <= ROUNDED; kind++) {
            check_threads(set, (shape){301, 128, 200}, 0, 0, kind);
            check_threads(set, (shape){145, 64, kind == FLOATS ? 1300 : 2100}, 1, 0, kind);
            check_threads(set, (shape){200, 130, 77}, 0, 1, kind);
            check_threads(set, (shape){1601, 70, 33}, 1, 1, kind);
        }
        check_nan(set);
    }
    for (int t = 0; t < POOL_N; t++) anepy_pool_free(pools[t]);
}
