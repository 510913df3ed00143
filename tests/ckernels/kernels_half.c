/* kernels_half.c - binary16 conversion of every instruction set: all 65536 halves, and floats on,
 * at and between their midpoints, in the caller's floating-point mode and in the library's; and
 * random rounding to bf16. */
#include <math.h>

#include "check.h"
#include "groups.h"
#include "guard.h"
#include "kernels/kernels.h"
#include "runtime/fpmode.h"
#include "runtime/half.h"

#define HALVES 65536
#define BATCH 61 /* full vectors and a rest */

/* From the definition: sign, 5 bits of exponent, 10 of fraction. */
static double value_of(uint32_t half) {
    int exponent = (int)(half >> 10 & 31);
    double fraction = half & 1023, sign = half >> 15 ? -1.0 : 1.0;
    if (exponent == 31) return fraction != 0.0 ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * ldexp(fraction, -24);
    return sign * ldexp(1024.0 + fraction, exponent - 25);
}

/* The nearest half, ties to even, as a number. */
static double nearest(double x) {
    if (isnan(x) || isinf(x) || x == 0.0) return x;
    int exponent = ilogb(x) < -14 ? -14 : ilogb(x);
    double unit = ldexp(1.0, exponent - 10), rounded = nearbyint(x / unit) * unit;
    return fabs(rounded) > 65504.0 ? copysign(INFINITY, x) : copysign(rounded, x);
}

static int equal(double actual, double expected) {
    if (isnan(expected)) return isnan(actual);
    return actual == expected && signbit(actual) == signbit(expected);
}

static void check_all_halves(const anepy_kernels *set) {
    static uint16_t halves[HALVES], back[HALVES];
    static float x[HALVES];
    int values = 1, round_trip = 1;
    for (uint32_t h = 0; h < HALVES; h++) halves[h] = (uint16_t)h;
    KERNEL(set, from_half)(x, halves, HALVES);
    KERNEL(set, to_half)(back, x, HALVES);
    for (uint32_t h = 0; h < HALVES; h++) {
        double expected = value_of(h);
        values &= equal(x[h], expected);
        round_trip &= isnan(expected) ? isnan(value_of(back[h])) : back[h] == h;
    }
    CHECK(values, "from_half %s is wrong", set->isa);
    CHECK(round_trip, "to_half %s does not give back what from_half made", set->isa);
}

static int converts(const anepy_kernels *set, const float *x, int32_t n) {
    uint16_t halves[BATCH];
    int right = 1;
    KERNEL(set, to_half)(halves, x, n);
    for (int32_t i = 0; i < n; i++) right &= equal(value_of(halves[i]), nearest(x[i]));
    return right;
}

/* Around the middle between each half and the next: below, on, above; and far out. */
static void check_rounding(const anepy_kernels *set) {
    int right = 1;
    for (uint32_t h = 0; h < 0x7c00; h++) {
        float middle = (float)(0.5 * (value_of(h) + (h < 0x7bff ? value_of(h + 1) : 65536.0)));
        float x[6] = {middle, from_bits(to_bits(middle) - 1), from_bits(to_bits(middle) + 1)};
        for (int i = 0; i < 3; i++) x[3 + i] = -x[i];
        right &= converts(set, x, 6);
    }
    CHECK(right, "to_half %s rounds ties wrongly in its rest", set->isa);
    for (uint32_t bits = 0, n = 0; bits < 0x7f900000u;) {
        float x[BATCH];
        for (n = 0; n < BATCH; n++, bits += 4099)
            x[n] = from_bits(bits | (n % 2 ? 0x80000000u : 0));
        right &= converts(set, x, BATCH);
    }
    for (uint32_t h = 0; h + BATCH < 0x7c00; h += BATCH) {
        float x[BATCH];
        for (uint32_t i = 0; i < BATCH; i++) {
            x[i] = (float)(0.5 * (value_of(h + i) + value_of(h + i + 1)));
            x[i] = from_bits(to_bits(x[i]) + i % 3 - 1);
        }
        right &= converts(set, x, BATCH);
    }
    CHECK(right, "to_half %s rounds wrongly", set->isa);
    const float edge[] = {65504.0f, 65519.996f, 65520.0f,  65536.0f,  1e30f,
                          INFINITY, NAN,        0.0f,      -0.0f,     0x1p-24f,
                          0x1p-25f, 0x1.8p-25f, 0x1p-149f, -65520.0f, -NAN};
    CHECK(converts(set, edge, sizeof edge / sizeof edge[0]), "to_half %s: an edge", set->isa);
}

static void check_bounds(const anepy_kernels *set, int32_t n, int place) {
    float *x = guard_matrix(1, n, n, place, random_wild), *y = guard_take(n, place);
    uint16_t *halves = guard_halves(n, place);
    int right = 1;
    KERNEL(set, to_half)(halves, x, n);
    for (int32_t i = 0; i < n; i++) right &= equal(value_of(halves[i]), nearest(x[i]));
    KERNEL(set, from_half)(y, halves, n);
    for (int32_t i = 0; i < n; i++) right &= equal(y[i], value_of(halves[i]));
    CHECK(right && guard_intact(), "half %s: %s, n %d, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", n, place);
    guard_reset();
}

/* Every set rounds like the plain one, to a neighbour, and right on average. */
static void check_random_rounding(const anepy_kernels *set, int32_t n, int place) {
    float *x = guard_matrix(1, n, n, place, random_wild);
    uint16_t *halves = guard_halves(n, place), wanted[4096];
    int right = n <= 4096;
    KERNEL(set, to_bf16_randomly)(halves, x, n, 0xfffffffeu, 77);
    anepy_kernels_scalar()->to_bf16_randomly(wanted, x, n, 0xfffffffeu, 77);
    for (int32_t i = 0; right && i < n; i++) {
        float low = from_bits(to_bits(x[i]) & 0xffff0000u), found = anepy_from_bf16(halves[i]);
        int up = to_bits(found) == to_bits(low) + 0x10000u;
        right &= halves[i] == wanted[i];
        right &= isnan(x[i]) || up || to_bits(found) == to_bits(low);
    }
    CHECK(right && guard_intact(), "to_bf16_randomly %s: %s, n %d, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", n, place);
    guard_reset();
}

static void check_mean_of_random_rounding(const anepy_kernels *set) {
    enum { N = 1 << 16 };
    static float x[N];
    static uint16_t halves[N];
    const float edge[] = {INFINITY, -INFINITY, 0.0f, -0.0f, 1.0f, -2.0f};
    uint16_t same[6];
    for (int part = 1; part < 8; part++) {
        double up = 0.0;
        for (int i = 0; i < N; i++) x[i] = 1.0f + (float)part / 8.0f * 0x1p-7f;
        KERNEL(set, to_bf16_randomly)(halves, x, N, 5, (uint32_t)part);
        for (int i = 0; i < N; i++) up += anepy_from_bf16(halves[i]) > 1.0f;
        CHECK(fabs(up / N - part / 8.0) < 0.01, "to_bf16_randomly %s: %g of %d / 8 go up", set->isa,
              up / N, part);
    }
    KERNEL(set, to_bf16_randomly)(same, edge, 6, 0, 1);
    for (int i = 0; i < 6; i++)
        CHECK(equal(anepy_from_bf16(same[i]), edge[i]), "to_bf16_randomly %s: edge %d", set->isa,
              i);
    x[0] = NAN;
    KERNEL(set, to_bf16_randomly)(same, x, 1, 0, 1);
    CHECK(isnan(anepy_from_bf16(same[0])), "to_bf16_randomly %s loses NaN", set->isa);
}

void checks_half(void) {
    const anepy_kernels *set;
    for (int flush = 0; flush < 2; flush++) {
        for (int32_t i = 0; (set = anepy_kernels_at(i)) != NULL; i++) {
            uint64_t fpmode = flush ? anepy_fpmode_enter() : 0;
            check_all_halves(set);
            check_rounding(set);
            check_mean_of_random_rounding(set);
            for (int32_t s = 0; s < SIZE_N; s++)
                for (int place = 0; place < GUARD_PLACES; place++) {
                    check_bounds(set, SIZES[s], place);
                    check_random_rounding(set, SIZES[s], place);
                }
            if (flush) anepy_fpmode_leave(fpmode);
        }
    }
}
