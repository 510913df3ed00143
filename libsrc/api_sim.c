/* api_sim.c - exported functions for any MIL text: they parse, describe and run it, on the
 * simulator or on a device that takes MIL text. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "device/device.h"
#include "device/sim/interpreter.h"
#include "device/traits.h"
#include "runtime/memory.h"

_Static_assert(sizeof(anepy_sim_options) == 96, "sim options");
_Static_assert(sizeof(anepy_sim_tensor) == 72, "sim tensor");
_Static_assert(sizeof(anepy_sim_report) == 496, "sim report");

struct anepy_sim {
    anepy_mil *mil;
    anepy_pool *pool;
    anepy_gemm gemm;
    const anepy_trial_ops *ops; /* of the device; NULL: the simulator runs it */
    anepy_trial *trial;
    int32_t compiled;
    _Atomic int32_t busy;
};

static int32_t read_options(const anepy_sim_options *o, const anepy_traits *traits,
                            anepy_mil_options *out) {
    if (o->struct_size < sizeof *o)
        return anepy_fail(ANEPY_E_ARGUMENT, "sim options have %u bytes, expected %zu",
                          o->struct_size, sizeof *o);
    if (o->chip < 0 || o->chip > ANEPY_CHIP_N)
        return anepy_fail(ANEPY_E_ARGUMENT, "chip %d, expected 1 to %d for M1 to M%d", o->chip,
                          ANEPY_CHIP_N, ANEPY_CHIP_N);
    if (o->file_n < 0 || o->action_n < 0 || o->action_n > ANEPY_RULE_N)
        return anepy_fail(ANEPY_E_ARGUMENT, "%d files, %d rules", o->file_n, o->action_n);
    anepy_mil_options_default(out, anepy_mil_chip(o->chip > 0 ? o->chip : traits->chip));
    out->memory_nbytes = o->memory_nbytes;
    out->work = o->work;
    for (int32_t i = 0; o->actions != NULL && i < o->action_n; i++) {
        if (o->actions[i] == 255) continue;
        if (o->actions[i] > ANEPY_RULE_ERROR)
            return anepy_fail(ANEPY_E_ARGUMENT, "rule %s: action %d, expected 0, 1, 2 or 255",
                              anepy_mil_rule_name(i), o->actions[i]);
        out->action[i] = o->actions[i];
    }
    out->numerics = traits->numerics;
    anepy_mil_options_limit(out, traits->fails);
    return ANEPY_OK;
}

static int32_t start_trial(anepy_sim *sim, const anepy_device_type *type, const char *detail,
                           const anepy_sim_options *o) {
    anepy_trial_source source = {o->text, o->text_n, o->paths, o->files, o->file_nbytes, o->file_n};
    sim->compiled = 1;
    if (type == &anepy_device_sim) return ANEPY_OK;
    ANEPY_TRY(type->probe());
    if (type->trial == NULL)
        return anepy_fail(ANEPY_E_UNSUPPORTED, "device %s runs no MIL text; use sim", type->name);
    ANEPY_TRY(type->trial->create(&sim->trial, &source, detail, &sim->compiled));
    sim->ops = type->trial;
    return ANEPY_OK;
}

static int32_t parse(anepy_sim *sim, const anepy_sim_options *o, int32_t *where) {
    anepy_mil_options options;
    anepy_mil_position position = {0, 0};
    anepy_traits traits;
    const char *detail;
    const anepy_device_type *type = anepy_device_find(o->device ? o->device : "sim", &detail);
    if (type == NULL) return ANEPY_E_NAME;
    ANEPY_TRY(anepy_traits_parse(&traits, detail));
    ANEPY_TRY(read_options(o, &traits, &options));
    if (type != &anepy_device_sim)
        for (int32_t i = 0; i < ANEPY_RULE_N; i++)
            options.action[i] = anepy_min_i32(options.action[i], ANEPY_RULE_REPORT);
    anepy_mil_file *files = calloc((size_t)o->file_n + 1, sizeof *files);
    if (files == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for %d files", o->file_n);
    for (int32_t i = 0; i < o->file_n; i++)
        files[i] = (anepy_mil_file){o->paths[i], o->files[i], o->file_nbytes[i]};
    int32_t status =
        anepy_mil_parse(&sim->mil, o->text, o->text_n, files, o->file_n, &options, &position);
    free(files);
    where[0] = position.line;
    where[1] = position.column;
    return status == ANEPY_OK ? start_trial(sim, type, detail, o) : status;
}

static int32_t prepare(anepy_sim *sim, int32_t threads) {
    sim->gemm.kernels = anepy_kernels_get();
    ANEPY_TRY(anepy_pool_create(&sim->pool, threads));
    sim->gemm.pool = sim->pool;
    sim->gemm.scratch_n = anepy_round_up(anepy_gemm_scratch_n(1), 16);
    sim->gemm.scratch = anepy_heap_alloc((uint64_t)sim->gemm.scratch_n *
                                         (uint64_t)anepy_pool_threads(sim->pool) * sizeof(float));
    return sim->gemm.scratch != NULL ? ANEPY_OK
                                     : anepy_fail(ANEPY_E_MEMORY, "no memory for the products");
}

int32_t anepy_sim_create(anepy_sim **out, const anepy_sim_options *options, int32_t *where) {
    where[0] = where[1] = 0;
    anepy_sim *sim = calloc(1, sizeof *sim);
    if (sim == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for a program");
    int32_t status = parse(sim, options, where);
    if (status == ANEPY_OK) status = prepare(sim, options->threads);
    if (status != ANEPY_OK) {
        anepy_sim_free(sim);
        return status;
    }
    *out = sim;
    return ANEPY_OK;
}

void anepy_sim_free(anepy_sim *sim) {
    if (sim == NULL) return;
    if (sim->ops != NULL) sim->ops->release(sim->trial);
    anepy_pool_free(sim->pool);
    anepy_heap_free(sim->gemm.scratch);
    anepy_mil_free(sim->mil);
    free(sim);
}

int32_t anepy_sim_compiled(const anepy_sim *sim) { return sim->compiled; }

int32_t anepy_sim_reload(anepy_sim *sim, const anepy_sim_options *o) {
    anepy_trial_source source = {NULL, 0, o->paths, o->files, o->file_nbytes, o->file_n};
    if (o->struct_size < sizeof *o || o->file_n < 0)
        return anepy_fail(ANEPY_E_ARGUMENT, "sim options have %u bytes and %d files",
                          o->struct_size, o->file_n);
    if (atomic_exchange(&sim->busy, 1))
        return anepy_fail(ANEPY_E_BUSY, "this program is running in another thread");
    int32_t status = sim->ops != NULL ? sim->ops->reload(sim->trial, &source) : ANEPY_OK;
    atomic_store(&sim->busy, 0);
    return status;
}

const char *anepy_sim_function_name(const anepy_sim *sim, int32_t index) {
    return anepy_mil_function_name(sim->mil, index);
}

int32_t anepy_sim_get_tensor(const anepy_sim *sim, anepy_sim_tensor *out, int32_t function,
                             int32_t output, int32_t index) {
    const anepy_mil_value_info *(*find)(const anepy_mil *, int32_t, int32_t, int32_t) =
        output ? anepy_mil_output : anepy_mil_input;
    const anepy_mil_value_info *info = find(sim->mil, function, index, 0), *sorted;
    if (info == NULL)
        return anepy_fail(ANEPY_E_ARGUMENT, "function %d has no %s %d", function,
                          output ? "output" : "input", index);
    uint32_t size = out->struct_size;
    *out = (anepy_sim_tensor){.struct_size = size,
                              .type = (int32_t)info->type,
                              .name = info->name,
                              .rank = info->rank,
                              .nbytes = info->nbytes};
    memcpy(out->dims, info->dims, sizeof out->dims);
    /* Names are unique within a function. */
    while ((sorted = find(sim->mil, function, out->slot, 1)) != NULL && sorted->name != info->name)
        out->slot++;
    return ANEPY_OK;
}

int32_t anepy_sim_run(anepy_sim *sim, int32_t function, const void *const *inputs,
                      const uint64_t *input_nbytes, void *const *outputs,
                      const uint64_t *output_nbytes, int32_t *where) {
    anepy_mil_position position = {0, 0};
    if (atomic_exchange(&sim->busy, 1))
        return anepy_fail(ANEPY_E_BUSY, "this program is running in another thread");
    int32_t status;
    if (sim->ops == NULL) {
        status = anepy_mil_run(sim->mil, function, inputs, input_nbytes, outputs, output_nbytes,
                               &sim->gemm, &position);
    } else {
        anepy_trial_surfaces surfaces = {function,
                                         anepy_mil_input_n(sim->mil, function),
                                         anepy_mil_output_n(sim->mil, function),
                                         inputs,
                                         input_nbytes,
                                         outputs,
                                         output_nbytes};
        status = sim->ops->run(sim->trial, &surfaces);
    }
    atomic_store(&sim->busy, 0);
    where[0] = position.line;
    where[1] = position.column;
    return status;
}

int32_t anepy_sim_get_report(const anepy_sim *sim, anepy_sim_report *out, int32_t rule) {
    const char *first = NULL;
    if (anepy_mil_rule_name(rule) == NULL)
        return anepy_fail(ANEPY_E_ARGUMENT, "rule %d of %d", rule, ANEPY_RULE_N);
    uint32_t size = out->struct_size;
    memset(out, 0, sizeof *out);
    out->struct_size = size;
    out->count = anepy_mil_report(sim->mil, rule, &first);
    if (first != NULL) strncpy(out->first, first, sizeof out->first - 1);
    return ANEPY_OK;
}

const char *anepy_sim_rule_name(int32_t index) { return anepy_mil_rule_name(index); }

const char *anepy_sim_rule_meaning(int32_t index) { return anepy_mil_rule_meaning(index); }

int32_t anepy_sim_rule_action(int32_t index) {
    anepy_mil_options options;
    anepy_mil_options_default(&options, ANEPY_CHIP_M4);
    return anepy_mil_rule_name(index) != NULL ? options.action[index] : -1;
}

void anepy_sim_watch(int32_t on) { anepy_mil_watch(on); }

const char *anepy_sim_headroom(int32_t index, double *largest) {
    return anepy_mil_headroom(index, largest);
}

const char *anepy_sim_op_name(int32_t index) { return anepy_mil_op_name(index); }

const char *anepy_sim_type_name(int32_t index) { return anepy_mil_type_name(index); }
