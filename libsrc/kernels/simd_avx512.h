/* kernels/simd_avx512.h - the primitives of vector_impl.h on 512-bit registers. */
#include <immintrin.h>

#include "runtime/common.h"

#ifndef SIMD_NAME /* simd_avx512bf16.h adds to this file */
#define SIMD_NAME "avx512"
#define SIMD_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#define SIMD_FN(name) name##__avx512
#endif
#define VL 16
#define TILE_VECTORS 4 /* 6 x 4 accumulators + 4 columns of B = 28 of 32 registers */

typedef __m512 vf;
#define V_INLINE static inline __attribute__((always_inline)) SIMD_TARGET

V_INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
V_INLINE void v_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
V_INLINE vf v_load_n(const float *p, int64_t n) {
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
V_INLINE void v_store_n(float *p, vf v, int64_t n) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v);
}
V_INLINE vf v_set(float x) { return _mm512_set1_ps(x); }
V_INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
V_INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
V_INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
V_INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
V_INLINE vf v_sqrt(vf a) { return _mm512_sqrt_ps(a); }
V_INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
V_INLINE vf v_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
V_INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); } /* b if either is NaN */
V_INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); } /* b if either is NaN */
V_INLINE vf v_round(vf a) { return _mm512_roundscale_ps(a, 0x08); }
/* 2^n for integral n in [-126, 127] */
V_INLINE vf v_pow2(vf n) {
    __m512i e =
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
    return _mm512_castsi512_ps(e);
}
/* The low bits of t, shifted to the place of sign and exponent. */
V_INLINE vf v_exponent(vf t) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t), 23));
}
/* v where x >= bound or x is NaN, else 0 */
V_INLINE vf v_zero_below(vf v, vf x, vf bound) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), v);
}
V_INLINE vf v_abs(vf a) { return _mm512_abs_ps(a); }
/* c + a b where size >= from; else c */
V_INLINE vf v_fma_from(vf a, vf b, vf c, vf size, vf from) {
    return _mm512_mask3_fmadd_ps(a, b, c, _mm512_cmp_ps_mask(size, from, _CMP_GE_OQ));
}
V_INLINE uint32_t v_below_bits(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
/* p[i] += the bits of v, less `less` */
V_INLINE void v_add_bits(int32_t *p, vf v, int32_t less) {
    __m512i bits = _mm512_sub_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(less));
    _mm512_storeu_si512(p, _mm512_add_epi32(_mm512_loadu_si512(p), bits));
}
/* Lists first + i for the bits i that are set; room for VL is needed. Returns how many. */
#define V_LIST
V_INLINE int32_t v_list(int32_t *list, int32_t first, uint32_t bits) {
    const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i all = _mm512_add_epi32(places, _mm512_set1_epi32(first));
    _mm512_storeu_si512(list, _mm512_maskz_compress_epi32((__mmask16)bits, all));
    return __builtin_popcount(bits);
}
V_INLINE float v_sum(vf v) { return _mm512_reduce_add_ps(v); }
V_INLINE float v_largest(vf v) { return _mm512_reduce_max_ps(v); }
typedef struct {
    __m512d low, high;
} vsum;
V_INLINE vsum v_sum_zero(void) { return (vsum){_mm512_setzero_pd(), _mm512_setzero_pd()}; }
V_INLINE vsum v_add_squares(vsum sum, vf v) {
    __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    return (vsum){_mm512_fmadd_pd(low, low, sum.low), _mm512_fmadd_pd(high, high, sum.high)};
}
V_INLINE double v_sum_total(vsum sum) {
    return _mm512_reduce_add_pd(_mm512_add_pd(sum.low, sum.high));
}

V_INLINE vf v_load_half(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
V_INLINE void v_store_half(uint16_t *p, vf v) {
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

V_INLINE vf v_load_bf16(const uint16_t *p) {
    __m256i half = _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
V_INLINE vf v_set_half(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_set1_epi16((int16_t)*p));
}
V_INLINE vf v_load_int8(const int8_t *p) {
    __m128i x = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
}

/* dst[p*dst_ld + j] = src[j*src_ld + p] for 16 x 16 elements. */
V_INLINE void v_transpose(float *dst, int64_t dst_ld, const float *src, int64_t src_ld) {
    __m512 r[16], t[16];
    ANEPY_UNROLL
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(src + i * src_ld);
    ANEPY_UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    ANEPY_UNROLL
    for (int i = 0; i < 16; i += 4) {
        __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
        __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
        r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    ANEPY_UNROLL
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    ANEPY_UNROLL
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_ps(dst + i * dst_ld, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_ps(dst + (i + 8) * dst_ld, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
    }
}
