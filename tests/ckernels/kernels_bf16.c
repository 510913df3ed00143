/* kernels_bf16.c - conversion, packing and products of bf16 pairs, of every set that has them. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "check.h"
#include "groups.h"
#include "guard.h"
#include "kernels/gemm.h"
#include "runtime/fpmode.h"
#include "runtime/half.h"

#define COLS ANEPY_COLUMNS
#define HALVES 65536
#define BATCH 61 /* full vectors and a rest */

/* ---------------------------------------------------------------------------------- conversion */

/* From the definition: sign, 8 bits of exponent, 7 of fraction. */
static double value_of(uint32_t half) {
    int exponent = (int)(half >> 7 & 255);
    double fraction = half & 127, sign = half >> 15 ? -1.0 : 1.0;
    if (exponent == 255) return fraction != 0.0 ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * ldexp(fraction, -133);
    return sign * ldexp(128.0 + fraction, exponent - 134);
}

/* The nearest bf16 number, ties to even. */
static double nearest(double x) {
    if (isnan(x) || isinf(x) || x == 0.0) return x;
    int exponent = ilogb(x) < -126 ? -126 : ilogb(x);
    double unit = ldexp(1.0, exponent - 7), rounded = nearbyint(x / unit) * unit;
    return fabs(rounded) >= 0x1p128 ? copysign(INFINITY, x) : copysign(rounded, x);
}

/* A result below the normal numbers may be zero, and so may what rounds up from there. */
static int equal(double actual, double expected) {
    if (isnan(expected)) return isnan(actual);
    if (actual == 0.0 && fabs(expected) <= (double)FLT_MIN) return 1;
    return actual == expected && (signbit(actual) != 0) == (signbit(expected) != 0);
}

static void check_all_halves(const anepy_kernels *set) {
    static uint16_t halves[HALVES], back[HALVES];
    static float x[HALVES];
    int values = 1, round_trip = 1;
    for (uint32_t h = 0; h < HALVES; h++) halves[h] = (uint16_t)h;
    KERNEL(set, from_bf16)(x, halves, HALVES);
    KERNEL(set->bf16, to_bf16)(back, x, HALVES);
    for (uint32_t h = 0; h < HALVES; h++) {
        values &= equal(x[h], value_of(h));
        round_trip &= equal(value_of(back[h]), value_of(h));
    }
    CHECK(values, "from_bf16 %s is wrong", set->isa);
    CHECK(round_trip, "to_bf16 %s does not give back what from_bf16 made", set->isa);
}

static int converts(const anepy_kernels *set, const float *x, int32_t n) {
    uint16_t halves[BATCH];
    int right = 1;
    KERNEL(set->bf16, to_bf16)(halves, x, n);
    for (int32_t i = 0; i < n; i++) right &= equal(value_of(halves[i]), nearest(x[i]));
    return right;
}

/* On the middle between each number and the next, just below and just above, of both signs. */
static void check_rounding(const anepy_kernels *set) {
    int right = 1;
    for (uint32_t h = 0x80; h < 0x7f80; h++) {
        uint32_t middle = h << 16 | 0x8000;
        float x[BATCH];
        for (uint32_t i = 0; i < BATCH; i++)
            x[i] = from_bits((middle + i % 3 - 1) | (i % 2 ? 0x80000000u : 0));
        right &= converts(set, x, h % 8 == 0 ? BATCH : 6);
    }
    CHECK(right, "to_bf16 %s rounds wrongly", set->isa);
    const float edge[] = {FLT_MAX, -FLT_MAX,  INFINITY,  -INFINITY, NAN,     -NAN, 0.0f,     -0.0f,
                          FLT_MIN, 0x1p-149f, 0x1p-127f, -FLT_MIN,  3.3e38f, 1.0f, 0x1p-140f};
    CHECK(converts(set, edge, sizeof edge / sizeof edge[0]), "to_bf16 %s: an edge", set->isa);
    float low_nan = from_bits(0x7f800001u); /* cut off, this would be infinity */
    CHECK(converts(set, &low_nan, 1), "to_bf16 %s makes infinity of NaN", set->isa);
}

static void check_bounds(const anepy_kernels *set, int32_t n, int place) {
    float *x = guard_matrix(1, n, n, place, random_wild), *y = guard_take(n, place);
    uint16_t *halves = guard_halves(n, place);
    int right = 1;
    KERNEL(set->bf16, to_bf16)(halves, x, n);
    for (int32_t i = 0; i < n; i++) right &= equal(value_of(halves[i]), nearest(x[i]));
    KERNEL(set, from_bf16)(y, halves, n);
    for (int32_t i = 0; i < n; i++) right &= equal(y[i], value_of(halves[i]));
    CHECK(right && guard_intact(), "bf16 %s: %s, n %d, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", n, place);
    guard_reset();
}

/* ------------------------------------------------------------------------------------- packing */

/* What pack_pairs makes of float rows, and zip_pairs of the same rows once rounded. */
static void check_packing(const anepy_kernels *set, int32_t k, int32_t n, int64_t slack,
                          int place) {
    int32_t pairs = (k + 1) / 2;
    int64_t ld = n + slack, dst_ld = n + slack % 3;
    float *src = guard_matrix(k, n, ld, place, random_wild);
    float *packed = guard_take(span(pairs, n, dst_ld), place);
    float *zipped = guard_take(span(pairs, n, dst_ld), place);
    uint16_t *halves = guard_halves(span(k, n, ld), place);
    for (int32_t p = 0; p < k; p++) KERNEL(set->bf16, to_bf16)(halves + p * ld, src + p * ld, n);
    KERNEL(set->bf16, pack_pairs)((uint32_t *)(void *)packed, dst_ld, src, ld, k, n);
    KERNEL(set->bf16, zip_pairs)((uint32_t *)(void *)zipped, dst_ld, halves, ld, k, n);
    int right = 1, equal_bits = 1;
    for (int32_t q = 0; q < pairs; q++) {
        for (int32_t j = 0; j < n; j++) {
            uint32_t unit = to_bits(packed[q * dst_ld + j]);
            double high = 2 * q + 1 < k ? nearest(src[(2 * q + 1) * ld + j]) : 0.0;
            right &= equal(value_of(unit & 0xffff), nearest(src[2 * q * ld + j]));
            right &= equal(value_of(unit >> 16), high);
            equal_bits &= unit == to_bits(zipped[q * dst_ld + j]);
        }
    }
    CHECK(right, "pack_pairs %s is wrong for %d x %d", set->isa, k, n);
    CHECK(equal_bits, "zip_pairs %s is wrong for %d x %d", set->isa, k, n);
    CHECK(guard_intact() && gaps_intact(packed, pairs, n, dst_ld) &&
              gaps_intact(zipped, pairs, n, dst_ld),
          "packing %s wrote elsewhere for %d x %d, place %d", set->isa, k, n, place);
    guard_reset();
}

/* ------------------------------------------------------------------------------------ products */

static uint32_t unit_of(float low, float high) {
    return to_bits(low) >> 16 | (to_bits(high) & 0xffff0000u);
}

/* Units of whole numbers, which bf16 holds exactly. */
static float random_unit(void) { return from_bits(unit_of(random_whole(), random_whole())); }

static double half_of(float unit, int high) {
    return value_of(high ? to_bits(unit) >> 16 : to_bits(unit) & 0xffff);
}

/* By the tile kernel; with form & 8 by anepy_gemm_small, and with form & 16 by the kernel of a
 * matrix unit, on any number of rows. */
static void check_tile(const anepy_kernels *set, int32_t rows, int32_t pairs, int form, int place) {
    int32_t cols = form >= 8 ? COLS : set->gemm_cols, accumulate = form & 1,
            by_columns = form >> 1 & 1;
    int64_t ldc = form & 4 ? COLS + 3 : cols, lda = (by_columns ? rows : pairs) + (form & 4);
    float *a = by_columns ? guard_matrix(pairs, rows, lda, place, random_unit)
                          : guard_matrix(rows, pairs, lda, place, random_unit);
    int64_t a_row = by_columns ? 1 : lda, a_step = by_columns ? lda : 1;
    float *b = guard_matrix(pairs, cols, COLS, place, random_unit);
    float *c = guard_matrix(rows, cols, ldc, place, random_whole);
    static double expected[COLS][COLS];
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t j = 0; j < cols; j++) {
            expected[i][j] = accumulate ? (double)c[i * ldc + j] : 0.0;
            if (!accumulate) c[i * ldc + j] = NAN; /* must not matter */
            for (int32_t q = 0; q < pairs; q++)
                for (int high = 0; high < 2; high++)
                    expected[i][j] +=
                        half_of(a[i * a_row + q * a_step], high) * half_of(b[q * COLS + j], high);
        }
    }
    if (form & 16)
        KERNEL(set->bf16, dot_panel)(c, ldc, (const uint32_t *)(const void *)a, a_row,
                                     (const uint32_t *)(const void *)b, COLS, pairs, rows,
                                     accumulate);
    else if (form & 8)
        anepy_gemm_small(set, set->bf16, c, ldc, a, a_row, a_step, b, COLS, rows, COLS, pairs,
                         accumulate);
    else
        KERNEL(set->bf16, dot_tile)(c, ldc, (const uint32_t *)(const void *)a, a_row, a_step,
                                    (const uint32_t *)(const void *)b, COLS, pairs, rows,
                                    accumulate, (anepy_lines){b, place % 3 * 64});
    int right = 1;
    for (int32_t i = 0; i < rows; i++)
        for (int32_t j = 0; j < cols; j++) right &= (double)c[i * ldc + j] == expected[i][j];
    CHECK(right && guard_intact() && gaps_intact(c, rows, cols, ldc),
          "dot_tile %s: %s for rows %d, pairs %d, form %d, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", rows, pairs, form, place);
    guard_reset();
}

/* Columns become rows, and nothing else is written. */
static void check_turn(const anepy_kernels *set, int32_t rows, int32_t pairs, int place) {
    int64_t ld = rows + 3, dst_ld = pairs + 2;
    float *src = guard_matrix(pairs, rows, ld, place, random_unit);
    float *dst = guard_take(span(rows, pairs, dst_ld), place);
    KERNEL(set->bf16, turn)((uint32_t *)(void *)dst, dst_ld, (const uint32_t *)(const void *)src,
                            ld, rows, pairs);
    int right = 1;
    for (int32_t i = 0; i < rows; i++)
        for (int32_t q = 0; q < pairs; q++)
            right &= to_bits(dst[i * dst_ld + q]) == to_bits(src[q * ld + i]);
    CHECK(right && guard_intact() && gaps_intact(dst, rows, pairs, dst_ld),
          "turn %s is wrong for %d rows of %d", set->isa, rows, pairs);
    guard_reset();
}

static void check_matrix_unit(const anepy_kernels *set) {
    static const int32_t sizes[] = {1, 2, 15, 16, 17, 31, 32, 33, 48, 64};
    const int32_t n = sizeof sizes / sizeof sizes[0];
    CHECK((set->bf16->dot_panel == NULL) == (set->bf16->turn == NULL), "%s: half a matrix unit",
          set->isa);
    for (int32_t i = 0; i < n * n && set->bf16->dot_panel != NULL; i++) {
        int32_t rows = sizes[i % n], pairs = sizes[i / n] + i % 3 * 64;
        for (int form = 16; form < 24; form++)
            if (!(form & 2)) check_tile(set, rows, pairs, form, (rows + form) % GUARD_PLACES);
        check_turn(set, rows, pairs, i % GUARD_PLACES);
    }
}

/* One unit of A times one of B. */
static float dot(const anepy_kernels *set, uint32_t a, uint32_t b, float start) {
    uint32_t panel[COLS] = {0};
    float c[COLS] = {start};
    panel[0] = b;
    if (set->bf16->dot_panel != NULL) {
        KERNEL(set->bf16, dot_panel)(c, COLS, &a, 1, panel, COLS, 1, 1, 1);
        return c[0];
    }
    KERNEL(set->bf16, dot_tile)(c, COLS, &a, 1, 1, panel, COLS, 1, 1, 1, (anepy_lines){panel, 0});
    return c[0];
}

static void check_special(const anepy_kernels *set) {
    const uint32_t one = unit_of(1.0f, 1.0f), small = unit_of(0x1p-130f, 0x1p-130f);
    CHECK(isnan(dot(set, unit_of(NAN, 1.0f), one, 1.0f)) &&
              isnan(dot(set, one, unit_of(1.0f, NAN), 1.0f)) && isnan(dot(set, one, one, NAN)),
          "dot_tile %s loses NaN", set->isa);
    CHECK(isnan(dot(set, unit_of(INFINITY, 0.0f), unit_of(0.0f, 0.0f), 0.0f)),
          "dot_tile %s: infinity times zero is a number", set->isa);
    CHECK(dot(set, unit_of(INFINITY, 1.0f), one, 0.0f) == INFINITY &&
              dot(set, unit_of(-INFINITY, 1.0f), one, 0.0f) == -INFINITY,
          "dot_tile %s loses infinity", set->isa);
    CHECK(dot(set, unit_of(0.0f, -0.0f), one, 0.0f) == 0.0f, "dot_tile %s: zero", set->isa);
    float tiny = dot(set, small, one, 1.0f);
    CHECK(tiny == 1.0f, "dot_tile %s: subnormal factors make %g of 1", set->isa, (double)tiny);
    tiny = dot(set, small, unit_of(0x1p100f, 0x1p100f), 0.0f);
    CHECK(tiny == 0.0f || tiny == 0x1p-29f, "dot_tile %s: subnormals make %g", set->isa,
          (double)tiny);
}

static void check_set(const anepy_kernels *set) {
    static const int32_t depths[] = {0, 1, 2, 3, 7, 32, 33, 64, 511, 1024};
    check_all_halves(set);
    check_rounding(set);
    for (int32_t s = 0; s < SIZE_N; s++) {
        for (int place = 0; place < GUARD_PLACES; place++) {
            check_bounds(set, SIZES[s], place);
            for (int32_t k = 1; k < 8; k++) check_packing(set, k, SIZES[s], k % 5, place);
        }
    }
    for (int32_t rows = 1; rows <= ANEPY_TILE_ROWS; rows++)
        for (size_t d = 0; d < sizeof depths / sizeof depths[0]; d++)
            for (int form = 0; form < 8; form++)
                check_tile(set, rows, depths[d], form, (rows + (int)d + form) % GUARD_PLACES);
    for (int32_t rows = 1; rows <= COLS; rows += 9)
        for (int32_t pairs = 1; pairs <= 65; pairs += 16)
            for (int form = 8; form < 16; form++)
                check_tile(set, rows, pairs, form, (rows + form) % GUARD_PLACES);
    check_matrix_unit(set);
    check_special(set);
}

void checks_bf16(void) {
    const anepy_kernels *set;
    CHECK(anepy_from_bf16(0x3fc0) == 1.5f && isnan(anepy_from_bf16(0x7fc0)), "bf16 in C is wrong");
    for (int flush = 0; flush < 2; flush++) {
        for (int32_t i = 0; (set = anepy_kernels_at(i)) != NULL; i++) {
            if (set->bf16 == NULL) continue;
            uint64_t fpmode = flush ? anepy_fpmode_enter() : 0;
            check_set(set);
            if (flush) anepy_fpmode_leave(fpmode);
        }
    }
}
