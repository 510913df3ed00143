/* kernels/weights.h - all that is computed with weights as they are stored, so that a further
 * storage is a case in each of these and nothing elsewhere. Only float32 is stored so far. */
#ifndef ANEPY_KERNELS_WEIGHTS_H
#define ANEPY_KERNELS_WEIGHTS_H

#include "kernels/gemm.h"
#include "runtime/storage.h"

/* The first factor of a product and what follows from it, m and k: W, or transposed. */
void anepy_weights_factor(anepy_product *product, anepy_storage w, int32_t transposed);

/* y = W x, on the calling thread. */
void anepy_weights_gemv(const anepy_kernels *kernels, float *y, anepy_storage w, const float *x);

/* To binary16, [rows, cols] without gaps, or [cols, rows] transposed. */
void anepy_weights_to_half(const anepy_kernels *kernels, uint16_t *dst, anepy_storage w,
                           int32_t transposed);

/* Of a vector, which is always stored as float32. */
static inline const float *anepy_weights_vector(anepy_storage w) { return w.data; }

#endif
