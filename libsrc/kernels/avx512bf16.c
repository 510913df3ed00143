/* kernels/avx512bf16.c - the kernel sets for AVX-512 with AVX512_BF16, and for AMX beside it, which
 * only multiplies whole panels. */
#if defined(__x86_64__) && !defined(ANEPY_NO_BF16)
#include "kernels/simd_avx512bf16.h"
#include "kernels/vector_impl.h"
#include "kernels/bf16_impl.h"

static const anepy_bf16_kernels BF16 = {PACK_KERNELS, DOT_KERNELS};
const anepy_kernels anepy_kernels_avx512bf16_set =
    VECTOR_KERNELS(SIMD_NAME, "dot_tile_6x64__avx512bf16", &BF16);

#if !defined(ANEPY_NO_AMX)
#include "kernels/amx_impl.h"

static const anepy_bf16_kernels AMX = {PACK_KERNELS, MATRIX_KERNELS};
const anepy_kernels anepy_kernels_amx_set =
    VECTOR_KERNELS("amxbf16", "dot_panel_32x32__amxbf16", &AMX);
#endif
#else
typedef int anepy_no_avx512bf16; /* ISO C forbids an empty file */
#endif
