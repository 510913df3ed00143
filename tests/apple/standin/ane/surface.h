/* surface.h - what the stand-in engine sees of a surface. */
#ifndef STANDIN_SURFACE_H
#define STANDIN_SURFACE_H

#import <IOSurface/IOSurface.h>

void *standin_surface_memory(IOSurfaceRef surface, size_t *nbytes);
int standin_surface_locked(IOSurfaceRef surface);

#endif
