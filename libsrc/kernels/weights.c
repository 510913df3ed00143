/* kernels/weights.c - weights of every storage in products, as float32 and as binary16. */
#include "kernels/weights.h"

#include <math.h>
#include <string.h>

#include "runtime/half.h"

#define TILE 64

void anepy_weights_factor(anepy_product *product, anepy_storage w, int32_t transposed) {
    int plain = w.dtype == ANEPY_F32;
    product->a = plain ? w.data : NULL;
    product->stored = plain ? (anepy_storage){0} : w;
    product->from = 0;
    product->a_row = transposed ? 1 : w.cols;
    product->a_step = transposed ? w.cols : 1;
    product->m = transposed ? w.cols : w.rows;
    product->k = transposed ? w.rows : w.cols;
}

void anepy_weights_gemv(const anepy_kernels *kernels, float *y, anepy_storage w, const float *x) {
    switch (w.dtype) {
    case ANEPY_BF16: kernels->gemv_bf16(y, w.data, x, w.rows, w.cols); break;
    case ANEPY_Q8: kernels->gemv_q8(y, w.data, x, w.rows, w.cols); break;
    default: kernels->gemv(y, w.data, w.cols, x, w.rows, w.cols);
    }
}

void anepy_weights_read(const anepy_kernels *kernels, float *dst, anepy_storage w, int32_t row,
                        int32_t first, int32_t n) {
    const void *data = anepy_storage_rows(w, row, 1).data;
    switch (w.dtype) {
    case ANEPY_BF16: kernels->from_bf16(dst, (const uint16_t *)data + first, n); break;
    case ANEPY_Q8: kernels->from_q8(dst, data, first, n); break;
    default: memcpy(dst, (const float *)data + first, (size_t)n * sizeof(float));
    }
}

/* Transposes squares that fit the cache. */
static void transpose_to_half(const anepy_kernels *kernels, uint16_t *dst, anepy_storage w) {
    float rows[TILE * TILE], tile[TILE * TILE];
    for (int32_t i = 0; i < w.rows; i += TILE) {
        int32_t m = anepy_min_i32(TILE, w.rows - i);
        for (int32_t j = 0; j < w.cols; j += TILE) {
            int32_t n = anepy_min_i32(TILE, w.cols - j);
            for (int32_t r = 0; r < m; r++)
                anepy_weights_read(kernels, rows + r * TILE, w, i + r, j, n);
            kernels->transpose_panel(tile, rows, TILE, m, n);
            for (int32_t p = 0; p < n; p++)
                kernels->to_half(dst + (int64_t)(j + p) * w.rows + i, tile + p * TILE, m);
        }
    }
}

void anepy_weights_to_half(const anepy_kernels *kernels, uint16_t *dst, anepy_storage w,
                           int32_t transposed) {
    float part[TILE * TILE];
    if (transposed) {
        transpose_to_half(kernels, dst, w);
        return;
    }
    if (w.dtype == ANEPY_F32) {
        kernels->to_half(dst, w.data, (int64_t)w.rows * w.cols);
        return;
    }
    for (int32_t i = 0; i < w.rows; i++) {
        for (int32_t j = 0; j < w.cols; j += TILE * TILE) {
            int32_t n = anepy_min_i32(TILE * TILE, w.cols - j);
            anepy_weights_read(kernels, part, w, i, j, n);
            kernels->to_half(dst + (int64_t)i * w.cols + j, part, n);
        }
    }
}

/* ------------------------------------------------------------------------------------- storing */

static uint16_t round_to_bf16(float x) {
    uint32_t bits = anepy_float_bits(x);
    if (isnan(x)) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* To the nearest whole number, halves away from zero, for |x| <= 128. */
static int8_t whole(float x) {
    int32_t n = (int32_t)x;
    float rest = x - (float)n;
    return (int8_t)(rest >= 0.5f ? n + 1 : rest <= -0.5f ? n - 1 : n);
}

/* Returns whether the scale is a finite number. */
static int pack_block(anepy_q8 *dst, const float *src) {
    float most = 0.0f, sum = 0.0f;
    for (int32_t i = 0; i < ANEPY_Q8_N; i++) {
        float size = fabsf(src[i]);
        most = size > most ? size : most;
        sum += size; /* NaN shows here only */
    }
    float scale = most / 127.0f, inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
    dst->scale = anepy_to_half(scale);
    if (!isfinite(anepy_from_half(dst->scale)) || isnan(sum)) return 0;
    for (int32_t i = 0; i < ANEPY_Q8_N; i++)
        dst->value[i] = isfinite(inverse) ? whole(src[i] * inverse) : 0;
    return 1;
}

int32_t anepy_weights_pack(void *dst, const float *src, anepy_dtype dtype, int64_t n) {
    int finite = 1;
    for (int64_t i = 0; i < n && dtype == ANEPY_F32; i++) finite &= isfinite(src[i]) != 0;
    if (dtype == ANEPY_F32) memcpy(dst, src, (size_t)n * sizeof *src);
    for (int64_t i = 0; i < n && dtype == ANEPY_BF16; i++) {
        uint16_t half = round_to_bf16(src[i]);
        finite &= (half & 0x7f80) != 0x7f80;
        ((uint16_t *)dst)[i] = half;
    }
    for (int64_t i = 0; i < n / ANEPY_Q8_N && dtype == ANEPY_Q8; i++)
        finite &= pack_block((anepy_q8 *)dst + i, src + i * ANEPY_Q8_N);
    if (finite) return ANEPY_OK;
    return anepy_fail(ANEPY_E_ARGUMENT, "a weight is no finite number, or too large for %s",
                      dtype == ANEPY_Q8     ? "q8"
                      : dtype == ANEPY_BF16 ? "bf16"
                                            : "f32");
}

static int32_t check(int32_t storage, int64_t n) {
    if (storage != ANEPY_STORED_F32 && storage != ANEPY_STORED_BF16 && storage != ANEPY_STORED_Q8)
        return anepy_fail(ANEPY_E_ARGUMENT, "storage is %d, expected %d, %d or %d", storage,
                          ANEPY_STORED_F32, ANEPY_STORED_BF16, ANEPY_STORED_Q8);
    if (n < 0 || (storage == ANEPY_STORED_Q8 && n % ANEPY_Q8_N != 0))
        return anepy_fail(ANEPY_E_ARGUMENT, "%lld numbers, expected whole blocks", (long long)n);
    return ANEPY_OK;
}

int32_t anepy_pack(void *dst, const float *src, int32_t storage, int64_t n) {
    ANEPY_TRY(check(storage, n));
    return anepy_weights_pack(dst, src, (anepy_dtype)storage, n);
}

int32_t anepy_unpack(float *dst, const void *src, int32_t storage, int64_t n) {
    const int32_t most = 1 << 20; /* a row of the library has 32 bits */
    const anepy_kernels *kernels = anepy_kernels_get();
    if (kernels == NULL) return ANEPY_E_NAME;
    ANEPY_TRY(check(storage, n));
    for (int64_t at = 0; at < n; at += most) {
        anepy_storage part = {(const char *)src + anepy_stored_nbytes((anepy_dtype)storage, at),
                              (anepy_dtype)storage, 1, most};
        anepy_weights_read(kernels, dst + at, part, 0, 0, (int32_t)anepy_min_i64(most, n - at));
    }
    return ANEPY_OK;
}
