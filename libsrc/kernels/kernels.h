/* kernels/kernels.h - the kernel table: one set of function pointers per instruction set.
 *
 * Every kernel has a plain reference in scalar.c; the vector sets are filled from one template
 * (vector_impl.h, bf16_impl.h) over the few primitives of each instruction set. A new instruction
 * set is a simd_*.h with those primitives, a file that includes the template, and a row in SETS
 * (kernels.c). Vectors of float32 throughout; `n` counts elements; pointers need no alignment
 * unless stated; outputs come first and are overwritten unless "accumulates" is said.
 *
 * The words for parts of work, here and in all files above, from small to large:
 *   unit    32 bits of a factor: a float32, or two bf16 that are multiplied in one instruction
 *   vector  a register: 16, 8 or 4 floats
 *   tile    what a matrix kernel holds in registers: 6 rows by 1 to 4 vectors of a product
 *   panel   64 columns: of the second factor of a product, packed, or of activations
 *   block   rows of the first factor that are packed at once; of attention 64 queries by 64 keys
 *   piece   what one thread takes at once */
#ifndef ANEPY_KERNELS_H
#define ANEPY_KERNELS_H

#include "runtime/status.h"
#include "runtime/storage.h"

#define ANEPY_TILE_ROWS 6   /* rows of C that a matrix kernel computes at once, on every set */
#define ANEPY_COLUMNS 64    /* columns of a panel; activations are padded to multiples */
#define ANEPY_PIECE_ROWS 64 /* rows in a piece of a loop over rows */
#define ANEPY_PIECE_ELEMENTS                                                                       \
    65536                      /* in a piece of a loop over long vectors: 1 MiB of an update       \
                                */
#define ANEPY_FIXED_ROWS 4     /* rows of C that fixed_tile computes at once */
#define ANEPY_FIXED_STEPS 16   /* steps of the reduction that fixed_bounds takes together */
#define ANEPY_FIXED_MOST 63.5f /* what sum |a b| + 2^-16 per step must stay below in fixed_tile */
#define ANEPY_CURVE_POINTS 33  /* of the table of an activation */
#define ANEPY_LOSS_ROWS 512    /* vocabulary rows in a piece of the loss; sums depend on it */

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

/* How an activation goes over its table of 33 points: at x * scale points from the middle one, and
 * not beyond the first and the last; where |x| is beyond `end`, straight to its limit in so much as
 * `tail`. The limit is 1, or 0 on the left. */
typedef struct {
    float scale, end, tail;
    int32_t middle; /* the point of x = 0 */
    int32_t odd;    /* a table of |x|; the result has the sign of x */
    int32_t linear; /* on the right the result is x */
} anepy_curve;

/* Arithmetic of the Neural Engine (docs/neural-engine.md#numerics). Its numbers are the values that
 * fp16 codes stand for, those of infinity and NaN read as 65536 to 131008; floats hold them
 * exactly.
 *
 * A sum of products is an integer that counts 2^-16. A product is rounded to one, halves away from
 * zero, or is left out if the exponents of its factors (at least -14) add up to -17 or less. The
 * vector sets let one fused multiply-add round and add at once: the sum is kept near 192, where the
 * last bit of a float is 2^-16, and factors are larger by their last bit, which settles halves. */
typedef struct {
    /* a[i] = x[i], larger by its last bit; least[i] is the smallest |b| whose product counts;
     * largest[i] becomes at least |x[i]|. */
    void (*prepare)(float *a, float *least, float *largest, const float *x, int64_t n);
    /* bounds[i] = sum |a[p] b[p]| over 16 steps p from 16 i on, for n steps. */
    void (*bounds)(float *bounds, const float *a, const float *b, int32_t n);
    /* C[4][64] += A . B, with prepared A(i,p) = a[i*lda + p] and B [k][64]; smallest[p] is the
     * smallest |B(p,j)| that is not 0, largest[p] the largest. No sum of |a b| may reach 64:
     * ANEPY_FIXED_MOST. Up to 15 elements behind the k of a row, of smallest and of largest are
     * read. */
    void (*tile)(int32_t *c, const float *a, const float *least, int64_t lda, const float *b,
                 const float *smallest, const float *largest, int32_t k);
    /* The same for products of any size. With stuck [4][64], a sum that reaches 2^31 makes that 1
     * or -1 and stays as it is; without, none may. */
    void (*steps)(int32_t *c, int8_t *stuck, const float *a, const float *least, int64_t lda,
                  const float *b, int32_t k);
    /* y[i] = x[i] 2^-16, rounded as round does; never -0. */
    void (*finish)(float *y, const int32_t *x, int32_t n);
    /* Rounds to numbers of fp16, halves away from zero; beyond 65504 becomes 65536. Returns how
     * many that were. Subnormal numbers are kept. */
    int64_t (*round)(float *p, int64_t n);
    void (*from_half)(float *dst, const uint16_t *src, int64_t n);
    void (*to_half)(uint16_t *dst, const float *src, int64_t n); /* of such numbers */
    /* Activations over tables of fp16 numbers, results not yet rounded to one. y may be x. Of
     * exp, 2^(x * factor), the product is rounded to fp16 and the table is that of 2^x in [0, 1]. */
    void (*curve)(float *y, const float *x, const float *table, const anepy_curve *curve,
                  int64_t n);
    void (*exp)(float *y, const float *x, const float *table, float factor, int64_t n);
    void (*softmax)(float *row, const float *table, float factor, int64_t n); /* in place */
} anepy_fixed_kernels;

/* Memory to prefetch: with every step of its reduction a matrix kernel fetches the cache line at
 * `at` and moves it by `step` bytes. With step 0 one readable line is fetched again and again,
 * which costs nothing. Many lines at once would fill the queue of cache misses and stall the
 * kernel. */
typedef struct {
    const void *at;
    int64_t step;
} anepy_lines;

/* Products of bfloat16 numbers with float32 sums, two steps of the reduction per instruction. A
 * unit is a pair of bf16 numbers, the first in the low half. A reduction of k has (k + 1) / 2
 * units; if k is odd, the second number of the last unit of B is zero. Subnormals may count as
 * zero. */
typedef struct {
    /* C[rows][gemm_cols] = or += A . B like gemm_tile, with strides in units. */
    void (*dot_tile)(float *c, int64_t ldc, const uint32_t *a, int64_t a_row, int64_t a_step,
                     const uint32_t *b, int64_t ldb, int32_t units, int32_t rows,
                     int32_t accumulate, anepy_lines next);
    /* Round to nearest even; NaN stays NaN. */
    void (*to_bf16)(uint16_t *dst, const float *src, int64_t n);
    /* Rows 2q and 2q + 1 of src [k][n], ld apart, become row q of units: dst[q*dst_ld + j]. */
    void (*pack_pairs)(uint32_t *dst, int64_t dst_ld, const float *src, int64_t ld, int32_t k,
                       int32_t n);
    void (*zip_pairs)(uint32_t *dst, int64_t dst_ld, const uint16_t *src, int64_t ld, int32_t k,
                      int32_t n);
    /* fma_chains with x = x + a . b, the dot product of the pairs a and b, in every chain; and the
     * floating-point operations of one round. */
    float (*dot_chains)(uint32_t a, uint32_t b, int64_t rounds);
    int32_t dot_operations;

    /* NULL, or for a matrix unit: C[rows][64] = or += A . B like dot_tile, for any number of rows,
     * of A by rows (a_step 1). */
    void (*dot_panel)(float *c, int64_t ldc, const uint32_t *a, int64_t a_row, const uint32_t *b,
                      int64_t ldb, int32_t units, int32_t rows, int32_t accumulate);
    /* NULL exactly where dot_panel is: dst[i*dst_ld + p] = src[p*ld + i], i < rows, p < units. */
    void (*turn)(uint32_t *dst, int64_t dst_ld, const uint32_t *src, int64_t ld, int32_t rows,
                 int32_t units);
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
    /* The same for rows without gaps, stored as bf16, or as Q8 (runtime/storage.h), k a multiple of
     * 32. Sums are float32. */
    void (*gemv_bf16)(float *y, const uint16_t *w, const float *x, int32_t rows, int32_t k);
    void (*gemv_q8)(float *y, const anepy_q8 *w, const float *x, int32_t rows, int32_t k);
    /* y[p] = sum_i x[i] * w[i*ldw + p], p < k: gemv with the transpose of w. */
    void (*sum_rows)(float *y, const float *w, int64_t ldw, const float *x, int32_t rows,
                     int32_t k);

    void (*add)(float *dst, const float *a, const float *b, int64_t n); /* dst may be a or b */
    void (*scale)(float *dst, float factor, int64_t n);
    void (*exp)(float *dst, const float *x,
                int64_t n); /* for x <= 88.37; error 2 ulp; 0 below -87.3 */
    double (*sum_squares)(const float *x, int64_t n);
    float (*sum)(const float *x, int64_t n); /* in any order, at the speed of memory */
    /* IEEE binary16, round to nearest even; beyond 65504 becomes infinite, NaN stays NaN. */
    void (*to_half)(uint16_t *dst, const float *src, int64_t n);
    void (*from_half)(float *dst, const uint16_t *src, int64_t n);
    void (*from_bf16)(float *dst, const uint16_t *src, int64_t n);
    /* To one of the two nearest bf16 at random, so that the mean is right: number i of the result
     * depends on src[i], key and (uint32_t)(first + i) alone, on every set. */
    void (*to_bf16_randomly)(uint16_t *dst, const float *src, int64_t n, int64_t first,
                             uint32_t key);
    /* dst[i] = number first + i of a row of blocks. */
    void (*from_q8)(float *dst, const anepy_q8 *row, int64_t first, int64_t n);

    /* RMSNorm over rows c < channels of 64 columns (Zhang & Sennrich 2019):
     * rstd[s] = 1/sqrt(mean_c x^2 + eps); y[c][s] = w[c] * x[c][s] * rstd[s]. */
    void (*rmsnorm)(float *y, int64_t ldy, float *rstd, const float *x, const float *w, float eps,
                    int32_t channels, int64_t ld);
    /* First half of the backward pass of rmsnorm for 64 columns: rstd as in rmsnorm, and coef[s] =
     * rstd^3 / channels * sum_c w[c] dy[c][s] x[c][s]. */
    void (*rmsnorm_stats)(float *rstd, float *coef, const float *dy, const float *x, const float *w,
                          float eps, int32_t channels, int64_t ld);
    /* Second half, for one channel of n columns: dx = residual + rstd*w*dy - coef*x; returns sum_s
     * dy*x*rstd, the gradient of w. dx may be residual or dy. */
    float (*rmsnorm_row)(float *dx, const float *residual, const float *dy, const float *x,
                         const float *rstd, const float *coef, float w, int32_t n);

    /* Rotates the channel pair (a, b) by the angle whose cos and sin are given; sign -1 inverts. */
    void (*rope)(float *a, float *b, const float *cosine, const float *sine, float sign, int32_t n);

    /* gate = h1 / (1 + e^-h1) * h3 (Shazeer 2020). */
    void (*swiglu)(float *gate, const float *h1, const float *h3, int64_t n);
    /* Gradients dh1, dh3 from ds, the gradient of gate. dh1 may be ds. */
    void (*swiglu_backward)(float *dh1, float *dh3, const float *ds, const float *h1,
                            const float *h3, int64_t n);

    /* One step of a soft-max down 64 columns that come some rows at a time, in powers of two. x is
     * [rows][64]; max (first -inf) and sum (first 0) are those of the rows before. Per column m =
     * max(max, x * scale), shrink = 2^(max - m), x = 2^(x * scale - m), sum = sum * shrink + sum of
     * x, max = m. With causal row t counts only for columns from t on and becomes zero before. */
    void (*softmax_step)(float *x, float *max, float *sum, float *shrink, int32_t rows, float scale,
                         int32_t causal);
    /* Probabilities of rows once more, from their log-sum-exp in powers of two, and the gradient
     * through them, in place: x = 2^(x * scale - lse[r]), dp = x * factor * (dp - dot[r]); x, dp
     * [rows][64]. The exponents must be at most 127. With causal row r counts only up to column r,
     * and both become zero behind. */
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

    /* Max and sum of exp(x - max) of each of 64 columns of x[rows][64], rows ld apart. */
    void (*logsumexp_columns)(float *max, float *sum, const float *x, int64_t ld, int32_t rows);
    /* x = exp(x - lse[s]) * scale over x[rows][64], in place. */
    void (*softmax_gradient)(float *x, const float *lse, float scale, int64_t ld, int32_t rows);

    /* AdamW on n elements (Loshchilov & Hutter 2019), in place; g is cleared or kept. */
    void (*adam)(float *p, float *g, float *m, float *v, int64_t n, const anepy_adam *a);

    /* Peak arithmetic of the set, for benchmarks: computes x = x * factor + term `rounds` times for
     * chain_n independent x in registers; returns their mean. */
    float (*fma_chains)(float factor, float term, int64_t rounds);
    int32_t chain_n;

    const anepy_fixed_kernels *fixed;
    const anepy_bf16_kernels *bf16; /* NULL: the instruction set has no bf16 products */
} anepy_kernels;

/* The best set that this machine and ANEPY_CPU_MASK allow; NULL with an error sentence if the mask
 * names no known set. Always the same in one process. */
const anepy_kernels *anepy_kernels_get(void);

/* The set of plain C, the reference. */
const anepy_kernels *anepy_kernels_scalar(void);

/* All sets that this machine and ANEPY_CPU_MASK allow, best first; NULL beyond the last. */
const anepy_kernels *anepy_kernels_at(int32_t index);

/* The set with this name; NULL: the one in use. Otherwise ANEPY_E_NAME with a list of all sets. */
int32_t anepy_kernels_named(const anepy_kernels **out, const char *isa);

/* One per instruction set, each in its own file; only those of the processor family exist. */
extern const anepy_kernels anepy_kernels_scalar_set;
extern const anepy_kernels anepy_kernels_avx2_set;
extern const anepy_kernels anepy_kernels_avx512_set;
extern const anepy_kernels anepy_kernels_avx512bf16_set;
extern const anepy_kernels anepy_kernels_amx_set;
extern const anepy_kernels anepy_kernels_neon_set;
extern const anepy_kernels anepy_kernels_neonbf16_set;

#endif
