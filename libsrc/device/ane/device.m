/* device/ane/device.m - the ANE as a device of the step engine: banks (device/bank.h) whose memory
 * is IOSurfaces.
 *
 * "ane:timeout=60000" waits longer for the hardware, "ane:reuse=no" compiles anew what an earlier
 * run left, "ane:budget=60" lets the process compile 60 texts. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device/ane/ane.h"
#include "device/bank.h"

#define BUDGET 100 /* safe in one process: docs/neural-engine.md#compile-budget */

typedef struct {
    anepy_bank_device base;
    anepy_ane *ane;
    char refused[512]; /* file with a text that the ANE refused; "": none */
} neural_engine;

static neural_engine *engine_of(anepy_bank_device *device) { return (neural_engine *)device; }

/* ------------------------------------------------------------------------------------ surfaces */

static int32_t ane_memory_create(anepy_bank_device *device, anepy_bank_surface *surface) {
    anepy_ane_surface *memory = NULL;
    ANEPY_TRY(anepy_ane_surface_create(engine_of(device)->ane, &memory, surface->nbytes));
    surface->memory = memory;
    return ANEPY_OK;
}

static void ane_memory_free(anepy_bank_device *device, anepy_bank_surface *surface) {
    (void)device;
    anepy_ane_surface_free(surface->memory);
}

static int32_t ane_lock(anepy_surface *surface, int32_t for_writing) {
    return anepy_ane_surface_lock(((anepy_bank_surface *)surface)->memory, for_writing,
                                  &surface->data);
}

static int32_t ane_unlock(anepy_surface *surface, int32_t for_writing) {
    return anepy_ane_surface_unlock(((anepy_bank_surface *)surface)->memory, for_writing);
}

/* ------------------------------------------------------------------------------------- programs */

static void add_port(anepy_ane_function *f, int32_t index, const char *name, int32_t channels,
                     int32_t columns) {
    anepy_ane_port *port = &f->ports[index];
    port->row_nbytes = (uint64_t)columns * sizeof(uint16_t);
    port->nbytes = (uint64_t)channels * port->row_nbytes;
    snprintf(port->name, sizeof port->name, "%s", name);
}

/* Describes function i of n with the names that programs/mil_generate.c gives it and its surfaces.
 */
static void describe(anepy_ane_function *f, const anepy_mil_item *item, const anepy_model *model,
                     int32_t i, int32_t n) {
    const anepy_program *p = item->program;
    snprintf(f->name, sizeof f->name, n > 1 ? "procedure%03d" : "main", i);
    for (int32_t s = 0; s < p->surface_n; s++) {
        const char name[] = {(char)('a' + s), '_', 'i', 'n', '\0'};
        add_port(f, f->input_n++, name, p->surface_channels[s], p->width);
    }
    for (int32_t w = 0; w < p->weight_n; w++) {
        anepy_program_matrix m;
        if (!anepy_program_passes(p, w)) continue;
        anepy_program_weight(&m, p, model, item->layer, w);
        add_port(f, f->input_n++, m.parameter, m.channels, m.columns);
    }
    f->output_n = 1;
    add_port(f, f->input_n, "z_out", p->output_channels, p->output_width);
}

/* Keeps the first text that is refused, with the reason. */
static void keep_refused(neural_engine *e, const anepy_mil_source *source) {
    char reason[512];
    if (e->refused[0] != '\0') return;
    anepy_last_error(reason, sizeof reason);
    int32_t kept = anepy_ane_keep(source->text, source->n, e->refused, sizeof e->refused);
    anepy_fail(ANEPY_E_UNSUPPORTED, "%.300s%s%s", reason,
               kept == ANEPY_OK ? "; the program is in " : "", e->refused);
}

static int32_t ane_compile(anepy_bank_device *device, const anepy_mil_source *source,
                           const anepy_mil_item *items, int32_t n, void **out, int32_t *compiled) {
    neural_engine *e = engine_of(device);
    const char *path = ANEPY_MIL_WEIGHT_FILE;
    const void *file = source->blob.data;
    anepy_trial_source files = {source->text, source->n,       &path,
                                &file,        &source->blob.n, source->blob.n > 0};
    anepy_ane_function *functions = calloc((size_t)n, sizeof *functions);
    anepy_ane_program *program = NULL;
    if (functions == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for %d programs", n);
    for (int32_t i = 0; i < n; i++)
        describe(&functions[i], &items[i], device->base.options.model, i, n);
    int32_t status =
        anepy_ane_compile(e->ane, &program, &files, functions, n, device->traits.fresh, compiled);
    free(functions);
    *out = program;
    if (status == ANEPY_E_UNSUPPORTED) keep_refused(e, source);
    if (status != ANEPY_OK || e->refused[0] == '\0') return status;
    remove(e->refused); /* another form of the text was taken */
    e->refused[0] = '\0';
    return ANEPY_OK;
}

static void ane_release(anepy_bank_device *device, void *compiled) {
    (void)device;
    anepy_ane_program_free(compiled);
}

static int32_t ane_run(anepy_executable *executable, void *compiled) {
    anepy_ane_call_surfaces call = {executable->function, executable->input_n, 1, {NULL}};
    for (int32_t i = 0; i < executable->input_n; i++)
        call.surfaces[i] = executable->inputs[i]->memory;
    call.surfaces[executable->input_n] = executable->output->memory;
    int32_t status = anepy_ane_run(compiled, &call);
    if (status != ANEPY_OK) anepy_ane_poison(engine_of(executable->device)->ane);
    return status;
}

/* ---------------------------------------------------------------------------------------- open */

static void ane_close(anepy_bank_device *device) {
    anepy_ane_close(engine_of(device)->ane);
    free(device);
}

static const anepy_bank_backend BACKEND = {
    .memory_create = ane_memory_create,
    .memory_free = ane_memory_free,
    .lock = ane_lock,
    .unlock = ane_unlock,
    .compile = ane_compile,
    .release = ane_release,
    .compiles = anepy_ane_compiles,
    .run = ane_run,
    .close = ane_close,
};

static int32_t ane_open(anepy_device **out, const anepy_device_options *options) {
    anepy_traits traits;
    anepy_ane_limits limits;
    ANEPY_TRY(anepy_traits_parse(&traits, options->detail));
    neural_engine *e = calloc(1, sizeof *e);
    if (e == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for device ane");
    anepy_ane_limits_set(&limits, traits.timeout_ms);
    int32_t status = anepy_ane_open(&e->ane, &limits);
    if (status != ANEPY_OK) {
        free(e);
        return status;
    }
    e->base.base = (anepy_device){.type = &anepy_device_ane,
                                  .ops = &anepy_bank_ops,
                                  .options = *options,
                                  .compile_budget = traits.budget > 0 ? traits.budget : BUDGET};
    e->base.backend = &BACKEND;
    e->base.traits = traits;
    *out = &e->base.base;
    return ANEPY_OK;
}

static int32_t ane_probe(void) {
    anepy_ane *ane = NULL;
    anepy_ane_limits limits;
    anepy_ane_limits_set(&limits, 0);
    ANEPY_TRY(anepy_ane_open(&ane, &limits));
    anepy_ane_close(ane);
    return ANEPY_OK;
}

const anepy_device_type anepy_device_ane = {
    .name = "ane",
    .about = "Apple Neural Engine",
    .precisions = 1u << ANEPY_F16,
    .capabilities = ANEPY_OFFLOADS | ANEPY_DYNAMIC | ANEPY_COMPILES_BESIDE | ANEPY_FUSES,
    .channels = ANEPY_MIL_LARGEST_CHANNELS,
    .probe = ane_probe,
    .open = ane_open,
    .trial = &anepy_ane_trial,
};
