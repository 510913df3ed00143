/* kernels/neon.c - the kernel set for AArch64. */
#if defined(__aarch64__)
#include "kernels/simd_neon.h"
#include "kernels/vector_impl.h"

const anepy_kernels anepy_kernels_neon_set =
    VECTOR_KERNELS(SIMD_NAME, "gemm_tile_6x16__neon", NULL);
#else
typedef int anepy_no_neon; /* ISO C forbids an empty file */
#endif
