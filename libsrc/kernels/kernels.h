/* kernels/kernels.h - the kernel table: one set of function pointers per instruction set.
 *
 * Every kernel has a plain reference in scalar.c; the vector sets are filled from one template
 * (vector_impl.h, bf16_impl.h) over the few primitives of each instruction set. A new instruction
 * set is a simd_*.h with those primitives, a file that includes the template, and a row in SETS
 * (kernels.c). Vectors of float32 throughout; `n` counts elements; pointers need no alignment
 * unless stated; outputs come first and are overwritten unless "accumulates" is said. */
#ifndef ANEPY_KERNELS_H
#define ANEPY_KERNELS_H

#include "runtime/status.h"

#define ANEPY_TILE_ROWS 6 /* rows of C a matrix kernel computes at once, on every set */
#define ANEPY_COLUMNS 64  /* columns per panel; activations are padded to it */

typedef struct {
    float lr; /* already divided by 1 - beta1^t */
    float beta1, beta2;
    float one_beta1, one_beta2; /* 1 - beta, rounded once */
    float eps;
    float decay;       /* 1 - lr * weight_decay */
    float inv_sqrt_c2; /* 1 / sqrt(1 - beta2^t) */
    float grad_scale;  /* multiplies every gradient first */
    int32_t clear;     /* write zeros to g */
} anepy_adam;

/* What is needed soon: with every step of its reduction a matrix kernel fetches the cache line at
 * `at`, which moves on by `step` bytes; with step 0 any readable place costs nothing. Many lines at
 * once would fill the queue of misses and stop it. */
typedef struct {
    const void *at;
    int64_t step;
} anepy_lines;

/* Products of bfloat16 numbers with float32 sums, two steps of the reduction per instruction. A
 * unit is a pair of bf16 numbers, the first in the low half; a reduction of k has (k + 1) / 2
 * units, and where k is odd the second number of the last unit of B is zero. Subnormals may count
 * as zero. */
typedef struct {
    /* As gemm_tile on units. */
    void (*dot_tile)(float *c, int64_t ldc, const uint32_t *a, int64_t a_row, int64_t a_step,
                     const uint32_t *b, int64_t ldb, int32_t units, int32_t rows,
                     int32_t accumulate, anepy_lines next);
    /* Round to nearest even; NaN stays NaN. */
    void (*to_bf16)(uint16_t *dst, const float *src, int64_t n);
    void (*from_bf16)(float *dst, const uint16_t *src, int64_t n);
    /* Rows 2q and 2q + 1 of src [k][n], ld apart, become row q of units: dst[q*dst_ld + j]. */
    void (*pack_pairs)(uint32_t *dst, int64_t dst_ld, const float *src, int64_t ld, int32_t k,
                       int32_t n);
    void (*zip_pairs)(uint32_t *dst, int64_t dst_ld, const uint16_t *src, int64_t ld, int32_t k,
                      int32_t n);
    /* As fma_chains below: x = x + a . b, both numbers of the pairs a and b in every chain. */
    float (*dot_chains)(uint32_t a, uint32_t b, int64_t rounds);
} anepy_bf16_kernels;

typedef struct anepy_kernels {
    const char *isa;
    const char *gemm_name;
    int32_t gemm_cols; /* columns of the matrix kernel's tile: divides ANEPY_COLUMNS */

    /* C[rows][gemm_cols] = or += A . B. A(i,p) = a[i*a_row + p*a_step], B(p,j) = b[p*ldb + j],
     * C(i,j) = c[i*ldc + j]; 1 <= rows <= ANEPY_TILE_ROWS; 0 <= p < k. */
    void (*gemm_tile)(float *c, int64_t ldc, const float *a, int64_t a_row, int64_t a_step,
                      const float *b, int64_t ldb, int32_t k, int32_t rows, int32_t accumulate,
                      anepy_lines next);

    /* dst[p*64 + j] = src[j*ld + p] for j < rows, 0 for rows <= j < 64; 0 <= p < n. */
    void (*transpose_panel)(float *dst, const float *src, int64_t ld, int32_t rows, int32_t n);

    /* y[i] = sum_p w[i*ldw + p] * x[p], i < rows. */
    void (*gemv)(float *y, const float *w, int64_t ldw, const float *x, int32_t rows, int32_t k);
    /* Its transpose: y[p] = sum_i x[i] * w[i*ldw + p], p < k. */
    void (*sum_rows)(float *y, const float *w, int64_t ldw, const float *x, int32_t rows,
                     int32_t k);

    void (*add)(float *dst, const float *a, const float *b, int64_t n); /* dst may be a or b */
    void (*scale)(float *dst, float factor, int64_t n);
    void (*exp)(float *dst, const float *x, int64_t n); /* x <= 88.37; 2 ulp; 0 below -87.3 */
    double (*sum_squares)(const float *x, int64_t n);
    float (*sum)(const float *x, int64_t n); /* in any order, as fast as memory can be read */
    /* IEEE binary16, round to nearest even; beyond 65504 becomes infinite, NaN stays NaN. */
    void (*to_half)(uint16_t *dst, const float *src, int64_t n);
    void (*from_half)(float *dst, const uint16_t *src, int64_t n);

    /* RMSNorm over rows c < channels of 64 columns (Zhang & Sennrich 2019):
     * rstd[s] = 1/sqrt(mean_c x^2 + eps); y[c][s] = w[c] * x[c][s] * rstd[s]. */
    void (*rmsnorm)(float *y, int64_t ldy, float *rstd, const float *x, const float *w, float eps,
                    int32_t channels, int64_t ld);
    /* First half of its backward for 64 columns: rstd as above and
     * coef[s] = rstd^3 / channels * sum_c w[c] dy[c][s] x[c][s]. */
    void (*rmsnorm_stats)(float *rstd, float *coef, const float *dy, const float *x, const float *w,
                          float eps, int32_t channels, int64_t ld);
    /* Second half for one channel of n columns: dx = residual + rstd*w*dy - coef*x; returns
     * sum_s dy*x*rstd, the gradient of w. dx may be residual. */
    float (*rmsnorm_row)(float *dx, const float *residual, const float *dy, const float *x,
                         const float *rstd, const float *coef, float w, int32_t n);

    /* Rotates the channel pair (a, b) by the angle whose cos and sin are given; sign -1 inverts. */
    void (*rope)(float *a, float *b, const float *cosine, const float *sine, float sign, int32_t n);

    void (*swiglu)(float *gate, const float *h1, const float *h3, int64_t n);
    /* ds = dgate in; dh1, dh3 out. dh1 may be ds. */
    void (*swiglu_backward)(float *dh1, float *dh3, const float *ds, const float *h1,
                            const float *h3, int64_t n);

    /* Soft-max down columns in powers of two, a block of rows [rows][64] at a time, for 64 columns
     * each: m = max(max, x * scale) with that of the rows before (first -inf), shrink = 2^(max -
     * m), x = 2^(x * scale - m), sum = sum * shrink + their sum; max = m. causal: row t counts for
     * columns from t on, and is zero before. */
    void (*softmax_step)(float *x, float *max, float *sum, float *shrink, int32_t rows, float scale,
                         int32_t causal);
    /* Rows again from what is known of them, and the gradient through them, in place:
     * x = 2^(x * scale - lse[r]), dp = x * factor * (dp - dot[r]); x, dp [rows][64]. What is raised
     * to is at most 127 where it counts: causal: row r up to column r, both are zero behind. */
    void (*softmax_again)(float *x, float *dp, const float *lse, const float *dot, int32_t rows,
                          float scale, float factor, int32_t causal);
    /* dst[r][j] = src[r][j] * factor[j], [rows][64]; dst may be src. */
    void (*scale_columns)(float *dst, int64_t dst_ld, const float *src, const float *factor,
                          int32_t rows);
    /* y[j] = sum_r a[r][j] * b[r*ldb + j], a [rows][64]. */
    void (*dot_columns)(float *y, const float *a, const float *b, int64_t ldb, int32_t rows);

    /* Soft-max of x[0..valid) times scale, in place; zeroes x[valid..padded). */
    void (*softmax_row)(float *x, int32_t valid, int32_t padded, float scale);
    /* ds = p * (dp - sum(p*dp)) * scale over n elements. ds may be dp. */
    void (*softmax_row_backward)(float *ds, const float *p, const float *dp, float scale,
                                 int32_t n);

    /* Columnwise max and sum of exp(x - max) over x[rows][64], leading dimension ld. */
    void (*logsumexp_columns)(float *max, float *sum, const float *x, int64_t ld, int32_t rows);
    /* x = exp(x - lse[s]) * scale over x[rows][64], in place. */
    void (*softmax_gradient)(float *x, const float *lse, float scale, int64_t ld, int32_t rows);

    /* AdamW on n elements (Loshchilov & Hutter 2019), in place; g is cleared or kept. */
    void (*adam)(float *p, float *g, float *m, float *v, int64_t n, const anepy_adam *a);

    /* The limit of this set, to measure others against: chain_n independent x = x * factor + term,
     * `rounds` times each, with nothing but registers; returns the mean of all x. */
    float (*fma_chains)(float factor, float term, int64_t rounds);
    int32_t chain_n;

    const anepy_bf16_kernels *bf16; /* NULL: the instruction set has no bf16 products */
} anepy_kernels;

/* The best set that this machine and ANEPY_CPU_MASK allow; NULL with an error sentence if the mask
 * names no known set. Always the same in one process. */
const anepy_kernels *anepy_kernels_get(void);

/* The plain reference. */
const anepy_kernels *anepy_kernels_scalar(void);

/* All sets that this machine and ANEPY_CPU_MASK allow, best first; NULL beyond the last. */
const anepy_kernels *anepy_kernels_at(int32_t index);

/* The set with this name, NULL: the one in use; ANEPY_E_NAME with the list of all. */
int32_t anepy_kernels_named(const anepy_kernels **out, const char *isa);

/* One per instruction set, filled in its own file; present only on its processor family. */
extern const anepy_kernels anepy_kernels_scalar_set;
extern const anepy_kernels anepy_kernels_avx2_set;
extern const anepy_kernels anepy_kernels_avx512_set;
extern const anepy_kernels anepy_kernels_avx512bf16_set;
extern const anepy_kernels anepy_kernels_neon_set;
extern const anepy_kernels anepy_kernels_neonbf16_set;

#endif
