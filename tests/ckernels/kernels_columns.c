/* kernels_columns.c - RMSNorm, soft-max and cross-entropy kernels of every instruction set, against
 * double precision or the scalar set, whose sums stand in plain sight. */
#include <float.h>
#include <math.h>

#include "check.h"
#include "groups.h"
#include "guard.h"

#define COLS ANEPY_COLUMNS

static const int32_t CHANNELS[] = {1, 2, 3, 7, 48, 64, 65, 129};
#define CHANNEL_N ((int32_t)(sizeof CHANNELS / sizeof CHANNELS[0]))

static float random_signed(void) { return random_float(-2.0f, 2.0f); }

/* One column of zeros, one of large and one of small numbers among ordinary ones. */
static void vary_columns(float *x, int32_t rows, int64_t ld) {
    for (int32_t r = 0; r < rows; r++) {
        x[r * ld + 3] = 0.0f;
        x[r * ld + 17] *= 1e10f;
        x[r * ld + 62] *= 1e-10f;
    }
}

/* -------------------------------------------------------------------------------------- RMSNorm */

static const float EPS[] = {1e-5f, 1e-6f, 0.03f};

static double reciprocal_rms(const float *x, float eps, int32_t channels, int64_t ld, int32_t s) {
    double sum = 0.0;
    for (int32_t c = 0; c < channels; c++) sum += (double)x[c * ld + s] * x[c * ld + s];
    return 1.0 / sqrt(sum / channels + (double)eps);
}

static void check_rmsnorm(const anepy_kernels *set, float eps, int32_t channels, int64_t ld,
                          int place) {
    float *x = guard_matrix(channels, COLS, ld, place, random_signed);
    float *w = guard_matrix(1, channels, channels, place, random_signed);
    float *y = guard_take(span(channels, COLS, ld), place), *rstd = guard_take(COLS, place);
    int right = 1;
    vary_columns(x, channels, ld);
    KERNEL(set, rmsnorm)(y, ld, rstd, x, w, eps, channels, ld);
    for (int32_t s = 0; s < COLS; s++) {
        double r = reciprocal_rms(x, eps, channels, ld, s);
        right &= is_close(rstd[s], r, channels + 4.0, r);
        for (int32_t c = 0; c < channels; c++) {
            double expected = w[c] * x[c * ld + s] * r;
            right &= is_close(y[c * ld + s], expected, channels + 6.0, fabs(expected));
        }
    }
    CHECK(right && guard_intact() && gaps_intact(y, channels, COLS, ld),
          "rmsnorm %s: %s, %d channels, ld %lld, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", channels, (long long)ld, place);
    guard_reset();
}

static void check_rmsnorm_stats(const anepy_kernels *set, float eps, int32_t channels, int64_t ld,
                                int place) {
    float *x = guard_matrix(channels, COLS, ld, place, random_signed);
    float *dy = guard_matrix(channels, COLS, ld, place, random_signed);
    float *w = guard_matrix(1, channels, channels, place, random_signed);
    float *rstd = guard_take(COLS, place), *coef = guard_take(COLS, place);
    int right = 1;
    vary_columns(x, channels, ld);
    KERNEL(set, rmsnorm_stats)(rstd, coef, dy, x, w, eps, channels, ld);
    for (int32_t s = 0; s < COLS; s++) {
        double r = reciprocal_rms(x, eps, channels, ld, s), cube = r * r * r / channels;
        double dot = 0.0, size = 0.0;
        for (int32_t c = 0; c < channels; c++) {
            double term = (double)w[c] * dy[c * ld + s] * x[c * ld + s];
            dot += term;
            size += fabs(term);
        }
        right &= is_close(rstd[s], r, channels + 4.0, r);
        right &= is_close(coef[s], cube * dot, 4.0 * channels + 16.0, cube * size);
    }
    CHECK(right && guard_intact(), "rmsnorm_stats %s: %s, %d channels, ld %lld, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", channels, (long long)ld, place);
    guard_reset();
}

static void check_rmsnorm_row(const anepy_kernels *set, int32_t n, int place, int in_place) {
    float *residual = guard_matrix(1, n, n, place, random_signed);
    float *start = guard_copy(residual, n, GUARD_START);
    float *read = guard_matrix(1, n, n, place, random_signed);
    float *dy = guard_copy(read, n, GUARD_START);
    float *x = guard_matrix(1, n, n, place, random_signed);
    float *rstd = guard_matrix(1, n, n, place, random_signed);
    float *coef = guard_matrix(1, n, n, place, random_signed);
    float *dx = guard_take(n, place), w = random_signed();
    if (in_place > 0) dx = in_place == 1 ? residual : read;
    float dw = KERNEL(set, rmsnorm_row)(dx, residual, read, x, rstd, coef, w, n);
    double sum = 0.0, sum_size = 0.0;
    int right = 1;
    for (int32_t s = 0; s < n; s++) {
        double through = (double)rstd[s] * w * dy[s], back = (double)coef[s] * x[s];
        double term = (double)dy[s] * x[s] * rstd[s];
        right &= is_close(dx[s], start[s] + through - back, 6.0,
                          fabs(start[s]) + fabs(through) + fabs(back));
        sum += term;
        sum_size += fabs(term);
    }
    right &= is_close(dw, sum, n + 4.0, sum_size);
    CHECK(right && guard_intact(), "rmsnorm_row %s: %s, n %d, place %d, in place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", n, place, in_place);
    guard_reset();
}

/* ------------------------------------------------------------------------------------- soft-max */

static float random_score(void) {
    return random_below(16) == 0 ? random_float(-400.0f, 400.0f) : random_float(-12.0f, 12.0f);
}

/* Rounding the argument costs its size in roundings of the result. */
static int exp_close(float actual, double argument, double expected) {
    return is_close(actual, expected, 6.0 + 2.0 * fabs(argument), expected);
}

/* What is raised to 2 is rounded once more, with its own size and that of its parts. */
static int exp2_close(float actual, double argument, double parts, double expected) {
    if (argument < -126.0) return actual >= 0.0f && actual <= 0x1p-125f;
    return is_close(actual, expected, 6.0 + 2.0 * (fabs(argument) + parts), expected);
}

/* Two blocks one after the other, the second one causal; then both against all rows at once. */
static void check_softmax_step(const anepy_kernels *set, int32_t rows, float scale, int place) {
    int64_t n = (int64_t)rows * COLS;
    float *x = guard_matrix(2 * rows, COLS, COLS, place, random_score);
    float *start = guard_copy(x, 2 * n, GUARD_START);
    float *max = guard_take(COLS, place), *sum = guard_take(COLS, place);
    float *shrink[2] = {guard_take(COLS, place), guard_take(COLS, place)}, first[COLS];
    int right = 1;
    for (int32_t j = 0; j < COLS; j++) {
        max[j] = -INFINITY;
        sum[j] = 0.0f;
    }
    for (int32_t i = 0; i < rows * COLS; i++) /* what does not count may be anything */
        x[n + i] = i % COLS < i / COLS ? (i % 2 ? NAN : INFINITY) : start[n + i];
    KERNEL(set, softmax_step)(x, max, sum, shrink[0], rows, scale, 0);
    for (int32_t j = 0; j < COLS; j++) first[j] = max[j];
    KERNEL(set, softmax_step)(x + n, max, sum, shrink[1], rows, scale, 1);
    for (int32_t j = 0; j < COLS; j++) {
        double largest[2] = {-INFINITY, -INFINITY}, total = 0.0;
        int32_t seen = rows + anepy_min_i32(rows, j + 1);
        for (int32_t t = 0; t < seen; t++)
            largest[t >= rows] = fmax(largest[t >= rows], (double)start[t * COLS + j] * scale);
        largest[1] = fmax(largest[0], largest[1]);
        double factor = exp2(largest[0] - largest[1]), size = fabs(largest[1]) + fabs(largest[0]);
        for (int32_t t = 0; t < 2 * rows; t++) {
            double z = (double)start[t * COLS + j] * scale - largest[t >= rows];
            double e = t < seen ? exp2(z) : 0.0;
            total += t < rows ? e * factor : e;
            right &= t < seen ? exp2_close(x[t * COLS + j], z, size, e) : x[t * COLS + j] == 0.0f;
        }
        right &= shrink[0][j] == 0.0f && is_close(first[j], largest[0], 1.0, fabs(largest[0]));
        right &= is_close(max[j], largest[1], 1.0, fabs(largest[1]));
        right &= exp2_close(shrink[1][j], largest[0] - largest[1], size, factor);
        right &= is_close(sum[j], total, 2.0 * rows + 64.0 + 4.0 * size, total);
    }
    CHECK(right && guard_intact(), "softmax_step %s: %s, %d rows, scale %g, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", rows, (double)scale, place);
    guard_reset();
}

static void check_softmax_again(const anepy_kernels *set, int32_t rows, int32_t causal, int place) {
    float *x = guard_matrix(rows, COLS, COLS, place, random_score);
    float *dp = guard_matrix(rows, COLS, COLS, place, random_signed);
    float *lse = guard_take(rows, place), *dot = guard_matrix(1, rows, rows, place, random_signed);
    int64_t n = (int64_t)rows * COLS;
    float *s = guard_copy(x, n, GUARD_START), *d = guard_copy(dp, n, GUARD_START);
    double scale = 0.25, factor = 0.125;
    int right = 1;
    for (int32_t r = 0; r < rows; r++) { /* it is above every score that counts */
        lse[r] = 0.5f;
        for (int32_t j = 0; j < COLS; j++) {
            int32_t counts = !causal || j <= r;
            if (counts) lse[r] = fmaxf(lse[r], s[r * COLS + j] * 0.25f + 0.5f);
            else x[r * COLS + j] = dp[r * COLS + j] = j % 2 ? NAN : INFINITY;
        }
    }
    KERNEL(set, softmax_again)(x, dp, lse, dot, rows, (float)scale, (float)factor, causal);
    for (int32_t r = 0; r < rows; r++) {
        for (int32_t j = 0; j < COLS; j++) {
            int32_t i = r * COLS + j;
            double z = s[i] * scale - (double)lse[r], p = exp2(z);
            if (causal && j > r) {
                right &= to_bits(x[i]) == 0 && to_bits(dp[i]) == 0;
                continue;
            }
            right &= exp2_close(x[i], z, fabs(lse[r]), p);
            right &= is_close(dp[i], x[i] * factor * (d[i] - (double)dot[r]), 4.0,
                              x[i] * factor * (fabs(d[i]) + fabs(dot[r])));
        }
    }
    CHECK(right && guard_intact(), "softmax_again %s: %s, %d rows, causal %d, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", rows, causal, place);
    guard_reset();
}

static void check_scale_columns(const anepy_kernels *set, int32_t rows, int64_t ld, int place,
                                int in_place) {
    float *src = guard_matrix(rows, COLS, COLS, place, random_signed);
    float *start = guard_copy(src, (int64_t)rows * COLS, GUARD_START);
    float *factor = guard_matrix(1, COLS, COLS, place, random_signed);
    float *dst = in_place ? src : guard_take(span(rows, COLS, ld), place);
    int right = 1;
    if (in_place) ld = COLS;
    KERNEL(set, scale_columns)(dst, ld, src, factor, rows);
    for (int32_t r = 0; r < rows; r++)
        for (int32_t j = 0; j < COLS; j++)
            right &= dst[r * ld + j] == start[r * COLS + j] * factor[j];
    CHECK(right && guard_intact() && gaps_intact(dst, rows, COLS, ld),
          "scale_columns %s: %s, %d rows, ld %lld, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", rows, (long long)ld, place);
    guard_reset();
}

static void check_dot_columns(const anepy_kernels *set, int32_t rows, int64_t ld, int place) {
    float *a = guard_matrix(rows, COLS, COLS, place, random_signed);
    float *b = guard_matrix(rows, COLS, ld, place, random_signed), *y = guard_take(COLS, place);
    int right = 1;
    vary_columns(b, rows, ld);
    KERNEL(set, dot_columns)(y, a, b, ld, rows);
    for (int32_t j = 0; j < COLS; j++) {
        double expected = 0.0, size = 0.0;
        for (int32_t r = 0; r < rows; r++) {
            expected += (double)a[r * COLS + j] * b[r * ld + j];
            size += fabs((double)a[r * COLS + j] * b[r * ld + j]);
        }
        right &= is_close(y[j], expected, rows + 2.0, size);
    }
    CHECK(right && guard_intact(), "dot_columns %s: %s, %d rows, ld %lld, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", rows, (long long)ld, place);
    guard_reset();
}

static void check_softmax_row(const anepy_kernels *set, int32_t valid, int32_t padded, float scale,
                              int place) {
    float *x = guard_matrix(1, padded, padded, place, random_score);
    float *start = guard_copy(x, padded, GUARD_START);
    double max = -INFINITY, sum = 0.0;
    int right = 1;
    for (int32_t i = valid; i < padded; i++) x[i] = i % 2 ? NAN : INFINITY; /* must not matter */
    for (int32_t i = 0; i < valid; i++) max = fmax(max, start[i]);
    for (int32_t i = 0; i < valid; i++) sum += exp((start[i] - max) * scale);
    KERNEL(set, softmax_row)(x, valid, padded, scale);
    for (int32_t i = 0; i < valid; i++) {
        double z = (start[i] - max) * scale, expected = exp(z) / sum;
        right &= is_close(x[i], expected, 2.0 * fabs(z) + valid + 64.0, expected);
    }
    for (int32_t i = valid; i < padded; i++) right &= to_bits(x[i]) == 0;
    CHECK(right && guard_intact(), "softmax_row %s: %s, %d of %d, scale %g, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", valid, padded, (double)scale, place);
    guard_reset();
}

static void check_softmax_row_backward(const anepy_kernels *set, int32_t n, int place,
                                       int in_place) {
    float *p = guard_matrix(1, n, n, place, random_signed);
    float *dp = guard_matrix(1, n, n, place, random_signed);
    float *d = guard_copy(dp, n, GUARD_START), *ds = in_place ? dp : guard_take(n, place);
    double dot = 0.0, size = 0.0, scale = 0.125;
    int right = 1;
    for (int32_t i = 0; i < n; i++) {
        dot += (double)p[i] * dp[i];
        size += fabs((double)p[i] * dp[i]);
    }
    KERNEL(set, softmax_row_backward)(ds, p, dp, (float)scale, n);
    for (int32_t i = 0; i < n; i++)
        right &= is_close(ds[i], p[i] * (d[i] - dot) * scale, n + 6.0,
                          fabs(p[i]) * (fabs(d[i]) + size) * scale);
    CHECK(right && guard_intact(), "softmax_row_backward %s: %s, n %d, place %d, in place %d",
          set->isa, right ? "wrote elsewhere" : "wrong", n, place, in_place);
    guard_reset();
}

/* -------------------------------------------------------------------------------- cross-entropy */

static void check_logsumexp(const anepy_kernels *set, int32_t rows, int64_t ld, int place) {
    float *x = guard_matrix(rows, COLS, ld, place, random_score);
    float *max = guard_take(COLS, place), *sum = guard_take(COLS, place);
    int right = 1;
    KERNEL(set, logsumexp_columns)(max, sum, x, ld, rows);
    for (int32_t s = 0; s < COLS; s++) {
        float largest = -INFINITY;
        double expected = 0.0;
        for (int32_t r = 0; r < rows; r++) largest = fmaxf(largest, x[r * ld + s]);
        for (int32_t r = 0; r < rows; r++) expected += exp((double)x[r * ld + s] - largest);
        right &= max[s] == largest && is_close(sum[s], expected, rows + 64.0, expected);
    }
    CHECK(right && guard_intact(), "logsumexp_columns %s: %s, %d rows, ld %lld, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", rows, (long long)ld, place);
    guard_reset();
}

static void check_softmax_gradient(const anepy_kernels *set, int32_t rows, int64_t ld, int place) {
    float *x = guard_matrix(rows, COLS, ld, place, random_signed);
    float *lse = guard_take(COLS, place), scale = 1.0f / 7.0f;
    float *start = guard_copy(x, span(rows, COLS, ld), GUARD_START);
    int right = 1;
    for (int32_t s = 0; s < COLS; s++) lse[s] = random_float(2.0f, 30.0f);
    lse[63] = INFINITY; /* how the caller asks for zeros in padding */
    KERNEL(set, softmax_gradient)(x, lse, scale, ld, rows);
    for (int32_t r = 0; r < rows; r++) {
        for (int32_t s = 0; s < COLS; s++) {
            double z = (double)start[r * ld + s] - lse[s], e = exp(z);
            float actual = x[r * ld + s];
            right &= s == 63 ? actual == 0.0f : exp_close(actual, z, e * scale);
        }
    }
    CHECK(right && guard_intact() && gaps_intact(x, rows, COLS, ld),
          "softmax_gradient %s: %s, %d rows, ld %lld, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", rows, (long long)ld, place);
    guard_reset();
}

/* A NaN must reach whoever looks at the result: a loss or a gradient that hides it trains on. */
static void check_nan(const anepy_kernels *set) {
    for (int32_t at = 0; at < 67; at++) {
        float row[67], column[67 * COLS], max[COLS], sum[COLS];
        for (int32_t i = 0; i < 67; i++) row[i] = i == at ? NAN : 0.5f;
        for (int32_t i = 0; i < 67 * COLS; i++)
            column[i] = i / COLS == at && i % COLS == 5 ? NAN : 0.5f;
        KERNEL(set, softmax_row)(row, 67, 67, 1.0f);
        KERNEL(set, logsumexp_columns)(max, sum, column, COLS, 67);
        int lost = 0;
        for (int32_t i = 0; i < 67; i++) lost |= !isnan(row[i]);
        CHECK(!lost, "softmax_row %s: NaN at %d is lost", set->isa, at);
        CHECK(isnan(sum[5]) && !isnan(sum[4]) && !isnan(sum[6]),
              "logsumexp_columns %s: NaN in row %d is lost or spread", set->isa, at);
        float shrink[COLS];
        for (int32_t i = 0; i < COLS; i++) max[i] = sum[i] = 0.0f;
        KERNEL(set, softmax_step)(column, max, sum, shrink, 67, 1.0f, 0);
        CHECK(isnan(sum[5]) && !isnan(sum[4]) && !isnan(sum[6]),
              "softmax_step %s: NaN in row %d is lost or spread", set->isa, at);
        for (int32_t i = 0; i < COLS; i++) column[i] = 0.5f; /* which cannot mend it */
        KERNEL(set, softmax_step)(column, max, sum, shrink, 1, 1.0f, 0);
        CHECK(isnan(sum[5]) && !isnan(sum[4]), "softmax_step %s: NaN in row %d is forgotten",
              set->isa, at);
    }
}

void checks_columns(void) {
    static const int32_t rows[] = {1, 2, 7, 63, 64, 65, 128, 192};
    const anepy_kernels *set;
    for (int32_t i = 0; (set = anepy_kernels_at(i)) != NULL; i++) {
        for (int place = 0; place < GUARD_PLACES; place++) {
            for (int32_t c = 0; c < CHANNEL_N; c++) {
                for (int64_t ld = COLS; ld <= 128; ld += 33) { /* 64 and 97 */
                    check_rmsnorm(set, EPS[c % 3], CHANNELS[c], ld, place);
                    check_rmsnorm_stats(set, EPS[c % 3], CHANNELS[c], ld, place);
                    check_logsumexp(set, CHANNELS[c], ld, place);
                    check_softmax_gradient(set, CHANNELS[c], ld, place);
                }
            }
            for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++) {
                check_softmax_step(set, rows[r], 1.0f, place);
                check_softmax_step(set, rows[r], 0.18f, place);
                check_softmax_again(set, rows[r], 0, place);
                check_softmax_again(set, rows[r], 1, place);
                check_scale_columns(set, rows[r], COLS + 5, place, 0);
                check_scale_columns(set, rows[r], COLS, place, 1);
                check_dot_columns(set, rows[r], COLS + rows[r] % 3, place);
            }
            for (int32_t s = 0; s < SIZE_N; s++) {
                for (int in_place = 0; in_place < 3; in_place++)
                    check_rmsnorm_row(set, SIZES[s], place, in_place);
                for (int in_place = 0; in_place < 2; in_place++)
                    check_softmax_row_backward(set, SIZES[s], place, in_place);
                if (SIZES[s] == 0) continue; /* a row has an element */
                check_softmax_row(set, SIZES[s], SIZES[s], 1.0f, place);
                check_softmax_row(set, SIZES[s], SIZES[s] + 1, 0.25f, place);
                check_softmax_row(set, SIZES[s], (int32_t)anepy_round_up(SIZES[s], COLS), 0.125f,
                                  place);
            }
        }
        check_nan(set);
    }
}
