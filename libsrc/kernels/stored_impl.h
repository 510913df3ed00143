/* kernels/stored_impl.h - weights that are stored as bf16 or Q8: times a vector, and widened.
 *
 * Part of vector_impl.h; kernels.h has the contracts. Values are widened in registers and summed in
 * float32. */

#define AHEAD 4096 /* bytes that are fetched ahead: the hardware stops at the end of a page */

SIMD_TARGET static void SIMD_FN(gemv_bf16)(float *y, const uint16_t *w, const float *x,
                                           int32_t rows, int32_t k) {
    for (int32_t i = 0; i < rows; i++, w += k) {
        vf part[4] = {v_set(0.0f), v_set(0.0f), v_set(0.0f), v_set(0.0f)};
        int32_t p = 0;
        for (; p + 4 * VL <= k; p += 4 * VL) {
            ANEPY_UNROLL
            for (int j = 0; j < 4; j++) {
                if (j * VL % 32 == 0) __builtin_prefetch((const char *)(w + p + j * VL) + AHEAD);
                part[j] = v_fma(v_load_bf16(w + p + j * VL), v_load(x + p + j * VL), part[j]);
            }
        }
        for (; p + VL <= k; p += VL) part[0] = v_fma(v_load_bf16(w + p), v_load(x + p), part[0]);
        float sum = v_sum(v_add(v_add(part[0], part[1]), v_add(part[2], part[3])));
        for (; p < k; p++) sum += anepy_from_bf16(w[p]) * x[p];
        y[i] = sum;
    }
}

/* Scaled sum of a block: its values times x are added up before they are scaled. */
V_INLINE vf q8_block(const anepy_q8 *block, const float *x, vf sum) {
    vf part = v_mul(v_load_int8(block->value), v_load(x));
    ANEPY_UNROLL
    for (int j = 1; j < ANEPY_Q8_N / VL; j++)
        part = v_fma(v_load_int8(block->value + j * VL), v_load(x + j * VL), part);
    return v_fma(v_set_half(&block->scale), part, sum);
}

SIMD_TARGET static void SIMD_FN(gemv_q8)(float *y, const anepy_q8 *w, const float *x, int32_t rows,
                                         int32_t k) {
    int32_t blocks = k / ANEPY_Q8_N;
    for (int32_t i = 0; i < rows; i++, w += blocks) {
        vf part[4] = {v_set(0.0f), v_set(0.0f), v_set(0.0f), v_set(0.0f)};
        int32_t b = 0;
        for (; b + 4 <= blocks; b += 4) {
            ANEPY_UNROLL
            for (int j = 0; j < 4; j++) {
                __builtin_prefetch((const char *)(w + b + j) + AHEAD);
                part[j] = q8_block(w + b + j, x + (b + j) * ANEPY_Q8_N, part[j]);
            }
        }
        for (; b < blocks; b++) part[0] = q8_block(w + b, x + b * ANEPY_Q8_N, part[0]);
        y[i] = v_sum(v_add(v_add(part[0], part[1]), v_add(part[2], part[3])));
    }
}

SIMD_TARGET static void SIMD_FN(from_bf16)(float *dst, const uint16_t *src, int64_t n) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) v_store(dst + i, v_load_bf16(src + i));
    for (; i < n; i++) dst[i] = anepy_from_bf16(src[i]);
}

SIMD_TARGET static void SIMD_FN(from_q8)(float *dst, const anepy_q8 *row, int64_t first,
                                         int64_t n) {
    for (int64_t at = first, end = first + n; at < end;) {
        const anepy_q8 *block = row + at / ANEPY_Q8_N;
        int64_t start = at % ANEPY_Q8_N, stop = anepy_min_i64(ANEPY_Q8_N, start + end - at);
        vf scale = v_set_half(&block->scale);
        int64_t i = start;
        for (; i + VL <= stop; i += VL)
            v_store(dst + i - start, v_mul(scale, v_load_int8(block->value + i)));
        for (float s = anepy_from_half(block->scale); i < stop; i++)
            dst[i - start] = s * (float)block->value[i];
        dst += stop - start;
        at += stop - start;
    }
}
