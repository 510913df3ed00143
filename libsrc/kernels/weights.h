/* kernels/weights.h - all computations that depend on how weights are stored: float32, bf16, Q8.
 *
 * A further storage is a case in each of these functions, and changes nothing elsewhere but what
 * gemm.c reads in place. */
#ifndef ANEPY_KERNELS_WEIGHTS_H
#define ANEPY_KERNELS_WEIGHTS_H

#include "kernels/gemm.h"
#include "runtime/storage.h"

/* Sets the first factor of a product, W or its transpose, and with it m and k. */
void anepy_weights_factor(anepy_product *product, anepy_storage w, int32_t transposed);

/* y = W x, on the calling thread. */
void anepy_weights_gemv(const anepy_kernels *kernels, float *y, anepy_storage w, const float *x);

/* Elements [first, first + n) of a row as float32. */
void anepy_weights_read(const anepy_kernels *kernels, float *dst, anepy_storage w, int32_t row,
                        int32_t first, int32_t n);

/* Converts to binary16: [rows, cols] without gaps, or transposed [cols, rows]. */
void anepy_weights_to_half(const anepy_kernels *kernels, uint16_t *dst, anepy_storage w,
                           int32_t transposed);

/* Converts n numbers to a storage; fails if one does not fit. */
int32_t anepy_weights_pack(void *dst, const float *src, anepy_dtype dtype, int64_t n);

/* The elements of a vector, which is always stored as float32. */
static inline const float *anepy_weights_vector(anepy_storage w) { return w.data; }

#endif
