/* kernels/vector_impl.h - every kernel of the table over the primitives of a simd_*.h.
 *
 * Included by one file per instruction set; kernels.h has the contracts. */
#include <math.h>

#include "kernels/kernels.h"
#include "runtime/half.h"

#define COLS ANEPY_COLUMNS
#define COL_VECTORS (COLS / VL) /* vectors across one panel */

/* Loads or stores a vector, or only its first `left` elements if there are fewer. */
V_INLINE vf load_left(const float *p, int64_t left) {
    return /* mutate: vector-load-tail */ left >= VL ? v_load(p) : v_load_n(p, left);
}
V_INLINE void store_left(float *p, vf v, int64_t left) {
    if (/* mutate: vector-store-tail */ left >= VL) v_store(p, v);
    else v_store_n(p, v, left);
}

/* ---------------------------------------------------------------------------------- products */

#define TILE_ROWS gemm_rows
#define TILE_NAME SIMD_FN(gemm_tile)
#define TILE_UNIT float
#define TILE_VECTOR vf
#define TILE_LOAD v_load
#define TILE_SPREAD v_set
#define TILE_MULTIPLY v_fma
#include "kernels/tile_impl.h"

SIMD_TARGET static void SIMD_FN(transpose_panel)(float *dst, const float *src, int64_t ld,
                                                 int32_t rows, int32_t n) {
    int32_t full_rows = rows / VL * VL, full_n = n / VL * VL;
    for (int32_t j = 0; j < full_rows; j += VL)
        for (int32_t p = 0; p < full_n; p += VL)
            v_transpose(dst + p * COLS + j, COLS, src + j * ld + p, ld);
    for (int32_t j = 0; j < full_rows; j++)
        for (int32_t p = full_n; p < n; p++) dst[p * COLS + j] = src[j * ld + p];
    for (int32_t p = 0; p < n && full_rows < COLS; p++)
        for (int32_t j = full_rows; j < COLS; j++)
            dst[p * COLS + j] = /* mutate: transpose-row-limit */ j < rows ? src[j * ld + p] : 0.0f;
}

/* Row by row, so that the matrix is read as one stream. */
SIMD_TARGET static void SIMD_FN(gemv)(float *y, const float *w, int64_t ldw, const float *x,
                                      int32_t rows, int32_t k) {
    for (int32_t i = 0; i < rows; i++, w += ldw) {
        vf part[4] = {v_set(0.0f), v_set(0.0f), v_set(0.0f), v_set(0.0f)};
        int32_t p = 0;
        for (; p + 4 * VL <= k; p += 4 * VL) {
            ANEPY_UNROLL
            for (int j = 0; j < 4; j++)
                part[j] = v_fma(v_load(w + p + j * VL), v_load(x + p + j * VL), part[j]);
        }
        for (; p < k; p += VL)
            part[0] = v_fma(load_left(w + p, k - p), load_left(x + p, k - p), part[0]);
        y[i] = v_sum(v_add(v_add(part[0], part[1]), v_add(part[2], part[3])));
    }
}

#include "kernels/stored_impl.h"

/* Sums up to 4 vectors of columns, odd and even rows separately, so that additions overlap. */
V_INLINE void sum_rows_block(float *y, const float *w, int64_t ldw, const float *x, int32_t rows,
                             int64_t left, const int vectors) {
    vf acc[2][4];
    ANEPY_UNROLL
    for (int j = 0; j < vectors; j++) acc[0][j] = acc[1][j] = v_set(0.0f);
    int32_t i = 0;
    for (; i + 2 <= rows; i += 2) {
        ANEPY_UNROLL
        for (int r = 0; r < 2; r++) {
            vf xv = v_set(x[i + r]);
            ANEPY_UNROLL
            for (int j = 0; j < vectors; j++)
                acc[r][j] =
                    v_fma(load_left(w + (i + r) * ldw + j * VL, left - j * VL), xv, acc[r][j]);
        }
    }
    ANEPY_UNROLL
    for (int j = 0; j < vectors; j++) {
        if (i < rows)
            acc[0][j] =
                v_fma(load_left(w + i * ldw + j * VL, left - j * VL), v_set(x[i]), acc[0][j]);
        store_left(y + j * VL, v_add(acc[0][j], acc[1][j]), left - j * VL);
    }
}

SIMD_TARGET static void SIMD_FN(sum_rows)(float *y, const float *w, int64_t ldw, const float *x,
                                          int32_t rows, int32_t k) {
    int32_t p = 0;
    for (; p + 4 * VL <= k; p += 4 * VL) sum_rows_block(y + p, w + p, ldw, x, rows, 4 * VL, 4);
    for (; p < k; p += VL) sum_rows_block(y + p, w + p, ldw, x, rows, k - p, 1);
}

/* ------------------------------------------------------------------------------- element-wise */

SIMD_TARGET static void SIMD_FN(add)(float *dst, const float *a, const float *b, int64_t n) {
    for (int64_t i = 0; i < n; i += VL)
        store_left(dst + i, v_add(load_left(a + i, n - i), load_left(b + i, n - i)), n - i);
}

SIMD_TARGET static void SIMD_FN(scale)(float *dst, float factor, int64_t n) {
    vf f = v_set(factor);
    for (int64_t i = 0; i < n; i += VL)
        store_left(dst + i, v_mul(load_left(dst + i, n - i), f), n - i);
}

/* exp(x) = 2^n * exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2; ln 2 has two parts so that r
 * is exact (Cody & Waite 1980). exp(r) = r^2 * q(r) + r + 1 with q of degree 4, fitted by Lawson's
 * iteration to the least relative error on that interval: 3.1e-9, a twentieth of an ulp. */
V_INLINE vf v_exp(vf x) {
    vf low = v_set(-87.33654f); /* ln of the smallest normal number */
    vf xc = v_min(v_set(88.37626f), v_max(low, x));
    vf n = v_round(v_mul(xc, v_set(1.44269504f)));
    vf r = v_fnma(n, v_set(0.693359375f), xc);
    r = v_fnma(n, v_set(-2.12194440e-4f), r);
    vf q = v_fma(v_set(0x1.6a23cep-10f), r, v_set(0x1.123a2p-7f));
    q = v_fma(q, r, v_set(0x1.5558f2p-5f));
    q = v_fma(q, r, v_set(0x1.555492p-3f));
    q = v_fma(q, r, v_set(/* mutate: exp-coefficient */ 0x1.fffffcp-2f));
    vf e = v_fma(v_mul(q, r), r, v_add(r, v_set(1.0f)));
    return v_zero_below(v_mul(e, v_pow2(n)), x, low);
}

SIMD_TARGET static void SIMD_FN(exp)(float *dst, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) store_left(dst + i, v_exp(load_left(x + i, n - i)), n - i);
}

SIMD_TARGET static double SIMD_FN(sum_squares)(const float *x, int64_t n) {
    vsum even = v_sum_zero(), odd = v_sum_zero(); /* four chains in double */
    int64_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        even = v_add_squares(even, v_load(x + i));
        odd = v_add_squares(odd, v_load(x + i + VL));
    }
    for (; i < n; i += VL) even = v_add_squares(even, load_left(x + i, n - i));
    return v_sum_total(even) + v_sum_total(odd);
}

/* Two streams are up to 4 % faster than one; more streams gain nothing, prefetch
 * hints at most 3 %. */
SIMD_TARGET static float SIMD_FN(sum)(const float *x, int64_t n) {
    vf part[4] = {v_set(0.0f), v_set(0.0f), v_set(0.0f), v_set(0.0f)};
    int64_t half = n / (8 * VL) * (4 * VL);
    for (int64_t i = 0; i < half; i += 4 * VL) {
        ANEPY_UNROLL
        for (int j = 0; j < 4; j++) part[j] = v_add(part[j], v_load(x + i + j * VL));
        ANEPY_UNROLL
        for (int j = 0; j < 4; j++) part[j] = v_add(part[j], v_load(x + half + i + j * VL));
    }
    for (int64_t i = 2 * half; i < n; i += VL) part[0] = v_add(part[0], load_left(x + i, n - i));
    return v_sum(v_add(v_add(part[0], part[1]), v_add(part[2], part[3])));
}

SIMD_TARGET static void SIMD_FN(to_half)(uint16_t *dst, const float *src, int64_t n) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) v_store_half(dst + i, /* mutate: half-value */ v_load(src + i));
    for (; i < n; i++) dst[i] = anepy_to_half(src[i]);
}

SIMD_TARGET static void SIMD_FN(from_half)(float *dst, const uint16_t *src, int64_t n) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) v_store(dst + i, v_load_half(src + i));
    for (; i < n; i++) dst[i] = anepy_from_half(src[i]);
}

/* The compiler makes vectors of it. */
SIMD_TARGET static void SIMD_FN(to_bf16_randomly)(uint16_t *dst, const float *src, int64_t n,
                                                  int64_t first, uint32_t key) {
    uint32_t at = (uint32_t)first;
    for (int64_t i = 0; i < n; i++)
        dst[i] = anepy_to_bf16_randomly(src[i], anepy_mixed((at + (uint32_t)i) ^ key));
}

V_INLINE vf v_sigmoid(vf x) {
    vf one = v_set(1.0f);
    return v_div(one, v_add(one, v_exp(v_sub(v_set(0.0f), x))));
}

SIMD_TARGET static void SIMD_FN(swiglu)(float *gate, const float *h1, const float *h3, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) {
        vf h = load_left(h1 + i, n - i);
        vf silu = /* mutate: swiglu-gate */ v_mul(h, v_sigmoid(h));
        store_left(gate + i, v_mul(silu, load_left(h3 + i, n - i)), n - i);
    }
}

SIMD_TARGET static void SIMD_FN(swiglu_backward)(float *dh1, float *dh3, const float *ds,
                                                 const float *h1, const float *h3, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) {
        vf h = load_left(h1 + i, n - i), d = load_left(ds + i, n - i);
        vf sig = v_sigmoid(h);
        vf dsig = v_mul(d, sig);
        vf slope = v_fma(h, v_sub(v_set(1.0f), sig), v_set(1.0f));
        vf up = load_left(h3 + i, n - i);
        store_left(dh3 + i, v_mul(dsig, h), n - i);
        store_left(dh1 + i, v_mul(v_mul(dsig, up), slope), n - i);
    }
}

SIMD_TARGET static void SIMD_FN(rope)(float *a, float *b, const float *cosine, const float *sine,
                                      float sign, int32_t n) {
    vf sg = v_set(sign);
    for (int32_t s = 0; s < n; s += VL) {
        vf re = load_left(a + s, n - s), im = load_left(b + s, n - s);
        vf co = load_left(cosine + s, n - s), si = v_mul(sg, load_left(sine + s, n - s));
        store_left(a + s, v_fnma(im, si, v_mul(re, co)), n - s);
        store_left(b + s, v_fma(im, co, v_mul(re, si)), n - s);
    }
}

/* ------------------------------------------------------------------------------------ RMSNorm */

V_INLINE vf v_rstd(vf sum, float eps, int32_t channels) {
    vf mean = v_div(sum, v_set((float)channels));
    return v_div(v_set(1.0f), v_sqrt(v_add(mean, v_set(eps))));
}

SIMD_TARGET static void SIMD_FN(rmsnorm)(float *y, int64_t ldy, float *rstd, const float *x,
                                         const float *w, float eps, int32_t channels, int64_t ld) {
    vf r[COL_VECTORS];
    ANEPY_UNROLL
    for (int j = 0; j < COL_VECTORS; j++) r[j] = v_set(0.0f);
    for (int32_t c = 0; c < channels; c++) {
        ANEPY_UNROLL
        for (int j = 0; j < COL_VECTORS; j++) {
            vf v = v_load(x + c * ld + j * VL);
            r[j] = v_fma(v, v, r[j]);
        }
    }
    ANEPY_UNROLL
    for (int j = 0; j < COL_VECTORS; j++) {
        r[j] = v_rstd(r[j], eps, channels);
        v_store(rstd + j * VL, r[j]);
    }
    for (int32_t c = 0; c < channels; c++) {
        vf wc = v_set(w[c]);
        ANEPY_UNROLL
        for (int j = 0; j < COL_VECTORS; j++) {
            vf v = v_load(x + c * ld + j * VL);
            v_store(y + c * ldy + j * VL, v_mul(wc, v_mul(v, r[j])));
        }
    }
}

SIMD_TARGET static void SIMD_FN(rmsnorm_stats)(float *rstd, float *coef, const float *dy,
                                               const float *x, const float *w, float eps,
                                               int32_t channels, int64_t ld) {
    for (int j0 = 0; j0 < COLS;
         j0 += COLS / 2) { /* half a panel at a time keeps both sums in registers */
        vf sum[COL_VECTORS / 2], dot[COL_VECTORS / 2];
        ANEPY_UNROLL
        for (int j = 0; j < COL_VECTORS / 2; j++) sum[j] = dot[j] = v_set(0.0f);
        for (int32_t c = 0; c < channels; c++) {
            vf wc = v_set(w[c]);
            ANEPY_UNROLL
            for (int j = 0; j < COL_VECTORS / 2; j++) {
                vf v = v_load(x + c * ld + j0 + j * VL);
                sum[j] = v_fma(v, v, sum[j]);
                dot[j] = v_fma(v_mul(wc, v_load(dy + c * ld + j0 + j * VL)), v, dot[j]);
            }
        }
        ANEPY_UNROLL
        for (int j = 0; j < COL_VECTORS / 2; j++) {
            vf r = v_rstd(sum[j], eps, channels);
            vf cube = v_div(v_mul(v_mul(r, r), r), v_set((float)channels));
            v_store(rstd + j0 + j * VL, r);
            v_store(coef + j0 + j * VL, v_mul(cube, dot[j]));
        }
    }
}

SIMD_TARGET static float SIMD_FN(rmsnorm_row)(float *dx, const float *residual, const float *dy,
                                              const float *x, const float *rstd, const float *coef,
                                              float w, int32_t n) {
    vf wc = v_set(w), dw = v_set(0.0f);
    for (int32_t s = 0; s < n; s += VL) {
        vf r = v_mul(load_left(rstd + s, n - s), load_left(dy + s, n - s));
        vf v = load_left(x + s, n - s);
        dw = v_fma(r, v, dw);
        vf sum = v_fma(wc, r, load_left(residual + s, n - s));
        store_left(dx + s, v_fnma(load_left(coef + s, n - s), v, sum), n - s);
    }
    return v_sum(dw);
}

/* ----------------------------------------------------------------------------------- soft-max */

/* 2^x for x <= 127, 0 below -126.5. Adding 1.5 * 2^23 rounds x and leaves the bits of the exponent
 * in the sum. 2^r = r * q(r) + 1 for |r| <= 1/2 with q of degree 5, fitted by Lawson's iteration to
 * the least relative error: 1.6e-8, a quarter of an ulp. */
V_INLINE vf v_exp2(vf x) {
    vf shift = v_set(0x1.8p23f + 127.0f), xc = v_max(v_set(-127.0f), x);
    vf t = v_add(xc, shift);
    vf r = v_sub(xc, v_sub(t, shift));
    vf q = v_fma(v_set(0x1.41fb74p-13f), r, v_set(0x1.5f3ec2p-10f));
    q = v_fma(q, r, v_set(0x1.3b2d4ep-7f));
    q = v_fma(q, r, v_set(0x1.c6aee8p-5f));
    q = v_fma(q, r, v_set(0x1.ebfbdcp-3f));
    q = v_fma(q, r, v_set(0x1.62e430p-1f));
    return v_mul(v_fma(q, r, v_set(1.0f)), v_exponent(t));
}

#define SOFTMAX_VECTORS 4 /* vectors of columns whose state stays in registers */

SIMD_TARGET static void SIMD_FN(softmax_step)(float *x, float *max, float *sum, float *shrink,
                                              int32_t rows, float scale, int32_t causal) {
    vf sc = v_set(scale);
    for (int32_t t = 1; t < rows && causal; t++)
        for (int32_t j = 0; j < COLS && j < t; j += VL)
            store_left(x + t * COLS + j, v_set(-INFINITY), t - j);
    for (int j0 = 0; j0 < COLS; j0 += SOFTMAX_VECTORS * VL) {
        vf m[SOFTMAX_VECTORS], s[SOFTMAX_VECTORS];
        ANEPY_UNROLL
        for (int j = 0; j < SOFTMAX_VECTORS; j++) m[j] = v_set(-INFINITY);
        for (int32_t t = 0; t < rows; t++) {
            ANEPY_UNROLL
            for (int j = 0; j < SOFTMAX_VECTORS; j++)
                m[j] = v_max(m[j], v_load(x + t * COLS + j0 + j * VL));
        }
        ANEPY_UNROLL
        for (int j = 0; j < SOFTMAX_VECTORS; j++) {
            vf before = v_load(max + j0 + j * VL);
            m[j] = v_max(before, v_mul(m[j], sc));
            vf factor = v_exp2(v_sub(before, m[j]));
            v_store(max + j0 + j * VL, m[j]);
            v_store(shrink + j0 + j * VL, factor);
            s[j] = v_mul(v_load(sum + j0 + j * VL), factor);
            m[j] = v_sub(v_set(0.0f), m[j]);
        }
        for (int32_t t = 0; t < rows; t++) {
            ANEPY_UNROLL
            for (int j = 0; j < SOFTMAX_VECTORS; j++) {
                float *at = x + t * COLS + j0 + j * VL;
                vf p = v_exp2(v_fma(v_load(at), sc, m[j]));
                v_store(at, p);
                s[j] = v_add(s[j], p);
            }
        }
        ANEPY_UNROLL
        for (int j = 0; j < SOFTMAX_VECTORS; j++) v_store(sum + j0 + j * VL, s[j]);
    }
}

SIMD_TARGET static void SIMD_FN(softmax_again)(float *x, float *dp, const float *lse,
                                               const float *dot, int32_t rows, float scale,
                                               float factor, int32_t causal) {
    vf sc = v_set(scale), f = v_set(factor);
    for (int32_t r = 0; r < rows; r++) {
        vf low = v_set(-lse[r]), d = v_set(dot[r]);
        ANEPY_UNROLL
        for (int j = 0; j < COL_VECTORS; j++) {
            float *at = x + r * COLS + j * VL, *out = dp + r * COLS + j * VL;
            vf p = v_exp2(v_fma(v_load(at), sc, low));
            v_store(at, p);
            v_store(out, v_mul(v_mul(p, f), v_sub(v_load(out), d)));
        }
        for (int32_t j = r / VL * VL; j < COLS && causal; j += VL) {
            float *at = x + r * COLS + j, *out = dp + r * COLS + j;
            int32_t left = r + 1 - j;
            if (left >= VL) continue;
            v_store(at, left > 0 ? v_load_n(at, left) : v_set(0.0f));
            v_store(out, left > 0 ? v_load_n(out, left) : v_set(0.0f));
        }
    }
}

SIMD_TARGET static void SIMD_FN(scale_columns)(float *dst, int64_t dst_ld, const float *src,
                                               const float *factor, int32_t rows) {
    for (int j0 = 0; j0 < COLS; j0 += SOFTMAX_VECTORS * VL) {
        vf f[SOFTMAX_VECTORS];
        ANEPY_UNROLL
        for (int j = 0; j < SOFTMAX_VECTORS; j++) f[j] = v_load(factor + j0 + j * VL);
        for (int32_t r = 0; r < rows; r++) {
            ANEPY_UNROLL
            for (int j = 0; j < SOFTMAX_VECTORS; j++) {
                int i = j0 + j * VL;
                v_store(dst + r * dst_ld + i, v_mul(v_load(src + r * COLS + i), f[j]));
            }
        }
    }
}

SIMD_TARGET static void SIMD_FN(dot_columns)(float *y, const float *a, const float *b, int64_t ldb,
                                             int32_t rows) {
    for (int j0 = 0; j0 < COLS; j0 += SOFTMAX_VECTORS * VL) {
        vf sum[SOFTMAX_VECTORS];
        ANEPY_UNROLL
        for (int j = 0; j < SOFTMAX_VECTORS; j++) sum[j] = v_set(0.0f);
        for (int32_t r = 0; r < rows; r++) {
            ANEPY_UNROLL
            for (int j = 0; j < SOFTMAX_VECTORS; j++) {
                int i = j0 + j * VL;
                sum[j] = v_fma(v_load(a + r * COLS + i), v_load(b + r * ldb + i), sum[j]);
            }
        }
        ANEPY_UNROLL
        for (int j = 0; j < SOFTMAX_VECTORS; j++) v_store(y + j0 + j * VL, sum[j]);
    }
}

SIMD_TARGET static void SIMD_FN(softmax_row)(float *x, int32_t valid, int32_t padded, float scale) {
    vf max = v_set(x[0]), sum = v_set(0.0f), sc = v_set(scale);
    int32_t i = 0;
    for (; i + VL <= valid; i += VL) max = v_max(max, v_load(x + i));
    float largest = v_largest(max);
    for (; i < valid; i++) largest = fmaxf(largest, x[i]);
    for (i = valid; i < padded; i++) x[i] = -INFINITY; /* exp(-inf) is zero */
    max = v_set(largest);
    for (i = 0; i < padded; i += VL) {
        vf e = v_exp(v_mul(v_sub(load_left(x + i, padded - i), max), sc));
        store_left(x + i, e, padded - i);
        sum = v_add(sum, load_left(x + i, padded - i)); /* a partial vector loads zeros */
    }
    vf inverse = v_set(1.0f / v_sum(sum));
    for (i = 0; i < padded; i += VL)
        store_left(x + i, v_mul(load_left(x + i, padded - i), inverse), padded - i);
}

SIMD_TARGET static void SIMD_FN(softmax_row_backward)(float *ds, const float *p, const float *dp,
                                                      float scale, int32_t n) {
    vf sum = v_set(0.0f), sc = v_set(scale);
    for (int32_t i = 0; i < n; i += VL)
        sum = v_fma(load_left(p + i, n - i), load_left(dp + i, n - i), sum);
    vf dot = v_set(v_sum(sum));
    for (int32_t i = 0; i < n; i += VL) {
        vf d = v_sub(load_left(dp + i, n - i), dot);
        store_left(ds + i, v_mul(v_mul(load_left(p + i, n - i), d), sc), n - i);
    }
}

SIMD_TARGET static void SIMD_FN(logsumexp_columns)(float *max, float *sum, const float *x,
                                                   int64_t ld, int32_t rows) {
    for (int j = 0; j < COLS; j += VL) {
        vf m = v_set(-INFINITY), s = v_set(0.0f);
        for (int32_t r = 0; r < rows; r++) m = v_max(m, v_load(x + r * ld + j));
        for (int32_t r = 0; r < rows; r++) s = v_add(s, v_exp(v_sub(v_load(x + r * ld + j), m)));
        v_store(max + j, m);
        v_store(sum + j, s);
    }
}

SIMD_TARGET static void SIMD_FN(softmax_gradient)(float *x, const float *lse, float scale,
                                                  int64_t ld, int32_t rows) {
    vf sc = v_set(scale);
    for (int32_t r = 0; r < rows; r++) {
        for (int j = 0; j < COLS; j += VL) {
            float *out = x + r * ld + j;
            v_store(out, v_mul(v_exp(v_sub(v_load(out), v_load(lse + j))), sc));
        }
    }
}

/* -------------------------------------------------------------------------------------- AdamW */

/* Square root and division are exact: estimates fail at zero, and would not be faster, because
 * memory limits the loop. */
V_INLINE void adam_loop(float *p, float *g, float *m, float *v, int64_t n, const anepy_adam *a,
                        const int clear) {
    vf b1 = v_set(a->beta1), b2 = v_set(a->beta2), lr = v_set(a->lr), eps = v_set(a->eps);
    vf o1 = v_set(a->one_beta1), o2 = v_set(a->one_beta2), decay = v_set(a->decay);
    vf c2 = v_set(a->inv_sqrt_c2), gs = v_set(a->grad_scale), zero = v_set(0.0f);
    for (int64_t i = 0; i < n; i += VL) {
        int64_t left = n - i;
        vf grad = v_mul(load_left(g + i, left), gs);
        vf mean = v_fma(b1, load_left(m + i, left), v_mul(o1, grad));
        vf var = v_fma(b2, load_left(v + i, left), v_mul(v_mul(o2, grad), grad));
        vf step = v_div(v_mul(lr, mean), v_fma(v_sqrt(var), c2, /* mutate: adam-eps */ eps));
        store_left(m + i, mean, left);
        store_left(v + i, /* mutate: adam-variance */ var, left);
        store_left(p + i, v_sub(v_mul(load_left(p + i, left), decay), step), left);
        if (clear) store_left(g + i, zero, left);
    }
}

SIMD_TARGET static void SIMD_FN(adam)(float *p, float *g, float *m, float *v, int64_t n,
                                      const anepy_adam *a) {
    if (a->clear) adam_loop(p, g, m, v, n, a, 1);
    else adam_loop(p, g, m, v, n, a, 0);
}

/* -------------------------------------------------------------------------------------- limits */

#define CHAINS (ANEPY_TILE_ROWS * TILE_VECTORS) /* as many as the accumulators of gemm_tile */

/* Each chain starts with another number, or the compiler would compute only one. */
SIMD_TARGET static float SIMD_FN(fma_chains)(float factor, float term, int64_t rounds) {
    vf chain[CHAINS], f = v_set(factor), t = v_set(term), sum = v_set(0.0f);
    ANEPY_UNROLL
    for (int i = 0; i < CHAINS; i++) chain[i] = v_set((float)i);
    for (int64_t r = 0; r < rounds; r++) {
        ANEPY_UNROLL
        for (int i = 0; i < CHAINS; i++) chain[i] = v_fma(chain[i], f, t);
    }
    ANEPY_UNROLL
    for (int i = 0; i < CHAINS; i++) sum = v_add(sum, chain[i]);
    return v_sum(sum) / (float)(CHAINS * VL);
}

#include "kernels/fixed_impl.h"

#define VECTOR_KERNELS(set, name, pairs)                                                           \
    {                                                                                              \
        .isa = (set),                                                                              \
        .gemm_name = (name),                                                                       \
        .gemm_cols = TILE_VECTORS * VL,                                                            \
        .gemm_tile = SIMD_FN(gemm_tile),                                                           \
        .transpose_panel = SIMD_FN(transpose_panel),                                               \
        .gemv = SIMD_FN(gemv),                                                                     \
        .gemv_bf16 = SIMD_FN(gemv_bf16),                                                           \
        .gemv_q8 = SIMD_FN(gemv_q8),                                                               \
        .sum_rows = SIMD_FN(sum_rows),                                                             \
        .add = SIMD_FN(add),                                                                       \
        .scale = SIMD_FN(scale),                                                                   \
        .exp = SIMD_FN(exp),                                                                       \
        .sum_squares = SIMD_FN(sum_squares),                                                       \
        .to_half = SIMD_FN(to_half),                                                               \
        .from_half = SIMD_FN(from_half),                                                           \
        .from_bf16 = SIMD_FN(from_bf16),                                                           \
        .to_bf16_randomly = SIMD_FN(to_bf16_randomly),                                             \
        .from_q8 = SIMD_FN(from_q8),                                                               \
        .rmsnorm = SIMD_FN(rmsnorm),                                                               \
        .rmsnorm_stats = SIMD_FN(rmsnorm_stats),                                                   \
        .rmsnorm_row = SIMD_FN(rmsnorm_row),                                                       \
        .rope = SIMD_FN(rope),                                                                     \
        .swiglu = SIMD_FN(swiglu),                                                                 \
        .swiglu_backward = SIMD_FN(swiglu_backward),                                               \
        .softmax_step = SIMD_FN(softmax_step),                                                     \
        .softmax_again = SIMD_FN(softmax_again),                                                   \
        .scale_columns = SIMD_FN(scale_columns),                                                   \
        .dot_columns = SIMD_FN(dot_columns),                                                       \
        .softmax_row = SIMD_FN(softmax_row),                                                       \
        .softmax_row_backward = SIMD_FN(softmax_row_backward),                                     \
        .logsumexp_columns = SIMD_FN(logsumexp_columns),                                           \
        .softmax_gradient = SIMD_FN(softmax_gradient),                                             \
        .adam = SIMD_FN(adam),                                                                     \
        .sum = SIMD_FN(sum),                                                                       \
        .fma_chains = SIMD_FN(fma_chains),                                                         \
        .chain_n = CHAINS * VL,                                                                    \
        .fixed = &SIMD_FN(fixed_set),                                                              \
        .bf16 = (pairs),                                                                           \
    }
