/* device/ane/none.c - the device's row in builds that cannot have it: it says why. */
#ifndef __APPLE__
#include "device/device.h"

static int32_t no_ane(void) {
    return anepy_fail(
        ANEPY_E_UNAVAILABLE,
        "device ane: this build has no Apple Neural Engine support (it needs macOS on "
        "Apple silicon); use --device cpu");
}

const anepy_device_type anepy_device_ane = {
    .name = "ane", .about = "Apple Neural Engine", .precisions = 1u << ANEPY_F16, .probe = no_ane};
#else
typedef int anepy_no_none; /* a translation unit must not be empty */
#endif
