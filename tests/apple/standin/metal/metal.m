/* metal.m - stand-in for Metal and MPSMatrixMultiplication: strict where the hardware is, and where
 * it would silently be wrong. */
#import <MetalPerformanceShaders/MetalPerformanceShaders.h>

#include "fault.h"
#include "gpu.h"

#define PAGE 16384 /* of Apple silicon */

@interface StandinGPUBuffer : NSObject <MTLBuffer> {
    void *memory;
    NSUInteger nbytes;
}
- (id)initWithMemory:(void *)start length:(NSUInteger)length;
@end

@implementation StandinGPUBuffer
- (id)initWithMemory:(void *)start length:(NSUInteger)length {
    self = [super init];
    memory = start;
    nbytes = length;
    gpu_count(1);
    return self;
}
- (void)dealloc {
    gpu_count(-1);
    [super dealloc];
}
- (NSUInteger)length {
    return nbytes;
}
- (void *)contents {
    return memory;
}
@end

@interface StandinGPUCommandBuffer : NSObject <MTLCommandBuffer> {
    gpu_work *work;
    NSMutableArray *used; /* what the GPU reads stays alive */
}
- (void)add:(const gpu_product *)product using:(NSArray *)objects;
@end

@implementation StandinGPUCommandBuffer
- (id)init {
    self = [super init];
    work = gpu_work_make();
    used = [[NSMutableArray alloc] init];
    gpu_count(1);
    return self;
}
- (void)dealloc {
    gpu_work_free(work);
    [used release];
    gpu_count(-1);
    [super dealloc];
}
- (void)add:(const gpu_product *)product using:(NSArray *)objects {
    if (work->state != GPU_OPEN) gpu_broken("encoding into a committed command buffer");
    gpu_work_add(work, product);
    [used addObjectsFromArray:objects];
}
- (void)commit {
    gpu_enter("commit");
    if (work->state != GPU_OPEN) gpu_broken("a command buffer was committed twice");
    gpu_work_commit(work);
}
- (void)waitUntilCompleted {
    gpu_enter("waitUntilCompleted");
    if (work->state == GPU_OPEN) gpu_broken("waiting for what was never committed");
    gpu_work_wait(work);
}
- (MTLCommandBufferStatus)status {
    switch (work->state) {
    case GPU_OPEN: return MTLCommandBufferStatusNotEnqueued;
    case GPU_COMMITTED: return MTLCommandBufferStatusCommitted;
    case GPU_DONE: return MTLCommandBufferStatusCompleted;
    default: return MTLCommandBufferStatusError;
    }
}
- (NSError *)error {
    if (work->state != GPU_FAILED) return nil;
    NSDictionary *info = [NSDictionary dictionaryWithObject:@"Caused GPU Timeout Error"
                                                     forKey:NSLocalizedDescriptionKey];
    return [NSError errorWithDomain:@"MTLCommandBufferErrorDomain" code:2 userInfo:info];
}
- (CFTimeInterval)GPUStartTime {
    if (work->state != GPU_DONE) gpu_broken("times of a command buffer that is not done");
    return work->start;
}
- (CFTimeInterval)GPUEndTime {
    return work->end;
}
@end

@interface StandinGPUQueue : NSObject <MTLCommandQueue>
@end

@implementation StandinGPUQueue
- (id)init {
    self = [super init];
    gpu_start();
    gpu_count(1);
    return self;
}
- (void)dealloc {
    if (gpu_stop()) gpu_broken("the queue went while the GPU was working");
    gpu_count(-1);
    [super dealloc];
}
- (id<MTLCommandBuffer>)commandBuffer {
    if (gpu_enter("commandBuffer") != GPU_WORKS) return nil;
    return [[[StandinGPUCommandBuffer alloc] init] autorelease];
}
@end

@interface StandinGPUDevice : NSObject <MTLDevice>
@end

@implementation StandinGPUDevice
- (id)init {
    self = [super init];
    gpu_count(1);
    return self;
}
- (void)dealloc {
    gpu_count(-1);
    [super dealloc];
}
- (BOOL)hasUnifiedMemory {
    return gpu_enter("hasUnifiedMemory") == GPU_WORKS;
}
- (NSUInteger)maxBufferLength {
    return gpu_enter("maxBufferLength") == GPU_WORKS ? (NSUInteger)1 << 33 : 4096;
}
- (id<MTLCommandQueue>)newCommandQueue {
    if (gpu_enter("newCommandQueue") != GPU_WORKS) return nil;
    return [[StandinGPUQueue alloc] init];
}
- (id<MTLBuffer>)newBufferWithBytesNoCopy:(void *)pointer
                                   length:(NSUInteger)length
                                  options:(MTLResourceOptions)options
                              deallocator:(id)deallocator {
    if (gpu_enter("newBufferWithBytesNoCopy") != GPU_WORKS) return nil;
    if ((uintptr_t)pointer % PAGE != 0) gpu_broken("no-copy memory starts inside a page");
    if (length == 0 || length % PAGE != 0) gpu_broken("no-copy memory ends inside a page");
    if (options != MTLResourceStorageModeShared) gpu_broken("no-copy memory is not shared");
    if (deallocator != nil) gpu_broken("the arena is not Metal's to free");
    return [[StandinGPUBuffer alloc] initWithMemory:pointer length:length];
}
@end

NSArray *MTLCopyAllDevices(void) {
    if (gpu_enter("MTLCopyAllDevices") != GPU_WORKS) return [[NSArray alloc] init];
    StandinGPUDevice *device = [[StandinGPUDevice alloc] init];
    NSArray *all = [[NSArray alloc] initWithObjects:device, nil];
    [device release];
    return all;
}

/* ------------------------------------------------------------------------------------- matrices */

@implementation MPSMatrixDescriptor
+ (MPSMatrixDescriptor *)matrixDescriptorWithRows:(NSUInteger)rows
                                          columns:(NSUInteger)columns
                                         rowBytes:(NSUInteger)rowBytes
                                         dataType:(MPSDataType)dataType {
    if (gpu_enter("matrixDescriptor") != GPU_WORKS) return nil;
    if (rows == 0 || columns == 0) gpu_broken("a matrix without elements");
    if (rowBytes % sizeof(float) != 0 || rowBytes < columns * sizeof(float))
        gpu_broken("%zu columns in rows of %zu bytes", (size_t)columns, (size_t)rowBytes);
    if (dataType != MPSDataTypeFloat32) gpu_broken("data type %#x", dataType);
    MPSMatrixDescriptor *made = [[[MPSMatrixDescriptor alloc] init] autorelease];
    made->rows = rows;
    made->columns = columns;
    made->rowBytes = rowBytes;
    return made;
}
@end

@implementation MPSMatrix
- (id)initWithBuffer:(id<MTLBuffer>)given
              offset:(NSUInteger)offset
          descriptor:(MPSMatrixDescriptor *)shape {
    self = [super init];
    gpu_count(1);
    gpu_outcome outcome = GPU_NIL;
    @try {
        outcome = gpu_enter("MPSMatrix");
    } @catch (id exception) {
        [self release]; /* as an initializer that throws has to */
        @throw;
    }
    if (outcome != GPU_WORKS) {
        [self release];
        return nil;
    }
    if (offset % sizeof(float) != 0) gpu_broken("a matrix at byte %zu", (size_t)offset);
    NSUInteger end = offset + (shape->rows - 1) * shape->rowBytes + shape->columns * sizeof(float);
    if (end > [given length]) gpu_broken("a matrix ends behind its buffer");
    buffer = [given retain];
    rows = shape->rows;
    columns = shape->columns;
    rowBytes = shape->rowBytes;
    data = (char *)[given contents] + offset;
    return self;
}
- (void)dealloc {
    [buffer release];
    gpu_count(-1);
    [super dealloc];
}
@end

@implementation MPSMatrixMultiplication
- (id)initWithDevice:(id<MTLDevice>)device
       transposeLeft:(BOOL)transposeLeft
      transposeRight:(BOOL)transposeRight
          resultRows:(NSUInteger)resultRows
       resultColumns:(NSUInteger)resultColumns
     interiorColumns:(NSUInteger)interiorColumns
               alpha:(double)factor
                beta:(double)kept {
    self = [super init];
    gpu_count(1);
    gpu_outcome outcome = GPU_NIL;
    @try {
        outcome = gpu_enter("MPSMatrixMultiplication");
    } @catch (id exception) {
        [self release];
        @throw;
    }
    if (outcome != GPU_WORKS) {
        [self release];
        return nil;
    }
    if (device == nil) gpu_broken("a product without a device");
    if (transposeLeft || !transposeRight) gpu_broken("this stand-in computes A . B^T only");
    m = resultRows;
    n = resultColumns;
    k = interiorColumns;
    alpha = factor;
    beta = kept;
    return self;
}
- (void)dealloc {
    gpu_count(-1);
    [super dealloc];
}
static gpu_matrix view(MPSMatrix *x) {
    return (gpu_matrix){x->data, x->rows, x->columns, x->rowBytes};
}
static void need(const char *name, MPSMatrix *x, NSUInteger rows, NSUInteger columns) {
    if (x->rows < rows || x->columns < columns)
        gpu_broken("%s has %zu x %zu elements, the product %zu x %zu", name, (size_t)x->rows,
                   (size_t)x->columns, (size_t)rows, (size_t)columns);
}
- (void)encodeToCommandBuffer:(id<MTLCommandBuffer>)commandBuffer
                   leftMatrix:(MPSMatrix *)left
                  rightMatrix:(MPSMatrix *)right
                 resultMatrix:(MPSMatrix *)result {
    gpu_enter("encode");
    need("left", left, m, k);
    need("right", right, n, k);
    need("result", result, m, n);
    gpu_product product = {.a = view(left),
                           .b = view(right),
                           .c = view(result),
                           .m = m,
                           .n = n,
                           .k = k,
                           .alpha = (float)alpha,
                           .beta = (float)beta};
    [(StandinGPUCommandBuffer *)commandBuffer
          add:&product
        using:[NSArray arrayWithObjects:self, left, right, result, nil]];
}
@end

/* ------------------------------------------------------------------------ what is found by name */

static BOOL MPSSupportsMTLDevice(id<MTLDevice> device) {
    return device != nil && gpu_enter("MPSSupportsMTLDevice") == GPU_WORKS;
}

/* The library is compiled with dlsym and NSClassFromString meaning these. */
void *gpu_dlsym(void *handle, const char *name);
void *gpu_dlsym(void *handle, const char *name) {
    if (gpu_enter("dlsym") != GPU_WORKS) return NULL;
    if (strcmp(name, "MPSSupportsMTLDevice") == 0) return (void *)(uintptr_t)MPSSupportsMTLDevice;
    return dlsym(handle, name);
}

Class gpu_class(NSString *name);
Class gpu_class(NSString *name) {
    return gpu_enter("NSClassFromString") == GPU_WORKS ? NSClassFromString(name) : Nil;
}
