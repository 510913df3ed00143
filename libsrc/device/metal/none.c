/* device/metal/none.c - stands for the GPU where there is no Metal. Its symbol is weak: metal.m,
 * compiled on macOS only, replaces it. */
#include "device/metal/metal.h"

static int32_t no_metal(void) {
    return anepy_fail(ANEPY_E_UNAVAILABLE, "this build has no Metal (it needs macOS)");
}

__attribute__((weak)) const anepy_metal_calls anepy_gpu = {.probe = no_metal};
