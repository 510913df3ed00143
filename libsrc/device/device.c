/* device/device.c - the device table, and functions for all devices. */
#include "device/device.h"

#include <stdio.h>
#include <string.h>

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
    /* With "auto" the last probe has left its reason as error sentence. */
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

#define MOVE_ROWS 128 /* channels in a piece of a conversion */

/* First element of a channel of a locked surface. */
static void *channel_data(anepy_surface *surface, int32_t channel) {
    return (char *)surface->data + anepy_dtype_nbytes(surface->dtype) * channel * surface->width;
}

/* A conversion of float32 rows of the host to or from channels of a surface. */
typedef struct {
    const anepy_surface *surface;
    void *inside;
    float *host;
    int32_t count, writing;
} move;

static void move_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const move *m = context;
    const anepy_kernels *kernels = m->surface->device->options.gemm->kernels;
    int64_t first = (int64_t)index * MOVE_ROWS * m->surface->width;
    int64_t n = (int64_t)anepy_min_i32(MOVE_ROWS, m->count - index * MOVE_ROWS) * m->surface->width;
    void *inside = (char *)m->inside + first * anepy_dtype_nbytes(m->surface->dtype);
    float *host = m->host + first;
    if (m->surface->dtype == ANEPY_F32)
        memcpy(m->writing ? inside : host, m->writing ? host : inside, (size_t)n * sizeof(float));
    else if (m->surface->dtype == ANEPY_BF16 && m->writing) kernels->bf16->to_bf16(inside, host, n);
    else if (m->surface->dtype == ANEPY_BF16) kernels->from_bf16(host, inside, n);
    else if (m->writing) kernels->to_half(inside, host, n);
    else kernels->from_half(host, inside, n);
}

static int32_t move_channels(anepy_surface *surface, int32_t channel, move m) {
    anepy_device *device = surface->device;
    ANEPY_TRY(device->ops->lock(surface, m.writing));
    m.surface = surface;
    m.inside = channel_data(surface, channel);
    device->moved += anepy_surface_nbytes(surface, m.count);
    anepy_pool_run(device->options.gemm->pool, anepy_pieces(m.count, MOVE_ROWS), move_rows, &m);
    return device->ops->unlock(surface, m.writing);
}

int32_t anepy_surface_read(anepy_surface *surface, int32_t channel, int32_t count, float *dst) {
    return move_channels(surface, channel, (move){.host = dst, .count = count});
}

int32_t anepy_surface_write(anepy_surface *surface, int32_t channel, int32_t count,
                            const float *src) {
    return move_channels(surface, channel,
                         (move){.host = (float *)src, .count = count, .writing = 1});
}

int32_t anepy_surface_copy(anepy_surface *dst, int32_t dst_channel, anepy_surface *src,
                           int32_t src_channel, int32_t count) {
    const anepy_device_ops *ops = dst->device->ops;
    ANEPY_TRY(ops->lock(src, 0));
    ANEPY_TRY(ops->lock(dst, 1));
    dst->device->moved += anepy_surface_nbytes(dst, count);
    memcpy(channel_data(dst, dst_channel), channel_data(src, src_channel),
           (size_t)anepy_surface_nbytes(dst, count));
    ANEPY_TRY(ops->unlock(dst, 1));
    return ops->unlock(src, 0);
}
