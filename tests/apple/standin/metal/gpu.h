/* gpu.h - the stand-in GPU: a thread that computes command buffers in order, late.
 *
 * It takes checksums of everything a product reads when it is committed and again when it is
 * computed: memory that was reused in between is a broken rule. */
#ifndef GPU_H
#define GPU_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    char *data;
    size_t rows, columns, row_nbytes;
} gpu_matrix;

/* c = alpha * a . b^T + beta * c; c is read even if beta is 0, as the interface allows. */
typedef struct {
    gpu_matrix a, b, c;
    size_t m, n, k;
    float alpha, beta;
    uint64_t inputs, before; /* checksums at commit: of a and b, of c */
    int later;               /* an earlier product still writes c */
} gpu_product;

typedef struct gpu_work {
    gpu_product *products;
    size_t n, cap;
    enum { GPU_OPEN, GPU_COMMITTED, GPU_DONE, GPU_FAILED } state;
    double start, end; /* seconds */
    struct gpu_work *next;
} gpu_work;

gpu_work *gpu_work_make(void);
void gpu_work_add(gpu_work *work, const gpu_product *product);
void gpu_work_commit(gpu_work *work);
void gpu_work_wait(gpu_work *work);
void gpu_work_free(gpu_work *work); /* waits if it was committed */

/* Per queue. The thread ends with the last one; whether work was left then. */
void gpu_start(void);
int gpu_stop(void);

/* How long the GPU sleeps before each command buffer. */
void gpu_set_delay_us(uint32_t delay);

#endif
