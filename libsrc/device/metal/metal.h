/* device/metal/metal.h - weight gradients on the GPU: C (+)= A . B^T in fp32, queued.
 *
 * Products are gathered into groups; a group is one command buffer, which starts with its last
 * product, while the host goes on. Memory is shared, never copied: operands and results lie in
 * ranges announced by `share`, and nobody may touch them from a product to the next `wait`. One
 * thread at a time. */
#ifndef ANEPY_DEVICE_METAL_H
#define ANEPY_DEVICE_METAL_H

#include "kernels/gemm.h"

#define ANEPY_METAL_PAGE 16384 /* bytes of a page on Apple silicon; shared memory starts at one */

typedef struct anepy_metal anepy_metal;

typedef struct {
    /* OK, or ANEPY_E_UNAVAILABLE with the reason as error sentence. */
    int32_t (*probe)(void);
    /* For products numbered 0 to product_n - 1. */
    int32_t (*open)(anepy_metal **out, int32_t product_n);
    void (*close)(anepy_metal *metal); /* waits; accepts NULL */
    /* memory starts at a page and stays until close; its last page may hold other data too. */
    int32_t (*share)(anepy_metal *metal, void *memory, uint64_t nbytes);
    /* Queues product `index` and, with `last`, starts its group. Rows of A and B are contiguous
     * (a_step 1, B transposed); C must be finite even where it is overwritten. Objects made for an
     * index are kept from step to step. */
    int32_t (*multiply)(anepy_metal *metal, int32_t index, const anepy_product *product,
                        int32_t last_of_group);
    /* Waits until all groups are done, and drops a group that is not complete. Adds the time that
     * the GPU worked to *busy_ms. After an error the results are undefined and the handle refuses
     * all calls. */
    int32_t (*wait)(anepy_metal *metal, double *busy_ms);
} anepy_metal_calls;

extern const anepy_metal_calls anepy_gpu; /* metal.m; elsewhere none.c */

#endif
