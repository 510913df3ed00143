/* train/switches.c - names to bits. */
#include "train/switches.h"

#include <stdio.h>
#include <string.h>

#include "device/metal/metal.h"

#define BIT(s) (1u << (s))

/* needs: the device capability without which the switch means nothing; 0: host work. */
static const struct {
    const char *name;
    uint32_t needs;
} SWITCHES[ANEPY_SWITCH_N] = {
    [ANEPY_SIMD_ADAM] = {"simd_adam", 0},
    [ANEPY_FP16_CACHE] = {"fp16_cache", 0},
    [ANEPY_PREALLOC] = {"prealloc", 0},
    [ANEPY_CONCURRENT_DW] = {"concurrent_dw", 0},
    [ANEPY_SKIP_DEAD_READS] = {"skip_dead_reads", 0},
    [ANEPY_VECTOR_EMBED] = {"vector_embed", 0},
    [ANEPY_METAL_DW] = {"metal_dw", 0},
    [ANEPY_OFFLOAD_RMSNORM] = {"offload_rmsnorm", ANEPY_OFFLOADS},
    [ANEPY_OFFLOAD_CLASSIFIER] = {"offload_classifier", ANEPY_OFFLOADS},
    [ANEPY_OFFLOAD_SOFTMAX] = {"offload_softmax", ANEPY_OFFLOADS},
    [ANEPY_DYNAMIC_WEIGHTS] = {"dynamic_weights", ANEPY_DYNAMIC},
    [ANEPY_BACKGROUND_COMPILE] = {"background_compile", ANEPY_COMPILES_BESIDE},
    [ANEPY_OFFLOAD_DW] = {"offload_dw", ANEPY_FUSES},
    [ANEPY_FUSED_LAYER] = {"fused_layer", ANEPY_FUSES},
};

#define OPT                                                                                        \
    (BIT(ANEPY_SIMD_ADAM) | BIT(ANEPY_FP16_CACHE) | BIT(ANEPY_PREALLOC) |                          \
     BIT(ANEPY_CONCURRENT_DW) | BIT(ANEPY_SKIP_DEAD_READS) | BIT(ANEPY_VECTOR_EMBED))
#define OFFLOADS                                                                                   \
    (BIT(ANEPY_OFFLOAD_RMSNORM) | BIT(ANEPY_OFFLOAD_CLASSIFIER) | BIT(ANEPY_OFFLOAD_SOFTMAX))

/* best_effort: takes those of its switches that help on the device. */
static const struct {
    const char *name;
    uint32_t switches;
    int best_effort;
} VARIANTS[] = {
    {"baseline", 0, 0},
    {"opt", OPT, 0},
    {"ane", OFFLOADS, 0},
    {"dynamic", BIT(ANEPY_DYNAMIC_WEIGHTS), 0},
    {"double-buffer", BIT(ANEPY_BACKGROUND_COMPILE), 0},
    {"resident",
     OFFLOADS | BIT(ANEPY_DYNAMIC_WEIGHTS) | BIT(ANEPY_OFFLOAD_DW) | BIT(ANEPY_FUSED_LAYER), 0},
    {"max", OPT | OFFLOADS, 1},
};
#define VARIANT_N ((int32_t)(sizeof VARIANTS / sizeof VARIANTS[0]))

const char *anepy_switch_name(int32_t index) {
    return index >= 0 && index < ANEPY_SWITCH_N ? SWITCHES[index].name : NULL;
}

const char *anepy_variant_name(int32_t index) {
    return index >= 0 && index < VARIANT_N ? VARIANTS[index].name : NULL;
}

static int same(const char *name, const char *text, size_t n) {
    return strlen(name) == n && memcmp(name, text, n) == 0;
}

/* Writes "a, b, c" of the names that name(0), name(1), ... return, up to NULL. */
static void join(char *out, size_t cap, const char *(*name)(int32_t)) {
    size_t n = 0;
    out[0] = '\0';
    for (int32_t i = 0; name(i) != NULL && n < cap; i++)
        n += (size_t)snprintf(out + n, cap - n, "%s%s", i > 0 ? ", " : "", name(i));
}

/* Finds text[0..n) among the names; -1 with an error sentence that lists them. */
static int32_t find(const char *kind, const char *text, size_t n, const char *(*name)(int32_t)) {
    for (int32_t i = 0; name(i) != NULL; i++)
        if (same(name(i), text, n)) return i;
    char known[256];
    join(known, sizeof known, name);
    anepy_fail(ANEPY_E_NAME, "unknown %s '%.*s': use one of %s", kind, (int)(n < 40 ? n : 40), text,
               known);
    return -1;
}

/* metal_dw depends on the machine, not on the device. */
static int32_t need_gpu(const char *text) {
    char reason[240];
    if (anepy_gpu.probe() == ANEPY_OK) return ANEPY_OK;
    anepy_last_error(reason, sizeof reason);
    return anepy_fail(ANEPY_E_UNSUPPORTED,
                      "variant '%s': switch metal_dw cannot be used: %s; leave it out", text,
                      reason);
}

/* The soft-max alone is one program whatever the vocabulary: its groups reach across all of it. */
static int fits(int32_t index, const anepy_device_type *device, const anepy_model *model) {
    return index != ANEPY_OFFLOAD_SOFTMAX || model == NULL || device->channels == 0 ||
           model->config.vocab_size <= device->channels;
}

int32_t anepy_switches_parse(const char *text, const anepy_device_type *device,
                             const anepy_model *model, uint32_t *out) {
    uint32_t known = 0, helpful = 0, switches;
    for (int32_t i = 0; i < ANEPY_SWITCH_N; i++) {
        if ((device->capabilities & SWITCHES[i].needs) != SWITCHES[i].needs) continue;
        known |= BIT(i);
        if ((device->slow & SWITCHES[i].needs) == 0 && fits(i, device, model)) helpful |= BIT(i);
    }
    if (text == NULL) text = "max";
    size_t n = 0;
    int32_t variant = -1;
    /* A minus may belong to the name (double-buffer), so names are tried; a sign or the end (which
     * strchr finds too) must follow. */
    for (int32_t i = 0; i < VARIANT_N; i++) {
        size_t length = strlen(VARIANTS[i].name);
        if (strncmp(text, VARIANTS[i].name, length) == 0 && strchr("+-", text[length]) != NULL) {
            variant = i;
            n = length;
        }
    }
    if (variant < 0) {
        find("variant", text, strcspn(text, "+"), anepy_variant_name);
        return ANEPY_E_NAME;
    }
    switches = VARIANTS[variant].switches & (VARIANTS[variant].best_effort ? helpful : ~0u);
    for (const char *rest = text + n; *rest != '\0'; rest += n) {
        char sign = *rest++;
        n = strcspn(rest, "+-");
        int32_t i = find("switch", rest, n, anepy_switch_name);
        if (i < 0) return ANEPY_E_NAME;
        if (sign == '+') switches |= BIT(i);
        else switches &= ~BIT(i);
    }
    for (int32_t i = 0; i < ANEPY_SWITCH_N; i++) {
        if ((switches & BIT(i)) == 0) continue;
        if ((known & BIT(i)) == 0)
            return anepy_fail(ANEPY_E_UNSUPPORTED,
                              "variant '%s': switch %s means nothing on device %s; leave it out or "
                              "choose another device",
                              text, SWITCHES[i].name, device->name);
        if (!fits(i, device, model))
            return anepy_fail(ANEPY_E_UNSUPPORTED,
                              "variant '%s': switch %s takes a vocabulary of up to %d on device "
                              "%s, the model has %d; leave it out",
                              text, SWITCHES[i].name, device->channels, device->name,
                              model->config.vocab_size);
    }
    if (switches & BIT(ANEPY_METAL_DW)) ANEPY_TRY(need_gpu(text));
    *out = switches;
    return ANEPY_OK;
}

int32_t anepy_variant_parse(const char *text, const char *device, const anepy_model *model,
                            uint32_t *switches) {
    const anepy_device_type *type = anepy_device_find(device, NULL);
    return type != NULL ? anepy_switches_parse(text, type, model, switches) : ANEPY_E_NAME;
}
