/* device/ane/surface.m - IOSurfaces: one row of bytes each, locked around every access. */
#include <stdlib.h>

#include "device/ane/surface.h"

static NSDictionary *properties(uint64_t nbytes) {
    NSNumber *size = [NSNumber numberWithUnsignedLongLong:nbytes];
    return @{
        (NSString *)kIOSurfaceWidth : size,
        (NSString *)kIOSurfaceHeight : @1,
        (NSString *)kIOSurfaceBytesPerElement : @1,
        (NSString *)kIOSurfaceBytesPerRow : size,
        (NSString *)kIOSurfaceAllocSize : size,
        (NSString *)kIOSurfacePixelFormat : @0,
    };
}

int32_t anepy_ane_surface_create(anepy_ane *ane, anepy_ane_surface **out, uint64_t nbytes) {
    static _Atomic uint64_t ids;
    ANEPY_TRY(anepy_ane_check(ane));
    anepy_ane_surface *surface = calloc(1, sizeof *surface);
    if (surface == NULL) return anepy_fail(ANEPY_E_MEMORY, "device ane: no memory for a surface");
    surface->ane = ane;
    surface->id = atomic_fetch_add(&ids, 1) + 1;
    surface->nbytes = nbytes;
    @autoreleasepool {
        surface->surface = IOSurfaceCreate((CFDictionaryRef)properties(surface->nbytes));
    }
    if (surface->surface == NULL || IOSurfaceGetAllocSize(surface->surface) < surface->nbytes) {
        anepy_ane_surface_free(surface);
        return anepy_fail(ANEPY_E_MEMORY, "device ane: the system gave no surface of %llu bytes",
                          (unsigned long long)nbytes);
    }
    *out = surface;
    return ANEPY_OK;
}

void anepy_ane_surface_free(anepy_ane_surface *surface) {
    if (surface == NULL || anepy_ane_forked(surface->ane)) return;
    if (surface->surface != NULL) CFRelease(surface->surface);
    free(surface);
}

/* Poisons the device: a step whose surface cannot be read or written cannot be finished. */
static int32_t broken(const anepy_ane_surface *surface, const char *what, kern_return_t error) {
    anepy_fail(ANEPY_E_DEVICE, "device ane: %s a surface failed: error 0x%x", what,
               (unsigned)error);
    anepy_ane_poison(surface->ane);
    return ANEPY_E_DEVICE;
}

static uint32_t lock_options(int32_t for_writing) {
    return for_writing ? 0 : kIOSurfaceLockReadOnly;
}

int32_t anepy_ane_surface_lock(anepy_ane_surface *surface, int32_t for_writing, void **data) {
    ANEPY_TRY(anepy_ane_check(surface->ane));
    if (!for_writing && atomic_load(&surface->stale))
        return anepy_fail(ANEPY_E_DEVICE, "device ane: the surface holds no result, because the "
                                          "program that writes it has failed");
    kern_return_t error = IOSurfaceLock(surface->surface, lock_options(for_writing), NULL);
    if (error != KERN_SUCCESS) return broken(surface, "locking", error);
    *data = IOSurfaceGetBaseAddress(surface->surface);
    if (*data == NULL) {
        anepy_ane_surface_unlock(surface, for_writing);
        return broken(surface, "finding the address of", KERN_SUCCESS);
    }
    if (for_writing) atomic_store(&surface->stale, 0);
    return ANEPY_OK;
}

int32_t anepy_ane_surface_unlock(anepy_ane_surface *surface, int32_t for_writing) {
    kern_return_t error = IOSurfaceUnlock(surface->surface, lock_options(for_writing), NULL);
    return error == KERN_SUCCESS ? ANEPY_OK : broken(surface, "unlocking", error);
}
