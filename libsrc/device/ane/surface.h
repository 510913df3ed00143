/* device/ane/surface.h - what programs need to know of a surface. Objective-C only. */
#ifndef ANEPY_DEVICE_ANE_SURFACE_H
#define ANEPY_DEVICE_ANE_SURFACE_H

#include "device/ane/framework.h"

struct anepy_ane_surface {
    anepy_ane *ane;
    IOSurfaceRef surface;
    uint64_t nbytes;
    uint64_t id;           /* never used twice in a process */
    _Atomic int32_t stale; /* an evaluation writes it or has failed to */
};

#endif
