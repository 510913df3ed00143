/* kernels_exp_adam.c - exp over its whole range, and AdamW where research code goes wrong: at zero
 * gradients, zero second moments, overflow and NaN. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "check.h"
#include "groups.h"
#include "guard.h"
#include "runtime/fpmode.h"

/* ------------------------------------------------------------------------------------------ exp */

#define SMALLEST (-87.33654f) /* about ln FLT_MIN: results below are zero */
#define ZERO_BELOW (-87.34f)
#define LARGEST 88.37f /* above, the vector sets may saturate */
#define BATCH 1024

/* Distance to the exact value in units of the last place of the float nearest to it. */
static double ulps(float actual, double exact) {
    int exponent;
    frexp(exact, &exponent);
    return fabs(actual - exact) / ldexp(1.0, exponent - 24);
}

/* Every `stride`-th float between two of the same sign, away from zero. */
static void sweep(const anepy_kernels *set, float from, float to, uint32_t stride) {
    float x[BATCH], y[BATCH], worst_x = from;
    double worst = 0.0;
    for (uint32_t bits = to_bits(from); bits < to_bits(to);) {
        int32_t n = 0;
        for (; n < BATCH && bits < to_bits(to); bits += stride) x[n++] = from_bits(bits);
        KERNEL(set, exp)(y, x, n);
        for (int32_t i = 0; i < n; i++) {
            double off = ulps(y[i], exp(x[i]));
            if (!(off <= worst)) worst = off, worst_x = x[i];
        }
    }
    CHECK(worst <= 2.0, "exp %s: %.2f ulp at %.9g", set->isa, worst, (double)worst_x);
}

static void check_exp_values(const anepy_kernels *set) {
    static const float x[] = {0.0f,    -0.0f,     1.0f,       -1.0f,  0x1p-149f, -0x1p-140f,
                              FLT_MIN, 88.37f,    ZERO_BELOW, -87.5f, -88.0f,    -100.0f,
                              -1e30f,  -INFINITY, NAN,        89.0f,  INFINITY};
    enum { N = sizeof x / sizeof x[0] };
    float y[N];
    KERNEL(set, exp)(y, x, N);
    CHECK(y[0] == 1.0f && y[1] == 1.0f, "exp %s of zero is %.9g", set->isa, (double)y[0]);
    CHECK(y[4] == 1.0f && y[5] == 1.0f && y[6] == 1.0f, "exp %s of a subnormal is not 1", set->isa);
    for (int i = 8; i < 14; i++)
        CHECK(y[i] == 0.0f, "exp %s: %g, not 0, at %g", set->isa, (double)y[i], (double)x[i]);
    CHECK(isnan(y[14]), "exp %s of NaN is %g", set->isa, (double)y[14]);
    CHECK(y[15] > 2.3e38f && y[16] > 2.3e38f, "exp %s of 89 is %g", set->isa, (double)y[15]);
}

static void check_exp_bounds(const anepy_kernels *set, int32_t n, int place) {
    float *x = guard_take(n, place), *y = guard_take(n, place);
    int right = 1;
    for (int32_t i = 0; i < n; i++) x[i] = random_float(-90.0f, 20.0f);
    KERNEL(set, exp)(y, x, n);
    for (int32_t i = 0; i < n; i++)
        right &= x[i] < ZERO_BELOW ? y[i] == 0.0f : x[i] < SMALLEST || ulps(y[i], exp(x[i])) <= 2.0;
    CHECK(right && guard_intact(), "exp %s: n %d, place %d", set->isa, n, place);
    KERNEL(set, exp)(x, x, n);
    CHECK(all_same(x, y, n) && guard_intact(), "exp %s in place: n %d, place %d", set->isa, n,
          place);
    guard_reset();
}

void checks_exp(void) {
    const anepy_kernels *set;
    uint64_t fpmode = anepy_fpmode_enter(); /* as in the library: subnormal results are zero */
    for (int32_t i = 0; (set = anepy_kernels_at(i)) != NULL; i++) {
        sweep(set, 0x1p-30f, 0.34f, 997);
        sweep(set, 0.34f, LARGEST, 211);
        sweep(set, -0x1p-30f, -0.34f, 997);
        sweep(set, -0.34f, SMALLEST, 211);
        /* Around every half multiple of ln 2, where the reduction changes its n. */
        for (int n = -126; n < 127; n++) {
            float edge = (float)((n + 0.5) * 0.69314718055994531);
            sweep(set, from_bits(to_bits(edge) - 64), from_bits(to_bits(edge) + 64), 1);
        }
        check_exp_values(set);
        for (int32_t s = 0; s < SIZE_N; s++)
            for (int place = 0; place < GUARD_PLACES; place++)
                check_exp_bounds(set, SIZES[s], place);
    }
    anepy_fpmode_leave(fpmode);
}

/* ---------------------------------------------------------------------------------------- AdamW */

typedef struct {
    float *p, *g, *m, *v;
} state;

static anepy_adam options(double lr, double decay, int t) {
    const double beta1 = 0.9, beta2 = 0.999;
    return (anepy_adam){.lr = (float)(lr / (1.0 - pow(beta1, t))),
                        .beta1 = (float)beta1,
                        .beta2 = (float)beta2,
                        .one_beta1 = (float)(1.0 - beta1),
                        .one_beta2 = (float)(1.0 - beta2),
                        .eps = 1e-8f,
                        .decay = (float)(1.0 - lr * decay),
                        .inv_sqrt_c2 = (float)(1.0 / sqrt(1.0 - pow(beta2, t))),
                        .grad_scale = 0.5f,
                        .clear = 1};
}

static float random_weight(void) { return random_float(-1.0f, 1.0f); }
static float random_gradient(void) { return ldexpf(random_weight(), random_below(30) - 25); }
static float random_moment(void) { return 1e-3f * random_weight(); }
static float random_square(void) { return random_float(0.0f, 1e-5f); }
static float zero(void) { return 0.0f; }

static state make(int32_t n, int place, float (*g)(void), float (*m)(void), float (*v)(void)) {
    return (state){guard_matrix(1, n, n, place, random_weight), guard_matrix(1, n, n, place, g),
                   guard_matrix(1, n, n, place, m), guard_matrix(1, n, n, place, v)};
}

static state copy(const state *s, int32_t n) {
    return (state){guard_copy(s->p, n, GUARD_START), guard_copy(s->g, n, GUARD_START),
                   guard_copy(s->m, n, GUARD_START), guard_copy(s->v, n, GUARD_START)};
}

/* One element against double precision, from the state before. */
static int adam_right(const state *s, const state *before, int32_t i, const anepy_adam *a) {
    double g = (double)before->g[i] * a->grad_scale;
    double m0 = a->beta1 * (double)before->m[i], m1 = a->one_beta1 * g;
    double v = a->beta2 * (double)before->v[i] + a->one_beta2 * g * g;
    double p = (double)before->p[i] * a->decay;
    double step = a->lr * (m0 + m1) / (sqrt(v) * a->inv_sqrt_c2 + a->eps);
    double size = a->lr * (fabs(m0) + fabs(m1)) / (sqrt(v) * a->inv_sqrt_c2 + a->eps);
    return is_close(s->m[i], m0 + m1, 4.0, fabs(m0) + fabs(m1)) && is_close(s->v[i], v, 5.0, v) &&
           is_close(s->p[i], p - step, 12.0, fabs(p) + size) &&
           to_bits(s->g[i]) == (a->clear ? 0 : to_bits(before->g[i]));
}

static void check_adam(const anepy_kernels *set, int32_t n, int place, int t, int clear) {
    anepy_adam a = options(1e-3, 0.1, t);
    a.clear = clear;
    state s = t == 1 ? make(n, place, random_gradient, zero, zero)
                     : make(n, place, random_gradient, random_moment, random_square);
    state before = copy(&s, n);
    int right = 1;
    KERNEL(set, adam)(s.p, s.g, s.m, s.v, n, &a);
    for (int32_t i = 0; i < n; i++) right &= adam_right(&s, &before, i, &a);
    CHECK(right && guard_intact(), "adam %s: %s, n %d, place %d, t %d, clear %d", set->isa,
          right ? "wrote elsewhere" : "wrong", n, place, t, clear);
    guard_reset();
}

/* Nothing but weight decay may move a weight that never had a gradient: not by one bit. */
static void check_adam_zero(const anepy_kernels *set, int32_t n, int place, double decay) {
    anepy_adam a = options(1e-3, decay, 1);
    state s = make(n, place, zero, zero, zero), before = copy(&s, n);
    int right = 1;
    KERNEL(set, adam)(s.p, s.g, s.m, s.v, n, &a);
    for (int32_t i = 0; i < n; i++)
        right &= same(s.p[i], before.p[i] * a.decay) && s.m[i] == 0.0f && s.v[i] == 0.0f;
    CHECK(right && guard_intact(), "adam %s: not exact at zero gradients, n %d, decay %g", set->isa,
          n, decay);
    guard_reset();
}

/* With a zero gradient, moments decay by exactly one rounding. */
static void check_adam_decay(const anepy_kernels *set, int32_t n, int place) {
    anepy_adam a = options(1e-3, 0.0, 100);
    state s = make(n, place, zero, random_moment, random_square), before = copy(&s, n);
    int right = 1;
    KERNEL(set, adam)(s.p, s.g, s.m, s.v, n, &a);
    for (int32_t i = 0; i < n; i++)
        right &= same(s.m[i], a.beta1 * before.m[i]) && same(s.v[i], a.beta2 * before.v[i]) &&
                 adam_right(&s, &before, i, &a);
    CHECK(right && guard_intact(), "adam %s: moments do not decay, n %d", set->isa, n);
    guard_reset();
}

/* One odd gradient among ordinary ones: at every lane, first step and later. */
static void check_adam_odd(const anepy_kernels *set, float odd, int t) {
    enum { N = 37 };
    const anepy_kernels *scalar = anepy_kernels_scalar();
    anepy_adam a = options(1e-3, 0.0, t);
    for (int32_t at = 0; at < N; at++) {
        state s = t == 1 ? make(N, GUARD_END, random_gradient, zero, zero)
                         : make(N, GUARD_END, random_gradient, random_moment, random_square);
        s.g[at] = odd;
        state before = copy(&s, N), expected = copy(&s, N);
        int right = 1;
        KERNEL(set, adam)(s.p, s.g, s.m, s.v, N, &a);
        scalar->adam(expected.p, expected.g, expected.m, expected.v, N, &a);
        for (int32_t i = 0; i < N; i++)
            if (i != at) right &= adam_right(&s, &before, i, &a);
        float p = s.p[at], e = expected.p[at];
        right &= isfinite(odd) ? is_close(p, e, 8.0, fabs(e)) && isfinite(p) : isnan(p) && isnan(e);
        right &= !isnan(odd) || (isnan(s.m[at]) && isnan(s.v[at]));
        right &= isnan(s.m[at]) == isnan(expected.m[at]) && isinf(s.v[at]) == isinf(expected.v[at]);
        CHECK(right && to_bits(s.g[at]) == 0 && guard_intact(),
              "adam %s: gradient %g at %d gives %g, scalar %g, t %d", set->isa, (double)odd, at,
              (double)p, (double)e, t);
        guard_reset();
    }
}

static void check_set(const anepy_kernels *set) {
    static const float odd[] = {NAN,     INFINITY, -INFINITY, FLT_MAX,   -1e30f, 1e25f, -1e19f,
                                FLT_MIN, 1e-25f,   -1e-40f,   0x1p-149f, 0.0f,   -0.0f};
    for (int32_t s = 0; s < SIZE_N; s++) {
        for (int place = 0; place < GUARD_PLACES; place++) {
            check_adam(set, SIZES[s], place, 1, 0), check_adam(set, SIZES[s], place, 1, 1);
            check_adam(set, SIZES[s], place, 1000, 0), check_adam(set, SIZES[s], place, 1000, 1);
            check_adam_zero(set, SIZES[s], place, 0.0);
            check_adam_zero(set, SIZES[s], place, 0.1);
            check_adam_decay(set, SIZES[s], place);
        }
    }
    for (size_t i = 0; i < sizeof odd / sizeof odd[0]; i++) {
        check_adam_odd(set, odd[i], 1);
        check_adam_odd(set, odd[i], 50);
    }
}

void checks_adam(void) {
    const anepy_kernels *set;
    for (int flush = 0; flush < 2; flush++) { /* the caller's mode, then the library's */
        uint64_t fpmode = flush ? anepy_fpmode_enter() : 0;
        for (int32_t i = 0; (set = anepy_kernels_at(i)) != NULL; i++) check_set(set);
        if (flush) anepy_fpmode_leave(fpmode);
    }
}
