/* kernels/scalar.c - every kernel in plain C, deliberately not tuned.
 *
 * It is the reference that vector sets are checked against, the fallback for other processors, and
 * the update without switch simd_adam. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-vectorize") /* or gcc would use vectors */
#endif
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"
#include "runtime/half.h"

#define COLS ANEPY_COLUMNS

static void gemm_tile_6x16__scalar(float *c, int64_t ldc, const float *a, int64_t a_row,
                                   int64_t a_step, const float *b, int64_t ldb, int32_t k,
                                   int32_t rows, int32_t accumulate, anepy_lines next) {
    (void)next;
    for (int32_t i = 0; i < rows; i++) {
        float sum[16] = {0};
        for (int32_t p = 0; p < k; p++)
            for (int32_t j = 0; j < 16; j++) sum[j] += a[i * a_row + p * a_step] * b[p * ldb + j];
        for (int32_t j = 0; j < 16; j++)
            c[i * ldc + j] = accumulate ? c[i * ldc + j] + sum[j] : sum[j];
    }
}

static void transpose_panel__scalar(float *dst, const float *src, int64_t ld, int32_t rows,
                                    int32_t n) {
    for (int32_t p = 0; p < n; p++)
        for (int32_t j = 0; j < COLS; j++) dst[p * COLS + j] = j < rows ? src[j * ld + p] : 0.0f;
}

static void gemv__scalar(float *y, const float *w, int64_t ldw, const float *x, int32_t rows,
                         int32_t k) {
    for (int32_t i = 0; i < rows; i++) {
        float sum = 0.0f;
        for (int32_t p = 0; p < k; p++) sum += w[i * ldw + p] * x[p];
        y[i] = sum;
    }
}

static void gemv_bf16__scalar(float *y, const uint16_t *w, const float *x, int32_t rows,
                              int32_t k) {
    for (int32_t i = 0; i < rows; i++, w += k) {
        y[i] = 0.0f;
        for (int32_t p = 0; p < k; p++) y[i] += anepy_from_bf16(w[p]) * x[p];
    }
}

static void gemv_q8__scalar(float *y, const anepy_q8 *w, const float *x, int32_t rows, int32_t k) {
    for (int32_t i = 0; i < rows; i++) {
        y[i] = 0.0f;
        for (int32_t b = 0; b < k / ANEPY_Q8_N; b++, w++) {
            float sum = 0.0f;
            for (int32_t j = 0; j < ANEPY_Q8_N; j++)
                sum += (float)w->value[j] * x[b * ANEPY_Q8_N + j];
            y[i] += anepy_from_half(w->scale) * sum;
        }
    }
}

static void sum_rows__scalar(float *y, const float *w, int64_t ldw, const float *x, int32_t rows,
                             int32_t k) {
    for (int32_t p = 0; p < k; p++) y[p] = 0.0f;
    for (int32_t i = 0; i < rows; i++)
        for (int32_t p = 0; p < k; p++) y[p] += x[i] * w[i * ldw + p];
}

static void add__scalar(float *dst, const float *a, const float *b, int64_t n) {
    for (int64_t i = 0; i < n; i++) dst[i] = a[i] + b[i];
}

static void scale__scalar(float *dst, float factor, int64_t n) {
    for (int64_t i = 0; i < n; i++) dst[i] *= factor;
}

static void exp__scalar(float *dst, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) dst[i] = expf(x[i]);
}

static double sum_squares__scalar(const float *x, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sum;
}

static float sum__scalar(const float *x, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    return sum;
}

static void to_half__scalar(uint16_t *dst, const float *src, int64_t n) {
    for (int64_t i = 0; i < n; i++) dst[i] = anepy_to_half(src[i]);
}

static void from_half__scalar(float *dst, const uint16_t *src, int64_t n) {
    for (int64_t i = 0; i < n; i++) dst[i] = anepy_from_half(src[i]);
}

static void from_bf16__scalar(float *dst, const uint16_t *src, int64_t n) {
    for (int64_t i = 0; i < n; i++) dst[i] = anepy_from_bf16(src[i]);
}

static void to_bf16_randomly__scalar(uint16_t *dst, const float *src, int64_t n, int64_t first,
                                     uint32_t key) {
    for (int64_t i = 0; i < n; i++)
        dst[i] = anepy_to_bf16_randomly(src[i], anepy_mixed((uint32_t)(first + i) ^ key));
}

static void from_q8__scalar(float *dst, const anepy_q8 *row, int64_t first, int64_t n) {
    for (int64_t i = first; i < first + n; i++) {
        const anepy_q8 *block = row + i / ANEPY_Q8_N;
        dst[i - first] = anepy_from_half(block->scale) * (float)block->value[i % ANEPY_Q8_N];
    }
}

static void rmsnorm__scalar(float *y, int64_t ldy, float *rstd, const float *x, const float *w,
                            float eps, int32_t channels, int64_t ld) {
    for (int32_t s = 0; s < COLS; s++) {
        float sum = 0.0f;
        for (int32_t c = 0; c < channels; c++) sum += x[c * ld + s] * x[c * ld + s];
        rstd[s] = 1.0f / sqrtf(sum / (float)channels + eps);
        for (int32_t c = 0; c < channels; c++) y[c * ldy + s] = w[c] * (x[c * ld + s] * rstd[s]);
    }
}

static void rmsnorm_stats__scalar(float *rstd, float *coef, const float *dy, const float *x,
                                  const float *w, float eps, int32_t channels, int64_t ld) {
    for (int32_t s = 0; s < COLS; s++) {
        float sum = 0.0f, dot = 0.0f;
        for (int32_t c = 0; c < channels; c++) {
            sum += x[c * ld + s] * x[c * ld + s];
            dot += w[c] * dy[c * ld + s] * x[c * ld + s];
        }
        float r = 1.0f / sqrtf(sum / (float)channels + eps);
        rstd[s] = r;
        coef[s] = r * r * r / (float)channels * dot;
    }
}

static float rmsnorm_row__scalar(float *dx, const float *residual, const float *dy, const float *x,
                                 const float *rstd, const float *coef, float w, int32_t n) {
    float dw = 0.0f;
    for (int32_t s = 0; s < n; s++) {
        dw += dy[s] * x[s] * rstd[s];
        dx[s] = residual[s] + rstd[s] * w * dy[s] - coef[s] * x[s];
    }
    return dw;
}

static void rope__scalar(float *a, float *b, const float *cosine, const float *sine, float sign,
                         int32_t n) {
    for (int32_t s = 0; s < n; s++) {
        float re = a[s], im = b[s], si = sign * sine[s];
        a[s] = re * cosine[s] - im * si;
        b[s] = re * si + im * cosine[s];
    }
}

static void swiglu__scalar(float *gate, const float *h1, const float *h3, int64_t n) {
    for (int64_t i = 0; i < n; i++) gate[i] = h1[i] / (1.0f + expf(-h1[i])) * h3[i];
}

static void swiglu_backward__scalar(float *dh1, float *dh3, const float *ds, const float *h1,
                                    const float *h3, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float sig = 1.0f / (1.0f + expf(-h1[i])), d = ds[i];
        dh3[i] = d * h1[i] * sig;
        dh1[i] = d * h3[i] * sig * (1.0f + h1[i] * (1.0f - sig));
    }
}

static void softmax_step__scalar(float *x, float *max, float *sum, float *shrink, int32_t rows,
                                 float scale, int32_t causal) {
    for (int32_t j = 0; j < COLS; j++) {
        float before = max[j];
        for (int32_t t = j + 1; t < rows && causal; t++) x[t * COLS + j] = -INFINITY;
        for (int32_t t = 0; t < rows; t++) max[j] = fmaxf(max[j], x[t * COLS + j] * scale);
        shrink[j] = exp2f(before - max[j]);
        sum[j] *= shrink[j];
        for (int32_t t = 0; t < rows; t++) {
            x[t * COLS + j] = exp2f(x[t * COLS + j] * scale - max[j]);
            sum[j] += x[t * COLS + j];
        }
    }
}

static void softmax_again__scalar(float *x, float *dp, const float *lse, const float *dot,
                                  int32_t rows, float scale, float factor, int32_t causal) {
    for (int32_t r = 0; r < rows; r++) {
        for (int32_t j = 0; j < COLS; j++) {
            int32_t i = r * COLS + j, counts = !causal || j <= r;
            x[i] = counts ? exp2f(x[i] * scale - lse[r]) : 0.0f;
            dp[i] = counts ? x[i] * factor * (dp[i] - dot[r]) : 0.0f;
        }
    }
}

static void scale_columns__scalar(float *dst, int64_t dst_ld, const float *src, const float *factor,
                                  int32_t rows) {
    for (int32_t r = 0; r < rows; r++)
        for (int32_t j = 0; j < COLS; j++) dst[r * dst_ld + j] = src[r * COLS + j] * factor[j];
}

static void dot_columns__scalar(float *y, const float *a, const float *b, int64_t ldb,
                                int32_t rows) {
    for (int32_t j = 0; j < COLS; j++) {
        y[j] = 0.0f;
        for (int32_t r = 0; r < rows; r++) y[j] += a[r * COLS + j] * b[r * ldb + j];
    }
}

static void softmax_row__scalar(float *x, int32_t valid, int32_t padded, float scale) {
    float max = -INFINITY, sum = 0.0f;
    for (int32_t i = 0; i < valid; i++) max = fmaxf(max, x[i]);
    for (int32_t i = 0; i < valid; i++) sum += x[i] = expf((x[i] - max) * scale);
    for (int32_t i = 0; i < valid; i++) x[i] /= sum;
    for (int32_t i = valid; i < padded; i++) x[i] = 0.0f;
}

static void softmax_row_backward__scalar(float *ds, const float *p, const float *dp, float scale,
                                         int32_t n) {
    float dot = 0.0f;
    for (int32_t i = 0; i < n; i++) dot += p[i] * dp[i];
    for (int32_t i = 0; i < n; i++) ds[i] = p[i] * (dp[i] - dot) * scale;
}

static void logsumexp_columns__scalar(float *max, float *sum, const float *x, int64_t ld,
                                      int32_t rows) {
    for (int32_t s = 0; s < COLS; s++) {
        max[s] = -INFINITY;
        sum[s] = 0.0f;
        for (int32_t r = 0; r < rows; r++) max[s] = fmaxf(max[s], x[r * ld + s]);
        for (int32_t r = 0; r < rows; r++) sum[s] += expf(x[r * ld + s] - max[s]);
    }
}

static void softmax_gradient__scalar(float *x, const float *lse, float scale, int64_t ld,
                                     int32_t rows) {
    for (int32_t r = 0; r < rows; r++)
        for (int32_t s = 0; s < COLS; s++) x[r * ld + s] = expf(x[r * ld + s] - lse[s]) * scale;
}

static void adam__scalar(float *p, float *g, float *m, float *v, int64_t n, const anepy_adam *a) {
    for (int64_t i = 0; i < n; i++) {
        float grad = g[i] * a->grad_scale;
        m[i] = a->beta1 * m[i] + a->one_beta1 * grad;
        v[i] = a->beta2 * v[i] + a->one_beta2 * grad * grad;
        p[i] = p[i] * a->decay - a->lr * m[i] / (sqrtf(v[i]) * a->inv_sqrt_c2 + a->eps);
        if (a->clear) g[i] = 0.0f;
    }
}

/* So many chains fit the 16 registers of x86-64 beside factor and term. */
#define CHAINS 12

static float fma_chains__scalar(float factor, float term, int64_t rounds) {
    float chain[CHAINS], sum = 0.0f;
    for (int i = 0; i < CHAINS; i++) chain[i] = (float)i;
    for (int64_t r = 0; r < rounds; r++) {
        ANEPY_UNROLL
        for (int i = 0; i < CHAINS; i++) chain[i] = chain[i] * factor + term;
    }
    for (int i = 0; i < CHAINS; i++) sum += chain[i];
    return sum / CHAINS;
}

/* ------------------------------------------------------------------------- the Neural Engine's */

static int32_t exponent_of(float x) {
    int exponent;
    frexpf(x, &exponent);
    return x == 0.0f || exponent - 1 < -14 ? -14 : exponent - 1;
}

static void fixed_prepare__scalar(float *a, float *least, float *largest, const float *x,
                                  int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        largest[i] = fmaxf(largest[i], fabsf(x[i]));
        int32_t exponent = -16 - exponent_of(x[i]);
        least[i] = x[i] == 0.0f || exponent <= -14 ? 0.0f : ldexpf(1.0f, exponent);
        a[i] = x[i] == 0.0f ? x[i] : nextafterf(x[i], x[i] * 2.0f);
    }
}

static void fixed_bounds__scalar(float *bounds, const float *a, const float *b, int32_t n) {
    for (int32_t p = 0; p < n; p++) {
        if (p % ANEPY_FIXED_STEPS == 0) bounds[p / ANEPY_FIXED_STEPS] = 0.0f;
        bounds[p / ANEPY_FIXED_STEPS] += fabsf(a[p] * b[p]);
    }
}

/* frexp and round instead of the tricks of the vector sets. */
static int64_t fixed_product__scalar(float a, float least, float b) {
    int exponent;
    float fraction = frexpf(a, &exponent);
    double exact = ldexp(trunc(ldexp((double)fraction, 11)), exponent - 11);
    return fabsf(b) < least ? 0 : (int64_t)round(exact * (double)b * 65536.0);
}

static void fixed_steps__scalar(int32_t *c, int8_t *stuck, const float *a, const float *least,
                                int64_t lda, const float *b, int32_t k) {
    for (int32_t i = 0; i < ANEPY_FIXED_ROWS * COLS; i++) {
        int32_t row = i / COLS, column = i % COLS;
        for (int32_t p = 0; p < k && (stuck == NULL || stuck[i] == 0); p++) {
            int64_t at = row * lda + p;
            int64_t sum = c[i] + fixed_product__scalar(a[at], least[at], b[p * COLS + column]);
            c[i] = llabs(sum) >= INT64_C(1) << 31 ? 0 : (int32_t)sum;
            if (llabs(sum) >= INT64_C(1) << 31 && stuck != NULL) stuck[i] = sum > 0 ? 1 : -1;
        }
    }
}

static void fixed_tile__scalar(int32_t *c, const float *a, const float *least, int64_t lda,
                               const float *b, const float *smallest, const float *largest,
                               int32_t k) {
    (void)smallest, (void)largest;
    fixed_steps__scalar(c, NULL, a, least, lda, b, k);
}

/* The number of fp16 next to x, the larger of two that are as near. */
static double fixed_nearest(double x) {
    int exponent;
    frexp(x, &exponent);
    double step = ldexp(1.0, exponent - 11 < -24 ? -24 : exponent - 11);
    double size = floor(fabs(x) / step + 0.5) * step;
    return copysign(size <= 65504.0 ? size : 65536.0, x); /* so is NaN */
}

static int64_t fixed_round__scalar(float *p, int64_t n) {
    int64_t beyond = 0;
    for (int64_t i = 0; i < n; i++) {
        p[i] = (float)fixed_nearest((double)p[i]);
        beyond += fabsf(p[i]) > 65504.0f;
    }
    return beyond;
}

static void fixed_finish__scalar(float *y, const int32_t *x, int32_t n) {
    for (int32_t i = 0; i < n; i++) y[i] = (float)fixed_nearest((double)x[i] / 65536.0);
}

static void fixed_from_half__scalar(float *dst, const uint16_t *src, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        int32_t exponent = src[i] >> 10 & 31, fraction = src[i] & 1023;
        float size = exponent == 0 ? ldexpf((float)fraction, -24)
                                   : ldexpf((float)(fraction + 1024), exponent - 25);
        dst[i] = src[i] & 0x8000 ? -size : size;
    }
}

static void fixed_to_half__scalar(uint16_t *dst, const float *src, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        int beyond = fabsf(src[i]) >= 65536.0f; /* half the value has the same fraction */
        dst[i] = (uint16_t)(anepy_to_half(beyond ? src[i] * 0.5f : src[i]) + (beyond ? 1024 : 0));
    }
}

#define SIMD_TARGET
#define SIMD_FN(name) name##__scalar
#include "kernels/curves_impl.h"

static const anepy_fixed_kernels FIXED = {
    .prepare = fixed_prepare__scalar,
    .bounds = fixed_bounds__scalar,
    .tile = fixed_tile__scalar,
    .steps = fixed_steps__scalar,
    .finish = fixed_finish__scalar,
    .round = fixed_round__scalar,
    .from_half = fixed_from_half__scalar,
    .to_half = fixed_to_half__scalar,
    .curve = curve_lines__scalar,
    .exp = curve_exp__scalar,
    .softmax = curve_softmax__scalar,
};

const anepy_kernels anepy_kernels_scalar_set = {
    .isa = "scalar",
    .gemm_name = "gemm_tile_6x16__scalar",
    .gemm_cols = 16,
    .gemm_tile = gemm_tile_6x16__scalar,
    .transpose_panel = transpose_panel__scalar,
    .gemv = gemv__scalar,
    .gemv_bf16 = gemv_bf16__scalar,
    .gemv_q8 = gemv_q8__scalar,
    .sum_rows = sum_rows__scalar,
    .add = add__scalar,
    .scale = scale__scalar,
    .exp = exp__scalar,
    .sum_squares = sum_squares__scalar,
    .to_half = to_half__scalar,
    .from_half = from_half__scalar,
    .from_bf16 = from_bf16__scalar,
    .to_bf16_randomly = to_bf16_randomly__scalar,
    .from_q8 = from_q8__scalar,
    .rmsnorm = rmsnorm__scalar,
    .rmsnorm_stats = rmsnorm_stats__scalar,
    .rmsnorm_row = rmsnorm_row__scalar,
    .rope = rope__scalar,
    .swiglu = swiglu__scalar,
    .swiglu_backward = swiglu_backward__scalar,
    .softmax_step = softmax_step__scalar,
    .softmax_again = softmax_again__scalar,
    .scale_columns = scale_columns__scalar,
    .dot_columns = dot_columns__scalar,
    .softmax_row = softmax_row__scalar,
    .softmax_row_backward = softmax_row_backward__scalar,
    .logsumexp_columns = logsumexp_columns__scalar,
    .softmax_gradient = softmax_gradient__scalar,
    .adam = adam__scalar,
    .sum = sum__scalar,
    .fma_chains = fma_chains__scalar,
    .chain_n = CHAINS,
    .fixed = &FIXED,
};
