/* device/sim/interpreter_internal.h - what the files of the interpreter share.
 *
 * lex.c reads tokens, parse.c builds functions of operations, op_table.c lists their types, op_*.c
 * check and run them, ops.c binds arguments to their parameters, plan.c gives buffers, run.c
 * executes.
 *
 * At run time every tensor is a row-major float array whose elements are exact fp16 numbers: the
 * products want fp32 operands, and rounding after each operation is all that makes it fp16. Unless
 * numerics are exact, codes of infinity and NaN are the numbers 65536 and up. */
#ifndef ANEPY_DEVICE_SIM_INTERPRETER_INTERNAL_H
#define ANEPY_DEVICE_SIM_INTERPRETER_INTERNAL_H

#include <stdatomic.h>

#include "device/numerics.h"
#include "device/sim/activations.h"
#include "device/sim/interpreter.h"

#define MIL_RANK ANEPY_MIL_RANK
#define MIL_PARAMS 10
#define MIL_PIECE 4096  /* elements of a piece of an element-wise operation: they fit the cache */
#define MIL_COLUMNS 512 /* columns per product: bounds the panels to 2 MiB */
#define MIL_SLACK 64    /* floats after every buffer that products may read */
#define MIL_MAX_EXTENT INT64_C(0x7fffffff)

/* Under AddressSanitizer memory that is not in use is poisoned, so that a step outside one value is
 * seen although all values share one stretch. */
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MIL_GUARDED 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define MIL_GUARDED 1
#endif
#if defined(MIL_GUARDED)
#include <sanitizer/asan_interface.h>
#define MIL_GUARD(p, nbytes) ASAN_POISON_MEMORY_REGION(p, nbytes)
#define MIL_UNGUARD(p, nbytes) ASAN_UNPOISON_MEMORY_REGION(p, nbytes)
#define MIL_REDZONE 64 /* bytes between allocations */
#else
#define MIL_GUARD(p, nbytes) ((void)(p), (void)(nbytes))
#define MIL_UNGUARD(p, nbytes) ((void)(p), (void)(nbytes))
#define MIL_REDZONE 0
#endif

/* A stretch of the text, for messages and names. */
typedef struct {
    const char *p;
    int32_t n, line, column;
} mil_span;

typedef struct {
    anepy_mil_type type;
    int32_t rank;
    int64_t dims[MIL_RANK];
} mil_shape;

typedef enum { MIL_INPUT, MIL_CONST, MIL_RESULT } mil_kind;
/* How a constant is held: as elements of its type in a weight file, as int64, float or characters.
 */
typedef enum { MIL_BLOB, MIL_INTS, MIL_FLOATS, MIL_TEXT } mil_form;

typedef struct mil_op mil_op;

typedef struct mil_value {
    const char *name;
    mil_span at;      /* where it is declared */
    mil_span type_at; /* its type there */
    mil_shape shape;
    int64_t n; /* elements */
    mil_kind kind;
    int32_t literal; /* written inside an argument list */
    mil_op *maker;   /* of a result */
    /* constants */
    mil_form form;
    const void *raw; /* the elements in the given form; of a weight file only while parsing */
    float *data;     /* the elements as floats, from when something computes with them */
    /* A view shares the elements of its base from `shift` on; base is never a view itself. */
    struct mil_value *base;
    int64_t shift;
    int32_t last;       /* of a base: index of the last operation that needs its elements */
    int32_t given_back; /* 1: the plan has given its place to others */
    int64_t place;      /* of a base that is no constant: floats from the start of the buffers */
} mil_value;

typedef struct mil_build mil_build;
typedef struct mil_run mil_run;
typedef struct mil_op_type mil_op_type;

typedef enum {
    MIL_END,
    MIL_TENSOR,  /* any value, decoded if constant */
    MIL_DATA,    /* a constant whose elements are read while parsing */
    MIL_TENSORS, /* a list (a, b, ...) or one tensor */
    MIL_INT,     /* this kind and those below are constants */
    MIL_INT_LIST,
    MIL_FLOAT,
    MIL_BOOL,
    MIL_BOOL_LIST,
    MIL_STRING
} mil_param_kind;

typedef struct {
    const char *name;
    uint8_t kind, optional;
} mil_param;

struct mil_op_type {
    const char *name;
    mil_param params[MIL_PARAMS];
    /* Infers and checks the result; prepares a view or the numbers for run. */
    int32_t (*check)(mil_build *b, mil_op *op);
    void (*run)(mil_run *r, const mil_op *op);
    int32_t code; /* tells operations with the same check and run apart */
};

struct mil_op {
    const mil_op_type *type;
    mil_span at;
    mil_value *arg[MIL_PARAMS];
    mil_span arg_at[MIL_PARAMS];
    mil_value **list; /* of the MIL_TENSORS parameter */
    int32_t list_n;
    mil_value **out;
    int32_t out_n;
    int32_t skip;  /* 1: a view or constant, nothing to run */
    int64_t a[24]; /* numbers that check leaves for run */
    float f[4];
    int64_t scratch_n; /* floats of scratch */
    int32_t columns;   /* of its widest product; 0: none */
};

typedef struct {
    const char *name, *label;
    mil_value **inputs, **outputs;               /* in declaration order */
    mil_value **sorted_inputs, **sorted_outputs; /* by name */
    anepy_mil_value_info *info; /* inputs, outputs, sorted inputs, sorted outputs */
    int32_t input_n, output_n;
    mil_op **ops;
    int32_t op_n;
    int64_t buffer_n, scratch_n; /* floats */
    int32_t columns;
    uint64_t work;
} mil_function;

typedef struct mil_block {
    struct mil_block *next;
    uint64_t nbytes, used;
    int32_t mapped;
} mil_block;

struct anepy_mil {
    anepy_mil_options options;
    anepy_mil_position where;
    const anepy_kernels *kernels;
    const anepy_numerics *numerics;
    float *tables; /* of activations.h, if numerics have them */
    mil_block *blocks;
    uint64_t memory_nbytes;
    mil_function *functions;
    int32_t function_n;
    float *buffers, *scratch, *panels;
    int64_t buffer_n;
    uint64_t mapped_nbytes;
    uint64_t weight_nbytes;
    struct {
        uint64_t count;
        char *first;
    } reports[ANEPY_RULE_N];
};

/* ------------------------------------------------------------------------- rules.c, memory.c */

/* "line 3, column 7, at 'word': ..."; remembers the position. */
int32_t mil_error(anepy_mil *mil, mil_span at, const char *format, ...) ANEPY_PRINTF(3, 4);
int32_t mil_no_memory(anepy_mil *mil, mil_span at); /* the failure after mil_alloc returned NULL */
/* Fails, reports or does nothing, depending on the action of the rule. */
int32_t mil_rule(anepy_mil *mil, anepy_mil_rule rule, mil_span at, uint64_t count,
                 const char *format, ...) ANEPY_PRINTF(5, 6);
int mil_rule_on(const anepy_mil *mil, anepy_mil_rule rule);

/* 64-byte aligned, zeroed, freed with mil; NULL beyond the memory limit of the options, or if the
 * system has none. */
void *mil_alloc(anepy_mil *mil, uint64_t nbytes);
/* Appends to a growing array of pointers in memory of mil_alloc; returns 0 if there is none. */
int mil_append(anepy_mil *mil, void ***array, int32_t *n, int32_t *cap, void *item);
void mil_free_blocks(anepy_mil *mil);

/* ----------------------------------------------------------------------------------- shape.c */

const char *mil_type_name(anepy_mil_type type);
int mil_type_find(mil_span name, anepy_mil_type *type);
uint64_t mil_type_nbytes(anepy_mil_type type);
int64_t mil_elements(const mil_shape *shape); /* -1: more than MIL_MAX_EXTENT */
/* "tensor<fp16, [1, 2]>" into text[cap]; returns text. */
const char *mil_shape_text(const mil_shape *shape, char *text, size_t cap);
int mil_shape_equal(const mil_shape *a, const mil_shape *b);
int mil_span_is(mil_span span, const char *word);
ANEPY_INLINE int mil_is_float(anepy_mil_type type) { return type <= ANEPY_MIL_F32; }
ANEPY_INLINE int mil_is_int(anepy_mil_type type) {
    return type >= ANEPY_MIL_I8 && type <= ANEPY_MIL_U64;
}
ANEPY_INLINE int64_t mil_product(const int64_t *dims, int32_t first, int32_t end) {
    int64_t n = 1;
    for (int32_t i = first; i < end; i++) n *= dims[i];
    return n;
}

/* ------------------------------------------------------------------------------------- lex.c */

typedef enum { MIL_WORD, MIL_NUMBER, MIL_QUOTED, MIL_MARK, MIL_ARROW, MIL_EOF } mil_token_kind;

typedef struct {
    mil_token_kind kind;
    mil_span at; /* of MIL_QUOTED without the quotes */
} mil_token;

typedef struct {
    const char *p, *end, *line_start;
    int32_t line;
} mil_lexer;

int32_t mil_next_token(anepy_mil *mil, mil_lexer *lexer, mil_token *out);
int mil_parse_int(mil_span text, int64_t *out);
int mil_parse_float(mil_span text, double *out); /* decimal, hexadecimal, inf, nan; any sign */

/* ------------------------------------------------------------------------------ parse.c, ops.c */

struct mil_build {
    anepy_mil *mil;
    mil_lexer lexer;
    mil_token token; /* the one not yet consumed */
    const anepy_mil_file *files;
    uint8_t *file_used;
    int32_t file_n;
    int32_t minor; /* of program(1.minor) */
    int32_t depth;
    uint64_t value_total;
    mil_function *function;
    int32_t op_cap;
    mil_value **names; /* hash table of the function's values */
    uint32_t name_cap, name_n;
    mil_value **records; /* hash table of blob constants by payload */
    uint32_t record_cap, record_n;
};

/* An argument as parsed: one value, or a list in parentheses. */
typedef struct {
    mil_span name, at;
    mil_value *value;
    mil_value **list;
    int32_t list_n;
} mil_argument;

int32_t mil_parse_program(mil_build *b);
/* consts.c: the parser's part for literals and constants. */
int32_t mil_parse_type(mil_build *b, mil_shape *shape, mil_span *at);
int32_t mil_parse_literal(mil_build *b, mil_value **out); /* TYPE ( ... ), TYPE not yet read */
int32_t mil_advance(mil_build *b);
int32_t mil_expect(mil_build *b, const char *mark, mil_span *at);
int mil_at_mark(const mil_build *b, char mark);
mil_value *mil_new_value(mil_build *b, mil_kind kind, mil_span at);
int32_t mil_decode(mil_build *b, mil_value *v, mil_span at);

/* op_table.c: all operation types. */
const mil_op_type *mil_op_find(mil_span name);
/* Why an operation of MIL is not available on the ANE; NULL: no such operation is known. */
const char *mil_op_refused(mil_span name);

int32_t mil_op_bind(mil_build *b, mil_op *op, const mil_argument *arguments, int32_t n);
int32_t mil_add_op(mil_build *b, mil_op *op); /* appends it to the function */

/* Fails unless out[index] is declared with the inferred shape. */
int32_t mil_declare(mil_build *b, mil_op *op, int32_t index, const mil_shape *shape);
int32_t mil_want_outputs(mil_build *b, mil_op *op, int32_t n);
/* Rules on the extents and channels of any tensor on the ANE. */
int32_t mil_check_limits(mil_build *b, const mil_value *v);
/* Makes out[index] a view of v from element shift on. */
void mil_make_view(mil_op *op, int32_t index, mil_value *v, int64_t shift);
int mil_is_const(const mil_value *v);
int64_t mil_int_at(const mil_value *v, int64_t index);
double mil_float_at(const mil_value *v, int64_t index);
/* Value of an optional scalar parameter, or `otherwise`. */
int64_t mil_int_or(const mil_op *op, int32_t slot, int64_t otherwise);
double mil_float_or(const mil_op *op, int32_t slot, double otherwise);
const char *mil_string_or(const mil_op *op, int32_t slot, const char *otherwise);
/* Fails unless a list parameter has exactly n entries. */
int32_t mil_want_list(mil_build *b, const mil_op *op, int32_t slot, int64_t n);
/* Makes an axis in [-rank, rank) non-negative; fails outside. */
int32_t mil_want_axis(mil_build *b, const mil_op *op, int32_t slot, int64_t value, int32_t rank,
                      int32_t *out);
/* Fails unless the parameter is fp16, or fp32 where a rule lets it pass. */
int32_t mil_want_float(mil_build *b, const mil_op *op, int32_t slot);
int32_t mil_want_same_type(mil_build *b, const mil_op *op, int32_t slot, int32_t other);

extern const mil_op_type MIL_ELEMENTWISE[], MIL_SHAPES[], MIL_PRODUCTS[], MIL_REDUCTIONS[],
    MIL_QUANTIZERS[]; /* each ends with a NULL name */

/* -------------------------------------------------------------------------------------- plan.c */

int32_t mil_plan(anepy_mil *mil, mil_function *f);

/* --------------------------------------------------------------------------- run.c, multiply.c */

struct mil_run {
    anepy_mil *mil;
    const mil_function *function;
    anepy_gemm gemm;
    float *scratch;
    _Atomic uint64_t saturated, flushed, cropped; /* of the current operation */
    _Atomic uint32_t largest;                     /* of its sums, as the bits of a float */
};

float *mil_data(const mil_run *r, const mil_value *v);
/* Rounds p[n] to fp16 in place as the chip does, with its subnormals and saturation, and counts
 * both. Callable on any thread of the pool. */
void mil_round(mil_run *r, float *p, int64_t n);
/* Calls fn for every index, on all threads. */
void mil_each(mil_run *r, int64_t count, anepy_loop_fn fn, void *context);
/* Calls fn for ranges [first, first + n) of at most MIL_PIECE elements, on all threads. */
typedef void (*mil_span_fn)(void *context, int64_t first, int64_t n);
void mil_each_piece(mil_run *r, int64_t n, mil_span_fn fn, void *context);
void mil_round_all(mil_run *r, float *p, int64_t n);
/* op_reduce.c: soft-max of a row, not yet rounded. */
void mil_softmax_row(mil_run *r, float *row, int64_t n);
/* What a float holds for an infinite number of fp16. */
float mil_infinity(const anepy_mil *mil);
/* Fp16 codes as numbers, and back. */
void mil_from_half(const anepy_mil *mil, float *dst, const uint16_t *src, int64_t n);
void mil_to_half(const anepy_mil *mil, uint16_t *dst, const float *src, int64_t n);
/* C[m, n] = bias + A . B for any n, with sums as the numerics have them. Fixed sums are fp16
 * numbers; others are fp32: mil_round_sums makes both fp16. pad: scratch of mil_multiply_scratch_n
 * floats. */
typedef struct {
    float *c;
    const float *a, *b;
    const float *bias; /* what sums begin with, of each row or column; NULL: zero */
    int32_t bias_by_column;
    int64_t m, n, k, ldc, a_row, a_step, ldb;
    int32_t b_transposed;
} mil_matmul;
void mil_multiply(mil_run *r, const mil_matmul *s, float *pad);
int64_t mil_multiply_scratch_n(const anepy_mil *mil, int64_t m, int64_t n, int64_t k,
                               int32_t b_transposed);
void mil_round_sums(mil_run *r, float *p, int64_t n);
/* headroom.c */
int mil_watched(void);
void mil_note_sums(const char *program, const char *op, float largest);
/* fixed.c: the same for numerics with fixed sums. */
void mil_fixed_multiply(mil_run *r, const mil_matmul *s, float *scratch);
int64_t mil_fixed_scratch_n(int64_t n, int64_t k);

/* `count` products of one size. Their C follow each other in memory. dims says which A and B each
 * uses: per batch dimension, innermost first, its extent and the steps of A and B in matrices. */
typedef struct {
    mil_matmul one; /* the first */
    int64_t count;
    const int64_t *dims;
    int64_t dim_n;
} mil_batch;
void mil_multiply_batch(mil_run *r, const mil_batch *s, float *scratch);
int64_t mil_multiply_batch_scratch_n(const anepy_mil *mil, const mil_batch *s);

#endif
