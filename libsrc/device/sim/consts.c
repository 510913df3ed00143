/* device/sim/consts.c - types, literals and constants: reading them and decoding their elements. */
#include "device/sim/interpreter_internal.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "programs/blob.h"
#include "runtime/half.h"

int32_t mil_advance(mil_build *b) { return mil_next_token(b->mil, &b->lexer, &b->token); }

int mil_at_mark(const mil_build *b, char mark) {
    return b->token.kind == MIL_MARK && *b->token.at.p == mark;
}

/* Marks are one character; "->" and words are compared as text. */
int32_t mil_expect(mil_build *b, const char *mark, mil_span *at) {
    if (b->token.kind == MIL_QUOTED || b->token.kind == MIL_EOF || !mil_span_is(b->token.at, mark))
        return mil_error(b->mil, b->token.at, "expected '%s' here", mark);
    if (at != NULL) *at = b->token.at;
    return mil_advance(b);
}

mil_value *mil_new_value(mil_build *b, mil_kind kind, mil_span at) {
    mil_value *v = mil_alloc(b->mil, sizeof *v);
    char *name = mil_alloc(b->mil, (uint64_t)at.n + 1);
    if (v == NULL || name == NULL) {
        mil_no_memory(b->mil, at);
        return NULL;
    }
    memcpy(name, at.p, (size_t)at.n);
    v->name = name;
    v->at = v->type_at = at;
    v->kind = kind;
    return v;
}

/* -------------------------------------------------------------------------------------- types */

static int32_t parse_dims(mil_build *b, mil_shape *shape) {
    ANEPY_TRY(mil_expect(b, "[", NULL));
    while (!mil_at_mark(b, ']')) {
        int64_t extent;
        if (shape->rank > 0) ANEPY_TRY(mil_expect(b, ",", NULL));
        if (b->token.kind != MIL_NUMBER || !mil_parse_int(b->token.at, &extent) || extent < 1 ||
            extent > MIL_MAX_EXTENT)
            return mil_error(b->mil, b->token.at, "an extent must be a whole number from 1 to %lld",
                             (long long)MIL_MAX_EXTENT);
        if (shape->rank == MIL_RANK)
            return mil_error(b->mil, b->token.at, "a tensor has at most %d dimensions", MIL_RANK);
        shape->dims[shape->rank++] = extent;
        ANEPY_TRY(mil_advance(b));
    }
    return mil_advance(b);
}

int32_t mil_parse_type(mil_build *b, mil_shape *shape, mil_span *at) {
    memset(shape, 0, sizeof *shape);
    *at = b->token.at;
    int tensor = b->token.kind == MIL_WORD && mil_span_is(b->token.at, "tensor");
    if (tensor) {
        ANEPY_TRY(mil_advance(b));
        ANEPY_TRY(mil_expect(b, "<", NULL));
    }
    if (b->token.kind != MIL_WORD || !mil_type_find(b->token.at, &shape->type))
        return mil_error(b->mil, b->token.at,
                         "expected a type (tensor<...>, fp16, fp32, int8, uint8, int16, uint16, "
                         "int32, uint32, int64, uint64, bool or string)");
    mil_span scalar = b->token.at;
    ANEPY_TRY(mil_advance(b));
    if (!tensor) {
        if (b->minor == 0)
            ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_SCALAR_TYPE, scalar, 1,
                               "program(1.0) writes tensor<%s, []>", mil_type_name(shape->type)));
        return ANEPY_OK;
    }
    ANEPY_TRY(mil_expect(b, ",", NULL));
    ANEPY_TRY(parse_dims(b, shape));
    ANEPY_TRY(mil_expect(b, ">", NULL));
    if (mil_elements(shape) < 0)
        return mil_error(b->mil, *at, "the tensor has more than %lld elements",
                         (long long)MIL_MAX_EXTENT);
    return ANEPY_OK;
}

/* ----------------------------------------------------------------------------------- literals */

static int32_t store_float(mil_build *b, mil_span at, mil_value *v, int64_t index, double value) {
    float *out = (float *)(uintptr_t)v->raw + index;
    *out = fabs(value) > (double)FLT_MAX ? (float)copysign(INFINITY, value) : (float)value;
    if (v->shape.type == ANEPY_MIL_F32) return ANEPY_OK;
    uint16_t half = anepy_to_half(*out);
    if ((half & 0x7fff) == 0x7c00 && isfinite(value))
        return mil_error(b->mil, at, "this is beyond fp16, whose largest number is 65504");
    if ((half & 0x7fff) < 0x0400 && value != 0.0 && b->mil->numerics->flush &&
        mil_rule_on(b->mil, ANEPY_RULE_SUBNORMAL)) {
        half &= 0x8000;
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_SUBNORMAL, at, 1, "the constant becomes zero"));
    }
    mil_from_half(b->mil, out, &half, 1);
    return ANEPY_OK;
}

static const struct {
    int64_t low, high;
} RANGES[ANEPY_MIL_TYPE_N] = {
    [ANEPY_MIL_I8] = {-128, 127},
    [ANEPY_MIL_U8] = {0, 255},
    [ANEPY_MIL_I16] = {-32768, 32767},
    [ANEPY_MIL_U16] = {0, 65535},
    [ANEPY_MIL_I32] = {INT32_MIN, INT32_MAX},
    [ANEPY_MIL_U32] = {0, UINT32_MAX},
    [ANEPY_MIL_I64] = {INT64_MIN, INT64_MAX},
    [ANEPY_MIL_U64] = {0, INT64_MAX},
};

/* Reads the token as element `index` of v. */
static int32_t parse_element(mil_build *b, mil_value *v, int64_t index) {
    mil_span at = b->token.at;
    int number = b->token.kind == MIL_NUMBER, word = b->token.kind == MIL_WORD;
    int64_t whole;
    double value;
    const char *type = mil_type_name(v->shape.type);
    if (v->form == MIL_TEXT) return mil_error(b->mil, at, "expected a string in quotes");
    if (v->shape.type == ANEPY_MIL_BOOL) {
        if (!word || !(mil_span_is(at, "true") || mil_span_is(at, "false")))
            return mil_error(b->mil, at, "expected true or false");
        ((int64_t *)(uintptr_t)v->raw)[index] = *at.p == 't';
    } else if (mil_is_int(v->shape.type)) {
        if (!number || !mil_parse_int(at, &whole))
            return mil_error(b->mil, at, "expected a whole number for %s", type);
        if (whole < RANGES[v->shape.type].low || whole > RANGES[v->shape.type].high)
            return mil_error(b->mil, at, "this does not fit %s", type);
        ((int64_t *)(uintptr_t)v->raw)[index] = whole;
    } else {
        if (!(number || word) || !mil_parse_float(at, &value))
            return mil_error(b->mil, at, "expected a number for %s", type);
        ANEPY_TRY(store_float(b, at, v, index, value));
    }
    return mil_advance(b);
}

/* A list nested as the shape is, [[a, b], [c, d]], or flat, [a, b, c, d]. */
static int32_t parse_list(mil_build *b, mil_value *v, int32_t level, int64_t *index) {
    mil_span open;
    ANEPY_TRY(mil_expect(b, "[", &open));
    int nested = level + 1 < v->shape.rank && mil_at_mark(b, '[');
    int64_t want = nested || level > 0 ? v->shape.dims[level] : v->n, count = 0;
    while (!mil_at_mark(b, ']')) {
        if (count > 0) ANEPY_TRY(mil_expect(b, ",", NULL));
        if (count == want)
            return mil_error(b->mil, b->token.at, "the list has more than %lld entries",
                             (long long)want);
        if (nested) ANEPY_TRY(parse_list(b, v, level + 1, index));
        else ANEPY_TRY(parse_element(b, v, (*index)++));
        count++;
    }
    if (count != want)
        return mil_error(b->mil, open, "the list has %lld entries, the type wants %lld",
                         (long long)count, (long long)want);
    return mil_advance(b);
}

static int32_t parse_values(mil_build *b, mil_value *v) {
    mil_span at = b->token.at;
    /* An element takes at least a character and a comma, so no list is longer than half the text.
     */
    if (v->n > (b->lexer.end - b->lexer.p) / 2 + 1)
        return mil_error(b->mil, at, "the type wants %lld elements, more than the text holds",
                         (long long)v->n);
    v->form = mil_is_float(v->shape.type) ? MIL_FLOATS : MIL_INTS;
    v->raw = mil_alloc(b->mil, (uint64_t)v->n * (v->form == MIL_FLOATS ? 4 : 8));
    if (v->raw == NULL) return mil_no_memory(b->mil, at);
    if (v->shape.rank == 0) return parse_element(b, v, 0);
    int64_t index = 0;
    return parse_list(b, v, 0, &index);
}

static int32_t parse_text(mil_build *b, mil_value *v) {
    mil_span at = b->token.at;
    if (b->token.kind != MIL_QUOTED || v->n != 1)
        return mil_error(b->mil, at, "expected a string in quotes");
    char *text = mil_alloc(b->mil, (uint64_t)at.n + 1);
    if (text == NULL) return mil_no_memory(b->mil, at);
    memcpy(text, at.p, (size_t)at.n);
    v->form = MIL_TEXT;
    v->raw = text;
    return mil_advance(b);
}

/* ------------------------------------------------------------------------------- weight files */

static const uint8_t TAGS[ANEPY_MIL_TYPE_N] = {
    /* type numbers of weight files: docs/neural-engine.md#weight-file */
    [ANEPY_MIL_F16] = 1, [ANEPY_MIL_F32] = 2, [ANEPY_MIL_U8] = 3,   [ANEPY_MIL_I8] = 4,
    [ANEPY_MIL_I16] = 6, [ANEPY_MIL_U16] = 7, [ANEPY_MIL_I32] = 14, [ANEPY_MIL_U32] = 15,
};

static uint32_t slot_of(const mil_build *b, const void *raw) {
    return (uint32_t)(((uint64_t)(uintptr_t)raw * UINT64_C(0x9e3779b97f4a7c15)) >> 32) &
           (b->record_cap - 1);
}

/* The first constant with the same data, type and size (records may overlap). The programs of a
 * step share weights and tables: each record counts and is decoded once. */
static mil_value **find_record(mil_build *b, const mil_value *v) {
    uint32_t slot = slot_of(b, v->raw);
    for (mil_value *d; (d = b->records[slot]) != NULL; slot = (slot + 1) & (b->record_cap - 1))
        if (d->raw == v->raw && d->shape.type == v->shape.type && d->n == v->n) break;
    return &b->records[slot];
}

static int32_t grow_records(mil_build *b, mil_span at) {
    if (b->record_cap > 0 && b->record_n < b->record_cap / 2) return ANEPY_OK;
    mil_value **old = b->records;
    uint32_t old_cap = b->record_cap;
    b->record_cap = old_cap > 0 ? old_cap * 2 : 64;
    b->records = mil_alloc(b->mil, b->record_cap * sizeof *b->records);
    if (b->records == NULL) return mil_no_memory(b->mil, at);
    for (uint32_t i = 0; i < old_cap; i++)
        if (old[i] != NULL) *find_record(b, old[i]) = old[i];
    return ANEPY_OK;
}

static int32_t note_record(mil_build *b, mil_value *v, mil_span at, uint64_t nbytes) {
    ANEPY_TRY(grow_records(b, at));
    mil_value **place = find_record(b, v);
    if (*place != NULL) return ANEPY_OK;
    *place = v;
    b->record_n++;
    b->mil->weight_nbytes += nbytes;
    return ANEPY_OK;
}

static int32_t open_record(mil_build *b, mil_value *v, mil_span path_at, const char *path,
                           mil_span offset_at, int64_t offset) {
    int32_t f = 0;
    while (f < b->file_n && strcmp(b->files[f].path, path) != 0) f++;
    if (f == b->file_n)
        return mil_error(b->mil, path_at, "this weight file was not given (%d %s)", b->file_n,
                         b->file_n == 1 ? "was" : "were");
    b->file_used[f] = 1;
    uint32_t tag;
    const uint8_t *payload;
    uint64_t nbytes, wanted = (uint64_t)v->n * mil_type_nbytes(v->shape.type);
    if (anepy_blob_read(b->files[f].data, b->files[f].n, (uint64_t)offset, &tag, &payload,
                        &nbytes) != ANEPY_OK) {
        char reason[300];
        anepy_last_error(reason, sizeof reason);
        return mil_error(b->mil, offset_at, "%s", reason);
    }
    if (nbytes != wanted)
        return mil_error(b->mil, offset_at,
                         "the record has %llu bytes of data, the type wants %llu",
                         (unsigned long long)nbytes, (unsigned long long)wanted);
    if (tag != TAGS[v->shape.type])
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_WEIGHT_TYPE, offset_at, 1,
                           "the record has type %u, %s is %u", tag, mil_type_name(v->shape.type),
                           TAGS[v->shape.type]));
    v->form = MIL_BLOB;
    v->raw = payload;
    return note_record(b, v, path_at, nbytes);
}

/* (path=string("..."), offset=uint64(64)) */
static int32_t parse_blobfile(mil_build *b, mil_value *v) {
    mil_value *path = NULL, *offset = NULL;
    mil_span path_at = b->token.at, offset_at = b->token.at, open;
    ANEPY_TRY(mil_expect(b, "(", &open));
    while (!mil_at_mark(b, ')')) {
        if (path != NULL || offset != NULL) ANEPY_TRY(mil_expect(b, ",", NULL));
        mil_span name = b->token.at;
        int is_path = mil_span_is(name, "path");
        if (b->token.kind != MIL_WORD || (is_path ? path : offset) != NULL ||
            !(is_path || mil_span_is(name, "offset")))
            return mil_error(b->mil, name, "BLOBFILE takes path and offset, once each");
        ANEPY_TRY(mil_advance(b));
        ANEPY_TRY(mil_expect(b, "=", NULL));
        *(is_path ? &path_at : &offset_at) = b->token.at;
        ANEPY_TRY(mil_parse_literal(b, is_path ? &path : &offset));
    }
    ANEPY_TRY(mil_advance(b));
    if (path == NULL || path->form != MIL_TEXT)
        return mil_error(b->mil, path_at, "BLOBFILE needs path=string(\"...\")");
    if (offset == NULL || offset->form != MIL_INTS || offset->n != 1)
        return mil_error(b->mil, offset_at, "BLOBFILE needs offset=uint64(...)");
    if (mil_type_nbytes(v->shape.type) == 0 || v->shape.type == ANEPY_MIL_BOOL ||
        TAGS[v->shape.type] == 0)
        return mil_error(b->mil, v->type_at, "a weight file holds no %s",
                         mil_type_name(v->shape.type));
    /* An error points at the number, not at its type. */
    return open_record(b, v, path->at, path->raw, offset->at, mil_int_at(offset, 0));
}

int32_t mil_parse_literal(mil_build *b, mil_value **out) {
    mil_shape shape;
    mil_span at;
    if (++b->depth > 8) return mil_error(b->mil, b->token.at, "literals are nested too deeply");
    ANEPY_TRY(mil_parse_type(b, &shape, &at));
    ANEPY_TRY(mil_expect(b, "(", NULL));
    mil_value *v = mil_new_value(b, MIL_CONST, b->token.at);
    if (v == NULL) return ANEPY_E_PROGRAM;
    v->type_at = at;
    v->shape = shape;
    v->n = mil_elements(&shape);
    v->literal = 1;
    if (b->token.kind == MIL_WORD && mil_span_is(b->token.at, "BLOBFILE")) {
        ANEPY_TRY(mil_advance(b));
        ANEPY_TRY(parse_blobfile(b, v));
    } else if (shape.type == ANEPY_MIL_STRING) {
        ANEPY_TRY(parse_text(b, v));
    } else {
        ANEPY_TRY(parse_values(b, v));
    }
    b->depth--;
    *out = v;
    return mil_expect(b, ")", NULL);
}

/* -------------------------------------------------------------------------- elements, decoding */

int mil_is_const(const mil_value *v) { return v->kind == MIL_CONST; }

int64_t mil_int_at(const mil_value *v, int64_t index) {
    if (v->form == MIL_INTS) return ((const int64_t *)v->raw)[index];
    if (v->form != MIL_BLOB) return 0;
    uint64_t nbytes = mil_type_nbytes(v->shape.type), bits = 0;
    /* Little endian, like every machine this runs on. */
    memcpy(&bits, (const uint8_t *)v->raw + (uint64_t)index * nbytes, nbytes);
    switch (v->shape.type) {
    case ANEPY_MIL_I8: return (int8_t)bits;
    case ANEPY_MIL_I16: return (int16_t)bits;
    case ANEPY_MIL_I32: return (int32_t)bits;
    default: return (int64_t)bits;
    }
}

double mil_float_at(const mil_value *v, int64_t index) {
    if (v->data != NULL) return (double)v->data[index];
    if (v->form == MIL_FLOATS) return (double)((const float *)v->raw)[index];
    if (!mil_is_float(v->shape.type)) return (double)mil_int_at(v, index);
    uint16_t half;
    float value;
    if (v->shape.type == ANEPY_MIL_F16) {
        memcpy(&half, (const uint8_t *)v->raw + (uint64_t)index * 2, sizeof half);
        return (double)anepy_from_half(half);
    }
    memcpy(&value, (const uint8_t *)v->raw + (uint64_t)index * 4, sizeof value);
    return (double)value;
}

/* fp16 in a file becomes fp32 with the same value. */
static void decode_half(const mil_build *b, const mil_value *v, float *data) {
    int flush = b->mil->numerics->flush && mil_rule_on(b->mil, ANEPY_RULE_SUBNORMAL);
    uint16_t half[256];
    for (int64_t i = 0; i < v->n; i += 256) {
        int64_t n = v->n - i < 256 ? v->n - i : 256;
        memcpy(half, (const uint8_t *)v->raw + i * 2, (size_t)n * 2);
        for (int64_t j = 0; flush && j < n; j++)
            half[j] = (half[j] & 0x7c00) == 0 ? half[j] & 0x8000 : half[j];
        mil_from_half(b->mil, data + i, half, n);
    }
}

int32_t mil_decode(mil_build *b, mil_value *v, mil_span at) {
    if (v->kind != MIL_CONST || v->data != NULL) return ANEPY_OK;
    if (v->form == MIL_TEXT) return mil_error(b->mil, at, "a string cannot be computed with");
    if (v->form == MIL_FLOATS) {
        v->data = (float *)(uintptr_t)v->raw;
        return ANEPY_OK;
    }
    mil_value *owner = v->form == MIL_BLOB ? *find_record(b, v) : v;
    if (owner->data == NULL) {
        float *data = mil_alloc(b->mil, ((uint64_t)v->n + MIL_SLACK) * sizeof(float));
        if (data == NULL) return mil_no_memory(b->mil, at);
        if (v->form == MIL_BLOB && v->shape.type == ANEPY_MIL_F16) decode_half(b, v, data);
        else
            for (int64_t i = 0; i < v->n; i++) data[i] = (float)mil_float_at(v, i);
        owner->data = data;
    }
    v->data = owner->data;
    return ANEPY_OK;
}
