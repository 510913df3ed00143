/* kernels/simd_neon.h - the primitives of vector_impl.h on 128-bit AArch64 registers. */
#include <arm_neon.h>

#include "runtime/common.h"

#ifndef SIMD_NAME /* simd_neonbf16.h adds to this file */
#define SIMD_NAME "neon"
#define SIMD_TARGET /* part of the base architecture */
#define SIMD_FN(name) name##__neon
#endif
#define VL 4
#define TILE_VECTORS 4 /* 6 x 4 accumulators + 4 columns of B + 1 factor = 29 of 32 registers */

typedef float32x4_t vf;
#define V_INLINE static inline __attribute__((always_inline)) SIMD_TARGET

V_INLINE vf v_load(const float *p) { return vld1q_f32(p); }
V_INLINE void v_store(float *p, vf v) { vst1q_f32(p, v); }
V_INLINE vf v_load_n(const float *p, int64_t n) {
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int64_t i = 0; i < n; i++) part[i] = p[i];
    return vld1q_f32(part);
}
V_INLINE void v_store_n(float *p, vf v, int64_t n) {
    float part[4];
    vst1q_f32(part, v);
    for (int64_t i = 0; i < n; i++) p[i] = part[i];
}
V_INLINE vf v_set(float x) { return vdupq_n_f32(x); }
V_INLINE vf v_add(vf a, vf b) { return vaddq_f32(a, b); }
V_INLINE vf v_sub(vf a, vf b) { return vsubq_f32(a, b); }
V_INLINE vf v_mul(vf a, vf b) { return vmulq_f32(a, b); }
V_INLINE vf v_div(vf a, vf b) { return vdivq_f32(a, b); } /* exact: estimates lose Adam's zeros */
V_INLINE vf v_sqrt(vf a) { return vsqrtq_f32(a); }
V_INLINE vf v_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
V_INLINE vf v_fnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); }
V_INLINE vf v_max(vf a, vf b) { return vmaxq_f32(a, b); } /* NaN if either is */
V_INLINE vf v_min(vf a, vf b) { return vminq_f32(a, b); } /* NaN if either is */
V_INLINE vf v_round(vf a) { return vrndnq_f32(a); }
/* 2^n for integral n in [-126, 127] */
V_INLINE vf v_pow2(vf n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
/* The low bits of t, shifted to the place of sign and exponent. */
V_INLINE vf v_exponent(vf t) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(t), 23));
}
/* v where x >= bound or x is NaN, else 0 */
V_INLINE vf v_zero_below(vf v, vf x, vf bound) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vcltq_f32(x, bound)));
}
V_INLINE vf v_abs(vf a) { return vabsq_f32(a); }
/* c + a b where size >= from; else c */
V_INLINE vf v_fma_from(vf a, vf b, vf c, vf size, vf from) {
    uint32x4_t kept = vandq_u32(vreinterpretq_u32_f32(b), vcgeq_f32(size, from));
    return vfmaq_f32(c, a, vreinterpretq_f32_u32(kept));
}
V_INLINE uint32_t v_below_bits(vf a, vf b) {
    const uint32x4_t place = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcltq_f32(a, b), place));
}
/* p[i] += the bits of v, less `less` */
V_INLINE void v_add_bits(int32_t *p, vf v, int32_t less) {
    int32x4_t bits = vsubq_s32(vreinterpretq_s32_f32(v), vdupq_n_s32(less));
    vst1q_s32(p, vaddq_s32(vld1q_s32(p), bits));
}
V_INLINE float v_sum(vf v) { return vaddvq_f32(v); }
V_INLINE float v_largest(vf v) { return vmaxvq_f32(v); }
typedef struct {
    float64x2_t low, high;
} vsum;
V_INLINE vsum v_sum_zero(void) { return (vsum){vdupq_n_f64(0.0), vdupq_n_f64(0.0)}; }
V_INLINE vsum v_add_squares(vsum sum, vf v) {
    float64x2_t low = vcvt_f64_f32(vget_low_f32(v)), high = vcvt_high_f64_f32(v);
    return (vsum){vfmaq_f64(sum.low, low, low), vfmaq_f64(sum.high, high, high)};
}
V_INLINE double v_sum_total(vsum sum) { return vaddvq_f64(vaddq_f64(sum.low, sum.high)); }

V_INLINE vf v_load_half(const uint16_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
V_INLINE void v_store_half(uint16_t *p, vf v) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v)));
}

V_INLINE vf v_load_bf16(const uint16_t *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
V_INLINE vf v_set_half(const uint16_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(*p)));
}
V_INLINE vf v_load_int8(const int8_t *p) {
    uint32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    int8x8_t x = vreinterpret_s8_u32(vdup_n_u32(four));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(x))));
}

/* dst[p*dst_ld + j] = src[j*src_ld + p] for 4 x 4 elements. */
V_INLINE void v_transpose(float *dst, int64_t dst_ld, const float *src, int64_t src_ld) {
    float32x4x2_t a = vtrnq_f32(vld1q_f32(src), vld1q_f32(src + src_ld));
    float32x4x2_t b = vtrnq_f32(vld1q_f32(src + 2 * src_ld), vld1q_f32(src + 3 * src_ld));
    vst1q_f32(dst, vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0])));
    vst1q_f32(dst + dst_ld, vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1])));
    vst1q_f32(dst + 2 * dst_ld, vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0])));
    vst1q_f32(dst + 3 * dst_ld, vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1])));
}
