/* programs/mil_text.c - MIL syntax: one operation per line, constants declared where first used. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "programs/mil_writer.h"
#include "runtime/half.h"

int32_t anepy_emit_fail(mil_writer *w, int32_t status, const char *format, ...) {
    if (w->status != ANEPY_OK) return w->status;
    char why[256];
    va_list args;
    va_start(args, format);
    vsnprintf(why, sizeof why, format, args);
    va_end(args);
    w->status =
        anepy_fail(status, "program %s: %s", w->program != NULL ? w->program->name : "?", why);
    return w->status;
}

/* ---------------------------------------------------------------------------------------- text */

static void ANEPY_PRINTF(2, 3) put(mil_writer *w, const char *format, ...) {
    if (w->status != ANEPY_OK) return;
    anepy_mil_source *out = w->out;
    for (;;) {
        uint64_t room = w->capacity - out->n;
        va_list args;
        va_start(args, format);
        int n = vsnprintf(out->text != NULL ? out->text + out->n : NULL, room, format, args);
        va_end(args);
        if (n < 0) {
            anepy_emit_fail(w, ANEPY_E_SYSTEM, "the text cannot be formatted");
            return;
        }
        if ((uint64_t)n < room) {
            out->n += (uint64_t)n;
            return;
        }
        uint64_t capacity = 2 * w->capacity + (uint64_t)n + 4096;
        char *text = realloc(out->text, capacity);
        if (text == NULL) {
            anepy_emit_fail(w, ANEPY_E_MEMORY, "no memory for its text");
            return;
        }
        out->text = text;
        w->capacity = capacity;
    }
}

/* A scalar type in the dialect; followed by a value in parentheses it is a scalar. */
static const char *scalar(const mil_writer *w, const char *type) {
    static const char *const NAMES[][3] = {
        {"string", "string", "tensor<string, []>"}, {"int32", "int32", "tensor<int32, []>"},
        {"bool", "bool", "tensor<bool, []>"},       {"fp16", "fp16", "tensor<fp16, []>"},
        {"uint64", "uint64", "tensor<uint64, []>"},
    };
    for (size_t i = 0; i < sizeof NAMES / sizeof NAMES[0]; i++)
        if (strcmp(type, NAMES[i][0]) == 0) return NAMES[i][w->dialect == ANEPY_DIALECT_10 ? 2 : 1];
    return type;
}

void anepy_emit_begin_program(mil_writer *w) {
    int old = w->dialect == ANEPY_DIALECT_10;
    const char *text = old ? "tensor<string, []>" : "string";
    put(w, "program(1.%d)\n", old ? 0 : 3);
    put(w, "[buildInfo = dict<%s, %s>({{\"coremlc-component-MIL\", \"3510.2.1\"}, ", text, text);
    put(w, "{\"coremlc-version\", \"3505.4.1\"}, {\"coremltools-component-milinternal\", \"\"}, ");
    put(w, "{\"coremltools-version\", \"9.0\"}})]\n{\n");
}

void anepy_emit_end_program(mil_writer *w) { put(w, "}\n"); }

static void put_type(mil_writer *w, const int32_t d[4]) {
    put(w, "tensor<fp16, [%d, %d, %d, %d]>", d[0], d[1], d[2], d[3]);
}

void anepy_emit_begin_function(mil_writer *w, const char *name) {
    put(w, "    func %s<%s>(", name, w->dialect == ANEPY_DIALECT_10 ? "ios16" : "ios18");
    for (int32_t i = 0; i < w->program->surface_n; i++) {
        if (i > 0) put(w, ", ");
        put_type(w, w->surfaces[i].dims);
        put(w, " %s", w->surfaces[i].name);
    }
    for (int32_t i = 0; i < w->program->weight_n; i++) {
        if (!anepy_program_passes(w->program, i)) continue;
        put(w, ", ");
        put_type(w, w->parameters[i].dims);
        put(w, " %s", w->parameters[i].name);
    }
    put(w, ") {\n");
    w->counter = 0;
    w->constant_n = 0;
}

void anepy_emit_end_function(mil_writer *w) { put(w, "    } -> (z_out);\n"); }

/* ----------------------------------------------------------------------------------- constants */

/* The name of the constant `type(value)`; declares it if it is new to this function. */
static const char *constant(mil_writer *w, const char *type, const char *value) {
    char text[sizeof w->constants[0].text];
    if (w->status != ANEPY_OK) return "";
    snprintf(text, sizeof text, "%s(%s)", scalar(w, type), value);
    for (int32_t i = 0; i < w->constant_n; i++)
        if (strcmp(w->constants[i].text, text) == 0) return w->constants[i].name;
    if (w->constant_n == MIL_CONSTANTS) {
        anepy_emit_fail(w, ANEPY_E_UNSUPPORTED, "more than %d constants", MIL_CONSTANTS);
        return "";
    }
    mil_constant *c = &w->constants[w->constant_n++];
    memcpy(c->text, text, sizeof text);
    snprintf(c->name, sizeof c->name, "c%02d", w->constant_n);
    put(w, "        %s %s = const()[name = %s(\"%s\"), val = %s];\n", scalar(w, type), c->name,
        scalar(w, "string"), c->name, text);
    return c->name;
}

static const char *integer(mil_writer *w, int32_t value) {
    char text[16];
    snprintf(text, sizeof text, "%d", value);
    return constant(w, "int32", text);
}

static const char *integers(mil_writer *w, int32_t n, const int32_t v[4]) {
    char type[32], text[64];
    snprintf(type, sizeof type, "tensor<int32, [%d]>", n);
    if (n == 2) snprintf(text, sizeof text, "[%d, %d]", v[0], v[1]);
    else snprintf(text, sizeof text, "[%d, %d, %d, %d]", v[0], v[1], v[2], v[3]);
    return constant(w, type, text);
}

static const char *boolean(mil_writer *w, int value) {
    return constant(w, "bool", value ? "true" : "false");
}

/* printf's %a would use the caller's locale, and its first digit differs between systems. */
static const char *half(mil_writer *w, double value) {
    uint16_t bits = anepy_to_half((float)value);
    uint32_t exponent = bits >> 10 & 31, mantissa = (uint32_t)(bits & 0x3ff) << 2;
    char text[24], digits[8] = "";
    if (exponent == 0 || exponent == 31) {
        anepy_emit_fail(w, ANEPY_E_UNSUPPORTED, "the constant %g is not a normal fp16 number",
                        value);
        return "";
    }
    if (mantissa != 0) {
        int n = 3;
        for (; mantissa % 16 == 0; n--) mantissa /= 16;
        snprintf(digits, sizeof digits, ".%0*x", n, mantissa);
    }
    snprintf(text, sizeof text, "%s0x1%sp%+d", bits >> 15 ? "-" : "", digits, (int)exponent - 15);
    return constant(w, "fp16", text);
}

/* ---------------------------------------------------------------------------------- operations */

/* A tensor for the result of the next operation; fails if its shape exceeds what every chip takes.
 */
static mil_tensor result(mil_writer *w, const int32_t dims[4], const char *hint) {
    mil_tensor t;
    memcpy(t.dims, dims, sizeof t.dims);
    if (strcmp(hint, "z_out") == 0) snprintf(t.name, sizeof t.name, "z_out");
    else snprintf(t.name, sizeof t.name, "v%02d_%.16s", ++w->counter % 10000, hint);
    if (dims[1] > ANEPY_MIL_LARGEST_CHANNELS)
        anepy_emit_fail(w, ANEPY_E_UNSUPPORTED, "%s has %d channels, the ANE takes at most %d",
                        hint, dims[1], ANEPY_MIL_LARGEST_CHANNELS);
    for (int32_t i = 2; i < 4; i++)
        if (dims[i] > ANEPY_MIL_LARGEST_EXTENT)
            anepy_emit_fail(w, ANEPY_E_UNSUPPORTED,
                            "%s is [%d, %d, %d, %d], but an extent above %d works on no M1 to M3",
                            hint, dims[0], dims[1], dims[2], dims[3], ANEPY_MIL_LARGEST_EXTENT);
    return t;
}

static void ANEPY_PRINTF(4, 5)
    operation(mil_writer *w, const mil_tensor *t, const char *op, const char *format, ...) {
    char arguments[512];
    va_list args;
    va_start(args, format);
    vsnprintf(arguments, sizeof arguments, format, args);
    va_end(args);
    put(w, "        ");
    put_type(w, t->dims);
    put(w, " %s = %s(%s)[name = %s(\"%s\")];\n", t->name, op, arguments, scalar(w, "string"),
        t->name);
}

mil_tensor anepy_emit_slice(mil_writer *w, mil_tensor x, int32_t channel, int32_t channels,
                            const char *hint) {
    if (channel == 0 && channels == x.dims[1]) return x;
    int32_t begin[4] = {0, channel, 0, 0}, size[4] = {1, channels, x.dims[2], x.dims[3]};
    const char *from = integers(w, 4, begin), *extent = integers(w, 4, size);
    mil_tensor t = result(w, size, hint);
    operation(w, &t, "slice_by_size", "begin = %s, size = %s, x = %s", from, extent, x.name);
    return t;
}

mil_tensor anepy_emit_concat(mil_writer *w, const mil_tensor *x, int32_t n, const char *hint) {
    char values[512] = "";
    int32_t dims[4] = {1, 0, x[0].dims[2], x[0].dims[3]};
    for (int32_t i = 0; i < n; i++) {
        size_t used = strlen(values);
        snprintf(values + used, sizeof values - used, "%s%s", i > 0 ? ", " : "", x[i].name);
        dims[1] += x[i].dims[1];
    }
    if (strlen(values) + 1 == sizeof values)
        anepy_emit_fail(w, ANEPY_E_UNSUPPORTED, "too many tensors to concatenate");
    const char *axis = integer(w, 1), *interleave = boolean(w, 0);
    mil_tensor t = result(w, dims, hint);
    operation(w, &t, "concat", "axis = %s, interleave = %s, values = (%s)", axis, interleave,
              values);
    return t;
}

mil_tensor anepy_emit_reshape(mil_writer *w, mil_tensor x, int32_t c, int32_t h, int32_t width,
                              const char *hint) {
    int32_t dims[4] = {1, c, h, width};
    if (memcmp(dims, x.dims, sizeof dims) == 0) return x;
    const char *shape = integers(w, 4, dims);
    mil_tensor t = result(w, dims, hint);
    operation(w, &t, "reshape", "shape = %s, x = %s", shape, x.name);
    return t;
}

mil_tensor anepy_emit_swap_last(mil_writer *w, mil_tensor x, const char *hint) {
    static const int32_t PERM[4] = {0, 1, 3, 2};
    int32_t dims[4] = {x.dims[0], x.dims[1], x.dims[3], x.dims[2]};
    const char *perm = integers(w, 4, PERM);
    mil_tensor t = result(w, dims, hint);
    operation(w, &t, "transpose", "perm = %s, x = %s", perm, x.name);
    return t;
}

static void check_contraction(mil_writer *w, int32_t extent, const char *hint) {
    if (extent > ANEPY_MIL_LARGEST_EXTENT)
        anepy_emit_fail(w, ANEPY_E_UNSUPPORTED, "%s sums over %d terms, M1 to M3 take at most %d",
                        hint, extent, ANEPY_MIL_LARGEST_EXTENT);
}

mil_tensor anepy_emit_conv(mil_writer *w, mil_tensor weight, mil_tensor x, const char *hint) {
    static const int32_t ONES[4] = {1, 1}, NONE[4] = {0, 0, 0, 0};
    int32_t dims[4] = {1, weight.dims[0], x.dims[2], x.dims[3]};
    check_contraction(w, weight.dims[1], hint);
    const char *dilations = integers(w, 2, ONES), *groups = integer(w, 1);
    const char *pad = integers(w, 4, NONE), *pad_type = constant(w, "string", "\"valid\"");
    mil_tensor t = result(w, dims, hint);
    operation(w, &t, "conv",
              "dilations = %s, groups = %s, pad = %s, pad_type = %s, strides = %s, weight = %s, "
              "x = %s",
              dilations, groups, pad, pad_type, dilations, weight.name, x.name);
    return t;
}

mil_tensor anepy_emit_matmul(mil_writer *w, mil_tensor x, int transpose_x, mil_tensor y,
                             int transpose_y, const char *hint) {
    int32_t dims[4] = {1, x.dims[1], x.dims[transpose_x ? 3 : 2], y.dims[transpose_y ? 2 : 3]};
    check_contraction(w, x.dims[transpose_x ? 2 : 3], hint);
    const char *tx = boolean(w, transpose_x), *ty = boolean(w, transpose_y);
    mil_tensor t = result(w, dims, hint);
    operation(w, &t, "matmul", "transpose_x = %s, transpose_y = %s, x = %s, y = %s", tx, ty, x.name,
              y.name);
    return t;
}

mil_tensor anepy_emit_binary(mil_writer *w, const char *op, mil_tensor x, mil_tensor y,
                             const char *hint) {
    int32_t dims[4];
    for (int32_t i = 0; i < 4; i++) dims[i] = anepy_max_i32(x.dims[i], y.dims[i]);
    mil_tensor t = result(w, dims, hint);
    operation(w, &t, op, "x = %s, y = %s", x.name, y.name);
    return t;
}

mil_tensor anepy_emit_with_scalar(mil_writer *w, const char *op, mil_tensor x, double value,
                                  const char *hint) {
    const char *scalar_name = half(w, value);
    mil_tensor t = result(w, x.dims, hint);
    operation(w, &t, op, "x = %s, y = %s", x.name, scalar_name);
    return t;
}

mil_tensor anepy_emit_scalar_with(mil_writer *w, const char *op, double value, mil_tensor x,
                                  const char *hint) {
    const char *scalar_name = half(w, value);
    mil_tensor t = result(w, x.dims, hint);
    operation(w, &t, op, "x = %s, y = %s", scalar_name, x.name);
    return t;
}

mil_tensor anepy_emit_tanh(mil_writer *w, mil_tensor x, const char *hint) {
    mil_tensor t = result(w, x.dims, hint);
    operation(w, &t, "tanh", "x = %s", x.name);
    return t;
}

mil_tensor anepy_emit_softmax(mil_writer *w, mil_tensor x, int32_t axis, const char *hint) {
    const char *which = integer(w, axis);
    mil_tensor t = result(w, x.dims, hint);
    operation(w, &t, "softmax", "axis = %s, x = %s", which, x.name);
    return t;
}

mil_tensor anepy_emit_declare_blob(mil_writer *w, const int32_t dims[4], uint64_t offset,
                                   const char *hint) {
    mil_tensor t = result(w, dims, hint);
    t.name[0] = 'k'; /* names of constants begin with k */
    put(w, "        ");
    put_type(w, dims);
    put(w, " %s = const()[name = %s(\"%s\"), val = ", t.name, scalar(w, "string"), t.name);
    put_type(w, dims);
    put(w, "(BLOBFILE(path = %s(\"" ANEPY_MIL_WEIGHT_FILE "\"), offset = %s(%llu)))];\n",
        scalar(w, "string"), scalar(w, "uint64"), (unsigned long long)offset);
    return t;
}
