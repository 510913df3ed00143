/* kernels/bf16_impl.h - the kernels of anepy_bf16_kernels, whose contracts are in kernels.h.
 *
 * They use vector_impl.h and the primitives on pairs that a simd_*bf16.h adds. */

/* dot_tile: the matrix kernel on pairs, two steps of the reduction at once. */
#define TILE_ROWS dot_rows
#define TILE_NAME SIMD_FN(dot_tile)
#define TILE_UNIT uint32_t
#define TILE_VECTOR vp
#define TILE_LOAD v_load_pairs
#define TILE_SPREAD v_set_pair
#define TILE_MULTIPLY v_dot
#include "kernels/tile_impl.h"

SIMD_TARGET static void SIMD_FN(to_bf16)(uint16_t *dst, const float *src, int64_t n) {
    int64_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        vp v = v_round_to_bf16(v_load(src + i), v_load(src + i + VL));
        memcpy(dst + i, &v, sizeof v);
    }
    if (i == n) return;
    vp rest = v_round_to_bf16(load_left(src + i, n - i),
                              n - i > VL ? load_left(src + i + VL, n - i - VL) : v_set(0.0f));
    memcpy(dst + i, &rest, (size_t)(n - i) * sizeof *dst);
}

/* Rounds two rows and interleaves them; high is NULL if the last row has no partner. */
V_INLINE void pack_pair(uint32_t *dst, const float *low, const float *high, int32_t n) {
    int32_t j = 0;
    for (; j + VL <= n; j += VL) {
        vf second = high != NULL ? v_load(high + j) : v_set(0.0f);
        v_store_pairs(dst + j, v_zip(v_round_to_bf16(v_load(low + j), second)));
    }
    if (j == n) return;
    vf second = high != NULL ? v_load_n(high + j, n - j) : v_set(0.0f);
    v_store_pairs_n(dst + j, v_zip(v_round_to_bf16(v_load_n(low + j, n - j), second)), n - j);
}

SIMD_TARGET static void SIMD_FN(pack_pairs)(uint32_t *dst, int64_t dst_ld, const float *src,
                                            int64_t ld, int32_t k, int32_t n) {
    for (; k > 1; k -= 2, dst += dst_ld, src += 2 * ld) {
        for (int32_t line = 0; line < n;
             line += 16) { /* the distance hides the latency of memory */
            __builtin_prefetch(src + 16 * ld + line);
            __builtin_prefetch(src + 17 * ld + line);
        }
        pack_pair(dst, src, src + ld, n);
    }
    if (k > 0) pack_pair(dst, src, /* mutate: pack-odd-row */ NULL, n);
}

V_INLINE uint32_t pair_of(const uint16_t *low, const uint16_t *high) {
    return *low | (high != NULL ? (uint32_t)*high << 16 : /* mutate: zip-odd-row */ 0);
}

SIMD_TARGET static void SIMD_FN(zip_pairs)(uint32_t *dst, int64_t dst_ld, const uint16_t *src,
                                           int64_t ld, int32_t k, int32_t n) {
    for (; k > 0; k -= 2, dst += dst_ld, src += 2 * ld) {
        const uint16_t *high = k > 1 ? src + ld : NULL;
        int32_t j = 0;
        for (; j + VL <= n && high != NULL; j += VL)
            v_store_pairs(dst + j, v_zip(v_join(src + j, high + j)));
        for (; j < n; j++) dst[j] = pair_of(src + j, high != NULL ? high + j : NULL);
    }
}

SIMD_TARGET static float SIMD_FN(dot_chains)(uint32_t a, uint32_t b, int64_t rounds) {
    vf chain[CHAINS], sum = v_set(0.0f);
    vp left = v_set_pair(a), right = v_set_pair(b);
    ANEPY_UNROLL
    for (int i = 0; i < CHAINS; i++) chain[i] = v_set((float)i);
    for (int64_t r = 0; r < rounds; r++) {
        ANEPY_UNROLL
        for (int i = 0; i < CHAINS; i++) chain[i] = v_dot(left, right, chain[i]);
    }
    ANEPY_UNROLL
    for (int i = 0; i < CHAINS; i++) sum = v_add(sum, chain[i]);
    return v_sum(sum) / (float)(CHAINS * VL);
}

#define PACK_KERNELS                                                                               \
    .dot_tile = SIMD_FN(dot_tile), .to_bf16 = SIMD_FN(to_bf16), .pack_pairs = SIMD_FN(pack_pairs), \
    .zip_pairs = SIMD_FN(zip_pairs)
#define DOT_KERNELS .dot_chains = SIMD_FN(dot_chains), .dot_operations = 4 * CHAINS * VL
