/* device/sim/interpreter.c - makes, describes and frees a parsed program. */
#include "device/sim/interpreter_internal.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/memory.h"

#define MOST_TEXT ((uint64_t)256 << 20)
#define DEFAULT_MEMORY ((uint64_t)16 << 30)
#define DEFAULT_WORK ((uint64_t)1 << 50)

#define COMPILE_BUDGET 119

static _Atomic int32_t compiles; /* in this process */

static const mil_span NOWHERE = {"", 0, 0, 0};

/* All functions share one mapping, because only one runs at a time. */
static int32_t map_buffers(anepy_mil *mil) {
    int64_t buffers = 0, scratch = 0;
    int32_t columns = 0;
    for (int32_t i = 0; i < mil->function_n; i++) {
        mil_function *f = &mil->functions[i];
        ANEPY_TRY(mil_plan(mil, f));
        if (f->buffer_n > buffers) buffers = f->buffer_n;
        if (f->scratch_n > scratch) scratch = f->scratch_n;
        if (f->columns > columns) columns = f->columns;
    }
    int64_t panels = columns > 0 ? anepy_gemm_panels_n(anepy_min_i32(columns, MIL_COLUMNS)) : 0;
    double total = ((double)buffers + (double)scratch + (double)panels) * sizeof(float);
    if (total + (double)mil->memory_nbytes > (double)mil->options.memory_nbytes)
        return mil_no_memory(mil, NOWHERE);
    scratch = anepy_round_up(scratch, 64);
    mil->mapped_nbytes = (uint64_t)(buffers + scratch + panels + 64) * sizeof(float);
    mil->buffers = anepy_map(mil->mapped_nbytes);
    if (mil->buffers == NULL) return mil_no_memory(mil, NOWHERE);
    mil->buffer_n = buffers;
    mil->scratch = mil->buffers + buffers;
    mil->panels = mil->scratch + scratch;
    return ANEPY_OK;
}

static int32_t check_weights(mil_build *b) {
    if (b->mil->weight_nbytes > (uint64_t)2 << 30)
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_WEIGHTS_SIZE, NOWHERE, 1,
                           "the program has %llu MiB of weights, 2048 is the most",
                           (unsigned long long)(b->mil->weight_nbytes >> 20)));
    for (int32_t i = 0; i < b->file_n; i++)
        if (!b->file_used[i])
            ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_WEIGHT_UNUSED, NOWHERE, 1,
                               "nothing in the program names %.200s", b->files[i].path));
    return ANEPY_OK;
}

static int32_t build(anepy_mil *mil, const char *text, uint64_t n, const anepy_mil_file *files,
                     int32_t file_n) {
    mil->kernels = anepy_kernels_get();
    mil->numerics = anepy_numerics_at(mil->options.numerics);
    if (mil->kernels == NULL) return ANEPY_E_NAME;
    if (mil->numerics->tables) {
        mil->tables = mil_alloc(mil, MIL_TABLE_N * MIL_TABLE_POINTS * sizeof(float));
        if (mil->tables == NULL) return mil_no_memory(mil, NOWHERE);
        mil_tables_make(mil->tables);
    }
    if (n > MOST_TEXT)
        return mil_error(mil, NOWHERE, "a MIL text of %llu bytes; %llu is the most",
                         (unsigned long long)n, (unsigned long long)MOST_TEXT);
    /* Operations keep pointers into the text for the reports of a run. */
    char *copy = mil_alloc(mil, n + 1);
    mil_build b = {.mil = mil, .files = files, .file_n = file_n};
    b.file_used = mil_alloc(mil, (uint64_t)file_n + 1);
    if (copy == NULL || b.file_used == NULL) return mil_no_memory(mil, NOWHERE);
    if (n > 0) memcpy(copy, text, n);
    b.lexer = (mil_lexer){copy, copy + n, copy, 1};
    ANEPY_TRY(mil_parse_program(&b));
    ANEPY_TRY(check_weights(&b));
    ANEPY_TRY(map_buffers(mil));
    int32_t n_compiled = atomic_fetch_add(&compiles, 1) + 1;
    int32_t budget = mil->options.budget > 0 ? mil->options.budget : COMPILE_BUDGET;
    if (n_compiled <= budget) return ANEPY_OK;
    return mil_rule(mil, ANEPY_RULE_COMPILE_BUDGET, NOWHERE, 1,
                    "compilation %d of this process, %d are safe: put programs into one text, or "
                    "pass weights as inputs",
                    n_compiled, budget);
}

int32_t anepy_mil_compiles(void) { return atomic_load(&compiles); }

int32_t anepy_mil_parse(anepy_mil **out, const char *text, uint64_t n, const anepy_mil_file *files,
                        int32_t file_n, const anepy_mil_options *options,
                        anepy_mil_position *where) {
    *out = NULL;
    if (where != NULL) *where = (anepy_mil_position){0, 0};
    anepy_mil *mil = calloc(1, sizeof *mil);
    if (mil == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for a program");
    mil->options = *options;
    if (mil->options.memory_nbytes == 0) mil->options.memory_nbytes = DEFAULT_MEMORY;
    if (mil->options.work == 0) mil->options.work = DEFAULT_WORK;
    int32_t status = build(mil, text, n, files, file_n);
    if (where != NULL) *where = mil->where;
    if (status == ANEPY_OK) *out = mil;
    else anepy_mil_free(mil);
    return status;
}

void anepy_mil_free(anepy_mil *mil) {
    if (mil == NULL) return;
    MIL_UNGUARD(mil->buffers, (uint64_t)mil->buffer_n * sizeof(float));
    anepy_unmap(mil->buffers, mil->mapped_nbytes);
    mil_free_blocks(mil);
    free(mil);
}

int32_t anepy_mil_function_n(const anepy_mil *mil) { return mil->function_n; }

static const mil_function *function_at(const anepy_mil *mil, int32_t function) {
    return function >= 0 && function < mil->function_n ? &mil->functions[function] : NULL;
}

void anepy_mil_label(anepy_mil *mil, int32_t function, const char *label) {
    if (function_at(mil, function) != NULL) mil->functions[function].label = label;
}

const char *anepy_mil_function_name(const anepy_mil *mil, int32_t function) {
    const mil_function *f = function_at(mil, function);
    return f != NULL ? f->name : NULL;
}

int32_t anepy_mil_input_n(const anepy_mil *mil, int32_t function) {
    const mil_function *f = function_at(mil, function);
    return f != NULL ? f->input_n : 0;
}

int32_t anepy_mil_output_n(const anepy_mil *mil, int32_t function) {
    const mil_function *f = function_at(mil, function);
    return f != NULL ? f->output_n : 0;
}

const anepy_mil_value_info *anepy_mil_input(const anepy_mil *mil, int32_t function, int32_t index,
                                            int32_t sorted) {
    const mil_function *f = function_at(mil, function);
    if (f == NULL || index < 0 || index >= f->input_n) return NULL;
    return f->info + (sorted ? f->input_n + f->output_n : 0) + index;
}

const anepy_mil_value_info *anepy_mil_output(const anepy_mil *mil, int32_t function, int32_t index,
                                             int32_t sorted) {
    const mil_function *f = function_at(mil, function);
    if (f == NULL || index < 0 || index >= f->output_n) return NULL;
    return f->info + (sorted ? f->input_n + f->output_n : 0) + f->input_n + index;
}
