/* kernels/simd_avx512bf16.h - AVX-512 with dot products of bf16 pairs (AVX512_BF16). */
#define SIMD_NAME "avx512bf16"
#define SIMD_TARGET                                                                                \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma")))
#define SIMD_FN(name) name##__avx512bf16

#include "kernels/simd_avx512.h"

typedef __m512i vp; /* VL pairs of bf16 */

V_INLINE vp v_load_pairs(const uint32_t *p) { return _mm512_loadu_si512(p); }
V_INLINE vp v_load_pairs_n(const uint32_t *p, int64_t n) {
    return _mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), p);
}
V_INLINE void v_store_pairs(uint32_t *p, vp v) { _mm512_storeu_si512(p, v); }
V_INLINE void v_store_pairs_n(uint32_t *p, vp v, int64_t n) {
    _mm512_mask_storeu_epi32(p, (__mmask16)((1u << n) - 1), v);
}
V_INLINE vp v_set_pair(uint32_t x) { return _mm512_set1_epi32((int32_t)x); }
/* c + the dot product of each pair. Subnormals count as zero in every floating-point mode. */
V_INLINE vf v_dot(vp a, vp b, vf c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

/* Rounds low, then high to bf16: to nearest even, NaN stays NaN. */
V_INLINE vp v_round_to_bf16(vf low, vf high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
/* Pairs number i with number VL + i. */
V_INLINE vp v_zip(vp v) {
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, v);
}
/* VL bf16 numbers from low, then VL from high. */
V_INLINE vp v_join(const uint16_t *low, const uint16_t *high) {
    __m256i a = _mm256_loadu_si256((const __m256i *)(const void *)low);
    __m256i b = _mm256_loadu_si256((const __m256i *)(const void *)high);
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}
