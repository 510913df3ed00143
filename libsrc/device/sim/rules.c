/* device/sim/rules.c - the rules of the hardware: names, defaults, reports; and error sentences.
 *
 * A rule is an error by default where several independent projects saw the compiler or the driver
 * refuse, or a number was probed (mark V in docs/neural-engine.md#facts). It is a report where the
 * program runs but may be wrong or slow, where one project alone says so (R), or where reports
 * conflict (C): refusing would reject programs that others run. Each comment begins with the mark.
 * Errors of the language itself (syntax, unknown names, types, missing weights) are no rules:
 * nothing could be run. */
#include "device/sim/interpreter_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define ERROR ANEPY_RULE_ERROR
#define REPORT ANEPY_RULE_REPORT
#define OFF ANEPY_RULE_OFF

static const struct {
    const char *name;
    uint8_t action;
    const char *meaning;
} RULES[ANEPY_RULE_N] = {
    /* V: ios18 functions inside program(1.0) are InvalidMILProgram (one commit, found by the
     * compiler's own message). */
    [ANEPY_RULE_DIALECT] = {"dialect", ERROR, "an ios18 function needs program(1.3)"},
    /* V: the old dialect writes every scalar as a rank-0 tensor; nobody tried otherwise. */
    [ANEPY_RULE_SCALAR_TYPE] = {"scalar_type", REPORT,
                                "program(1.0) writes scalars as tensor<type, []>"},
    /* C: accepted for some operations, refused for matmul's transposes in one project. */
    [ANEPY_RULE_INLINE_LITERAL] = {"inline_literal", REPORT,
                                   "matmul's transposes may have to be named constants"},
    /* V: runs, but surfaces are bound by name; harmless where the caller binds by name too. */
    [ANEPY_RULE_IO_ORDER] = {"io_order", REPORT,
                             "inputs or outputs are declared in another order than by name, in "
                             "which surfaces are bound"},
    /* V: fp16 I/O is mandatory on M1 and M2, works with a cast on M3 and later. */
    [ANEPY_RULE_IO_FP32] = {"io_fp32", ERROR, "M1 and M2 take fp16 inputs and outputs only"},
    /* V: no fp32, bf16 or int32 compute. */
    [ANEPY_RULE_FP32_COMPUTE] = {"fp32_compute", ERROR, "the ANE computes in fp16 only"},
    /* V: read in several projects. */
    [ANEPY_RULE_RETURN_VALUE] = {"return_value", ERROR,
                                 "returned names must be results of operations"},
    /* V: evaluation fails with status 0x1d. */
    [ANEPY_RULE_SURFACE_SIZE] = {"surface_size", ERROR,
                                 "a surface is smaller than the tensor bound to it"},
    /* V: 48 KiB can fail, but 4 to 8 KiB worked in M4 and M5 probes. */
    [ANEPY_RULE_SURFACE_FLOOR] = {"surface_floor", REPORT, "a surface is smaller than 48 KiB"},
    /* C: one project demands it, another runs different sizes. */
    [ANEPY_RULE_SURFACE_EQUAL] = {"surface_equal", REPORT,
                                  "the inputs' (or outputs') surfaces differ in size"},
    /* V: exact on M3 Ultra. */
    [ANEPY_RULE_EXTENT] = {"extent", ERROR,
                           "a spatial or contraction extent is above 16384 (M1 to M3) or 65536"},
    [ANEPY_RULE_CHANNELS] = {"channels", ERROR, "a tensor has more than 65536 channels"},
    /* V: rejected at 32000 on every chip; 16384 is the largest contraction that all allow. */
    [ANEPY_RULE_CONV_INPUTS] = {"conv_inputs", ERROR, "a conv reads more than 16384 channels"},
    /* V: InvalidMILProgram in two projects; a plain runtime weight works. */
    [ANEPY_RULE_CONV_RUNTIME_GROUPS] = {"conv_runtime_groups", ERROR,
                                        "a grouped conv needs a constant weight"},
    /* V: probed on M1 and M4; M2 and M3 are taken as M1. */
    [ANEPY_RULE_KERNEL_WIDTH] = {"kernel_width", ERROR,
                                 "a conv kernel is wider than 13 (M1 to M3) or 15"},
    [ANEPY_RULE_RANK] = {"rank", ERROR, "transpose and matmul take at most 4 dimensions"},
    /* R: zeros without an error. */
    [ANEPY_RULE_MATMUL_K] = {"matmul_k", REPORT,
                             "M1: the reduction of a runtime matmul is no multiple of 32: zeros"},
    /* R: unsupported broadcasts give zeros without an error. */
    [ANEPY_RULE_MATMUL_BROADCAST] = {"matmul_broadcast", REPORT,
                                     "a matmul broadcasts its batch dimensions: may give zeros"},
    /* R: one report. */
    [ANEPY_RULE_RUNTIME_BROADCAST] = {"runtime_broadcast", REPORT,
                                      "M1: broadcasting a runtime operand along the last axis "
                                      "gives zeros"},
    /* R: silent corruption; also for a width of 1. */
    [ANEPY_RULE_WIDTH] = {"width", REPORT, "the last axis is no multiple of 16"},
    /* R: beyond 4094 becomes infinite on M1 and M2 (applied); refused on M3 Ultra by one. */
    [ANEPY_RULE_LAST_AXIS_SLICE] = {"last_axis_slice", REPORT,
                                    "M1 to M3: a slice at a non-zero offset of the last axis"},
    [ANEPY_RULE_LAST_AXIS_CONCAT] = {"last_axis_concat", REPORT,
                                     "M1: a concat of slices at offsets of the last axis picks "
                                     "wrong elements"},
    /* R: infinite from about 32752 on M2 and M5 (applied), a risk on all. */
    [ANEPY_RULE_SATURATION] = {"saturation", REPORT, "a result is beyond 32752"},
    [ANEPY_RULE_SUBNORMAL] = {"subnormal", REPORT, "results below 2^-14 become zero"},
    /* V: runs, ignoring the mask (applied). */
    [ANEPY_RULE_SDPA_MASK] = {"sdpa_mask", REPORT, "scaled_dot_product_attention ignores its mask"},
    [ANEPY_RULE_SDPA_LENGTH] = {"sdpa_length", REPORT,
                                "scaled_dot_product_attention is wrong from lengths of 512"},
    /* V: refused on M1 and M2; elsewhere works at the boundary. */
    [ANEPY_RULE_CAST] = {"cast", ERROR,
                         "cast is refused on M1 and M2, and away from inputs and outputs"},
    /* V: compile failure in two projects. */
    [ANEPY_RULE_ROOT_AFTER_REDUCE] = {"root_after_reduce", ERROR,
                                      "sqrt or rsqrt of a reduction does not compile; use "
                                      "pow(x, -0.5)"},
    /* R: integers are exact to about 2048. */
    [ANEPY_RULE_REDUCE_LONG] = {"reduce_long", REPORT,
                                "a sum of more than 512 elements is done in fp16; use a matmul or "
                                "conv with ones"},
    /* R: one report. */
    [ANEPY_RULE_SQUARE] = {"square", REPORT,
                           "square may be wrong for these widths; write mul(x, x)"},
    [ANEPY_RULE_REDUCE_TIMES_ZERO] = {"reduce_times_zero", REPORT, "a reduction times zero fails"},
    [ANEPY_RULE_LAYER_NORM] = {"layer_norm", ERROR,
                               "layer_norm fails from 10240 channels on, on M1 and M2 also for "
                               "1024, 1536, 2560 and 4096"},
    /* V: read in several projects. */
    [ANEPY_RULE_WEIGHTS_SIZE] = {"weights_size", ERROR, "a program has more than 2 GiB of weights"},
    /* An inference: int8 data under an fp16 tag runs; the tag seems to be ignored. */
    [ANEPY_RULE_WEIGHT_TYPE] = {"weight_type", REPORT,
                                "a weight record has another type than its constant"},
    [ANEPY_RULE_WEIGHT_UNUSED] = {"weight_unused", REPORT,
                                  "a weight file that the program does not name"},
    /* C: 119 to 132 seen, but 169 and 250 as well. Off, because it is about the process and
     * not about the program. */
    [ANEPY_RULE_COMPILE_BUDGET] = {"compile_budget", OFF,
                                   "the process has compiled more than 119 programs"},
};

void anepy_mil_options_default(anepy_mil_options *options, anepy_chip chip) {
    memset(options, 0, sizeof *options);
    options->chip = chip;
    for (int32_t i = 0; i < ANEPY_RULE_N; i++) options->action[i] = RULES[i].action;
}

void anepy_mil_options_limit(anepy_mil_options *options, int32_t n) {
    if (n == 0) return;
    options->budget = n;
    options->action[ANEPY_RULE_COMPILE_BUDGET] = ANEPY_RULE_ERROR;
}

anepy_chip anepy_mil_chip(int32_t number) {
    return number > 0 ? (anepy_chip)(ANEPY_CHIP_M1 + number - 1) : ANEPY_CHIP_M4;
}

const char *anepy_mil_rule_name(int32_t rule) {
    return rule >= 0 && rule < ANEPY_RULE_N ? RULES[rule].name : NULL;
}

const char *anepy_mil_rule_meaning(int32_t rule) {
    return rule >= 0 && rule < ANEPY_RULE_N ? RULES[rule].meaning : NULL;
}

int mil_rule_on(const anepy_mil *mil, anepy_mil_rule rule) {
    return mil->options.action[rule] != ANEPY_RULE_OFF;
}

/* ---------------------------------------------------------------------------------- sentences */

#define SENTENCE 480 /* what anepy_last_error keeps */

static void write_sentence(char *out, mil_span at, const char *prefix, const char *format,
                           va_list args) {
    char word[44];
    int32_t n = 0;
    /* Text may hold any byte: only printable ones are repeated. */
    for (; n < at.n && n < 40; n++) word[n] = at.p[n] >= ' ' && at.p[n] <= '~' ? at.p[n] : '?';
    if (n < at.n) memcpy(word + n - 3, "...", 3);
    word[n] = '\0';
    int used = 0;
    if (at.line > 0)
        used = snprintf(out, SENTENCE, "line %d, column %d, at '%s': ", at.line, at.column,
                        n > 0 ? word : "end of text");
    used += snprintf(out + used, (size_t)(SENTENCE - used), "%s", prefix);
    vsnprintf(out + used, (size_t)(SENTENCE - used), format, args);
}

int32_t mil_error(anepy_mil *mil, mil_span at, const char *format, ...) {
    char text[SENTENCE];
    va_list args;
    va_start(args, format);
    write_sentence(text, at, "", format, args);
    va_end(args);
    mil->where = (anepy_mil_position){at.line, at.column};
    return anepy_fail(ANEPY_E_PROGRAM, "%s", text);
}

int32_t mil_no_memory(anepy_mil *mil, mil_span at) {
    return mil_error(mil, at,
                     "the program needs more than the %llu MiB it may have, or there is no memory",
                     (unsigned long long)(mil->options.memory_nbytes >> 20));
}

int32_t mil_rule(anepy_mil *mil, anepy_mil_rule rule, mil_span at, uint64_t count,
                 const char *format, ...) {
    if (!mil_rule_on(mil, rule)) return ANEPY_OK;
    int first = mil->reports[rule].count == 0;
    int error = mil->options.action[rule] == ANEPY_RULE_ERROR;
    mil->reports[rule].count += count;
    if (!first && !error) return ANEPY_OK;
    char text[SENTENCE], prefix[48];
    snprintf(prefix, sizeof prefix, "rule %s: ", RULES[rule].name);
    va_list args;
    va_start(args, format);
    write_sentence(text, at, prefix, format, args);
    va_end(args);
    if (first) {
        size_t n = strlen(text) + 1;
        /* Without memory for the sentence the report is still counted. */
        if (mil->reports[rule].first == NULL) mil->reports[rule].first = mil_alloc(mil, SENTENCE);
        if (mil->reports[rule].first != NULL) memcpy(mil->reports[rule].first, text, n);
    }
    if (!error) return ANEPY_OK;
    mil->where = (anepy_mil_position){at.line, at.column};
    return anepy_fail(ANEPY_E_PROGRAM, "%s", text);
}

uint64_t anepy_mil_report(const anepy_mil *mil, int32_t rule, const char **first) {
    uint64_t count = rule >= 0 && rule < ANEPY_RULE_N ? mil->reports[rule].count : 0;
    if (first != NULL) *first = count > 0 ? mil->reports[rule].first : NULL;
    return count;
}
