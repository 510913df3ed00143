/* kernels/neonbf16.c - the kernel set for AArch64 with FEAT_BF16. */
#if defined(__aarch64__) && !defined(ANEPY_NO_BF16)
#include "kernels/simd_neonbf16.h"
#include "kernels/vector_impl.h"
#include "kernels/bf16_impl.h"

static const anepy_bf16_kernels BF16 = {PACK_KERNELS, DOT_KERNELS};
const anepy_kernels anepy_kernels_neonbf16_set =
    VECTOR_KERNELS(SIMD_NAME, "dot_tile_6x16__neonbf16", &BF16);
#else
typedef int anepy_no_neonbf16; /* ISO C forbids an empty file */
#endif
