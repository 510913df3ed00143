/* kernels/blas.c - which library multiplies, and how a product is shared out among threads. */
#include "kernels/blas.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* Of C per call in the foreground: 4 to 170 calls per product of stories110M. */
#define BLOCK_ROWS 192

static pthread_once_t once = PTHREAD_ONCE_INIT;
static const anepy_blas *chosen;
static int32_t status;
static char sentence[256];

static void choose(void) {
    const char *name = getenv("ANEPY_BLAS");
    if (name == NULL || name[0] == '\0') { /* nothing was asked for: take it if it is there */
        chosen = anepy_blas_accelerate();
        return;
    }
    if (strcmp(name, "accelerate") == 0) {
        chosen = anepy_blas_accelerate();
        status = chosen != NULL ? ANEPY_OK : ANEPY_E_UNAVAILABLE;
    } else if (strcmp(name, "own") != 0) {
        status =
            anepy_fail(ANEPY_E_NAME, "ANEPY_BLAS=%.32s is unknown: use own or accelerate", name);
    }
    if (status != ANEPY_OK) anepy_last_error(sentence, sizeof sentence);
}

int32_t anepy_blas_get(const anepy_blas **out) {
    pthread_once(&once, choose);
    *out = chosen;
    return status == ANEPY_OK ? ANEPY_OK : anepy_fail(status, "%s", sentence);
}

void anepy_blas_rows(const anepy_blas *blas, const anepy_product *s, int32_t first, int32_t rows) {
    int by_columns = s->a_step != 1; /* A stands as its transpose */
    int64_t lda = by_columns ? s->a_step : s->a_row;
    /* A single row or column may have any stride; the library wants one that could be. */
    int32_t least = by_columns ? rows : s->k, least_b = s->b_transposed ? s->k : s->n;
    blas->sgemm(by_columns, s->b_transposed, rows, s->n, s->k,
                s->a + /* mutate: blas-first-row */ first * s->a_row,
                anepy_max_i32((int32_t)lda, least), s->b, anepy_max_i32((int32_t)s->ldb, least_b),
                /* mutate: blas-accumulate */ s->accumulate ? 1.0f : 0.0f, s->c + first * s->ldc,
                (int32_t)s->ldc);
}

static void multiply_block(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_gemm_job *job = context;
    const anepy_product *s = &job->product;
    int32_t first = index * BLOCK_ROWS, rows = anepy_min_i32(BLOCK_ROWS, s->m - first);
    anepy_blas_rows(job->gemm->blas, s, first, rows);
    /* mutate: blas-row-squares */ anepy_gemm_row_squares(job->gemm, s, first, rows);
}

void anepy_blas_run(const anepy_gemm *gemm, const anepy_product *product) {
    anepy_gemm_job job = {gemm, *product};
    anepy_pool_run(gemm->pool, (product->m + BLOCK_ROWS - 1) / BLOCK_ROWS, multiply_block, &job);
}
