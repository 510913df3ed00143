/* device/sim/shape.c - element types and tensor types: names, sizes, equality, text. */
#include "device/sim/interpreter_internal.h"

#include <stdio.h>
#include <string.h>

static const struct {
    const char *name;
    uint64_t nbytes;
} TYPES[ANEPY_MIL_TYPE_N] = {
    [ANEPY_MIL_F16] = {"fp16", 2},  [ANEPY_MIL_F32] = {"fp32", 4},
    [ANEPY_MIL_I8] = {"int8", 1},   [ANEPY_MIL_U8] = {"uint8", 1},
    [ANEPY_MIL_I16] = {"int16", 2}, [ANEPY_MIL_U16] = {"uint16", 2},
    [ANEPY_MIL_I32] = {"int32", 4}, [ANEPY_MIL_U32] = {"uint32", 4},
    [ANEPY_MIL_I64] = {"int64", 8}, [ANEPY_MIL_U64] = {"uint64", 8},
    [ANEPY_MIL_BOOL] = {"bool", 1}, [ANEPY_MIL_STRING] = {"string", 0},
};

const char *anepy_mil_type_name(int32_t type) {
    return type >= 0 && type < ANEPY_MIL_TYPE_N ? TYPES[type].name : NULL;
}
const char *mil_type_name(anepy_mil_type type) { return TYPES[type].name; }
uint64_t mil_type_nbytes(anepy_mil_type type) { return TYPES[type].nbytes; }

int mil_span_is(mil_span span, const char *word) {
    return strlen(word) == (size_t)span.n && memcmp(span.p, word, (size_t)span.n) == 0;
}

int mil_type_find(mil_span name, anepy_mil_type *type) {
    for (int32_t i = 0; i < ANEPY_MIL_TYPE_N; i++) {
        if (mil_span_is(name, TYPES[i].name)) {
            *type = (anepy_mil_type)i;
            return 1;
        }
    }
    return 0;
}

int64_t mil_elements(const mil_shape *shape) {
    int64_t n = 1;
    for (int32_t i = 0; i < shape->rank; i++) {
        if (shape->dims[i] > MIL_MAX_EXTENT / n) return -1;
        n *= shape->dims[i];
    }
    return n;
}

const char *mil_shape_text(const mil_shape *shape, char *text, size_t cap) {
    int used = snprintf(text, cap, "tensor<%s, [", TYPES[shape->type].name);
    for (int32_t i = 0; i < shape->rank && used >= 0 && (size_t)used < cap; i++)
        used += snprintf(text + used, cap - (size_t)used, i > 0 ? ", %lld" : "%lld",
                         (long long)shape->dims[i]);
    if (used >= 0 && (size_t)used < cap) snprintf(text + used, cap - (size_t)used, "]>");
    return text;
}

int mil_shape_equal(const mil_shape *a, const mil_shape *b) {
    if (a->type != b->type || a->rank != b->rank) return 0;
    for (int32_t i = 0; i < a->rank; i++)
        if (a->dims[i] != b->dims[i]) return 0;
    return 1;
}
