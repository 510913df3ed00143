/* The part of IOSurface.framework and CoreFoundation that anepy uses; implemented by surface.m. */
#ifndef STANDIN_IOSURFACE_H
#define STANDIN_IOSURFACE_H

#include <stddef.h>
#include <stdint.h>

typedef const void *CFTypeRef;
typedef const struct __CFString *CFStringRef;
typedef const struct __CFDictionary *CFDictionaryRef;
typedef struct __IOSurface *IOSurfaceRef;
typedef int kern_return_t;

#define KERN_SUCCESS 0
enum { kIOSurfaceLockReadOnly = 1 };

extern const CFStringRef kIOSurfaceWidth, kIOSurfaceHeight, kIOSurfaceBytesPerElement,
    kIOSurfaceBytesPerRow, kIOSurfaceAllocSize, kIOSurfacePixelFormat;

CFTypeRef CFRetain(CFTypeRef object);
void CFRelease(CFTypeRef object);

IOSurfaceRef IOSurfaceCreate(CFDictionaryRef properties);
size_t IOSurfaceGetAllocSize(IOSurfaceRef surface);
void *IOSurfaceGetBaseAddress(IOSurfaceRef surface);
kern_return_t IOSurfaceLock(IOSurfaceRef surface, uint32_t options, uint32_t *seed);
kern_return_t IOSurfaceUnlock(IOSurfaceRef surface, uint32_t options, uint32_t *seed);

#endif
