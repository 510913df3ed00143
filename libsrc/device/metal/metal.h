/* device/metal/metal.h - weight gradients on the GPU: C (+)= A . B^T in fp32, queued.
 *
 * Products are gathered into groups; a group is one command buffer that starts when its last
 * product is there, while the host goes on. Memory is shared, never copied: operands and results
 * lie in ranges that were announced with `share`, and none may be touched between a product and the
 * next `wait`. Everything but probe takes a handle of `open`. One thread at a time. */
#ifndef ANEPY_DEVICE_METAL_H
#define ANEPY_DEVICE_METAL_H

#include "kernels/gemm.h"

#define ANEPY_METAL_PAGE 16384 /* what shared memory is aligned to: the page of Apple silicon */

typedef struct anepy_metal anepy_metal;

typedef struct {
    /* OK, or ANEPY_E_UNAVAILABLE with the reason as error sentence. */
    int32_t (*probe)(void);
    /* For products numbered 0 to product_n - 1. */
    int32_t (*open)(anepy_metal **out, int32_t product_n);
    void (*close)(anepy_metal *metal); /* waits; accepts NULL */
    /* memory: starts a page and stays until close; its last page may be used by others as well. */
    int32_t (*share)(anepy_metal *metal, void *memory, uint64_t nbytes);
    /* Queues product `index`: rows of A and B contiguous (a_step 1, B transposed). C is finite also
     * where it is overwritten. What belongs to an index is kept from step to step. */
    int32_t (*multiply)(anepy_metal *metal, int32_t index, const anepy_product *product,
                        int32_t last_of_group);
    /* Until everything is done; groups that are not complete are dropped. Adds the time the GPU
     * worked. After an error results are undefined and the handle is of no more use. */
    int32_t (*wait)(anepy_metal *metal, double *busy_ms);
} anepy_metal_calls;

extern const anepy_metal_calls anepy_gpu; /* metal.m; elsewhere none.c */

#endif
