/* device/metal/metal.m - matrix products by MPSMatrixMultiplication.
 *
 * Classes of MetalPerformanceShaders are looked up by name: the framework can be linked, but not
 * the frameworks inside it that define them. Every entry has its autorelease pool and lets no
 * exception out. After a failed command buffer the handle refuses all calls, because later buffers
 * may have failed with it. */
#import <Metal/Metal.h>
#import <MetalPerformanceShaders/MetalPerformanceShaders.h>

#include <dlfcn.h>
#include <stdlib.h>

#include "device/metal/metal.h"

typedef struct {
    const char *base;
    uint64_t nbytes;
    id<MTLBuffer> buffer;
} range;

/* Metal objects of one product, made when it is first queued. */
typedef struct {
    MPSMatrix *a, *b, *c;
    anepy_product made_for;
    /* [0] overwrites, [1] accumulates; both for reductions of k. */
    MPSMatrixMultiplication *kernels[2];
    int32_t k;
} entry;

struct anepy_metal {
    Class multiplication, matrix, descriptor;
    id<MTLDevice> device;
    id<MTLCommandQueue> queue;
    id<MTLCommandBuffer> group;    /* being filled */
    id<MTLCommandBuffer> *running; /* committed since the last wait */
    int32_t running_n, product_n;
    entry *entries;
    range *ranges;
    int32_t range_n, range_cap;
    int32_t broken;
};

static int32_t thrown(const char *what, id exception) {
    const char *text = [[exception description] UTF8String];
    return anepy_fail(ANEPY_E_DEVICE, "Metal: %s threw %s", what, text != NULL ? text : "");
}

static int32_t nothing(const char *what) {
    return anepy_fail(ANEPY_E_DEVICE, "Metal: %s gave nothing", what);
}

/* ------------------------------------------------------------------------------- what is there */

/* The first GPU that works in the processor's memory and knows the products; retained. */
static int32_t find_device(id<MTLDevice> *out) {
    typedef BOOL (*supports_fn)(id<MTLDevice>);
    supports_fn supports = (supports_fn)dlsym(RTLD_DEFAULT, "MPSSupportsMTLDevice");
    NSArray<id<MTLDevice>> *devices = [MTLCopyAllDevices() autorelease];
    NSUInteger n = [devices count];
    for (NSUInteger i = 0; i < n && *out == nil; i++) {
        id<MTLDevice> device = [devices objectAtIndex:i];
        if ([device hasUnifiedMemory] && supports != NULL && supports(device))
            *out = [device retain];
    }
    if (*out != nil) return ANEPY_OK;
    if (n == 0) return anepy_fail(ANEPY_E_UNAVAILABLE, "this machine has no Metal GPU");
    return anepy_fail(ANEPY_E_UNAVAILABLE, "no GPU of this machine %s",
                      supports != NULL ? "shares the processor's memory and runs "
                                         "MetalPerformanceShaders"
                                       : "can be used: MPSSupportsMTLDevice is missing");
}

static int32_t find_class(Class *out, NSString *name) {
    *out = NSClassFromString(name);
    if (*out != Nil) return ANEPY_OK;
    return anepy_fail(ANEPY_E_UNAVAILABLE, "MetalPerformanceShaders has no class %s",
                      [name UTF8String]);
}

static int32_t find_all(anepy_metal *m) {
    int32_t status = ANEPY_E_DEVICE;
    @try {
        status = find_class(&m->multiplication, @"MPSMatrixMultiplication");
        if (status == ANEPY_OK) status = find_class(&m->matrix, @"MPSMatrix");
        if (status == ANEPY_OK) status = find_class(&m->descriptor, @"MPSMatrixDescriptor");
        if (status == ANEPY_OK) status = find_device(&m->device);
    } @catch (id exception) {
        thrown("looking for a GPU", exception);
        status = ANEPY_E_UNAVAILABLE;
    }
    return status;
}

static int32_t metal_probe(void) {
    anepy_metal found = {.device = nil};
    int32_t status;
    @autoreleasepool {
        status = find_all(&found);
        [found.device release];
    }
    return status;
}

/* ------------------------------------------------------------------------------- open and close */

static int32_t start(anepy_metal *m) {
    int32_t status = find_all(m);
    if (status != ANEPY_OK) return status;
    @try {
        m->queue = [m->device newCommandQueue];
    } @catch (id exception) {
        return thrown("newCommandQueue", exception);
    }
    return m->queue != nil ? ANEPY_OK : nothing("newCommandQueue");
}

static void drop_kernels(entry *e) {
    for (int i = 0; i < 2; i++) {
        [e->kernels[i] release];
        e->kernels[i] = nil;
    }
}

static void drop_matrices(entry *e) {
    [e->a release];
    [e->b release];
    [e->c release];
    e->a = e->b = e->c = nil;
}

/* Waits for the committed groups; returns their first error and adds their time. */
static int32_t finish(anepy_metal *m, double *busy_ms) {
    int32_t status = ANEPY_OK;
    for (int32_t i = 0; i < m->running_n; i++) {
        id<MTLCommandBuffer> group = m->running[i];
        @try {
            [group waitUntilCompleted];
            if ([group status] == MTLCommandBufferStatusCompleted)
                *busy_ms += ([group GPUEndTime] - [group GPUStartTime]) * 1e3;
            else if (status == ANEPY_OK) {
                const char *text = [[[group error] localizedDescription] UTF8String];
                status = anepy_fail(ANEPY_E_DEVICE, "the GPU failed: %s; leave out metal_dw",
                                    text != NULL ? text : "it does not say why");
            }
        } @catch (id exception) {
            status = thrown("waitUntilCompleted", exception);
        }
        [group release];
    }
    m->running_n = 0;
    /* mutate: metal-release-group */ [m->group release];
    m->group = nil;
    /* mutate: metal-broken */ m->broken |= status != ANEPY_OK;
    return status;
}

static void metal_close(anepy_metal *m) {
    if (m == NULL) return;
    @autoreleasepool {
        double busy_ms = 0.0;
        finish(m, &busy_ms);
        for (int32_t i = 0; i < m->product_n; i++) {
            drop_matrices(&m->entries[i]);
            drop_kernels(&m->entries[i]);
        }
        for (int32_t i = 0; i < m->range_n; i++)
            /* mutate: metal-release-buffer */ [m->ranges[i].buffer release];
        [m->queue release];
        [m->device release];
    }
    free(m->entries);
    free(m->running);
    free(m->ranges);
    free(m);
}

static int32_t metal_open(anepy_metal **out, int32_t product_n) {
    anepy_metal *m = calloc(1, sizeof *m);
    if (m == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for Metal");
    m->entries = calloc((size_t)product_n, sizeof *m->entries);
    m->running = calloc((size_t)product_n, sizeof *m->running);
    int32_t status = ANEPY_E_MEMORY;
    if (m->entries == NULL || m->running == NULL) {
        anepy_fail(status, "no memory for %d products on the GPU", product_n);
    } else {
        m->product_n = product_n;
        @autoreleasepool {
            status = start(m);
        }
    }
    if (status == ANEPY_OK) *out = m;
    else metal_close(m);
    return status;
}

/* -------------------------------------------------------------------------------------- memory */

static const range *find_range(const anepy_metal *m, const void *memory, uint64_t nbytes) {
    const char *first = memory;
    for (int32_t i = 0; i < m->range_n; i++) {
        const range *r = &m->ranges[i];
        if (first >= r->base && first + nbytes <= r->base + r->nbytes) return r;
    }
    return NULL;
}

static int32_t make_buffer(anepy_metal *m, void *memory, uint64_t nbytes, id<MTLBuffer> *out) {
    int32_t status = ANEPY_OK;
    @autoreleasepool {
        @try {
            NSUInteger most = [m->device maxBufferLength];
            if (nbytes > most)
                status = anepy_fail(ANEPY_E_UNSUPPORTED,
                                    "metal_dw needs %llu bytes in one piece, this GPU takes %llu",
                                    (unsigned long long)nbytes, (unsigned long long)most);
            else
                *out = [m->device newBufferWithBytesNoCopy:memory
                                                    length:nbytes
                                                   options:MTLResourceStorageModeShared
                                               deallocator:nil];
        } @catch (id exception) {
            status = thrown("newBufferWithBytesNoCopy", exception);
        }
    }
    return status != ANEPY_OK || *out != nil ? status : nothing("newBufferWithBytesNoCopy");
}

static int32_t metal_share(anepy_metal *m, void *memory, uint64_t nbytes) {
    if (/* mutate: metal-aligned */ (uintptr_t)memory % ANEPY_METAL_PAGE != 0)
        return anepy_fail(ANEPY_E_ARGUMENT,
                          "metal_dw needs memory that starts a page of %d bytes, as that of "
                          "anepy_memory_alloc does",
                          ANEPY_METAL_PAGE);
    if (find_range(m, memory, nbytes) != NULL) return ANEPY_OK;
    if (m->range_n == m->range_cap) {
        int32_t cap = 2 * m->range_cap + 8;
        range *more = realloc(m->ranges, (size_t)cap * sizeof *more);
        if (more == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for Metal's buffers");
        m->ranges = more;
        m->range_cap = cap;
    }
    range added = {.base = memory,
                   .nbytes = (uint64_t)anepy_round_up(
                       (int64_t)nbytes, /* mutate: metal-round-up */ ANEPY_METAL_PAGE)};
    ANEPY_TRY(make_buffer(m, memory, added.nbytes, &added.buffer));
    m->ranges[m->range_n++] = added;
    return ANEPY_OK;
}

/* ------------------------------------------------------------------------------------ products */

/* [rows, columns] of float32 at `at`, rows ld apart; retained. */
static int32_t make_matrix(anepy_metal *m, const float *at, int32_t rows, int32_t columns,
                           int64_t ld, MPSMatrix **out) {
    uint64_t stride = (uint64_t)ld * sizeof(float);
    const range *r = find_range(m, at, (uint64_t)(rows - 1) * stride + (uint64_t)columns * 4);
    if (r == NULL)
        return anepy_fail(ANEPY_E_STATE, "a matrix of %d x %d is not in memory shared with the GPU",
                          rows, columns);
    MPSMatrixDescriptor *shape = [m->descriptor matrixDescriptorWithRows:(NSUInteger)rows
                                                                 columns:(NSUInteger)columns
                                                                rowBytes:stride
                                                                dataType:MPSDataTypeFloat32];
    if (shape == nil) return nothing("matrixDescriptorWithRows");
    *out = [(MPSMatrix *)[m->matrix alloc] initWithBuffer:r->buffer
                                                   offset:(NSUInteger)((const char *)at - r->base)
                                               descriptor:shape];
    return *out != nil ? ANEPY_OK : nothing("MPSMatrix initWithBuffer");
}

/* Whether two products have the same memory and shape; k and accumulate may differ. */
static int same_matrices(const anepy_product *p, const anepy_product *q) {
    return p->a == q->a && p->b == q->b && p->c == q->c && p->m == q->m && p->n == q->n &&
           p->a_row == q->a_row && p->ldb == q->ldb && p->ldc == q->ldc;
}

static int32_t prepare(anepy_metal *m, entry *e, const anepy_product *p) {
    if (e->c == nil || !same_matrices(&e->made_for, p)) {
        drop_matrices(e);
        ANEPY_TRY(make_matrix(m, p->a, p->m, (int32_t)p->a_row, p->a_row, &e->a));
        ANEPY_TRY(make_matrix(m, p->b, p->n, (int32_t)p->ldb, p->ldb, &e->b));
        ANEPY_TRY(make_matrix(m, p->c, p->m, p->n, p->ldc, &e->c));
        drop_kernels(e);
        e->made_for = *p;
    }
    if (/* mutate: metal-new-depth */ e->k != p->k) drop_kernels(e);
    e->k = p->k;
    MPSMatrixMultiplication **kernel = &e->kernels[p->accumulate != 0];
    if (*kernel == nil)
        *kernel = [(MPSMatrixMultiplication *)[m->multiplication alloc]
             initWithDevice:m->device
              transposeLeft:NO
             transposeRight:YES
                 resultRows:(NSUInteger)p->m
              resultColumns:(NSUInteger)p->n
            interiorColumns:/* mutate: metal-depth */ (NSUInteger)p->k
                      alpha:1.0
                       beta:/* mutate: metal-accumulate */ p->accumulate ? 1.0 : 0.0];
    return *kernel != nil ? ANEPY_OK : nothing("MPSMatrixMultiplication initWithDevice");
}

static int32_t queue(anepy_metal *m, entry *e, const anepy_product *p, int32_t last_of_group) {
    ANEPY_TRY(prepare(m, e, p));
    if (m->group == nil) m->group = [[m->queue commandBuffer] retain];
    if (m->group == nil) return nothing("commandBuffer");
    [e->kernels[p->accumulate != 0] encodeToCommandBuffer:m->group
                                               leftMatrix:e->a
                                              rightMatrix:e->b
                                             resultMatrix:e->c];
    if (!last_of_group) return ANEPY_OK;
    [m->group commit];
    m->running[m->running_n++] = m->group;
    m->group = nil;
    return ANEPY_OK;
}

static int32_t metal_multiply(anepy_metal *m, int32_t index, const anepy_product *product,
                              int32_t last_of_group) {
    if (m->broken)
        return anepy_fail(ANEPY_E_STATE, "the GPU failed before: restart without metal_dw");
    int32_t status = ANEPY_E_DEVICE;
    @autoreleasepool {
        @try {
            status = queue(m, &m->entries[index], product, last_of_group);
        } @catch (id exception) {
            status = thrown("a product", exception);
        }
    }
    return status;
}

static int32_t metal_wait(anepy_metal *m, double *busy_ms) {
    int32_t status;
    @autoreleasepool {
        status = finish(m, busy_ms);
    }
    return status;
}

const anepy_metal_calls anepy_gpu = {
    .probe = metal_probe,
    .open = metal_open,
    .close = metal_close,
    .share = metal_share,
    .multiply = metal_multiply,
    .wait = metal_wait,
};
