/* kernels/simd_neonbf16.h - NEON with dot products of bf16 pairs (FEAT_BF16). */
#define SIMD_NAME "neonbf16"
#define SIMD_TARGET __attribute__((target("arch=armv8.2-a+bf16")))
#define SIMD_FN(name) name##__neonbf16

#include "kernels/simd_neon.h"

typedef uint32x4_t vp; /* VL pairs of bf16 */

V_INLINE vp v_load_pairs(const uint32_t *p) { return vld1q_u32(p); }
V_INLINE vp v_load_pairs_n(const uint32_t *p, int64_t n) {
    uint32_t part[4] = {0, 0, 0, 0};
    for (int64_t i = 0; i < n; i++) part[i] = p[i];
    return vld1q_u32(part);
}
V_INLINE void v_store_pairs(uint32_t *p, vp v) { vst1q_u32(p, v); }
V_INLINE void v_store_pairs_n(uint32_t *p, vp v, int64_t n) {
    uint32_t part[4];
    vst1q_u32(part, v);
    for (int64_t i = 0; i < n; i++) p[i] = part[i];
}
V_INLINE vp v_set_pair(uint32_t x) { return vdupq_n_u32(x); }
/* c + the dot product of each pair. Subnormals count as zero in every floating-point mode. */
V_INLINE vf v_dot(vp a, vp b, vf c) {
    return vbfdotq_f32(c, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b));
}

/* Rounds low, then high to bf16: to nearest even, NaN stays NaN. */
V_INLINE vp v_round_to_bf16(vf low, vf high) {
    return vreinterpretq_u32_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high));
}
/* Pairs number i with number VL + i. */
V_INLINE vp v_zip(vp v) {
    uint16x8_t x = vreinterpretq_u16_u32(v);
    return vreinterpretq_u32_u16(vzip1q_u16(x, vextq_u16(x, x, 4)));
}
/* VL bf16 numbers from low, then VL from high. */
V_INLINE vp v_join(const uint16_t *low, const uint16_t *high) {
    return vreinterpretq_u32_u16(vcombine_u16(vld1_u16(low), vld1_u16(high)));
}
