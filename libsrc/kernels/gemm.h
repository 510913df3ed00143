/* kernels/gemm.h - blocked matrix products over the matrix kernels.
 *
 * All products of a step are C (+)= A . B with weights (or output gradients) as A, whose elements
 * are broadcast, and activations as B, whose rows are vectors. docs/performance.md has the blocking
 * and its reasons (#how-products-are-built). One thread sums each element of C in a fixed order, so
 * results do not depend on the number of threads.
 *
 * With bf16 kernels the factors are rounded to bf16 as they are packed, and multiplied in pairs of
 * steps; sums and C stay float32. */
#ifndef ANEPY_KERNELS_GEMM_H
#define ANEPY_KERNELS_GEMM_H

#include "kernels/kernels.h"
#include "runtime/storage.h"
#include "runtime/threads.h"

/* C[m, n] = or += A[m, k] . B[k, n], k >= 1. A(i,p) = a[i*a_row + p*a_step] with a_row or a_step 1.
 * B(p,j) = b[p*ldb + j], then n is a multiple of 64; or, transposed, b[j*ldb + p] with any n. */
typedef struct anepy_product {
    float *c;
    const float *a, *b;
    /* For a bf16 product: a factor that is already rounded, instead of a or b. Strides other than 1
     * are even, the first element is 4-byte aligned, and the element behind a row of odd length is
     * finite. */
    const uint16_t *a16, *b16;
    /* Weights that are stored smaller, instead of a: A is stored, or with a_row 1 its transpose,
     * and the reduction begins at its column, or row, `from`. They are widened as they are packed.
     */
    anepy_storage stored;
    int32_t from;
    int64_t ldc, a_row, a_step, ldb;
    int32_t b_transposed;
    int32_t m, n, k;
    int32_t accumulate;
    /* If not NULL, gets sums of squares of the final C, one per row, or one per piece for
     * anepy_gemm_piece. */
    double *squares;
    /* If not NULL, a further product that is added to C while that is in the cache: its A, k and B,
     * for all rows and columns of this one. Its panels hold its B, packed by anepy_gemm_pack with
     * these as gemm->panels. */
    const struct anepy_product *also;
    const float *panels; /* of `also` only */
    /* Of a product with packed B: the rows of B that it takes are [b_row, b_row + k) of packed_k
     * that were packed together; packed_k 0: just its own. b_row is even. */
    int32_t b_row, packed_k;
} anepy_product;

static inline double anepy_product_flops(const anepy_product *p) {
    return 2.0 * p->m * p->n * p->k;
}

/* What products need to run. */
typedef struct {
    const anepy_kernels *kernels;
    const anepy_bf16_kernels *bf16; /* kernels->bf16, or NULL for float32 products */
    const struct anepy_blas *blas;  /* for large float32 products; NULL: own kernels */
    anepy_pool *pool;
    float *panels;  /* shared: anepy_gemm_panels_n floats, 64-byte aligned */
    float *scratch; /* per worker: scratch_n floats, 64-byte aligned */
    int64_t scratch_n;
} anepy_gemm;

int64_t anepy_gemm_panels_n(int32_t columns); /* for products with up to `columns` columns */
int64_t anepy_gemm_scratch_n(int32_t k);      /* for anepy_gemm_piece with reductions up to k */

/* Computes the product on all threads. */
void anepy_gemm_run(const anepy_gemm *gemm, const anepy_product *product);

/* Whether anepy_gemm_run packs B, so that its two parts may be called one by one: not where the
 * system's library multiplies. */
int anepy_gemm_packs(const anepy_gemm *gemm);
/* anepy_gemm_run in two parts, for k up to anepy_gemm_depth: packing B into gemm->panels, and the
 * product with the packed B. Panel i holds columns [64 i, 64 i + 64) of B as [units][64]. */
int32_t anepy_gemm_depth(const anepy_gemm *gemm);
/* The part of a product with steps [p, p + k) of its reduction: the first overwrites C unless the
 * whole accumulates, the last adds `also`. */
anepy_product anepy_gemm_part(const anepy_product *whole, int32_t p, int32_t k);
void anepy_gemm_pack(const anepy_gemm *gemm, const anepy_product *product);
void anepy_gemm_multiply(const anepy_gemm *gemm, const anepy_product *product);
/* Packs rows [row, row + rows) of the k rows of B, for bf16 products, right where they are
 * computed. row is even; column and columns are multiples of 64. */
void anepy_gemm_pack_rows(const anepy_gemm *gemm, int32_t k, const float *src, int64_t ld,
                          int32_t row, int32_t rows, int32_t column, int32_t columns);

/* A product with transposed B (a weight gradient), cut into independent pieces, so that it can run
 * in the background: submit anepy_gemm_piece to the pool with an anepy_gemm_job. */
typedef struct {
    const anepy_gemm *gemm;
    anepy_product product;
} anepy_gemm_job;

int32_t anepy_gemm_pieces(const anepy_product *product);
void anepy_gemm_piece(void *job, int32_t index, int32_t worker); /* an anepy_loop_fn */

/* Computes only the piece's sum of squares, of C as it is. */
void anepy_gemm_piece_squares(void *job, int32_t index, int32_t worker);
/* Computes the sums of squares of rows [first, first + rows) of C, unless product->squares is NULL.
 */
void anepy_gemm_row_squares(const anepy_gemm *gemm, const anepy_product *product, int32_t first,
                            int32_t rows);

/* Computes a product on the calling thread, for small operands in the layout of the matrix kernels:
 * B is not transposed. With bf16 both factors are k units, and ldb is 64. */
void anepy_gemm_small(const anepy_kernels *kernels, const anepy_bf16_kernels *bf16, float *c,
                      int64_t ldc, const float *a, int64_t a_row, int64_t a_step, const float *b,
                      int64_t ldb, int32_t m, int32_t n, int32_t k, int32_t accumulate);

#endif
