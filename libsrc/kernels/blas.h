/* kernels/blas.h - large float32 products by the system's library instead of the own kernels.
 *
 * ANEPY_BLAS says which: "own", or "accelerate", the default on macOS, where it alone reaches the
 * matrix units (docs/performance.md#how-products-are-built). A product is cut into blocks of rows
 * that do not depend on the number of threads, one call each; every call runs on the thread that
 * makes it, so products in the background and in the foreground share the cores as those of the own
 * kernels do.
 */
#ifndef ANEPY_KERNELS_BLAS_H
#define ANEPY_KERNELS_BLAS_H

#include "runtime/status.h"

/* C[m, n] = A . B + beta * C, row-major; a factor with transpose != 0 stands as its transpose. */
typedef struct anepy_blas {
    const char *name;
    void (*sgemm)(int transpose_a, int transpose_b, int m, int n, int k, const float *a, int lda,
                  const float *b, int ldb, float beta, float *c, int ldc);
} anepy_blas;

/* *out: what to use; NULL: the own kernels. Fails if ANEPY_BLAS names something else, or something
 * that is not here. */
int32_t anepy_blas_get(const anepy_blas **out);

/* blas_accelerate.c; NULL with an error sentence where it is not. */
const anepy_blas *anepy_blas_accelerate(void);

#endif
