/* kernels/simd_avx2.h - the primitives of vector_impl.h on 256-bit registers with FMA. */
#include <immintrin.h>

#include "runtime/common.h"

#define SIMD_NAME "avx2"
#define SIMD_TARGET __attribute__((target("avx2,fma,f16c")))
#define SIMD_FN(name) name##__avx2
#define VL 8
#define TILE_VECTORS 2 /* 6 x 2 accumulators + 2 columns of B + 1 factor = 15 of 16 registers */

typedef __m256 vf;
#define V_INLINE static inline __attribute__((always_inline)) SIMD_TARGET

V_INLINE __m256i v_mask(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
V_INLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
V_INLINE void v_store(float *p, vf v) { _mm256_storeu_ps(p, v); }
V_INLINE vf v_load_n(const float *p, int64_t n) { return _mm256_maskload_ps(p, v_mask(n)); }
V_INLINE void v_store_n(float *p, vf v, int64_t n) { _mm256_maskstore_ps(p, v_mask(n), v); }
V_INLINE vf v_set(float x) { return _mm256_set1_ps(x); }
V_INLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
V_INLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
V_INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
V_INLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
V_INLINE vf v_sqrt(vf a) { return _mm256_sqrt_ps(a); }
V_INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
V_INLINE vf v_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
V_INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); } /* b if either is NaN */
V_INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); } /* b if either is NaN */
V_INLINE vf v_round(vf a) { return _mm256_round_ps(a, 0x08); }
/* 2^n for integral n in [-126, 127] */
V_INLINE vf v_pow2(vf n) {
    __m256i e =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_castsi256_ps(e);
}
/* The low bits of t, shifted to the place of sign and exponent. */
V_INLINE vf v_exponent(vf t) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23));
}
/* v where x >= bound or x is NaN, else 0 */
V_INLINE vf v_zero_below(vf v, vf x, vf bound) {
    return _mm256_and_ps(v, _mm256_cmp_ps(x, bound, _CMP_NLT_UQ));
}
V_INLINE vf v_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
/* c + a b where size >= from; else c */
V_INLINE vf v_fma_from(vf a, vf b, vf c, vf size, vf from) {
    return _mm256_fmadd_ps(a, _mm256_and_ps(b, _mm256_cmp_ps(size, from, _CMP_GE_OQ)), c);
}
V_INLINE uint32_t v_below_bits(vf a, vf b) {
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
/* p[i] += the bits of v, less `less` */
V_INLINE void v_add_bits(int32_t *p, vf v, int32_t less) {
    __m256i *at = (__m256i *)(void *)p;
    __m256i bits = _mm256_sub_epi32(_mm256_castps_si256(v), _mm256_set1_epi32(less));
    _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), bits));
}
V_INLINE float v_sum(vf v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
V_INLINE float v_largest(vf v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
typedef struct {
    __m256d low, high;
} vsum;
V_INLINE vsum v_sum_zero(void) { return (vsum){_mm256_setzero_pd(), _mm256_setzero_pd()}; }
V_INLINE vsum v_add_squares(vsum sum, vf v) {
    __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    return (vsum){_mm256_fmadd_pd(low, low, sum.low), _mm256_fmadd_pd(high, high, sum.high)};
}
V_INLINE double v_sum_total(vsum sum) {
    __m256d both = _mm256_add_pd(sum.low, sum.high);
    __m128d s = _mm_add_pd(_mm256_castpd256_pd128(both), _mm256_extractf128_pd(both, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

V_INLINE vf v_load_half(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}
V_INLINE void v_store_half(uint16_t *p, vf v) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

V_INLINE vf v_load_bf16(const uint16_t *p) {
    __m128i half = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
V_INLINE vf v_set_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_set1_epi16((int16_t)*p)); }
V_INLINE vf v_load_int8(const int8_t *p) {
    __m128i x = _mm_loadl_epi64((const __m128i *)(const void *)p);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
}

/* dst[p*dst_ld + j] = src[j*src_ld + p] for 8 x 8 elements. */
V_INLINE void v_transpose(float *dst, int64_t dst_ld, const float *src, int64_t src_ld) {
    __m256 r[8], t[8];
    ANEPY_UNROLL
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(src + i * src_ld);
    ANEPY_UNROLL
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    ANEPY_UNROLL
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    ANEPY_UNROLL
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(dst + i * dst_ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(dst + (i + 4) * dst_ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}
