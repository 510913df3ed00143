/* kernels/weights.c - float32 weights in products and as binary16. */
#include "kernels/weights.h"

#include <string.h>

#define TILE 64

void anepy_weights_factor(anepy_product *product, anepy_storage w, int32_t transposed) {
    product->a = w.data;
    product->a_row = transposed ? 1 : w.cols;
    product->a_step = transposed ? w.cols : 1;
    product->m = transposed ? w.cols : w.rows;
    product->k = transposed ? w.rows : w.cols;
}

void anepy_weights_gemv(const anepy_kernels *kernels, float *y, anepy_storage w, const float *x) {
    kernels->gemv(y, w.data, w.cols, x, w.rows, w.cols);
}

void anepy_weights_read(const anepy_kernels *kernels, float *dst, anepy_storage w, int32_t row,
                        int32_t first, int32_t n) {
    (void)kernels;
    memcpy(dst, (const float *)anepy_storage_rows(w, row, 1).data + first,
           (size_t)n * sizeof(float));
}

/* Transposes squares that fit the cache. */
static void transpose_to_half(const anepy_kernels *kernels, uint16_t *dst, anepy_storage w) {
    const float *src = w.data;
    float tile[TILE * TILE];
    for (int32_t i = 0; i < w.rows; i += TILE) {
        int32_t m = anepy_min_i32(TILE, w.rows - i);
        for (int32_t j = 0; j < w.cols; j += TILE) {
            int32_t n = anepy_min_i32(TILE, w.cols - j);
            kernels->transpose_panel(tile, src + (int64_t)i * w.cols + j, w.cols, m, n);
            for (int32_t p = 0; p < n; p++)
                kernels->to_half(dst + (int64_t)(j + p) * w.rows + i, tile + p * TILE, m);
        }
    }
}

void anepy_weights_to_half(const anepy_kernels *kernels, uint16_t *dst, anepy_storage w,
                           int32_t transposed) {
    if (transposed) transpose_to_half(kernels, dst, w);
    else kernels->to_half(dst, w.data, (int64_t)w.rows * w.cols);
}
