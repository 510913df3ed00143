/* device/ane/surface.h - the fields of a surface that programs use. Objective-C only. */
#ifndef ANEPY_DEVICE_ANE_SURFACE_H
#define ANEPY_DEVICE_ANE_SURFACE_H

#include "device/ane/framework.h"

struct anepy_ane_surface {
    anepy_ane *ane;
    IOSurfaceRef surface;
    uint64_t nbytes;
    uint64_t id;           /* never used twice in a process */
    _Atomic int32_t stale; /* 1: an evaluation is writing it, or failed to */
};

#endif
