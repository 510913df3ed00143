/* device/sim/parse.c - MIL text to functions of checked operations
 * (docs/neural-engine.md#mil-text).
 *
 * One pass: a statement is bound, inferred and checked as soon as it is read, so that an error
 * points at what is being read. */
#include "device/sim/interpreter_internal.h"

#include <stdlib.h>
#include <string.h>

#define MAX_FUNCTIONS 4096
#define MAX_OUTS 1024
#define MAX_ARGUMENTS 16

static int32_t out_of_memory(mil_build *b) { return mil_no_memory(b->mil, b->token.at); }

/* ------------------------------------------------------------------------------ names of values */

static uint32_t name_hash(const char *p, int32_t n) {
    uint32_t hash = 2166136261u; /* FNV-1a */
    for (int32_t i = 0; i < n; i++) hash = (hash ^ (uint8_t)p[i]) * 16777619u;
    return hash;
}

static mil_value **name_slot(const mil_build *b, const char *p, int32_t n) {
    uint32_t slot = name_hash(p, n) & (b->name_cap - 1);
    for (mil_value *v; (v = b->names[slot]) != NULL; slot = (slot + 1) & (b->name_cap - 1))
        if (v->at.n == n && memcmp(v->at.p, p, (size_t)n) == 0) break;
    return &b->names[slot];
}

static int32_t grow_names(mil_build *b) {
    if (b->name_n < b->name_cap / 2) return ANEPY_OK;
    mil_value **old = b->names;
    uint32_t old_cap = b->name_cap;
    b->name_cap = old_cap * 2;
    b->names = mil_alloc(b->mil, b->name_cap * sizeof *b->names);
    if (b->names == NULL) return out_of_memory(b);
    for (uint32_t i = 0; i < old_cap; i++)
        if (old[i] != NULL) *name_slot(b, old[i]->at.p, old[i]->at.n) = old[i];
    return ANEPY_OK;
}

static int32_t add_name(mil_build *b, mil_value *v) {
    ANEPY_TRY(grow_names(b));
    mil_value **slot = name_slot(b, v->at.p, v->at.n);
    if (*slot != NULL)
        return mil_error(b->mil, v->at, "this name is already declared in line %d",
                         (*slot)->at.line);
    *slot = v;
    b->name_n++;
    return ANEPY_OK;
}

static int32_t find_name(mil_build *b, mil_span name, mil_value **out) {
    *out = *name_slot(b, name.p, name.n);
    if (*out == NULL) return mil_error(b->mil, name, "this name is not declared before this line");
    return ANEPY_OK;
}

static int32_t expect_word(mil_build *b, const char *what, mil_span *out) {
    if (b->token.kind != MIL_WORD) return mil_error(b->mil, b->token.at, "expected %s", what);
    *out = b->token.at;
    return mil_advance(b);
}

/* TYPE NAME */
static int32_t parse_declaration(mil_build *b, mil_kind kind, mil_value **out) {
    mil_shape shape;
    mil_span type_at, name;
    ANEPY_TRY(mil_parse_type(b, &shape, &type_at));
    ANEPY_TRY(expect_word(b, "a name after the type", &name));
    mil_value *v = mil_new_value(b, kind, name);
    if (v == NULL) return ANEPY_E_PROGRAM;
    v->type_at = type_at;
    v->shape = shape;
    v->n = mil_elements(&shape);
    *out = v;
    return ANEPY_OK;
}

static int32_t append(mil_build *b, void ***array, int32_t *n, int32_t *cap, void *item) {
    return mil_append(b->mil, array, n, cap, item) ? ANEPY_OK : out_of_memory(b);
}

/* ---------------------------------------------------------------------------------- operations */

/* fp16(1) or tensor<...>(...) is a literal, anything else a name. */
static int at_literal(const mil_build *b) {
    anepy_mil_type type;
    const char *p = b->lexer.p;
    if (mil_span_is(b->token.at, "tensor")) return 1;
    if (!mil_type_find(b->token.at, &type)) return 0;
    while (p < b->lexer.end && (*p == ' ' || *p == '\t')) p++;
    return p < b->lexer.end && *p == '(';
}

static int32_t parse_operand(mil_build *b, mil_value **out) {
    if (b->token.kind != MIL_WORD)
        return mil_error(b->mil, b->token.at, "expected a name or a typed literal like int32(1)");
    if (at_literal(b)) return mil_parse_literal(b, out);
    ANEPY_TRY(find_name(b, b->token.at, out));
    return mil_advance(b);
}

/* NAME = VALUE or NAME = (VALUE, ...) */
static int32_t parse_argument(mil_build *b, mil_argument *out) {
    memset(out, 0, sizeof *out);
    ANEPY_TRY(expect_word(b, "a parameter name", &out->name));
    ANEPY_TRY(mil_expect(b, "=", NULL));
    out->at = b->token.at;
    if (!mil_at_mark(b, '(')) return parse_operand(b, &out->value);
    ANEPY_TRY(mil_advance(b));
    int32_t cap = 0;
    do {
        mil_value *v = NULL;
        if (out->list_n > 0) ANEPY_TRY(mil_expect(b, ",", NULL));
        if (out->list_n == MAX_OUTS)
            return mil_error(b->mil, b->token.at, "a list has at most %d values", MAX_OUTS);
        ANEPY_TRY(parse_operand(b, &v));
        ANEPY_TRY(append(b, (void ***)(void *)&out->list, &out->list_n, &cap, v));
    } while (!mil_at_mark(b, ')'));
    return mil_advance(b);
}

static int32_t parse_arguments(mil_build *b, char close, mil_argument *arguments, int32_t *n) {
    int32_t first = *n;
    while (!mil_at_mark(b, close)) {
        if (*n > first) ANEPY_TRY(mil_expect(b, ",", NULL));
        if (*n == MAX_ARGUMENTS)
            return mil_error(b->mil, b->token.at, "an operation has at most %d arguments",
                             MAX_ARGUMENTS);
        ANEPY_TRY(parse_argument(b, &arguments[*n]));
        (*n)++;
    }
    return mil_advance(b);
}

/* Removes the attribute `name`, which means nothing, from the arguments. */
static int32_t drop_name(mil_build *b, mil_argument *arguments, int32_t first, int32_t *n) {
    for (int32_t i = first; i < *n; i++) {
        if (!mil_span_is(arguments[i].name, "name")) continue;
        const mil_value *v = arguments[i].value;
        if (v == NULL || v->kind != MIL_CONST || v->form != MIL_TEXT)
            return mil_error(b->mil, arguments[i].at, "name must be a string");
        (*n)--;
        memmove(&arguments[i], &arguments[i + 1], (size_t)(*n - i) * sizeof *arguments);
        return ANEPY_OK;
    }
    return ANEPY_OK;
}

static int32_t finish_const(mil_build *b, mil_span at, mil_value **outs, int32_t out_n,
                            const mil_argument *arguments, int32_t n) {
    if (out_n != 1) return mil_error(b->mil, at, "const has one result, %d are declared", out_n);
    if (n != 1 || !mil_span_is(arguments[0].name, "val") || arguments[0].value == NULL)
        return mil_error(b->mil, n > 0 ? arguments[0].name : at,
                         "const takes the attributes name and val, nothing else");
    mil_value *v = outs[0];
    const mil_value *val = arguments[0].value;
    char declared[128], given[128];
    if (!mil_shape_equal(&v->shape, &val->shape))
        return mil_error(b->mil, arguments[0].at, "the value is %s, declared is %s",
                         mil_shape_text(&val->shape, given, sizeof given),
                         mil_shape_text(&v->shape, declared, sizeof declared));
    if (val->kind != MIL_CONST)
        return mil_error(b->mil, arguments[0].at, "the value of a constant must be a literal");
    v->kind = MIL_CONST;
    v->form = val->form;
    v->raw = val->raw;
    v->data = val->data;
    return ANEPY_OK;
}

static int32_t finish_op(mil_build *b, mil_span at, mil_value **outs, int32_t out_n,
                         const mil_argument *arguments, int32_t n, int32_t attribute) {
    mil_op *op = mil_alloc(b->mil, sizeof *op);
    if (op == NULL) return out_of_memory(b);
    op->at = at;
    op->type = mil_op_find(at);
    op->out = outs;
    op->out_n = out_n;
    if (op->type == NULL) {
        const char *why = mil_op_refused(at);
        if (why != NULL) return mil_error(b->mil, at, "not available on the ANE: %s", why);
        return mil_error(b->mil, at, "no operation of this name is known");
    }
    /* The constexpr operations of older texts carry their operands as attributes. */
    if (attribute < n && strncmp(op->type->name, "constexpr_", 10) != 0)
        return mil_error(b->mil, arguments[attribute].name, "%s takes no such attribute",
                         op->type->name);
    for (int32_t i = 0; i < out_n; i++) outs[i]->maker = op;
    ANEPY_TRY(mil_op_bind(b, op, arguments, n));
    return mil_add_op(b, op);
}

/* TYPE NAME, ... = OP(NAME=VALUE, ...)[NAME=VALUE, ...]; */
static int32_t parse_statement(mil_build *b) {
    mil_value **outs = NULL;
    int32_t out_n = 0, out_cap = 0, n = 0;
    mil_span at;
    mil_argument arguments[MAX_ARGUMENTS];
    do {
        mil_value *v = NULL;
        if (out_n > 0) ANEPY_TRY(mil_expect(b, ",", NULL));
        if (out_n == MAX_OUTS)
            return mil_error(b->mil, b->token.at, "an operation has at most %d results", MAX_OUTS);
        ANEPY_TRY(parse_declaration(b, MIL_RESULT, &v));
        ANEPY_TRY(append(b, (void ***)(void *)&outs, &out_n, &out_cap, v));
    } while (mil_at_mark(b, ','));
    ANEPY_TRY(mil_expect(b, "=", NULL));
    ANEPY_TRY(expect_word(b, "an operation", &at));
    ANEPY_TRY(mil_expect(b, "(", NULL));
    ANEPY_TRY(parse_arguments(b, ')', arguments, &n));
    int32_t attribute = n;
    if (mil_at_mark(b, '[')) {
        ANEPY_TRY(mil_advance(b));
        ANEPY_TRY(parse_arguments(b, ']', arguments, &n));
        ANEPY_TRY(drop_name(b, arguments, attribute, &n));
    }
    ANEPY_TRY(mil_expect(b, ";", NULL));
    if (mil_span_is(at, "const")) ANEPY_TRY(finish_const(b, at, outs, out_n, arguments, n));
    else ANEPY_TRY(finish_op(b, at, outs, out_n, arguments, n, attribute));
    /* Declared last, because a statement cannot use its own results. */
    for (int32_t i = 0; i < out_n; i++) ANEPY_TRY(add_name(b, outs[i]));
    return ANEPY_OK;
}

/* ----------------------------------------------------------------------------------- functions */

static int by_name(const void *a, const void *b) {
    return strcmp((*(mil_value *const *)a)->name, (*(mil_value *const *)b)->name);
}

/* Surfaces are bound in ascending order of the names. */
static int32_t sort_values(mil_build *b, mil_value **values, int32_t n, mil_value ***out,
                           const char *what) {
    *out = mil_alloc(b->mil, (uint64_t)(n + 1) * sizeof **out);
    if (*out == NULL) return out_of_memory(b);
    if (n == 0) return ANEPY_OK;
    memcpy(*out, values, (size_t)n * sizeof **out);
    qsort(*out, (size_t)n, sizeof **out, by_name);
    for (int32_t i = 0; i < n; i++)
        if ((*out)[i] != values[i])
            return mil_rule(b->mil, ANEPY_RULE_IO_ORDER, values[i]->at, 1,
                            "the %ss bind by name, so here comes '%s'", what, (*out)[i]->name);
    return ANEPY_OK;
}

static int32_t check_io(mil_build *b, const mil_value *v, mil_span at) {
    const mil_shape *s = &v->shape;
    if (!mil_is_float(s->type) && s->type != ANEPY_MIL_I8 && s->type != ANEPY_MIL_U8)
        return mil_error(b->mil, v->type_at,
                         "inputs and outputs are fp16, fp32, int8 or uint8, not %s",
                         mil_type_name(s->type));
    if (s->type == ANEPY_MIL_F32 && b->mil->options.chip <= ANEPY_CHIP_M2)
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_IO_FP32, v->type_at, 1,
                           "M1 and M2 take fp16 inputs and outputs only"));
    if (s->rank == 0)
        return mil_error(b->mil, v->type_at, "inputs and outputs need at least one dimension");
    if (s->dims[s->rank - 1] % 16 != 0)
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_WIDTH, at, 1,
                           "the last axis of an input or output is %lld, no multiple of 16",
                           (long long)s->dims[s->rank - 1]));
    return ANEPY_OK;
}

static int32_t parse_inputs(mil_build *b, mil_function *f) {
    int32_t cap = 0;
    ANEPY_TRY(mil_expect(b, "(", NULL));
    while (!mil_at_mark(b, ')')) {
        mil_value *v = NULL;
        if (f->input_n > 0) ANEPY_TRY(mil_expect(b, ",", NULL));
        if (f->input_n == MAX_OUTS)
            return mil_error(b->mil, b->token.at, "a function has at most %d inputs", MAX_OUTS);
        ANEPY_TRY(parse_declaration(b, MIL_INPUT, &v));
        ANEPY_TRY(check_io(b, v, v->at));
        ANEPY_TRY(mil_check_limits(b, v));
        ANEPY_TRY(add_name(b, v));
        ANEPY_TRY(append(b, (void ***)(void *)&f->inputs, &f->input_n, &cap, v));
    }
    return mil_advance(b);
}

static int32_t parse_outputs(mil_build *b, mil_function *f) {
    int32_t cap = 0;
    if (b->token.kind != MIL_ARROW)
        return mil_error(b->mil, b->token.at, "expected '->' and the outputs of the function");
    ANEPY_TRY(mil_advance(b));
    ANEPY_TRY(mil_expect(b, "(", NULL));
    do {
        mil_value *v;
        mil_span name;
        if (f->output_n > 0) ANEPY_TRY(mil_expect(b, ",", NULL));
        ANEPY_TRY(expect_word(b, "the name of an output", &name));
        ANEPY_TRY(find_name(b, name, &v));
        if (f->output_n == MAX_OUTS)
            return mil_error(b->mil, name, "a function has at most %d outputs", MAX_OUTS);
        for (int32_t i = 0; i < f->output_n; i++)
            if (f->outputs[i] == v) return mil_error(b->mil, name, "this output is given twice");
        if (v->kind != MIL_RESULT)
            ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_RETURN_VALUE, name, 1,
                               "an output must be the result of an operation"));
        ANEPY_TRY(check_io(b, v, name));
        ANEPY_TRY(mil_decode(b, v, name));
        ANEPY_TRY(append(b, (void ***)(void *)&f->outputs, &f->output_n, &cap, v));
    } while (!mil_at_mark(b, ')'));
    ANEPY_TRY(mil_advance(b));
    return mil_expect(b, ";", NULL);
}

/* A cast works only as the first or last operation, and only on M3 and later. */
static int32_t check_casts(mil_build *b, const mil_function *f) {
    for (int32_t i = 0; i < f->op_n; i++) {
        const mil_op *op = f->ops[i];
        if (strcmp(op->type->name, "cast") != 0) continue;
        int at_edge = op->arg[0]->kind == MIL_INPUT;
        for (int32_t o = 0; o < f->output_n; o++) at_edge |= f->outputs[o] == op->out[0];
        if (b->mil->options.chip <= ANEPY_CHIP_M2)
            ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_CAST, op->at, 1, "M1 and M2 refuse cast"));
        else if (!at_edge)
            ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_CAST, op->at, 1,
                               "cast works on inputs and for outputs only"));
    }
    return ANEPY_OK;
}

static int32_t fill_info(mil_build *b, mil_function *f) {
    int32_t n = 2 * (f->input_n + f->output_n), k = 0;
    f->info = mil_alloc(b->mil, (uint64_t)(n + 1) * sizeof *f->info);
    if (f->info == NULL) return out_of_memory(b);
    mil_value **lists[] = {f->inputs, f->outputs, f->sorted_inputs, f->sorted_outputs};
    for (int32_t l = 0; l < 4; l++) {
        for (int32_t i = 0; i < (l % 2 ? f->output_n : f->input_n); i++, k++) {
            const mil_shape *s = &lists[l][i]->shape;
            f->info[k] = (anepy_mil_value_info){.name = lists[l][i]->name,
                                                .type = s->type,
                                                .rank = s->rank,
                                                .nbytes = (uint64_t)lists[l][i]->n *
                                                          mil_type_nbytes(s->type)};
            memcpy(f->info[k].dims, s->dims, sizeof s->dims);
        }
    }
    return ANEPY_OK;
}

/* func NAME<ios18>(TYPE NAME, ...) { ... } -> (NAME, ...); */
static int32_t parse_function(mil_build *b) {
    mil_function *f = &b->mil->functions[b->mil->function_n];
    mil_span name, opset;
    b->function = f;
    b->op_cap = 0;
    b->name_n = 0;
    b->name_cap = 64;
    b->names = mil_alloc(b->mil, b->name_cap * sizeof *b->names);
    if (b->names == NULL) return out_of_memory(b);
    ANEPY_TRY(mil_expect(b, "func", NULL));
    ANEPY_TRY(expect_word(b, "the name of the function", &name));
    for (int32_t i = 0; i < b->mil->function_n; i++)
        if (mil_span_is(name, b->mil->functions[i].name))
            return mil_error(b->mil, name, "a function of this name comes before");
    mil_value *named = mil_new_value(b, MIL_CONST, name);
    if (named == NULL) return ANEPY_E_PROGRAM;
    f->name = named->name;
    ANEPY_TRY(mil_expect(b, "<", NULL));
    ANEPY_TRY(expect_word(b, "the operation set, like ios18", &opset));
    int64_t version = 0;
    mil_span digits = {opset.p + 3, opset.n - 3, 0, 0};
    if (opset.n < 5 || opset.n > 6 || memcmp(opset.p, "ios", 3) != 0 ||
        !mil_parse_int(digits, &version) || version < 13)
        return mil_error(b->mil, opset, "expected an operation set from ios13 on");
    if (version >= 18 && b->minor < 3)
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_DIALECT, opset, 1,
                           "program(1.%d) has no such functions, program(1.3) has", b->minor));
    ANEPY_TRY(mil_expect(b, ">", NULL));
    ANEPY_TRY(parse_inputs(b, f));
    ANEPY_TRY(mil_expect(b, "{", NULL));
    while (!mil_at_mark(b, '}')) ANEPY_TRY(parse_statement(b));
    ANEPY_TRY(mil_advance(b));
    ANEPY_TRY(parse_outputs(b, f));
    ANEPY_TRY(sort_values(b, f->inputs, f->input_n, &f->sorted_inputs, "input"));
    ANEPY_TRY(sort_values(b, f->outputs, f->output_n, &f->sorted_outputs, "output"));
    ANEPY_TRY(check_casts(b, f));
    b->mil->function_n++;
    return fill_info(b, f);
}

/* ------------------------------------------------------------------------------------- program */

static int32_t skip_dict_entry(mil_build *b) {
    ANEPY_TRY(mil_expect(b, "{", NULL));
    for (int32_t i = 0; i < 2; i++) {
        if (i > 0) ANEPY_TRY(mil_expect(b, ",", NULL));
        if (b->token.kind != MIL_QUOTED)
            return mil_error(b->mil, b->token.at, "expected a string in quotes");
        ANEPY_TRY(mil_advance(b));
    }
    return mil_expect(b, "}", NULL);
}

/* [NAME = dict<string, string>({{"a", "b"}, ...}), ...] */
static int32_t parse_attributes(mil_build *b) {
    int32_t n = 0;
    ANEPY_TRY(mil_advance(b));
    while (!mil_at_mark(b, ']')) {
        mil_shape shape;
        mil_span at;
        if (n++ > 0) ANEPY_TRY(mil_expect(b, ",", NULL));
        ANEPY_TRY(expect_word(b, "the name of an attribute", &at));
        ANEPY_TRY(mil_expect(b, "=", NULL));
        ANEPY_TRY(mil_expect(b, "dict", NULL));
        ANEPY_TRY(mil_expect(b, "<", NULL));
        for (int32_t i = 0; i < 2; i++) {
            if (i > 0) ANEPY_TRY(mil_expect(b, ",", NULL));
            ANEPY_TRY(mil_parse_type(b, &shape, &at));
            if (shape.type != ANEPY_MIL_STRING || shape.rank != 0)
                return mil_error(b->mil, at, "a program's attributes are dict<string, string>");
        }
        ANEPY_TRY(mil_expect(b, ">", NULL));
        ANEPY_TRY(mil_expect(b, "(", NULL));
        ANEPY_TRY(mil_expect(b, "{", NULL));
        for (int32_t i = 0; !mil_at_mark(b, '}'); i++) {
            if (i > 0) ANEPY_TRY(mil_expect(b, ",", NULL));
            ANEPY_TRY(skip_dict_entry(b));
        }
        ANEPY_TRY(mil_advance(b));
        ANEPY_TRY(mil_expect(b, ")", NULL));
    }
    return mil_advance(b);
}

/* Counts the word "func", so that the array of functions never has to grow. */
static int32_t count_functions(const mil_lexer *lexer) {
    int32_t n = 0;
    for (const char *p = lexer->p; lexer->end - p > 4; p++) {
        p = memchr(p, 'f', (size_t)(lexer->end - p - 4));
        if (p == NULL) break;
        n += memcmp(p, "func", 4) == 0;
        if (n == MAX_FUNCTIONS) break;
    }
    return n;
}

int32_t mil_parse_program(mil_build *b) {
    int32_t most = count_functions(&b->lexer);
    b->mil->functions = mil_alloc(b->mil, (uint64_t)(most + 1) * sizeof *b->mil->functions);
    if (b->mil->functions == NULL) return out_of_memory(b);
    ANEPY_TRY(mil_advance(b));
    ANEPY_TRY(mil_expect(b, "program", NULL));
    ANEPY_TRY(mil_expect(b, "(", NULL));
    const char *version = b->token.at.p;
    if (b->token.kind != MIL_NUMBER || b->token.at.n != 3 || memcmp(version, "1.", 2) != 0 ||
        version[2] < '0' || version[2] > '9')
        return mil_error(b->mil, b->token.at, "expected the version of the program, 1.0 to 1.9");
    b->minor = version[2] - '0';
    ANEPY_TRY(mil_advance(b));
    ANEPY_TRY(mil_expect(b, ")", NULL));
    if (mil_at_mark(b, '[')) ANEPY_TRY(parse_attributes(b));
    ANEPY_TRY(mil_expect(b, "{", NULL));
    do {
        if (b->mil->function_n == most)
            return mil_error(b->mil, b->token.at,
                             most < MAX_FUNCTIONS ? "expected 'func' here"
                                                  : "a program has at most 4096 functions");
        ANEPY_TRY(parse_function(b));
    } while (!mil_at_mark(b, '}'));
    ANEPY_TRY(mil_advance(b));
    if (b->token.kind != MIL_EOF)
        return mil_error(b->mil, b->token.at, "nothing may follow the program");
    return ANEPY_OK;
}
