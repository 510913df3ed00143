/* kernels/blas.h - large float32 products by the system's library instead of the own kernels.
 *
 * ANEPY_BLAS says which: "own", or "accelerate", the default on macOS, where only it reaches the
 * matrix units (docs/performance.md#how-products-are-built). A product is cut into rows, in a way
 * that does not depend on the number of threads, with one call each. A call runs on its calling
 * thread, so background and foreground products share the cores as with the own kernels. */
#ifndef ANEPY_KERNELS_BLAS_H
#define ANEPY_KERNELS_BLAS_H

#include "runtime/status.h"

/* C[m, n] = A . B + beta * C, row-major; with transpose != 0 a factor is stored transposed. */
typedef struct anepy_blas {
    const char *name;
    void (*sgemm)(int transpose_a, int transpose_b, int m, int n, int k, const float *a, int lda,
                  const float *b, int ldb, float beta, float *c, int ldc);
} anepy_blas;

/* *out becomes the library to use, or NULL for the own kernels. Fails if ANEPY_BLAS names an
 * unknown library, or one that this machine lacks. */
int32_t anepy_blas_get(const anepy_blas **out);

/* NULL with an error sentence where there is no Accelerate. */
const anepy_blas *anepy_blas_accelerate(void);

#endif
