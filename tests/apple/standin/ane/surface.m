/* surface.m - IOSurfaces for Linux: what the host sees of a surface is inaccessible while it is not
 * locked, so an access outside of a lock ends the test at once. The engine has a view of its own.
 */
#import <Foundation/Foundation.h>
#import <IOSurface/IOSurface.h>

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "control.h"
#include "surface.h"

#define MAGIC 0x10505ac3u

struct __IOSurface {
    uint32_t magic;
    int32_t users, readers, writers;
    size_t nbytes;
    void *host, *engine;
    pthread_mutex_t mutex;
};

#define KEY(name) const CFStringRef kIOSurface##name = (CFStringRef) @ #name
KEY(Width);
KEY(Height);
KEY(BytesPerElement);
KEY(BytesPerRow);
KEY(AllocSize);
KEY(PixelFormat);

static struct __IOSurface *check(CFTypeRef object) {
    struct __IOSurface *surface = (struct __IOSurface *)object;
    if (surface == NULL || surface->magic != MAGIC) abort();
    return surface;
}

static long long value(NSDictionary *properties, CFStringRef key) {
    return [[properties objectForKey:(NSString *)key] longLongValue];
}

IOSurfaceRef IOSurfaceCreate(CFDictionaryRef dictionary) {
    NSDictionary *properties = (NSDictionary *)dictionary;
    standin_fault_kind fault = standin_enter("IOSurfaceCreate");
    long long nbytes = value(properties, kIOSurfaceAllocSize);
    if (nbytes < 1 || value(properties, kIOSurfaceWidth) != nbytes ||
        value(properties, kIOSurfaceBytesPerRow) != nbytes ||
        value(properties, kIOSurfaceHeight) != 1 ||
        value(properties, kIOSurfaceBytesPerElement) != 1 ||
        [properties objectForKey:(NSString *)kIOSurfacePixelFormat] == nil)
        standin_break_rule("a surface is not one row of bytes");
    if (fault == STANDIN_NIL) return NULL;
    if (fault == STANDIN_LIE) nbytes /= 2;
    int file = memfd_create("surface", 0);
    IOSurfaceRef surface = calloc(1, sizeof *surface);
    if (file < 0 || surface == NULL || ftruncate(file, nbytes) != 0) abort();
    surface->host = mmap(NULL, (size_t)nbytes, PROT_NONE, MAP_SHARED, file, 0);
    surface->engine = mmap(NULL, (size_t)nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (surface->host == MAP_FAILED || surface->engine == MAP_FAILED) abort();
    surface->magic = MAGIC;
    surface->users = 1;
    surface->nbytes = (size_t)nbytes;
    pthread_mutex_init(&surface->mutex, NULL);
    standin_born();
    return surface;
}

CFTypeRef CFRetain(CFTypeRef object) {
    __atomic_add_fetch(&check(object)->users, 1, __ATOMIC_SEQ_CST);
    return object;
}

void CFRelease(CFTypeRef object) {
    struct __IOSurface *surface = check(object);
    if (__atomic_sub_fetch(&surface->users, 1, __ATOMIC_SEQ_CST) != 0) return;
    if (surface->readers + surface->writers > 0)
        standin_break_rule("a surface was given back while it was locked");
    munmap(surface->host, surface->nbytes);
    munmap(surface->engine, surface->nbytes);
    pthread_mutex_destroy(&surface->mutex);
    surface->magic = 0;
    free(surface);
    standin_dead();
}

size_t IOSurfaceGetAllocSize(IOSurfaceRef surface) { return check(surface)->nbytes; }

void *IOSurfaceGetBaseAddress(IOSurfaceRef surface) {
    if (standin_enter("IOSurfaceGetBaseAddress") == STANDIN_NIL) return NULL;
    return check(surface)->host;
}

static void protect(IOSurfaceRef surface) {
    int access = surface->writers > 0   ? PROT_READ | PROT_WRITE
                 : surface->readers > 0 ? PROT_READ
                                        : PROT_NONE;
    if (mprotect(surface->host, surface->nbytes, access) != 0) abort();
}

kern_return_t IOSurfaceLock(IOSurfaceRef surface, uint32_t options, uint32_t *seed) {
    (void)seed;
    if (standin_enter("IOSurfaceLock") == STANDIN_REFUSE) return 0x2c2;
    pthread_mutex_lock(&check(surface)->mutex);
    *(options & kIOSurfaceLockReadOnly ? &surface->readers : &surface->writers) += 1;
    protect(surface);
    pthread_mutex_unlock(&surface->mutex);
    return KERN_SUCCESS;
}

kern_return_t IOSurfaceUnlock(IOSurfaceRef surface, uint32_t options, uint32_t *seed) {
    (void)seed;
    standin_fault_kind fault = standin_enter("IOSurfaceUnlock");
    pthread_mutex_lock(&check(surface)->mutex);
    int32_t *count = options & kIOSurfaceLockReadOnly ? &surface->readers : &surface->writers;
    if (*count < 1) standin_break_rule("a surface was unlocked in another way than locked");
    else *count -= 1;
    protect(surface);
    pthread_mutex_unlock(&surface->mutex);
    return fault == STANDIN_REFUSE ? 0x2c2 : KERN_SUCCESS;
}

void *standin_surface_memory(IOSurfaceRef surface, size_t *nbytes) {
    *nbytes = check(surface)->nbytes;
    return surface->engine;
}

int standin_surface_locked(IOSurfaceRef surface) {
    pthread_mutex_lock(&check(surface)->mutex);
    int locked = surface->readers + surface->writers > 0;
    pthread_mutex_unlock(&surface->mutex);
    return locked;
}
