/* kernels/avx2.c - the kernel set for AVX2 with FMA. */
#if defined(__x86_64__)
#include "kernels/simd_avx2.h"
#include "kernels/vector_impl.h"

const anepy_kernels anepy_kernels_avx2_set =
    VECTOR_KERNELS(SIMD_NAME, "gemm_tile_6x16__avx2", NULL);
#else
typedef int anepy_no_avx2; /* ISO C forbids an empty file */
#endif
