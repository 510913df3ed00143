/* device/sim/ops.c - arguments bound to the parameters of an operation, and checks that all
 * operations share. */
#include "device/sim/interpreter_internal.h"

#include <stdio.h>
#include <string.h>

#define MAX_OPS 65536 /* per function: more than a whole training step has */

/* ------------------------------------------------------------------------------------- binding */

static int32_t param_error(mil_build *b, const mil_op *op, mil_span name) {
    char known[200] = "";
    for (int32_t i = 0; i < MIL_PARAMS && op->type->params[i].kind != MIL_END; i++) {
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, i > 0 ? ", %s" : "%s",
                 op->type->params[i].name);
    }
    return mil_error(b->mil, name, "%s has no such parameter; it takes %s", op->type->name, known);
}

static int32_t check_kind(mil_build *b, const mil_op *op, int32_t slot) {
    const mil_param *p = &op->type->params[slot];
    mil_value *v = op->arg[slot];
    mil_span at = op->arg_at[slot];
    if (p->kind == MIL_TENSOR) return mil_decode(b, v, at);
    if (v->kind != MIL_CONST)
        return mil_error(b->mil, at, "parameter %s of %s must be a constant", p->name,
                         op->type->name);
    anepy_mil_type type = v->shape.type;
    int scalar = v->n == 1 && v->shape.rank <= 1;
    switch (p->kind) {
    case MIL_DATA:
        if (type != ANEPY_MIL_STRING) return ANEPY_OK;
        break;
    case MIL_INT:
        if (mil_is_int(type) && scalar) return ANEPY_OK;
        break;
    case MIL_INT_LIST:
        if (mil_is_int(type) && v->shape.rank <= 1) return ANEPY_OK;
        break;
    case MIL_FLOAT:
        if (mil_is_float(type) && scalar) return ANEPY_OK;
        break;
    case MIL_BOOL:
        if (type == ANEPY_MIL_BOOL && scalar) return ANEPY_OK;
        break;
    case MIL_BOOL_LIST:
        if (type == ANEPY_MIL_BOOL && v->shape.rank <= 1) return ANEPY_OK;
        break;
    default:
        if (type == ANEPY_MIL_STRING && scalar) return ANEPY_OK;
        break;
    }
    static const char *const WANTS[] = {[MIL_DATA] = "numbers",
                                        [MIL_INT] = "one whole number",
                                        [MIL_INT_LIST] = "a list of whole numbers",
                                        [MIL_FLOAT] = "one fp16 or fp32 number",
                                        [MIL_BOOL] = "one bool",
                                        [MIL_BOOL_LIST] = "a list of bools",
                                        [MIL_STRING] = "a string"};
    char given[128];
    return mil_error(b->mil, at, "parameter %s of %s must be %s, not %s", p->name, op->type->name,
                     WANTS[p->kind], mil_shape_text(&v->shape, given, sizeof given));
}

static int32_t bind_one(mil_build *b, mil_op *op, const mil_argument *argument) {
    int32_t slot = 0;
    while (slot < MIL_PARAMS && op->type->params[slot].kind != MIL_END &&
           !mil_span_is(argument->name, op->type->params[slot].name))
        slot++;
    if (slot == MIL_PARAMS || op->type->params[slot].kind == MIL_END)
        return param_error(b, op, argument->name);
    if (op->arg[slot] != NULL)
        return mil_error(b->mil, argument->name, "this parameter is given twice");
    op->arg_at[slot] = argument->at;
    if (op->type->params[slot].kind == MIL_TENSORS) {
        op->list = argument->list;
        op->list_n = argument->list_n;
        if (op->list == NULL) {
            op->list = mil_alloc(b->mil, sizeof *op->list);
            if (op->list == NULL) return mil_no_memory(b->mil, argument->at);
            op->list[0] = argument->value;
            op->list_n = 1;
        }
        for (int32_t i = 0; i < op->list_n; i++)
            ANEPY_TRY(mil_decode(b, op->list[i], argument->at));
        op->arg[slot] = op->list[0];
        return ANEPY_OK;
    }
    if (argument->value == NULL)
        return mil_error(b->mil, argument->at, "parameter %s of %s takes one value, not a list",
                         op->type->params[slot].name, op->type->name);
    op->arg[slot] = argument->value;
    return check_kind(b, op, slot);
}

int32_t mil_op_bind(mil_build *b, mil_op *op, const mil_argument *arguments, int32_t n) {
    for (int32_t i = 0; i < n; i++) ANEPY_TRY(bind_one(b, op, &arguments[i]));
    for (int32_t i = 0; i < MIL_PARAMS && op->type->params[i].kind != MIL_END; i++)
        if (op->arg[i] == NULL && !op->type->params[i].optional)
            return mil_error(b->mil, op->at, "%s needs the parameter %s", op->type->name,
                             op->type->params[i].name);
    return op->type->check(b, op);
}

/* --------------------------------------------------------------------------- what checks share */

int32_t mil_want_outputs(mil_build *b, mil_op *op, int32_t n) {
    if (op->out_n == n) return ANEPY_OK;
    return mil_error(b->mil, op->at, "%s has %d result%s, declared are %d", op->type->name, n,
                     n == 1 ? "" : "s", op->out_n);
}

int32_t mil_check_limits(mil_build *b, const mil_value *v) {
    const mil_shape *s = &v->shape;
    int64_t most = b->mil->options.chip <= ANEPY_CHIP_M3 ? 16384 : 65536;
    for (int32_t i = s->rank > 2 ? 2 : s->rank - 1; i >= 0 && i < s->rank; i++)
        if (s->dims[i] > most)
            ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_EXTENT, v->type_at, 1,
                               "dimension %d is %lld, M%d allows %lld", i, (long long)s->dims[i],
                               (int)b->mil->options.chip + 1, (long long)most));
    if (s->rank > 2 && s->dims[1] > 65536)
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_CHANNELS, v->type_at, 1,
                           "%lld channels, the ANE has 65536", (long long)s->dims[1]));
    return ANEPY_OK;
}

int32_t mil_declare(mil_build *b, mil_op *op, int32_t index, const mil_shape *shape) {
    mil_value *v = op->out[index];
    char declared[128], inferred[128];
    if (mil_elements(shape) < 0)
        return mil_error(b->mil, op->at, "the result has more than %lld elements",
                         (long long)MIL_MAX_EXTENT);
    if (!mil_shape_equal(&v->shape, shape))
        return mil_error(b->mil, v->type_at, "'%s' is declared %s, but %s gives %s", v->name,
                         mil_shape_text(&v->shape, declared, sizeof declared), op->type->name,
                         mil_shape_text(shape, inferred, sizeof inferred));
    int64_t last = shape->rank > 0 ? shape->dims[shape->rank - 1] : 1;
    if (last > 1 && last % 16 != 0 && v->kind == MIL_RESULT)
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_WIDTH, v->type_at, 1,
                           "the last axis of '%s' is %lld, no multiple of 16", v->name,
                           (long long)last));
    return mil_check_limits(b, v);
}

void mil_make_view(mil_op *op, int32_t index, mil_value *v, int64_t shift) {
    op->out[index]->base = v->base != NULL ? v->base : v;
    op->out[index]->shift = v->shift + shift;
    op->skip = 1;
}

int64_t mil_int_or(const mil_op *op, int32_t slot, int64_t otherwise) {
    return op->arg[slot] != NULL ? mil_int_at(op->arg[slot], 0) : otherwise;
}

double mil_float_or(const mil_op *op, int32_t slot, double otherwise) {
    return op->arg[slot] != NULL ? mil_float_at(op->arg[slot], 0) : otherwise;
}

const char *mil_string_or(const mil_op *op, int32_t slot, const char *otherwise) {
    return op->arg[slot] != NULL ? (const char *)op->arg[slot]->raw : otherwise;
}

int32_t mil_want_list(mil_build *b, const mil_op *op, int32_t slot, int64_t n) {
    if (op->arg[slot] == NULL || op->arg[slot]->n == n) return ANEPY_OK;
    return mil_error(
        b->mil, op->arg_at[slot], "parameter %s of %s needs %lld entries here, not %lld",
        op->type->params[slot].name, op->type->name, (long long)n, (long long)op->arg[slot]->n);
}

int32_t mil_want_axis(mil_build *b, const mil_op *op, int32_t slot, int64_t value, int32_t rank,
                      int32_t *out) {
    if (value < -rank || value >= rank)
        return mil_error(b->mil, op->arg_at[slot], "axis %lld is outside a tensor of %d dimensions",
                         (long long)value, rank);
    *out = (int32_t)(value < 0 ? value + rank : value);
    return ANEPY_OK;
}

int32_t mil_want_float(mil_build *b, const mil_op *op, int32_t slot) {
    anepy_mil_type type = op->arg[slot]->shape.type;
    if (type == ANEPY_MIL_F16) return ANEPY_OK;
    if (type == ANEPY_MIL_F32)
        return mil_rule(b->mil, ANEPY_RULE_FP32_COMPUTE, op->arg_at[slot], 1,
                        "%s of fp32: the ANE computes in fp16 only", op->type->name);
    return mil_error(b->mil, op->arg_at[slot], "parameter %s of %s must be fp16, not %s",
                     op->type->params[slot].name, op->type->name, mil_type_name(type));
}

int32_t mil_want_same_type(mil_build *b, const mil_op *op, int32_t slot, int32_t other) {
    anepy_mil_type type = op->arg[slot]->shape.type, wanted = op->arg[other]->shape.type;
    if (type == wanted) return ANEPY_OK;
    return mil_error(b->mil, op->arg_at[slot], "%s is %s, but %s is %s",
                     op->type->params[slot].name, mil_type_name(type), op->type->params[other].name,
                     mil_type_name(wanted));
}

int32_t mil_add_op(mil_build *b, mil_op *op) {
    if (b->function->op_n == MAX_OPS)
        return mil_error(b->mil, op->at, "a function has at most %d operations", MAX_OPS);
    void ***ops = (void ***)(void *)&b->function->ops;
    if (mil_append(b->mil, ops, &b->function->op_n, &b->op_cap, op)) return ANEPY_OK;
    return mil_no_memory(b->mil, op->at);
}
