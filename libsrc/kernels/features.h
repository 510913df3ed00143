/* kernels/features.h - the instructions that processor and operating system support. */
#ifndef ANEPY_KERNELS_FEATURES_H
#define ANEPY_KERNELS_FEATURES_H

#include <stdint.h>

#define ANEPY_CPU_AVX2 1u   /* AVX2, FMA, F16C, and the OS saves ymm */
#define ANEPY_CPU_AVX512 2u /* F, DQ, BW, VL, and the OS saves zmm and opmask */
#define ANEPY_CPU_NEON 4u
#define ANEPY_CPU_AVX512_BF16 8u
#define ANEPY_CPU_NEON_BF16 16u
#define ANEPY_CPU_AMX_BF16 32u /* tiles and their bf16 products, and the OS lets us use them */

uint32_t anepy_cpu_features(void);

#endif
