/* device/sim/sim.c - the simulator as a device.
 *
 * The MIL text and weight file that the ANE would get are generated, parsed and interpreted in
 * fp16. "sim:m1" to "sim:m6" choose the chip whose limits apply; "procedures=no" makes a text of
 * each program, "budget=20" lets the process compile 20 texts. With "run=no" nothing is parsed or
 * computed, and all outputs are 1: a step does all that it does beside, and counts it. */
#include <stdlib.h>
#include <string.h>

#include "device/bank.h"
#include "device/sim/interpreter.h"
#include "runtime/memory.h"

typedef struct {
    anepy_bank_device base;
    anepy_mil_options options;
} simulator;

static int32_t sim_memory_create(anepy_bank_device *device, anepy_bank_surface *surface) {
    (void)device;
    surface->base.data = anepy_map(surface->nbytes);
    return surface->base.data != NULL
               ? ANEPY_OK
               : anepy_fail(ANEPY_E_MEMORY, "no memory for a surface of %llu bytes",
                            (unsigned long long)surface->nbytes);
}

static void sim_memory_free(anepy_bank_device *device, anepy_bank_surface *surface) {
    (void)device;
    anepy_unmap(surface->base.data, surface->nbytes);
}

static int32_t sim_lock(anepy_surface *surface, int32_t for_writing) {
    (void)surface, (void)for_writing; /* evaluation is synchronous in host memory */
    return ANEPY_OK;
}

static int32_t sim_compile(anepy_bank_device *device, const anepy_mil_source *source,
                           const anepy_mil_item *items, int32_t n, void **out, int32_t *compiled) {
    (void)compiled;
    if (device->traits.dry) return ANEPY_OK;
    anepy_mil_file file = {ANEPY_MIL_WEIGHT_FILE, source->blob.data, source->blob.n};
    ANEPY_TRY(anepy_mil_parse((anepy_mil **)out, source->text, source->n, &file, source->blob.n > 0,
                              &((simulator *)device)->options, NULL));
    for (int32_t i = 0; i < n; i++) /* the text has them in order */
        anepy_mil_label(*out, i, items[i].program->name);
    return ANEPY_OK;
}

static void sim_release(anepy_bank_device *device, void *compiled) {
    (void)device;
    anepy_mil_free(compiled);
}

/* A value of which every reader makes a finite one. */
static void fill_ones(anepy_surface *s) {
    uint16_t *data = s->data;
    for (int64_t i = 0; i < (int64_t)s->channels * s->width; i++) data[i] = 0x3c00;
}

static int32_t sim_run(anepy_executable *executable, void *compiled) {
    const void *inputs[ANEPY_BANK_INPUTS];
    uint64_t nbytes[ANEPY_BANK_INPUTS];
    void *output = executable->output->base.data;
    if (compiled == NULL) {
        fill_ones(&executable->output->base);
        return ANEPY_OK;
    }
    for (int32_t i = 0; i < executable->input_n; i++) {
        inputs[i] = executable->inputs[i]->base.data;
        nbytes[i] = executable->inputs[i]->nbytes;
    }
    return anepy_mil_run(compiled, executable->function, inputs, nbytes, &output,
                         &executable->output->nbytes, executable->device->base.options.gemm, NULL);
}

static void sim_close(anepy_bank_device *device) { free(device); }

static const anepy_bank_backend BACKEND = {
    .memory_create = sim_memory_create,
    .memory_free = sim_memory_free,
    .lock = sim_lock,
    .unlock = sim_lock,
    .compile = sim_compile,
    .release = sim_release,
    .compiles = anepy_mil_compiles,
    .run = sim_run,
    .close = sim_close,
};

static int32_t sim_open(anepy_device **out, const anepy_device_options *options) {
    anepy_traits traits;
    ANEPY_TRY(anepy_traits_parse(&traits, options->detail));
    simulator *sim = calloc(1, sizeof *sim);
    if (sim == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for device sim");
    sim->base.base = (anepy_device){.type = &anepy_device_sim,
                                    .ops = &anepy_bank_ops,
                                    .options = *options,
                                    .compile_budget = traits.budget};
    sim->base.backend = &BACKEND;
    sim->base.traits = traits;
    anepy_mil_options_default(&sim->options, anepy_mil_chip(traits.chip));
    sim->options.numerics = traits.numerics;
    anepy_mil_options_limit(&sim->options, traits.fails);
    *out = &sim->base.base;
    return ANEPY_OK;
}

static int32_t sim_probe(void) { return anepy_kernels_get() != NULL ? ANEPY_OK : ANEPY_E_NAME; }

const anepy_device_type anepy_device_sim = {
    .name = "sim",
    .about = "simulator of the Neural Engine: interprets its MIL programs in fp16",
    .precisions = 1u << ANEPY_F16,
    .capabilities = ANEPY_OFFLOADS | ANEPY_DYNAMIC | ANEPY_COMPILES_BESIDE | ANEPY_FUSES,
    .channels = ANEPY_MIL_LARGEST_CHANNELS,
    .probe = sim_probe,
    .open = sim_open,
};
