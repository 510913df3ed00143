/* kernels_products.c - gemm_tile, gemv, sum_rows, transpose_panel, sums and chains of every
 * instruction set, and the table itself.
 *
 * Factors are small whole numbers, so that every order of summation gives the very same float and
 * one wrong, missing or doubled term shows. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "anepy.h"
#include "check.h"
#include "groups.h"
#include "guard.h"

#define COLS ANEPY_COLUMNS

static const int32_t DEPTHS[] = {0,  1,  2,  3,  5,  7,   8,    9,    16,
                                 17, 31, 63, 64, 65, 255, 1023, 1024, 1025};
#define DEPTH_N ((int32_t)(sizeof DEPTHS / sizeof DEPTHS[0]))

/* ------------------------------------------------------------------------------------ the table */

static int complete(const anepy_kernels *k) {
    return k->gemm_tile && k->transpose_panel && k->gemv && k->gemv_bf16 && k->gemv_q8 &&
           k->from_bf16 && k->from_q8 && k->sum_rows && k->add && k->scale && k->exp &&
           k->sum_squares && k->to_half && k->from_half && k->rmsnorm && k->rmsnorm_stats &&
           k->rmsnorm_row && k->rope && k->swiglu && k->swiglu_backward && k->softmax_step &&
           k->softmax_again && k->scale_columns && k->dot_columns && k->softmax_row &&
           k->softmax_row_backward && k->logsumexp_columns && k->softmax_gradient && k->adam &&
           k->sum && k->fma_chains && k->chain_n > 0 &&
           (!k->bf16 || (k->bf16->dot_tile && k->bf16->to_bf16 && k->from_bf16 &&
                         k->bf16->pack_pairs && k->bf16->zip_pairs && k->bf16->dot_chains));
}

/* Whether the sets differ in what multiplies alone: in their matrix units. */
static int units_differ(const anepy_kernels *a, const anepy_kernels *b) {
    return a->bf16 != NULL && b->bf16 != NULL && a->bf16->dot_panel != b->bf16->dot_panel;
}

/* Two sets that share a function are one set under two names. */
static void check_different(const anepy_kernels *a, const anepy_kernels *b) {
    CHECK(strcmp(a->isa, b->isa) != 0, "two sets are named %s", a->isa);
    CHECK(strcmp(a->gemm_name, b->gemm_name) != 0, "%s and %s name the same gemm", a->isa, b->isa);
    CHECK((a->gemm_tile != b->gemm_tile && a->exp != b->exp && a->adam != b->adam) ||
              units_differ(a, b),
          "%s and %s share kernels", a->isa, b->isa);
}

void checks_table(void) {
    const anepy_kernels *set, *last = NULL, *chosen = anepy_kernels_get();
    int found = 0;
    for (int32_t i = 0; (set = anepy_kernels_at(i)) != NULL; i++) {
        size_t name = strlen(set->gemm_name), isa = strlen(set->isa);
        CHECK(complete(set), "%s has empty rows", set->isa);
        CHECK(set->gemm_cols > 0 && COLS % set->gemm_cols == 0, "%s: tile of %d columns", set->isa,
              set->gemm_cols);
        CHECK(name > isa && strcmp(set->gemm_name + name - isa, set->isa) == 0, "%s is of %s",
              set->gemm_name, set->isa);
        CHECK((set->bf16 != NULL) == (strstr(set->isa, "bf16") != NULL),
              "%s is named after instructions it has not", set->isa);
        for (int32_t j = 0; j < i; j++) check_different(anepy_kernels_at(j), set);
        found |= set == chosen;
        last = set;
    }
    CHECK(found, "the chosen set is not one this machine can run");
    CHECK(last == anepy_kernels_scalar() && strcmp(last->isa, "scalar") == 0, "scalar is not last");
    CHECK(anepy_kernels_at(-1) == NULL, "there is a set before the first");
    const char *mask = getenv("ANEPY_CPU_MASK");
    int masked = mask != NULL && mask[0] != '\0';
#if defined(__x86_64__)
    CHECK(masked || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
              anepy_kernels_at(1) != NULL,
          "AVX2 and FMA are there and not used");
#elif defined(__aarch64__)
    CHECK(masked || strcmp(anepy_kernels_at(0)->isa, "neonbf16") == 0 ||
              strcmp(anepy_kernels_at(0)->isa, "neon") == 0,
          "NEON is not used");
#endif
    if (expected_isa == NULL || chosen == NULL) return;
    anepy_library_info info = {.struct_size = sizeof info};
    CHECK(strcmp(chosen->isa, expected_isa) == 0, "%s was chosen, not %s", chosen->isa,
          expected_isa);
    CHECK(anepy_library_get_info(&info) == ANEPY_OK && strcmp(info.isa, expected_isa) == 0 &&
              strcmp(info.gemm, chosen->gemm_name) == 0,
          "the library reports %s with %s", info.isa, info.gemm);
}

/* ------------------------------------------------------------------------------------ gemm_tile */

typedef struct {
    int32_t rows, cols, k, accumulate, by_columns, place;
    int64_t ldc, lda, ldb;
} tile_case;

static void check_tile(const anepy_kernels *set, const tile_case *t) {
    int32_t rows = t->rows, cols = t->cols, k = t->k;
    float *a = t->by_columns ? guard_matrix(k, rows, t->lda, t->place, random_whole)
                             : guard_matrix(rows, k, t->lda, t->place, random_whole);
    int64_t a_row = t->by_columns ? 1 : t->lda, a_step = t->by_columns ? t->lda : 1;
    float *b = guard_matrix(k, cols, t->ldb, t->place, random_whole);
    float *c = guard_matrix(rows, cols, t->ldc, t->place, random_whole);
    int32_t expected[ANEPY_TILE_ROWS][COLS];
    for (int32_t i = 0; i < rows; i++)
        for (int32_t j = 0; j < cols; j++)
            expected[i][j] = t->accumulate ? (int32_t)c[i * t->ldc + j] : 0;
    for (int32_t i = 0; i < rows; i++)
        for (int32_t p = 0; p < k; p++)
            for (int32_t j = 0; j < cols; j++)
                expected[i][j] += (int32_t)a[i * a_row + p * a_step] * (int32_t)b[p * t->ldb + j];
    if (!t->accumulate) /* what was there must not matter, NaN included */
        for (int32_t i = 0; i < rows; i++)
            for (int32_t j = 0; j < cols; j++) c[i * t->ldc + j] = NAN;
    KERNEL(set, gemm_tile)(c, t->ldc, a, a_row, a_step, b, t->ldb, k, rows, t->accumulate,
                           (anepy_lines){b, rows % 3 * 64});
    int right = 1;
    for (int32_t i = 0; i < rows; i++)
        for (int32_t j = 0; j < cols; j++) right &= c[i * t->ldc + j] == (float)expected[i][j];
    CHECK(right && guard_intact() && gaps_intact(c, rows, cols, t->ldc),
          "gemm_tile %s: %s for rows %d, k %d, accumulate %d, by_columns %d, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", rows, k, t->accumulate, t->by_columns, t->place);
    guard_reset();
}

static void check_tiles(const anepy_kernels *set) {
    for (int32_t rows = 1; rows <= ANEPY_TILE_ROWS; rows++) {
        for (int32_t d = 0; d < DEPTH_N; d++) {
            for (int32_t form = 0; form < 4; form++) {
                int32_t cols = set->gemm_cols, k = DEPTHS[d], by_columns = form & 1;
                tile_case t = {rows,       cols,
                               k,          form >> 1,
                               by_columns, (rows + d + form) % GUARD_PLACES,
                               cols,       by_columns ? rows : k + 1,
                               cols};
                check_tile(set, &t);
                t.place = (t.place + 1) % GUARD_PLACES;
                t.ldc = COLS + 3;
                t.lda += 5;
                t.ldb = COLS + 1;
                check_tile(set, &t);
            }
        }
    }
}

/* ------------------------------------------------------------------------------ gemv, transpose */

static void check_gemv(const anepy_kernels *set, int32_t rows, int32_t k, int64_t ld, int place) {
    float *w = guard_matrix(rows, k, ld, place, random_whole);
    float *x = guard_matrix(1, k, k, place, random_whole);
    float *y = guard_take(rows, place);
    KERNEL(set, gemv)(y, w, ld, x, rows, k);
    int right = 1;
    for (int32_t i = 0; i < rows; i++) {
        int32_t expected = 0;
        for (int32_t p = 0; p < k; p++) expected += (int32_t)w[i * ld + p] * (int32_t)x[p];
        right &= y[i] == (float)expected;
    }
    CHECK(right && guard_intact(), "gemv %s: %s for %d x %d, ld %lld, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", rows, k, (long long)ld, place);
    guard_reset();
}

static void check_sum_rows(const anepy_kernels *set, int32_t rows, int32_t k, int64_t ld,
                           int place) {
    float *w = guard_matrix(rows, k, ld, place, random_whole);
    float *x = guard_matrix(1, rows, rows, place, random_whole);
    float *y = guard_take(k, place);
    KERNEL(set, sum_rows)(y, w, ld, x, rows, k);
    int right = 1;
    for (int32_t p = 0; p < k; p++) {
        int32_t expected = 0;
        for (int32_t i = 0; i < rows; i++) expected += (int32_t)w[i * ld + p] * (int32_t)x[i];
        right &= y[p] == (float)expected;
    }
    CHECK(right && guard_intact(), "sum_rows %s: %s for %d x %d, ld %lld, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", rows, k, (long long)ld, place);
    guard_reset();
}

static void check_transpose(const anepy_kernels *set, int32_t rows, int32_t n, int64_t ld,
                            int place) {
    float *src = guard_matrix(rows, n, ld, place, random_wild);
    float *dst = guard_take((int64_t)n * COLS, place);
    KERNEL(set, transpose_panel)(dst, src, ld, rows, n);
    int right = 1;
    for (int32_t p = 0; p < n; p++)
        for (int32_t j = 0; j < COLS; j++)
            right &= same(dst[p * COLS + j], j < rows ? src[j * ld + p] : 0.0f);
    CHECK(right && guard_intact(), "transpose_panel %s: %s for %d x %d, ld %lld, place %d",
          set->isa, right ? "wrote elsewhere" : "wrong", rows, n, (long long)ld, place);
    guard_reset();
}

/* ---------------------------------------------------------------------------------- sum_squares */

static void check_sum(const anepy_kernels *set, int32_t n, int place) {
    float *x = guard_take(n, place);
    double expected = 0.0;
    for (int32_t i = 0; i < n; i++) {
        x[i] = ldexpf(random_float(-1.0f, 1.0f), random_below(80) - 40);
        expected += (double)x[i] * x[i];
    }
    double actual = KERNEL(set, sum_squares)(x, n);
    CHECK(fabs(actual - expected) <= 1e-13 * expected && guard_intact(),
          "sum_squares %s: %.17g, not %.17g, for n %d, place %d", set->isa, actual, expected, n,
          place);
    if (n > 0) {
        x[random_below(n)] = NAN;
        CHECK(isnan(KERNEL(set, sum_squares)(x, n)), "sum_squares %s: NaN is lost, n %d", set->isa,
              n);
        for (int32_t i = 0; i < n; i++) x[i] = FLT_MAX;
        double largest = (double)FLT_MAX * FLT_MAX * n;
        CHECK(fabs(KERNEL(set, sum_squares)(x, n) - largest) <= 1e-13 * largest,
              "sum_squares %s overflows, n %d", set->isa, n);
    }
    guard_reset();
}

/* ------------------------------------------------------------------------------ sum, fma_chains */

static void check_plain_sum(const anepy_kernels *set, int32_t n, int place) {
    float *x = guard_take(n, place), expected = 0.0f;
    for (int32_t i = 0; i < n; i++) expected += x[i] = random_whole();
    float actual = KERNEL(set, sum)(x, n);
    CHECK(actual == expected && guard_intact(), "sum %s: %g, not %g, for n %d, place %d", set->isa,
          (double)actual, (double)expected, n, place);
    guard_reset();
}

/* The promised number of steps is taken, by every chain: x + 1 counts them, x / 2 + 1 forgets where
 * it began. */
static void check_chains(const anepy_kernels *set) {
    float start = KERNEL(set, fma_chains)(1.0f, 1.0f, 0),
          after = KERNEL(set, fma_chains)(1.0f, 1.0f, 4096);
    CHECK(after - start == 4096.0f, "fma_chains %s: %g after 4096 rounds, %g before", set->isa,
          (double)after, (double)start);
    if (set->bf16 != NULL) { /* 1 * 2 + 0.5 * 4 */
        uint32_t a = 0x3f003f80u, b = 0x40804000u;
        start = KERNEL(set->bf16, dot_chains)(a, b, 0);
        after = KERNEL(set->bf16, dot_chains)(a, b, 4096);
        CHECK(after - start == 16384.0f, "dot_chains %s: %g after 4096 rounds, %g before", set->isa,
              (double)after, (double)start);
    }
    float settled = KERNEL(set, fma_chains)(0.5f, 1.0f, 100);
    CHECK(settled == 2.0f, "fma_chains %s: settles at %g", set->isa, (double)settled);
}

void checks_products(void) {
    static const int32_t rows[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 64};
    const anepy_kernels *set;
    for (int32_t i = 0; (set = anepy_kernels_at(i)) != NULL; i++) {
        check_tiles(set);
        check_chains(set);
        for (int32_t s = 0; s < SIZE_N; s++) {
            for (int place = 0; place < GUARD_PLACES; place++) {
                for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++) {
                    check_gemv(set, rows[r], SIZES[s], SIZES[s] + (int64_t)r % 3 * 3, place);
                    check_sum_rows(set, rows[r], SIZES[s], SIZES[s] + (int64_t)r % 3 * 3, place);
                }
                check_sum(set, SIZES[s], place);
                check_plain_sum(set, SIZES[s], place);
            }
            for (int32_t r = 1; r <= COLS; r++)
                check_transpose(set, r, SIZES[s], SIZES[s] + r % 5, (r + s) % GUARD_PLACES);
        }
    }
}
