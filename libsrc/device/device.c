/* device/device.c - the device table, and what all devices have in common. */
#include "device/device.h"

#include <stdio.h>
#include <string.h>

static int32_t no_ane(void) {
    return anepy_fail(
        ANEPY_E_UNAVAILABLE,
        "device ane: this build has no Apple Neural Engine support (it needs macOS on "
        "Apple silicon); use --device cpu");
}

static const anepy_device_type anepy_device_ane = {
    .name = "ane", .about = "Apple Neural Engine", .precisions = 1u << ANEPY_F16, .probe = no_ane};

/* In the order "auto" tries them. */
static const anepy_device_type *const DEVICES[] = {&anepy_device_ane, &anepy_device_cpu,
                                                   &anepy_device_sim};
#define DEVICE_N ((int32_t)(sizeof DEVICES / sizeof DEVICES[0]))

const anepy_device_type *anepy_device_find(const char *name, const char **detail) {
    char known[64] = "auto";
    int automatic = name == NULL || strcmp(name, "auto") == 0;
    size_t length = automatic ? 0 : strcspn(name, ":");
    if (detail != NULL) *detail = !automatic && name[length] == ':' ? name + length + 1 : NULL;
    for (int32_t i = 0; i < DEVICE_N; i++) {
        const char *candidate = DEVICES[i]->name;
        if (automatic ? DEVICES[i]->probe() == ANEPY_OK
                      : strlen(candidate) == length && memcmp(name, candidate, length) == 0)
            return DEVICES[i];
        snprintf(known + strlen(known), sizeof known - strlen(known), ", %s", candidate);
    }
    /* With "auto" the device probed last has said why not. */
    if (!automatic) anepy_fail(ANEPY_E_NAME, "unknown device '%s': use one of %s", name, known);
    return NULL;
}

int32_t anepy_device_get_info(int32_t index, anepy_device_info *out) {
    if (index < 0 || index >= DEVICE_N)
        return anepy_fail(ANEPY_E_ARGUMENT, "device %d of %d", index, DEVICE_N);
    uint32_t size = out->struct_size;
    memset(out, 0, sizeof *out);
    out->struct_size = size;
    out->usable = DEVICES[index]->probe() == ANEPY_OK;
    snprintf(out->name, sizeof out->name, "%s", DEVICES[index]->name);
    if (out->usable) snprintf(out->reason, sizeof out->reason, "%s", DEVICES[index]->about);
    else anepy_last_error(out->reason, sizeof out->reason);
    return ANEPY_OK;
}

static size_t element_size(anepy_dtype dtype) { return dtype == ANEPY_F32 ? 4 : 2; }

/* Where a channel begins; the surface is locked. */
static void *channel_data(anepy_surface *surface, int32_t channel) {
    size_t row = (size_t)surface->width * element_size(surface->dtype);
    return (char *)surface->data + (size_t)channel * row;
}

int32_t anepy_surface_read(anepy_surface *surface, int32_t channel, int32_t count, float *dst) {
    const anepy_device_ops *ops = surface->device->ops;
    int64_t n = (int64_t)count * surface->width;
    ANEPY_TRY(ops->lock(surface, 0));
    const void *src = channel_data(surface, channel);
    if (surface->dtype == ANEPY_F16) surface->device->options.gemm->kernels->from_half(dst, src, n);
    else memcpy(dst, src, (size_t)n * sizeof(float));
    return ops->unlock(surface, 0);
}

int32_t anepy_surface_write(anepy_surface *surface, int32_t channel, int32_t count,
                            const float *src) {
    const anepy_device_ops *ops = surface->device->ops;
    int64_t n = (int64_t)count * surface->width;
    ANEPY_TRY(ops->lock(surface, 1));
    void *dst = channel_data(surface, channel);
    if (surface->dtype == ANEPY_F16) surface->device->options.gemm->kernels->to_half(dst, src, n);
    else memcpy(dst, src, (size_t)n * sizeof(float));
    return ops->unlock(surface, 1);
}

int32_t anepy_surface_copy(anepy_surface *dst, int32_t dst_channel, anepy_surface *src,
                           int32_t src_channel, int32_t count) {
    const anepy_device_ops *ops = dst->device->ops;
    ANEPY_TRY(ops->lock(src, 0));
    ANEPY_TRY(ops->lock(dst, 1));
    memcpy(channel_data(dst, dst_channel), channel_data(src, src_channel),
           (size_t)count * (size_t)dst->width * element_size(dst->dtype));
    ANEPY_TRY(ops->unlock(dst, 1));
    return ops->unlock(src, 0);
}
