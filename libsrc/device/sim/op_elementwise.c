/* device/sim/op_elementwise.c - one element in, one element out: arithmetic, activations, choices.
 *
 * fp32 arithmetic on fp16 operands, rounded once, equals fp16 arithmetic for + - * / and sqrt. */
#include "device/sim/interpreter_internal.h"

#include <math.h>
#include <string.h>

/* --------------------------------------------------------------------------------------- unary */

enum {
    ABS,
    CAST_UP,
    CEIL,
    CLIP,
    COS,
    ELU,
    ERF,
    EXP,
    EXP2,
    FLOOR,
    GELU,
    INVERSE,
    LEAKY_RELU,
    LINEAR,
    LOG,
    RELU,
    RELU6,
    ROUND,
    RSQRT,
    SIGMOID,
    SIGMOID_HARD,
    SIGN,
    SILU,
    SIN,
    SOFTPLUS,
    SOFTSIGN,
    SQRT,
    SQUARE,
    TANH,
    THRESHOLD,
    IDENTITY,
    GELU_TANH,
    GELU_SIGMOID
};

#define EACH(expression)                                                                           \
    for (int64_t i = 0; i < n; i++) {                                                              \
        float v = x[i];                                                                            \
        y[i] = (expression);                                                                       \
    }                                                                                              \
    break

/* y = 1 / (1 + exp(-factor x)); x and y do not overlap. */
static void sigmoid(const anepy_kernels *kernels, float *restrict y, const float *restrict x,
                    float factor, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = -factor * x[i];
    kernels->exp(y, y, n);
    for (int64_t i = 0; i < n; i++) y[i] = 1.0f / (1.0f + y[i]);
}

static void unary(const anepy_kernels *kernels, int32_t code, float *restrict y,
                  const float *restrict x, int64_t n, float alpha, float beta) {
    switch (code) {
    case ABS: EACH(fabsf(v));
    case CAST_UP:
    case IDENTITY: memcpy(y, x, (size_t)n * sizeof *y); break;
    case CEIL: EACH(ceilf(v));
    case CLIP: EACH(v < alpha ? alpha : v > beta ? beta : v);
    case COS: EACH(cosf(v));
    case ELU: EACH(v >= 0.0f ? v : alpha * expm1f(v));
    case ERF: EACH(erff(v));
    case EXP: kernels->exp(y, x, n); break;
    case EXP2: EACH(exp2f(v));
    case FLOOR: EACH(floorf(v));
    case GELU: EACH(0.5f * v * (1.0f + erff(v * 0.70710678f)));
    case GELU_TANH: EACH(0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v))));
    case GELU_SIGMOID:
        sigmoid(kernels, y, x, 1.702f, n);
        for (int64_t i = 0; i < n; i++) y[i] *= x[i];
        break;
    case INVERSE: EACH(1.0f / (v + alpha));
    case LEAKY_RELU: EACH(v >= 0.0f ? v : alpha * v);
    case LINEAR: EACH(alpha * v + beta);
    case LOG: EACH(logf(v + alpha));
    case RELU: EACH(v > 0.0f ? v : 0.0f);
    case RELU6: EACH(v > 6.0f ? 6.0f : v > 0.0f ? v : 0.0f);
    case ROUND: EACH(rintf(v)); /* to even, as MIL says */
    case RSQRT: EACH(1.0f / sqrtf(v + alpha));
    case SIGMOID: sigmoid(kernels, y, x, 1.0f, n); break;
    case SIGMOID_HARD: EACH(fminf(fmaxf(alpha * v + beta, 0.0f), 1.0f));
    case SIGN: EACH((float)((v > 0.0f) - (v < 0.0f)));
    case SILU:
        sigmoid(kernels, y, x, 1.0f, n);
        for (int64_t i = 0; i < n; i++) y[i] *= x[i];
        break;
    case SIN: EACH(sinf(v));
    case SOFTPLUS: EACH(fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v))));
    case SOFTSIGN: EACH(v / (1.0f + fabsf(v)));
    case SQRT: EACH(sqrtf(v));
    case SQUARE: EACH(v * v);
    case TANH: EACH(tanhf(v));
    case THRESHOLD: EACH(v > alpha ? v : alpha);
    default: break;
    }
}

/* The table of an activation, or MIL_TABLE_N: the hardware's other functions are not published. */
static mil_table table_of(int32_t code) {
    switch (code) {
    case SIGMOID: return MIL_TABLE_SIGMOID;
    case TANH: return MIL_TABLE_TANH;
    case ERF: return MIL_TABLE_ERF;
    case SIN: return MIL_TABLE_SIN;
    case EXP: return MIL_TABLE_EXP;
    case EXP2: return MIL_TABLE_EXP2;
    case LOG: return MIL_TABLE_LOG;
    case SQRT: return MIL_TABLE_SQRT;
    case RSQRT: return MIL_TABLE_RSQRT;
    case INVERSE: return MIL_TABLE_INVERSE;
    case SILU: return MIL_TABLE_SILU;
    case GELU:
    case GELU_TANH: return MIL_TABLE_GELU; /* one table for both modes */
    default: return MIL_TABLE_N;
    }
}

typedef struct {
    mil_run *run;
    const mil_op *op;
    int32_t code;
} unary_job;

/* The epsilon of log, rsqrt and inverse is added, and rounded, before the table. */
static void run_table(mil_run *r, const mil_op *op, mil_table which, float *y, const float *x,
                      int64_t n) {
    int shifted = which == MIL_TABLE_LOG || which == MIL_TABLE_RSQRT || which == MIL_TABLE_INVERSE;
    for (int64_t i = 0; shifted && i < n; i++) y[i] = x[i] + op->f[2];
    if (shifted) mil_round(r, y, n);
    mil_table_run(r->mil->kernels->fixed, r->mil->tables, which, y, shifted ? y : x, n);
}

static void unary_piece(void *context, int64_t first, int64_t n) {
    const unary_job *job = context;
    float *y = mil_data(job->run, job->op->out[0]) + first;
    const float *x = mil_data(job->run, job->op->arg[0]) + first;
    mil_table which = job->run->mil->tables != NULL ? table_of(job->code) : MIL_TABLE_N;
    if (which < MIL_TABLE_N) run_table(job->run, job->op, which, y, x, n);
    else unary(job->run->mil->kernels, job->code, y, x, n, job->op->f[0], job->op->f[1]);
    if (job->code != IDENTITY) mil_round(job->run, y, n);
}

static void run_unary(mil_run *r, const mil_op *op) {
    unary_job job = {r, op, (int32_t)op->a[0]};
    mil_each_piece(r, op->out[0]->n, unary_piece, &job);
}

/* Whether v is a reduction, perhaps scaled or shifted by constants. */
static int from_reduction(const mil_value *v) {
    for (int32_t step = 0; step < 4 && v->maker != NULL; step++) {
        const mil_op *op = v->maker;
        if (strncmp(op->type->name, "reduce_", 7) == 0) return 1;
        if (op->arg[1] == NULL || op->type->params[1].kind != MIL_TENSOR) return 0;
        int constant = mil_is_const(op->arg[0]);
        if (constant == mil_is_const(op->arg[1])) return 0;
        v = op->arg[constant ? 1 : 0];
    }
    return 0;
}

static int32_t gelu_code(mil_build *b, const mil_op *op, int64_t *code) {
    const char *mode = mil_string_or(op, 1, "EXACT");
    if (strcmp(mode, "EXACT") == 0) *code = GELU;
    else if (strcmp(mode, "TANH_APPROXIMATION") == 0) *code = GELU_TANH;
    else if (strcmp(mode, "SIGMOID_APPROXIMATION") == 0) *code = GELU_SIGMOID;
    else
        return mil_error(b->mil, op->arg_at[1],
                         "gelu's mode is EXACT, TANH_APPROXIMATION or SIGMOID_APPROXIMATION");
    return ANEPY_OK;
}

static int32_t check_unary(mil_build *b, mil_op *op) {
    const mil_shape *x = &op->arg[0]->shape;
    int32_t code = op->type->code;
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_float(b, op, 0));
    op->a[0] = code;
    /* Defaults of the two numbers of an operation: alpha or epsilon, then beta. */
    static const float DEFAULTS[][2] = {
        [ELU] = {1.0f, 0.0f},          [LEAKY_RELU] = {0.01f, 0.0f}, [LINEAR] = {1.0f, 0.0f},
        [LOG] = {1e-45f, 0.0f},        [RSQRT] = {1e-12f, 0.0f},     [INVERSE] = {1e-4f, 0.0f},
        [SIGMOID_HARD] = {0.2f, 0.5f}, [THRESHOLD] = {0.0f, 0.0f},   [GELU_SIGMOID] = {0.0f, 0.0f}};
    op->f[0] = DEFAULTS[code][0];
    op->f[1] = DEFAULTS[code][1];
    if (code == GELU) {
        ANEPY_TRY(gelu_code(b, op, &op->a[0]));
    } else {
        for (int32_t i = 1; i < 3 && op->type->params[i].kind == MIL_FLOAT; i++) {
            if (op->arg[i] == NULL) continue;
            ANEPY_TRY(mil_want_same_type(b, op, i, 0));
            op->f[i - 1] = (float)mil_float_at(op->arg[i], 0);
        }
        op->f[2] = op->f[0];
        mil_run constant = {.mil = b->mil}; /* an epsilon is a number of fp16 */
        mil_round(&constant, op->f + 2, 1);
    }
    if ((code == SQRT || code == RSQRT) && from_reduction(op->arg[0]))
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_ROOT_AFTER_REDUCE, op->at, 1,
                           "write pow(x, -0.5) or pow(x, 0.5) after a reduction"));
    if (code == SQUARE && x->rank > 0 && x->dims[x->rank - 1] % 128 > 64)
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_SQUARE, op->at, 1,
                           "may be wrong at width %lld when fused; write mul(x, x)",
                           (long long)x->dims[x->rank - 1]));
    return mil_declare(b, op, 0, x);
}

/* Between fp16 and fp32; values stay fp16 numbers, which is all that the ANE has. bool gives 0
 * and 1. */
static int32_t check_cast(mil_build *b, mil_op *op) {
    mil_shape out = op->arg[0]->shape;
    const char *dtype = mil_string_or(op, 1, "");
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    mil_span name = {dtype, (int32_t)strlen(dtype), 0, 0};
    anepy_mil_type type;
    if (!mil_type_find(name, &type) || !mil_is_float(type))
        return mil_error(b->mil, op->arg_at[1], "cast makes fp16 or fp32 on the ANE, not '%.40s'",
                         dtype);
    if (!mil_is_float(out.type) && out.type != ANEPY_MIL_BOOL)
        return mil_error(b->mil, op->arg_at[0], "cast reads fp16, fp32 or bool, not %s",
                         mil_type_name(out.type));
    out.type = type;
    op->a[0] = IDENTITY;
    return mil_declare(b, op, 0, &out);
}

/* -------------------------------------------------------------------------- binary and select */

enum {
    ADD,
    SUB,
    MUL,
    DIV,
    MAXIMUM,
    MINIMUM,
    POW,
    FLOOR_DIV, /* results are fp16 up to here */
    EQUAL,
    NOT_EQUAL,
    GREATER,
    GREATER_EQUAL,
    LESS,
    LESS_EQUAL, /* results are bool from EQUAL to here */
    SELECT
};

/* a[]: 0 the number of merged dimensions, 1.. extents, then the strides of up to three operands;
 * a stride is 0 where an operand is broadcast. Adjacent dimensions merge where all operands allow.
 */
enum { DIMS = 1, STRIDES = 1 + MIL_RANK };

static int32_t broadcast(mil_build *b, mil_op *op, mil_value *const *operands, int32_t count,
                         mil_shape *out) {
    int64_t extents[3][MIL_RANK], strides[3] = {1, 1, 1};
    out->rank = 0;
    for (int32_t k = 0; k < count; k++)
        if (operands[k]->shape.rank > out->rank) out->rank = operands[k]->shape.rank;
    for (int32_t i = 0; i < out->rank; i++) {
        out->dims[i] = 1;
        for (int32_t k = 0; k < count; k++) {
            const mil_shape *s = &operands[k]->shape;
            int32_t axis = i - (out->rank - s->rank);
            int64_t extent = extents[k][i] = axis >= 0 ? s->dims[axis] : 1;
            if (extent == 1 || extent == out->dims[i]) continue;
            if (out->dims[i] != 1) {
                char one[128], two[128];
                return mil_error(b->mil, op->arg_at[k], "%s and %s do not broadcast in %s",
                                 mil_shape_text(&operands[0]->shape, one, sizeof one),
                                 mil_shape_text(s, two, sizeof two), op->type->name);
            }
            out->dims[i] = extent;
        }
    }
    /* Merged from the last dimension to the first; the merged list begins with the innermost. */
    int64_t dims[MIL_RANK], steps[3][MIL_RANK];
    int32_t n = 0;
    for (int32_t i = out->rank - 1; i >= 0; i--) {
        int64_t step[3] = {0, 0, 0};
        if (out->dims[i] == 1) continue;
        for (int32_t k = 0; k < count; k++) step[k] = extents[k][i] > 1 ? strides[k] : 0;
        int merge = n > 0;
        for (int32_t k = 0; k < count && merge; k++)
            merge = step[k] == steps[k][n - 1] * dims[n - 1];
        if (merge) {
            dims[n - 1] *= out->dims[i];
        } else {
            dims[n] = out->dims[i];
            for (int32_t k = 0; k < count; k++) steps[k][n] = step[k];
            n++;
        }
        for (int32_t k = 0; k < count; k++)
            if (extents[k][i] > 1) strides[k] *= extents[k][i];
    }
    op->a[0] = n;
    for (int32_t i = 0; i < n; i++) {
        op->a[DIMS + i] = dims[i];
        for (int32_t k = 0; k < count; k++) op->a[STRIDES + k * MIL_RANK + i] = steps[k][i];
    }
    return ANEPY_OK;
}

#define PAIRS(expression)                                                                          \
    if (sa == 1 && sb == 1) {                                                                      \
        for (int64_t i = 0; i < n; i++) {                                                          \
            float u = a[i], v = b[i];                                                              \
            y[i] = (expression);                                                                   \
        }                                                                                          \
    } else if (sa == 1) {                                                                          \
        float v = b[0];                                                                            \
        for (int64_t i = 0; i < n; i++) {                                                          \
            float u = a[i];                                                                        \
            y[i] = (expression);                                                                   \
        }                                                                                          \
    } else {                                                                                       \
        float u = a[0];                                                                            \
        for (int64_t i = 0; i < n; i++) {                                                          \
            float v = b[i * sb];                                                                   \
            y[i] = (expression);                                                                   \
        }                                                                                          \
    }                                                                                              \
    break

/* pow is slow, and programs use exponents that have a direct form: roots by the same tables. */
static void power(const anepy_mil *mil, float *restrict y, const float *restrict a, int64_t sa,
                  const float *restrict b, int64_t sb, int64_t n) {
    int root = sb == 0 && (*b == -0.5f || *b == 0.5f || *b == -1.0f);
    if (mil->tables != NULL && root) {
        for (int64_t i = 0; i < n; i++) y[i] = a[i * sa];
        mil_table_run(mil->kernels->fixed, mil->tables,
                      *b == 0.5f    ? MIL_TABLE_SQRT
                      : *b == -0.5f ? MIL_TABLE_RSQRT
                                    : MIL_TABLE_INVERSE,
                      y, y, n);
    } else if (sb == 0 && *b == -0.5f) {
        for (int64_t i = 0; i < n; i++) y[i] = 1.0f / sqrtf(a[i * sa]);
    } else if (sb == 0 && *b == 0.5f) {
        for (int64_t i = 0; i < n; i++) y[i] = sqrtf(a[i * sa]);
    } else if (sb == 0 && *b == 2.0f) {
        for (int64_t i = 0; i < n; i++) y[i] = a[i * sa] * a[i * sa];
    } else if (sb == 0 && *b == -1.0f) {
        for (int64_t i = 0; i < n; i++) y[i] = 1.0f / a[i * sa];
    } else {
        for (int64_t i = 0; i < n; i++) y[i] = powf(a[i * sa], b[i * sb]);
    }
}

static void binary(const anepy_mil *mil, int32_t code, float *restrict y, const float *restrict a,
                   int64_t sa, const float *restrict b, int64_t sb, int64_t n) {
    switch (code) {
    case ADD: PAIRS(u + v);
    case SUB: PAIRS(u - v);
    case MUL: PAIRS(u * v);
    case DIV: PAIRS(u / v);
    case MAXIMUM: PAIRS(u > v ? u : v);
    case MINIMUM: PAIRS(u < v ? u : v);
    case POW: power(mil, y, a, sa, b, sb, n); break;
    case FLOOR_DIV: PAIRS(floorf(u / v));
    case EQUAL: PAIRS(u == v ? 1.0f : 0.0f);
    case NOT_EQUAL: PAIRS(u != v ? 1.0f : 0.0f);
    case GREATER: PAIRS(u > v ? 1.0f : 0.0f);
    case GREATER_EQUAL: PAIRS(u >= v ? 1.0f : 0.0f);
    case LESS: PAIRS(u < v ? 1.0f : 0.0f);
    case LESS_EQUAL: PAIRS(u <= v ? 1.0f : 0.0f);
    default: break;
    }
}

typedef struct {
    mil_run *run;
    const mil_op *op;
} pair_job;

static void pair_piece(void *context, int64_t first, int64_t n) {
    const pair_job *job = context;
    const mil_op *op = job->op;
    const int64_t *dims = op->a + DIMS, *strides = op->a + STRIDES;
    int32_t count = op->type->code == SELECT ? 3 : 2, rank = (int32_t)op->a[0];
    float *y = mil_data(job->run, op->out[0]);
    const float *operand[3];
    for (int32_t k = 0; k < count; k++) operand[k] = mil_data(job->run, op->arg[k]);
    int64_t inner = rank > 0 ? dims[0] : 1;
    for (int64_t at = first, m; at < first + n; at += m) {
        const float *p[3] = {operand[0], operand[1], operand[count - 1]};
        int64_t s[3] = {0, 0, 0}, column = at % inner, row = at / inner;
        m = inner - column < first + n - at ? inner - column : first + n - at;
        for (int32_t k = 0; k < count; k++) {
            s[k] = rank > 0 ? strides[k * MIL_RANK] : 0;
            p[k] += column * s[k];
        }
        for (int32_t i = 1; i < rank; i++) {
            int64_t index = row % dims[i];
            row /= dims[i];
            for (int32_t k = 0; k < count; k++) p[k] += index * strides[k * MIL_RANK + i];
        }
        if (count == 2) {
            binary(job->run->mil, op->type->code, y + at, p[0], s[0], p[1], s[1], m);
            continue;
        }
        for (int64_t i = 0; i < m; i++)
            y[at + i] = p[0][i * s[0]] != 0.0f ? p[1][i * s[1]] : p[2][i * s[2]];
    }
    if (op->out[0]->shape.type != ANEPY_MIL_BOOL) mil_round(job->run, y + first, n);
}

static void run_pair(mil_run *r, const mil_op *op) {
    pair_job job = {r, op};
    mil_each_piece(r, op->out[0]->n, pair_piece, &job);
}

/* Rules on broadcasts, which the M1 gets wrong, and on multiplying a reduction by zero. */
static int32_t check_pair_rules(mil_build *b, const mil_op *op, const mil_shape *out) {
    for (int32_t k = 0; k < 2; k++) {
        const mil_value *v = op->arg[k], *other = op->arg[1 - k];
        const mil_shape *s = &v->shape;
        if (b->mil->options.chip == ANEPY_CHIP_M1 && !mil_is_const(v) && s->rank > 0 &&
            s->dims[s->rank - 1] == 1 && out->dims[out->rank - 1] > 1)
            ANEPY_TRY(
                mil_rule(b->mil, ANEPY_RULE_RUNTIME_BROADCAST, op->arg_at[k], 1,
                         "on M1 this runtime operand is broadcast along the last axis: zeros"));
        if (op->type->code == MUL && mil_is_const(v) && v->n == 1 && v->data[0] == 0.0f &&
            other->maker != NULL && strncmp(other->maker->type->name, "reduce_", 7) == 0)
            ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_REDUCE_TIMES_ZERO, op->at, 1,
                               "a reduction times zero fails"));
    }
    return ANEPY_OK;
}

static int32_t check_binary(mil_build *b, mil_op *op) {
    mil_shape out = {.type = op->arg[0]->shape.type};
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_float(b, op, 0));
    ANEPY_TRY(mil_want_same_type(b, op, 1, 0));
    ANEPY_TRY(broadcast(b, op, op->arg, 2, &out));
    ANEPY_TRY(check_pair_rules(b, op, &out));
    if (op->type->code >= EQUAL) out.type = ANEPY_MIL_BOOL;
    return mil_declare(b, op, 0, &out);
}

static int32_t check_select(mil_build *b, mil_op *op) {
    mil_shape out = {.type = op->arg[1]->shape.type};
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_float(b, op, 1));
    ANEPY_TRY(mil_want_same_type(b, op, 2, 1));
    if (op->arg[0]->shape.type != ANEPY_MIL_BOOL)
        return mil_error(b->mil, op->arg_at[0], "select's cond must be bool, not %s",
                         mil_type_name(op->arg[0]->shape.type));
    ANEPY_TRY(broadcast(b, op, op->arg, 3, &out));
    return mil_declare(b, op, 0, &out);
}

/* --------------------------------------------------------------------------------------- table */

#define X {"x", MIL_TENSOR, 0}
#define UNARY(name, code) {name, {X}, check_unary, run_unary, code}
#define UNARY1(name, first, optional, code)                                                        \
    {name, {X, {first, MIL_FLOAT, optional}}, check_unary, run_unary, code}
#define UNARY2(name, code)                                                                         \
    {name, {X, {"alpha", MIL_FLOAT, 0}, {"beta", MIL_FLOAT, 0}}, check_unary, run_unary, code}
#define BINARY(name, code) {name, {X, {"y", MIL_TENSOR, 0}}, check_binary, run_pair, code}

const mil_op_type MIL_ELEMENTWISE[] = {
    BINARY("add", ADD),
    BINARY("mul", MUL),
    BINARY("sub", SUB),
    BINARY("real_div", DIV),
    BINARY("maximum", MAXIMUM),
    BINARY("minimum", MINIMUM),
    BINARY("pow", POW),
    BINARY("floor_div", FLOOR_DIV),
    BINARY("equal", EQUAL),
    BINARY("not_equal", NOT_EQUAL),
    BINARY("greater", GREATER),
    BINARY("greater_equal", GREATER_EQUAL),
    BINARY("less", LESS),
    BINARY("less_equal", LESS_EQUAL),
    {"select",
     {{"cond", MIL_TENSOR, 0}, {"a", MIL_TENSOR, 0}, {"b", MIL_TENSOR, 0}},
     check_select,
     run_pair,
     SELECT},
    {"cast", {X, {"dtype", MIL_STRING, 0}}, check_cast, run_unary, CAST_UP},
    UNARY("sigmoid", SIGMOID),
    UNARY("silu", SILU),
    UNARY("exp", EXP),
    UNARY("exp2", EXP2),
    UNARY("tanh", TANH),
    UNARY("relu", RELU),
    UNARY("relu6", RELU6),
    UNARY("abs", ABS),
    UNARY("ceil", CEIL),
    UNARY("floor", FLOOR),
    UNARY("round", ROUND),
    UNARY("sign", SIGN),
    UNARY("sin", SIN),
    UNARY("cos", COS),
    UNARY("erf", ERF),
    UNARY("sqrt", SQRT),
    UNARY("square", SQUARE),
    UNARY("softplus", SOFTPLUS),
    UNARY("softsign", SOFTSIGN),
    UNARY("identity", IDENTITY),
    UNARY1("rsqrt", "epsilon", 1, RSQRT),
    UNARY1("log", "epsilon", 1, LOG),
    UNARY1("inverse", "epsilon", 1, INVERSE),
    UNARY1("leaky_relu", "alpha", 1, LEAKY_RELU),
    UNARY1("elu", "alpha", 1, ELU),
    UNARY1("threshold", "alpha", 0, THRESHOLD),
    UNARY2("clip", CLIP),
    UNARY2("sigmoid_hard", SIGMOID_HARD),
    UNARY2("linear_activation", LINEAR),
    {"gelu", {X, {"mode", MIL_STRING, 1}}, check_unary, run_unary, GELU},
    {NULL, {{NULL, 0, 0}}, NULL, NULL, 0},
};
