/* train/switches.h - the switch table and the named variants (docs/compare.md#variants). */
#ifndef ANEPY_TRAIN_SWITCHES_H
#define ANEPY_TRAIN_SWITCHES_H

#include "device/device.h"

typedef enum {
    ANEPY_SIMD_ADAM,
    ANEPY_FP16_CACHE,
    ANEPY_PREALLOC,
    ANEPY_CONCURRENT_DW,
    ANEPY_SKIP_DEAD_READS,
    ANEPY_VECTOR_EMBED,
    ANEPY_METAL_DW,
    ANEPY_OFFLOAD_RMSNORM,
    ANEPY_OFFLOAD_CLASSIFIER,
    ANEPY_OFFLOAD_SOFTMAX,
    ANEPY_DYNAMIC_WEIGHTS,
    ANEPY_BACKGROUND_COMPILE,
    ANEPY_OFFLOAD_DW,
    ANEPY_FUSED_LAYER,
    ANEPY_SWITCH_N
} anepy_switch;

/* NAME, then any number of +switch or -switch. Fails if a name is unknown, a switch means nothing
 * on the device, or its programs are too large there for the model (NULL: any); "max" leaves that
 * switch out. text NULL: "max". */
int32_t anepy_switches_parse(const char *text, const anepy_device_type *device,
                             const anepy_model *model, uint32_t *out);

#endif
