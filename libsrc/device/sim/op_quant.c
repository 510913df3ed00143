/* device/sim/op_quant.c - 8-bit numbers: compressed constants, decoded while parsing, and
 * quantize / dequantize at run time. */
#include "device/sim/interpreter_internal.h"

#include <math.h>
#include <string.h>

/* ----------------------------------------------------------------------------------- constants */

/* out[0] becomes a constant of this shape with room for its elements. */
static int32_t make_const(mil_build *b, mil_op *op, const mil_shape *shape) {
    mil_value *v = op->out[0];
    v->kind = MIL_CONST;
    v->maker = NULL;
    v->form = MIL_FLOATS;
    op->skip = 1;
    ANEPY_TRY(mil_declare(b, op, 0, shape));
    v->data = mil_alloc(b->mil, ((uint64_t)v->n + MIL_SLACK) * sizeof(float));
    v->raw = v->data;
    return v->data != NULL ? ANEPY_OK : mil_no_memory(b->mil, op->at);
}

static void round_const(mil_build *b, mil_value *v) {
    mil_run r = {.mil = b->mil}; /* counts are dropped: decoding is no computation of the ANE */
    atomic_init(&r.saturated, 0);
    atomic_init(&r.flushed, 0);
    mil_round(&r, v->data, v->n);
}

static int32_t want_eight_bits(mil_build *b, const mil_op *op, int32_t slot) {
    anepy_mil_type type = op->arg[slot]->shape.type;
    if (type == ANEPY_MIL_I8 || type == ANEPY_MIL_U8) return ANEPY_OK;
    return mil_error(b->mil, op->arg_at[slot], "parameter %s of %s must be int8 or uint8, not %s",
                     op->type->params[slot].name, op->type->name, mil_type_name(type));
}

/* A scale or zero point for every index of an axis, or one for all. */
static int32_t want_per_axis(mil_build *b, const mil_op *op, int32_t slot, int64_t extent) {
    const mil_value *v = op->arg[slot];
    if (v == NULL || (v->shape.rank <= 1 && (v->n == 1 || v->n == extent))) return ANEPY_OK;
    char given[128];
    return mil_error(b->mil, op->arg_at[slot],
                     "%s must be a scalar or have %lld elements, not be %s",
                     op->type->params[slot].name, (long long)extent,
                     mil_shape_text(&v->shape, given, sizeof given));
}

/* Sets a[0] to the extent of the axis and a[1] to the elements inside it. */
static int32_t find_axis(mil_build *b, mil_op *op, int32_t slot, const mil_shape *x) {
    int32_t axis = 0;
    op->a[0] = op->a[1] = 1;
    if (x->rank == 0) return ANEPY_OK;
    if (op->arg[slot] != NULL)
        ANEPY_TRY(mil_want_axis(b, op, slot, mil_int_at(op->arg[slot], 0), x->rank, &axis));
    op->a[0] = x->dims[axis];
    op->a[1] = mil_product(x->dims, axis + 1, x->rank);
    return ANEPY_OK;
}

static double per_axis(const mil_value *v, int64_t index) {
    return v == NULL ? 0.0 : mil_float_at(v, v->n == 1 ? 0 : index);
}

enum { AFFINE_DATA, AFFINE_SCALE, AFFINE_ZERO, AFFINE_AXIS };

/* scale * (data - zero_point) along an axis. */
static int32_t check_affine(mil_build *b, mil_op *op) {
    const mil_value *data = op->arg[AFFINE_DATA];
    mil_shape out = data->shape;
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(want_eight_bits(b, op, AFFINE_DATA));
    ANEPY_TRY(mil_want_float(b, op, AFFINE_SCALE));
    ANEPY_TRY(find_axis(b, op, AFFINE_AXIS, &out));
    ANEPY_TRY(want_per_axis(b, op, AFFINE_SCALE, op->a[0]));
    ANEPY_TRY(want_per_axis(b, op, AFFINE_ZERO, op->a[0]));
    out.type = op->arg[AFFINE_SCALE]->shape.type;
    ANEPY_TRY(make_const(b, op, &out));
    for (int64_t i = 0; i < data->n; i++) {
        int64_t index = i / op->a[1] % op->a[0];
        op->out[0]->data[i] =
            (float)((mil_float_at(data, i) - per_axis(op->arg[AFFINE_ZERO], index)) *
                    per_axis(op->arg[AFFINE_SCALE], index));
    }
    round_const(b, op->out[0]);
    return ANEPY_OK;
}

/* scale * (data - offset), each scale for a block of data. */
static int32_t check_blockwise(mil_build *b, mil_op *op) {
    const mil_value *data = op->arg[0], *scale = op->arg[1], *offset = op->arg[2];
    mil_shape out = data->shape;
    int64_t block[MIL_RANK];
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(want_eight_bits(b, op, 0));
    ANEPY_TRY(mil_want_float(b, op, 1));
    int fits = scale->shape.rank == out.rank;
    for (int32_t i = 0; i < out.rank && fits; i++) {
        fits = out.dims[i] % scale->shape.dims[i] == 0;
        block[i] = fits ? out.dims[i] / scale->shape.dims[i] : 1;
    }
    char given[128], wanted[128];
    if (!fits)
        return mil_error(b->mil, op->arg_at[1], "the scale %s does not divide the data %s",
                         mil_shape_text(&scale->shape, given, sizeof given),
                         mil_shape_text(&out, wanted, sizeof wanted));
    mil_shape zeros = scale->shape;
    if (offset != NULL) {
        zeros.type = out.type;
        if (!mil_shape_equal(&offset->shape, &zeros))
            return mil_error(b->mil, op->arg_at[2], "the offset is %s, wanted %s",
                             mil_shape_text(&offset->shape, given, sizeof given),
                             mil_shape_text(&zeros, wanted, sizeof wanted));
    }
    out.type = scale->shape.type;
    ANEPY_TRY(make_const(b, op, &out));
    for (int64_t i = 0; i < data->n; i++) {
        int64_t rest = i, at = 0, step = 1;
        for (int32_t d = out.rank - 1; d >= 0; d--) {
            at += rest % out.dims[d] / block[d] * step;
            rest /= out.dims[d];
            step *= scale->shape.dims[d];
        }
        double zero = offset != NULL ? mil_float_at(offset, at) : 0.0;
        op->out[0]->data[i] = (float)((mil_float_at(data, i) - zero) * mil_float_at(scale, at));
    }
    round_const(b, op->out[0]);
    return ANEPY_OK;
}

/* Palette entries of 1, 2, 4, 6 or 8 bits, packed from the lowest bit on. */
static int32_t check_lut(mil_build *b, mil_op *op) {
    const mil_value *indices = op->arg[0], *lut = op->arg[1], *shape = op->arg[2];
    mil_shape out = {.type = lut->shape.type, .rank = (int32_t)shape->n};
    int32_t bits = 0;
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_float(b, op, 1));
    if (indices->shape.type != ANEPY_MIL_U8 || indices->shape.rank != 1)
        return mil_error(b->mil, op->arg_at[0], "indices must be a list of uint8");
    while (bits < 8 && lut->n != INT64_C(1) << bits) bits++;
    if (bits < 1 || bits == 3 || bits == 5 || bits == 7 || lut->n != INT64_C(1) << bits)
        return mil_error(b->mil, op->arg_at[1], "a palette has 2, 4, 16, 64 or 256 entries");
    if (shape->n > MIL_RANK)
        return mil_error(b->mil, op->arg_at[2], "a tensor has at most %d dimensions", MIL_RANK);
    for (int32_t i = 0; i < out.rank; i++) {
        out.dims[i] = mil_int_at(shape, i);
        if (out.dims[i] < 1 || out.dims[i] > MIL_MAX_EXTENT)
            return mil_error(b->mil, op->arg_at[2], "extent %lld", (long long)out.dims[i]);
    }
    ANEPY_TRY(make_const(b, op, &out));
    if (indices->n != (op->out[0]->n * bits + 7) / 8)
        return mil_error(b->mil, op->arg_at[0],
                         "%lld bytes of indices, %lld elements of %d bits need %lld",
                         (long long)indices->n, (long long)op->out[0]->n, bits,
                         (long long)((op->out[0]->n * bits + 7) / 8));
    for (int64_t i = 0; i < op->out[0]->n; i++) {
        int64_t bit = i * bits;
        uint32_t two = (uint32_t)mil_int_at(indices, bit / 8);
        if (bit / 8 + 1 < indices->n) two |= (uint32_t)mil_int_at(indices, bit / 8 + 1) << 8;
        op->out[0]->data[i] = (float)mil_float_at(lut, two >> bit % 8 & ((1u << bits) - 1));
    }
    round_const(b, op->out[0]);
    return ANEPY_OK;
}

/* ------------------------------------------------------------------------------------ run time */

enum { Q_INPUT, Q_SCALE, Q_ZERO, Q_AXIS, Q_DTYPE };

typedef struct {
    mil_run *run;
    const mil_op *op;
} quant_job;

static void quant_piece(void *context, int64_t first, int64_t n) {
    const quant_job *job = context;
    const mil_op *op = job->op;
    const float *x = mil_data(job->run, op->arg[Q_INPUT]);
    const float *scale = mil_data(job->run, op->arg[Q_SCALE]);
    const float *zero = op->arg[Q_ZERO] != NULL ? mil_data(job->run, op->arg[Q_ZERO]) : NULL;
    float *y = mil_data(job->run, op->out[0]);
    int64_t scales = op->arg[Q_SCALE]->n > 1, zeros = zero != NULL && op->arg[Q_ZERO]->n > 1;
    for (int64_t i = first; i < first + n; i++) {
        int64_t index = i / op->a[1] % op->a[0];
        float s = scale[index * scales], z = zero != NULL ? zero[index * zeros] : 0.0f;
        if (op->type->code) {
            float q = rintf(x[i] / s) + z;
            y[i] = q < op->f[0] ? op->f[0] : q > op->f[1] ? op->f[1] : q == q ? q : 0.0f;
        } else {
            y[i] = (x[i] - z) * s;
        }
    }
    if (!op->type->code) mil_round(job->run, y + first, n);
}

static void run_quant(mil_run *r, const mil_op *op) {
    quant_job job = {r, op};
    mil_each_piece(r, op->out[0]->n, quant_piece, &job);
}

/* For quantize and dequantize; type is the 8-bit type. */
static int32_t check_quant(mil_build *b, mil_op *op, anepy_mil_type type) {
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_float(b, op, Q_SCALE));
    ANEPY_TRY(find_axis(b, op, Q_AXIS, &op->arg[Q_INPUT]->shape));
    ANEPY_TRY(want_per_axis(b, op, Q_SCALE, op->a[0]));
    ANEPY_TRY(want_per_axis(b, op, Q_ZERO, op->a[0]));
    for (int32_t slot = Q_SCALE; slot <= Q_ZERO; slot++)
        if (op->arg[slot] != NULL && !mil_is_const(op->arg[slot]))
            return mil_error(b->mil, op->arg_at[slot], "%s must be a constant",
                             op->type->params[slot].name);
    if (op->arg[Q_ZERO] != NULL && op->arg[Q_ZERO]->shape.type != type)
        return mil_error(b->mil, op->arg_at[Q_ZERO], "zero_point is %s, wanted %s",
                         mil_type_name(op->arg[Q_ZERO]->shape.type), mil_type_name(type));
    return ANEPY_OK;
}

static int32_t check_quantize(mil_build *b, mil_op *op) {
    mil_shape out = op->arg[Q_INPUT]->shape;
    const char *dtype = mil_string_or(op, Q_DTYPE, "");
    ANEPY_TRY(mil_want_float(b, op, Q_INPUT));
    if (strcmp(dtype, "int8") == 0) out.type = ANEPY_MIL_I8;
    else if (strcmp(dtype, "uint8") == 0) out.type = ANEPY_MIL_U8;
    else return mil_error(b->mil, op->arg_at[Q_DTYPE], "output_dtype is int8 or uint8");
    op->f[0] = out.type == ANEPY_MIL_I8 ? -128.0f : 0.0f;
    op->f[1] = op->f[0] + 255.0f;
    ANEPY_TRY(check_quant(b, op, out.type));
    return mil_declare(b, op, 0, &out);
}

static int32_t check_dequantize(mil_build *b, mil_op *op) {
    mil_shape out = op->arg[Q_INPUT]->shape;
    ANEPY_TRY(want_eight_bits(b, op, Q_INPUT));
    ANEPY_TRY(check_quant(b, op, out.type));
    out.type = op->arg[Q_SCALE]->shape.type;
    return mil_declare(b, op, 0, &out);
}

/* --------------------------------------------------------------------------------------- table */

const mil_op_type MIL_QUANTIZERS[] = {
    {"constexpr_affine_dequantize",
     {{"quantized_data", MIL_DATA, 0},
      {"scale", MIL_DATA, 0},
      {"zero_point", MIL_DATA, 1},
      {"axis", MIL_INT, 1}},
     check_affine,
     NULL,
     0},
    {"constexpr_blockwise_shift_scale",
     {{"data", MIL_DATA, 0}, {"scale", MIL_DATA, 0}, {"offset", MIL_DATA, 1}},
     check_blockwise,
     NULL,
     0},
    {"constexpr_lut_to_dense",
     {{"indices", MIL_DATA, 0}, {"lut", MIL_DATA, 0}, {"shape", MIL_INT_LIST, 0}},
     check_lut,
     NULL,
     0},
    {"quantize",
     {{"input", MIL_TENSOR, 0},
      {"scale", MIL_TENSOR, 0},
      {"zero_point", MIL_TENSOR, 1},
      {"axis", MIL_INT, 1},
      {"output_dtype", MIL_STRING, 0}},
     check_quantize,
     run_quant,
     1},
    {"dequantize",
     {{"input", MIL_TENSOR, 0},
      {"scale", MIL_TENSOR, 0},
      {"zero_point", MIL_TENSOR, 1},
      {"axis", MIL_INT, 1}},
     check_dequantize,
     run_quant,
     0},
    {NULL, {{NULL, 0, 0}}, NULL, NULL, 0},
};
