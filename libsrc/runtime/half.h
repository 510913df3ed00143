/* runtime/half.h - IEEE binary16 in software, bit for bit what the conversion instructions do; and
 * bfloat16, the upper half of a float32. */
#ifndef ANEPY_RUNTIME_HALF_H
#define ANEPY_RUNTIME_HALF_H

#include <string.h>

#include "runtime/common.h"

ANEPY_INLINE uint32_t anepy_float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

ANEPY_INLINE float anepy_bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Round to nearest even; NaN stays NaN (quiet), beyond 65504 (after rounding) becomes infinite. */
static inline uint16_t anepy_to_half(float x) {
    uint32_t bits = anepy_float_bits(x);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x1ff));
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00); /* 65536 and above */
    if (magnitude < 0x33000000) return (uint16_t)sign;             /* below half the smallest */
    uint32_t exponent = magnitude >> 23;
    uint32_t mantissa = magnitude & 0x7fffff;
    uint32_t shift = 13;
    if (exponent < 113) { /* subnormal: the implicit one becomes explicit and moves right */
        mantissa |= 0x800000;
        shift = 126 - exponent;
        exponent = 112;
    }
    uint32_t half = (exponent - 112) << 10;
    half += mantissa >> shift;
    uint32_t rest = mantissa & ((1u << shift) - 1), middle = 1u << (shift - 1);
    half +=
        rest > middle || (rest == middle && (half & 1)); /* may carry into the exponent: right */
    return (uint16_t)(sign | half);
}

static inline float anepy_from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff, bits;
    if (magnitude >= 0x7c00) {
        bits = 0x7f800000 | (magnitude & 0x3ff) << 13 | (magnitude > 0x7c00 ? 0x400000 : 0);
    } else if (magnitude >= 0x0400) {
        bits = (magnitude << 13) + (112u << 23);
    } else { /* subnormal: magnitude * 2^-24, exact */
        bits = anepy_float_bits((float)magnitude * 0x1p-24f);
    }
    return anepy_bits_float(bits | sign);
}

static inline float anepy_from_bf16(uint16_t half) {
    return anepy_bits_float((uint32_t)half << 16);
}

/* Mixes the bits of a number so that each bit of it changes each bit of the result in half of all
 * cases: the end of MurmurHash3 (Appleby, in the public domain). */
static inline uint32_t anepy_mixed(uint32_t x) {
    x = (x ^ x >> 16) * 0x85ebca6bu;
    x = (x ^ x >> 13) * 0xc2b2ae35u;
    return x ^ x >> 16;
}

/* Rounds up with a probability of the part that is cut off, and so to x on average; infinities and
 * NaN stay. The bits of `random` decide, of which the lower 16 count. */
static inline uint16_t anepy_to_bf16_randomly(float x, uint32_t random) {
    uint32_t bits = anepy_float_bits(x);
    uint32_t finite = 0u - (uint32_t)((bits & 0x7f800000) != 0x7f800000);
    return (uint16_t)((bits + /* mutate: random-rounding */ (random & 0xffff & finite)) >> 16);
}

#endif
