/* kernels/avx512bf16.c - the kernel set for AVX-512 with AVX512_BF16. */
#if defined(__x86_64__) && !defined(ANEPY_NO_BF16)
#include "kernels/simd_avx512bf16.h"
#include "kernels/vector_impl.h"
#include "kernels/bf16_impl.h"

static const anepy_bf16_kernels BF16 = BF16_KERNELS;
const anepy_kernels anepy_kernels_avx512bf16_set =
    VECTOR_KERNELS("dot_tile_6x64__avx512bf16", &BF16);
#else
typedef int anepy_no_avx512bf16; /* ISO C forbids an empty file */
#endif
