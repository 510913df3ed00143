/* MetalPerformanceShaders.h - stand-in: what device/metal uses of it, as in the macOS 12 SDK. */
#ifndef STANDIN_MPS_H
#define STANDIN_MPS_H

#import <Metal/Metal.h>

typedef uint32_t MPSDataType;
enum { MPSDataTypeFloat32 = 0x10000000 | 32 };

@interface MPSMatrixDescriptor : NSObject {
  @public
    NSUInteger rows, columns, rowBytes;
}
+ (MPSMatrixDescriptor *)matrixDescriptorWithRows:(NSUInteger)rows
                                          columns:(NSUInteger)columns
                                         rowBytes:(NSUInteger)rowBytes
                                         dataType:(MPSDataType)dataType;
@end

@interface MPSMatrix : NSObject {
  @public
    id<MTLBuffer> buffer;
    NSUInteger rows, columns, rowBytes;
    char *data;
}
- (id)initWithBuffer:(id<MTLBuffer>)buffer
              offset:(NSUInteger)offset
          descriptor:(MPSMatrixDescriptor *)descriptor;
@end

@interface MPSMatrixMultiplication : NSObject {
    NSUInteger m, n, k;
    double alpha, beta;
}
- (id)initWithDevice:(id<MTLDevice>)device
       transposeLeft:(BOOL)transposeLeft
      transposeRight:(BOOL)transposeRight
          resultRows:(NSUInteger)resultRows
       resultColumns:(NSUInteger)resultColumns
     interiorColumns:(NSUInteger)interiorColumns
               alpha:(double)alpha
                beta:(double)beta;
- (void)encodeToCommandBuffer:(id<MTLCommandBuffer>)commandBuffer
                   leftMatrix:(MPSMatrix *)leftMatrix
                  rightMatrix:(MPSMatrix *)rightMatrix
                 resultMatrix:(MPSMatrix *)resultMatrix;
@end

#endif
