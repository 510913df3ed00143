/* kernels/avx512.c - the kernel set for AVX-512 (F, DQ, BW, VL). */
#if defined(__x86_64__)
#include "kernels/simd_avx512.h"
#include "kernels/vector_impl.h"

const anepy_kernels anepy_kernels_avx512_set =
    VECTOR_KERNELS(SIMD_NAME, "gemm_tile_6x64__avx512", NULL);
#else
typedef int anepy_no_avx512; /* ISO C forbids an empty file */
#endif
