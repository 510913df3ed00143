/* device/sim/interpreter.h - parses, checks and runs MIL text as the ANE would.
 *
 * The text may come from anywhere: every error names line, column and the offending words, and
 * memory and work are bounded before anything runs. Values are fp16 after every operation; how
 * results are summed and rounded is one of several named arithmetics (device/numerics.h). What the
 * hardware refuses or silently gets wrong is a named rule that can be off, reported, or an error.
 */
#ifndef ANEPY_DEVICE_SIM_INTERPRETER_H
#define ANEPY_DEVICE_SIM_INTERPRETER_H

#include "kernels/gemm.h"

#define ANEPY_MIL_RANK 5 /* most dimensions of a tensor on the ANE */

typedef enum {
    ANEPY_MIL_F16,
    ANEPY_MIL_F32,
    ANEPY_MIL_I8,
    ANEPY_MIL_U8,
    ANEPY_MIL_I16,
    ANEPY_MIL_U16,
    ANEPY_MIL_I32,
    ANEPY_MIL_U32,
    ANEPY_MIL_I64,
    ANEPY_MIL_U64,
    ANEPY_MIL_BOOL,
    ANEPY_MIL_STRING,
    ANEPY_MIL_TYPE_N
} anepy_mil_type;

typedef enum {
    ANEPY_CHIP_M1,
    ANEPY_CHIP_M2,
    ANEPY_CHIP_M3,
    ANEPY_CHIP_M4,
    ANEPY_CHIP_M5,
    ANEPY_CHIP_M6,
    ANEPY_CHIP_N
} anepy_chip;

typedef enum { ANEPY_RULE_OFF, ANEPY_RULE_REPORT, ANEPY_RULE_ERROR } anepy_rule_action;

/* rules.c has a table with the meaning, the default and the evidence of each. */
typedef enum {
    ANEPY_RULE_DIALECT,
    ANEPY_RULE_SCALAR_TYPE,
    ANEPY_RULE_INLINE_LITERAL,
    ANEPY_RULE_IO_ORDER,
    ANEPY_RULE_IO_FP32,
    ANEPY_RULE_FP32_COMPUTE,
    ANEPY_RULE_RETURN_VALUE,
    ANEPY_RULE_SURFACE_SIZE,
    ANEPY_RULE_SURFACE_FLOOR,
    ANEPY_RULE_SURFACE_EQUAL,
    ANEPY_RULE_EXTENT,
    ANEPY_RULE_CHANNELS,
    ANEPY_RULE_CONV_INPUTS,
    ANEPY_RULE_CONV_RUNTIME_GROUPS,
    ANEPY_RULE_KERNEL_WIDTH,
    ANEPY_RULE_RANK,
    ANEPY_RULE_MATMUL_K,
    ANEPY_RULE_MATMUL_BROADCAST,
    ANEPY_RULE_RUNTIME_BROADCAST,
    ANEPY_RULE_WIDTH,
    ANEPY_RULE_LAST_AXIS_SLICE,
    ANEPY_RULE_LAST_AXIS_CONCAT,
    ANEPY_RULE_SATURATION,
    ANEPY_RULE_SUBNORMAL,
    ANEPY_RULE_SDPA_MASK,
    ANEPY_RULE_SDPA_LENGTH,
    ANEPY_RULE_CAST,
    ANEPY_RULE_ROOT_AFTER_REDUCE,
    ANEPY_RULE_REDUCE_LONG,
    ANEPY_RULE_SQUARE,
    ANEPY_RULE_REDUCE_TIMES_ZERO,
    ANEPY_RULE_LAYER_NORM,
    ANEPY_RULE_WEIGHTS_SIZE,
    ANEPY_RULE_WEIGHT_TYPE,
    ANEPY_RULE_WEIGHT_UNUSED,
    ANEPY_RULE_COMPILE_BUDGET,
    ANEPY_RULE_N
} anepy_mil_rule;

typedef struct {
    anepy_chip chip;
    int32_t numerics;             /* of device/numerics.h */
    uint8_t action[ANEPY_RULE_N]; /* anepy_rule_action */
    uint64_t memory_nbytes;       /* most the program may take, text to buffers; 0: 16 GiB */
    uint64_t work;                /* most multiply-adds or elements per run; 0: 2^50 */
    int32_t budget; /* texts that a process may parse by rule compile_budget; 0: 119 */
} anepy_mil_options;

void anepy_mil_options_default(anepy_mil_options *options, anepy_chip chip);
/* Makes it an error to parse more than n texts in this process; n = 0 changes nothing. */
void anepy_mil_options_limit(anepy_mil_options *options, int32_t n);
anepy_chip anepy_mil_chip(int32_t number); /* 1 to 6 for M1 to M6; 0: M4 */

const char *anepy_mil_rule_name(int32_t rule);    /* NULL beyond the last */
const char *anepy_mil_rule_meaning(int32_t rule); /* NULL beyond the last */
const char *anepy_mil_op_name(int32_t index);     /* NULL beyond the last */
const char *anepy_mil_type_name(int32_t type);    /* NULL beyond the last */

/* path is as in BLOBFILE, e.g. "@model_path/weights/weight.bin". */
typedef struct {
    const char *path;
    const uint8_t *data;
    uint64_t n;
} anepy_mil_file;

typedef struct {
    const char *name;
    anepy_mil_type type;
    int32_t rank;
    int64_t dims[ANEPY_MIL_RANK];
    uint64_t nbytes;
} anepy_mil_value_info;

typedef struct {
    int32_t line, column; /* both from 1; 0, 0: the fault is not in the text */
} anepy_mil_position;

typedef struct anepy_mil anepy_mil;

/* Parses, checks, decodes the weights and plans the buffers: text and files are not needed later.
 * where (may be NULL) gets the position that the error sentence begins with. */
int32_t anepy_mil_parse(anepy_mil **out, const char *text, uint64_t n, const anepy_mil_file *files,
                        int32_t file_n, const anepy_mil_options *options,
                        anepy_mil_position *where);
void anepy_mil_free(anepy_mil *mil); /* accepts NULL */

int32_t anepy_mil_function_n(const anepy_mil *mil);
const char *anepy_mil_function_name(const anepy_mil *mil, int32_t function);
int32_t anepy_mil_input_n(const anepy_mil *mil, int32_t function);
int32_t anepy_mil_output_n(const anepy_mil *mil, int32_t function);
/* index counts in declaration order, or with sorted != 0 by ascending name, the order of surfaces.
 */
const anepy_mil_value_info *anepy_mil_input(const anepy_mil *mil, int32_t function, int32_t index,
                                            int32_t sorted);
const anepy_mil_value_info *anepy_mil_output(const anepy_mil *mil, int32_t function, int32_t index,
                                             int32_t sorted);

/* Runs one function. inputs and outputs are surfaces in ascending name order, raw elements of the
 * declared types from their start; nbytes are the surfaces' sizes. Only kernels, pool and scratch
 * of gemm are used. One run of a program at a time; the caller's floating-point mode is restored.
 * After a failure the outputs are undefined. where (may be NULL) gets the position in the text. */
int32_t anepy_mil_run(anepy_mil *mil, int32_t function, const void *const *inputs,
                      const uint64_t *input_nbytes, void *const *outputs,
                      const uint64_t *output_nbytes, const anepy_gemm *gemm,
                      anepy_mil_position *where);

/* What reports of sums call a function; the text must stay. */
void anepy_mil_label(anepy_mil *mil, int32_t function, const char *label);
/* From now on every product of every program in this process notes its largest sum; 0: no more. */
void anepy_mil_watch(int32_t on);
/* "PROGRAM RESULT" of a product and its largest sum, 65536 if infinite; NULL beyond the last. */
const char *anepy_mil_headroom(int32_t index, double *largest);

int32_t anepy_mil_compiles(void); /* texts parsed by this process so far */

/* How often a rule was broken in parsing and running so far; *first is the first sentence (NULL if
 * none; owned by mil). */
uint64_t anepy_mil_report(const anepy_mil *mil, int32_t rule, const char **first);

#endif
