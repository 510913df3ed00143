/* kernels_elementwise.c - add, scale, rope, swiglu and swiglu_backward of every instruction set,
 * in place as well where the contract or a caller does so. */
#include <float.h>
#include <math.h>

#include "check.h"
#include "groups.h"
#include "guard.h"

/* -------------------------------------------------------------------------------- add and scale */

/* One rounding each: every set gives the same bits. */
static void check_add(const anepy_kernels *set, int32_t n, int place) {
    for (int alias = 0; alias < 4; alias++) { /* none, dst is a, dst is b, all one */
        float *a = guard_matrix(1, n, n, place, random_wild);
        float *b = alias == 3 ? a : guard_matrix(1, n, n, place, random_wild);
        float *expected = guard_take(n, GUARD_START);
        float *dst = alias == 0 ? guard_take(n, place) : alias == 2 ? b : a;
        for (int32_t i = 0; i < n; i++) expected[i] = a[i] + b[i];
        KERNEL(set, add)(dst, a, b, n);
        CHECK(all_same(dst, expected, n) && guard_intact(), "add %s: n %d, place %d, alias %d",
              set->isa, n, place, alias);
        guard_reset();
    }
}

static void check_scale(const anepy_kernels *set, int32_t n, int place) {
    static const float factors[] = {0.0f, 1.0f, -0.3f, 1e30f, 1e-30f, INFINITY, NAN};
    for (size_t f = 0; f < sizeof factors / sizeof factors[0]; f++) {
        float *x = guard_matrix(1, n, n, place, random_wild);
        float *expected = guard_take(n, GUARD_START);
        for (int32_t i = 0; i < n; i++) expected[i] = x[i] * factors[f];
        KERNEL(set, scale)(x, factors[f], n);
        CHECK(all_same(x, expected, n) && guard_intact(), "scale %s: n %d, place %d, factor %g",
              set->isa, n, place, (double)factors[f]);
        guard_reset();
    }
}

/* ----------------------------------------------------------------------------------------- rope */

static float random_any(void) { return random_float(-3.0f, 3.0f); }
static float random_angle(void) { return random_float(0.0f, 6.2831853f); }

static void check_rope(const anepy_kernels *set, int32_t n, int place) {
    float *a = guard_matrix(1, n, n, place, random_any),
          *b = guard_matrix(1, n, n, place, random_any);
    float *a0 = guard_copy(a, n, GUARD_START), *b0 = guard_copy(b, n, GUARD_START);
    float *cosine = guard_matrix(1, n, n, place, random_angle), *sine = guard_take(n, place);
    for (int32_t i = 0; i < n; i++) {
        sine[i] = sinf(cosine[i]);
        cosine[i] = cosf(cosine[i]);
    }
    KERNEL(set, rope)(a, b, cosine, sine, 1.0f, n);
    int right = 1, back = 1;
    for (int32_t i = 0; i < n; i++) {
        double re = a0[i], im = b0[i], co = cosine[i], si = sine[i], size = fabs(re) + fabs(im);
        right &= is_close(a[i], re * co - im * si, 3.0, size);
        right &= is_close(b[i], re * si + im * co, 3.0, size);
    }
    KERNEL(set, rope)(a, b, cosine, sine, -1.0f, n);
    for (int32_t i = 0; i < n; i++)
        back &= is_close(a[i], a0[i], 8.0, 6.0) && is_close(b[i], b0[i], 8.0, 6.0);
    CHECK(right && back && guard_intact(), "rope %s: %s, n %d, place %d", set->isa,
          !right  ? "wrong"
          : !back ? "does not turn back"
                  : "wrote elsewhere",
          n, place);
    guard_reset();
}

/* --------------------------------------------------------------------------------------- swiglu */

/* From where the sigmoid is 0, through its bend, to where it is 1; zeros and subnormals. */
static float random_gate(void) {
    switch (random_below(8)) {
    case 0: return random_float(-120.0f, 120.0f);
    case 1: return random_below(2) ? 0.0f : -0.0f;
    case 2: return ldexpf(random_float(-1.0f, 1.0f), -100 - random_below(49));
    case 3: return random_below(2) ? 1e30f : -1e30f;
    default: return random_float(-6.0f, 6.0f);
    }
}

static double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

/* Allows what flushing the sigmoid itself below the smallest normal number costs. */
static int gate_close(float actual, double expected, double roundings, double size,
                      double flushed) {
    return is_close(actual, expected, roundings, size) ||
           fabs(actual - expected) <= 2.0 * (double)FLT_MIN * flushed;
}

static void check_swiglu(const anepy_kernels *set, int32_t n, int place, int in_place) {
    float *h1 = guard_matrix(1, n, n, place, random_gate);
    float *h3 = guard_matrix(1, n, n, place, random_any);
    float *h = guard_copy(h1, n, GUARD_START);
    float *gate = in_place ? h1 : guard_take(n, place);
    KERNEL(set, swiglu)(gate, h1, h3, n);
    int right = 1;
    for (int32_t i = 0; i < n; i++) {
        double expected = h[i] * sigmoid(h[i]) * h3[i];
        right &= gate_close(gate[i], expected, 8.0, fabs(expected), fabs((double)h[i] * h3[i]));
    }
    CHECK(right && guard_intact(), "swiglu %s: %s, n %d, place %d, in place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", n, place, in_place);
    guard_reset();
}

static void check_swiglu_backward(const anepy_kernels *set, int32_t n, int place, int in_place) {
    float *h1 = guard_matrix(1, n, n, place, random_gate);
    float *h3 = guard_matrix(1, n, n, place, random_any);
    float *ds = guard_matrix(1, n, n, place, random_any);
    float *d = guard_copy(ds, n, GUARD_START);
    float *dh1 = in_place ? ds : guard_take(n, place), *dh3 = guard_take(n, place);
    KERNEL(set, swiglu_backward)(dh1, dh3, ds, h1, h3, n);
    int right = 1;
    for (int32_t i = 0; i < n; i++) {
        double h = h1[i], sig = sigmoid(h), up = (double)d[i] * h3[i];
        double expected3 = d[i] * h * sig, expected1 = up * sig * (1.0 + h * (1.0 - sig));
        /* 1 - sig is off by a rounding of 1, until sig is 1. */
        double flushed = fabs(d[i] * h), size = fabs(up) * sig * (1.0 + fmin(fabs(h), 20.0));
        right &= gate_close(dh3[i], expected3, 8.0, fabs(expected3), flushed);
        right &= gate_close(dh1[i], expected1, 12.0, size, fabs(up) * (1.0 + fabs(h)));
    }
    CHECK(right && guard_intact(), "swiglu_backward %s: %s, n %d, place %d, in place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", n, place, in_place);
    guard_reset();
}

static void check_swiglu_nan(const anepy_kernels *set) {
    float h1[3] = {NAN, 1.0f, 1.0f}, h3[3] = {1.0f, NAN, 1.0f}, ds[3] = {1.0f, 1.0f, NAN};
    float gate[3], dh1[3], dh3[3];
    KERNEL(set, swiglu)(gate, h1, h3, 3);
    KERNEL(set, swiglu_backward)(dh1, dh3, ds, h1, h3, 3);
    CHECK(isnan(gate[0]) && isnan(gate[1]) && !isnan(gate[2]), "swiglu %s: NaN is lost", set->isa);
    CHECK(isnan(dh1[0]) && isnan(dh3[0]) && isnan(dh1[1]) && !isnan(dh3[1]) && isnan(dh1[2]) &&
              isnan(dh3[2]),
          "swiglu_backward %s: NaN is lost or spread", set->isa);
}

void checks_elementwise(void) {
    const anepy_kernels *set;
    for (int32_t i = 0; (set = anepy_kernels_at(i)) != NULL; i++) {
        for (int32_t s = 0; s < SIZE_N; s++) {
            for (int place = 0; place < GUARD_PLACES; place++) {
                check_add(set, SIZES[s], place);
                check_scale(set, SIZES[s], place);
                check_rope(set, SIZES[s], place);
                for (int in_place = 0; in_place < 2; in_place++) {
                    check_swiglu(set, SIZES[s], place, in_place);
                    check_swiglu_backward(set, SIZES[s], place, in_place);
                }
            }
        }
        check_swiglu_nan(set);
    }
}
