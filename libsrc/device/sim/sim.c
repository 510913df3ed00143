/* device/sim/sim.c - the simulator as a device: the MIL text and weight blob the Neural Engine
 * would get are generated, parsed and interpreted in fp16.
 *
 * All programs of one compilation are functions of one text with one blob, so a weight update costs
 * one compile (ane-facts.md 1.5). "sim:m1" ... "sim:m5" choose the chip whose limits apply;
 * "procedures=no" makes a text of each program, "budget=20" lets the process compile 20 texts, and
 * with "fails=20" the hardware refuses the next one. */
#include <stdlib.h>
#include <string.h>

#include "device/device.h"
#include "device/sim/mil.h"
#include "device/traits.h"
#include "programs/mil.h"
#include "runtime/memory.h"

#define SURFACE_STEP 65536 /* smaller surfaces fail on some chips (ane-facts.md 4.1) */

/* One compiled text. */
typedef struct {
    anepy_mil *mil;
    int32_t users; /* kernels that are functions of it */
} bank;

struct anepy_kernel {
    anepy_device *device;
    const anepy_program *program;
    bank *bank;
    int32_t function;
    anepy_surface *input, *output;
    anepy_kernel *previous, *next; /* all kernels of the device */
};

typedef struct sim_surface {
    anepy_surface base;
    uint64_t nbytes;
    struct sim_surface *next;
} sim_surface;

typedef struct {
    anepy_device base;
    anepy_mil_options options;
    anepy_traits traits;
    sim_surface *surfaces;
    anepy_kernel *kernels;
} simulator;

/* ------------------------------------------------------------------------------------ surfaces */

static int32_t sim_surface_create(anepy_device *device, int32_t channels, anepy_surface **out) {
    simulator *sim = (simulator *)device;
    int32_t width = device->options.width;
    sim_surface *surface = calloc(1, sizeof *surface);
    uint64_t nbytes = (uint64_t)channels * (uint64_t)width * sizeof(uint16_t);
    uint64_t step =
        sim->traits.surface_nbytes > 0 ? (uint64_t)sim->traits.surface_nbytes : SURFACE_STEP;
    nbytes = (nbytes + step - 1) / step * step;
    void *data = surface != NULL ? anepy_map(nbytes) : NULL;
    if (data == NULL) {
        free(surface);
        return anepy_fail(ANEPY_E_MEMORY, "no memory for a surface of %llu bytes",
                          (unsigned long long)nbytes);
    }
    surface->base = (anepy_surface){device, ANEPY_F16, channels, width, data};
    surface->nbytes = nbytes;
    surface->next = sim->surfaces;
    sim->surfaces = surface;
    *out = &surface->base;
    return ANEPY_OK;
}

static int32_t sim_lock(anepy_surface *surface, int32_t for_writing) {
    (void)surface, (void)for_writing; /* evaluation is synchronous and memory is the host's */
    return ANEPY_OK;
}

/* ------------------------------------------------------------------------------------- kernels */

static void sim_release(anepy_kernel *kernel) {
    simulator *sim = (simulator *)kernel->device;
    if (kernel->previous != NULL) kernel->previous->next = kernel->next;
    else sim->kernels = kernel->next;
    if (kernel->next != NULL) kernel->next->previous = kernel->previous;
    if (--kernel->bank->users == 0) {
        anepy_mil_free(kernel->bank->mil);
        free(kernel->bank);
    }
    free(kernel);
}

static int32_t add_kernel(simulator *sim, bank *b, const anepy_program *program, int32_t function,
                          anepy_kernel **out) {
    anepy_kernel *kernel = calloc(1, sizeof *kernel);
    if (kernel == NULL)
        return anepy_fail(ANEPY_E_MEMORY, "no memory for program %s", program->name);
    kernel->device = &sim->base;
    kernel->program = program;
    kernel->bank = b;
    kernel->function = function;
    kernel->next = sim->kernels;
    if (sim->kernels != NULL) sim->kernels->previous = kernel;
    sim->kernels = kernel;
    b->users++;
    *out = kernel;
    return ANEPY_OK;
}

static int32_t compile_bank(simulator *sim, const anepy_instance *instances, int32_t n,
                            const float *params, anepy_mil **out) {
    const anepy_device_options *o = &sim->base.options;
    anepy_mil_source source = {0};
    anepy_mil_item *items = calloc((size_t)n, sizeof *items);
    if (items == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for %d programs", n);
    for (int32_t i = 0; i < n; i++)
        items[i] = (anepy_mil_item){instances[i].program, params, instances[i].layer};
    anepy_dialect dialect = sim->traits.dialect == 10 ? ANEPY_DIALECT_10 : ANEPY_DIALECT_13;
    int32_t status = anepy_mil_generate(&source, items, n, o->model, o->width, o->seq_len, dialect);
    if (status == ANEPY_OK) {
        anepy_mil_file file = {ANEPY_MIL_WEIGHT_FILE, source.blob.data, source.blob.n};
        status = anepy_mil_parse(out, source.text, source.n, &file, source.blob.n > 0,
                                 &sim->options, NULL);
    }
    anepy_mil_source_free(&source);
    free(items);
    return status;
}

static int32_t compile_text(simulator *sim, const anepy_instance *instances, int32_t n,
                            const float *params, anepy_kernel **out) {
    bank *b = calloc(1, sizeof *b);
    if (b == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for %d programs", n);
    int32_t status = compile_bank(sim, instances, n, params, &b->mil), made = 0;
    while (status == ANEPY_OK && made < n) {
        status = add_kernel(sim, b, instances[made].program, made, &out[made]);
        made += status == ANEPY_OK;
    }
    if (status == ANEPY_OK) {
        sim->base.compiles++;
        return ANEPY_OK;
    }
    if (made == 0) { /* otherwise the bank goes with the last kernel */
        anepy_mil_free(b->mil);
        free(b);
    }
    while (made > 0) sim_release(out[--made]);
    return status;
}

static int32_t sim_compile(anepy_device *device, const anepy_instance *instances, int32_t n,
                           const float *params, anepy_kernel **out) {
    simulator *sim = (simulator *)device;
    int32_t step = sim->traits.single ? 1 : n, texts = sim->traits.single ? n : 1, made = 0;
    int64_t budget = device->compile_budget, used = anepy_mil_compiles();
    if (budget > 0 && texts > budget)
        return anepy_fail(ANEPY_E_BUDGET,
                          "device sim: the programs need %d compilations, a process may make %lld: "
                          "allow more, or leave out procedures=no",
                          texts, (long long)budget);
    if (budget > 0 && used + texts > budget)
        return anepy_fail(ANEPY_E_BUDGET,
                          "device sim: the weights need %d compilations, this process has made "
                          "%lld of the %lld it may; nothing is lost: save the model or a "
                          "checkpoint and go on in a new process",
                          texts, (long long)used, (long long)budget);
    while (made < n) {
        int32_t status = compile_text(sim, instances + made, step, params, out + made);
        if (status != ANEPY_OK) {
            while (made > 0) sim_release(out[--made]);
            return status;
        }
        made += step;
    }
    return ANEPY_OK;
}

/* Programs have one packed input and one packed output surface. */
static int32_t sim_bind(anepy_kernel *kernel, int32_t index, anepy_surface *surface,
                        int32_t channel) {
    const anepy_program *program = kernel->program;
    anepy_surface **slot = index < program->input_n ? &kernel->input : &kernel->output;
    if (surface->dtype != ANEPY_F16 || channel != program->tensors[index].channel ||
        (*slot != NULL && *slot != surface))
        return anepy_fail(ANEPY_E_UNSUPPORTED, "%s.%s is not at its place in the packed surface",
                          program->name, program->tensors[index].name);
    *slot = surface;
    return ANEPY_OK;
}

static int32_t sim_evaluate(anepy_kernel *kernel, int32_t n) {
    (void)n; /* the engine computes whole surfaces */
    const void *inputs[1] = {kernel->input->data};
    void *outputs[1] = {kernel->output->data};
    uint64_t input_nbytes = ((const sim_surface *)kernel->input)->nbytes;
    uint64_t output_nbytes = ((const sim_surface *)kernel->output)->nbytes;
    return anepy_mil_run(kernel->bank->mil, kernel->function, inputs, &input_nbytes, outputs,
                         &output_nbytes, kernel->device->options.gemm, NULL);
}

/* ---------------------------------------------------------------------------------------- open */

static void sim_close(anepy_device *device) {
    simulator *sim = (simulator *)device;
    while (sim->kernels != NULL) sim_release(sim->kernels);
    while (sim->surfaces != NULL) {
        sim_surface *surface = sim->surfaces;
        sim->surfaces = surface->next;
        anepy_unmap(surface->base.data, surface->nbytes);
        free(surface);
    }
    free(sim);
}

static const anepy_device_ops OPS = {
    .close = sim_close,
    .surface_create = sim_surface_create,
    .lock = sim_lock,
    .unlock = sim_lock,
    .compile = sim_compile,
    .release = sim_release,
    .bind = sim_bind,
    .evaluate = sim_evaluate,
};

static int32_t sim_open(anepy_device **out, const anepy_device_options *options) {
    anepy_traits traits;
    ANEPY_TRY(anepy_traits_parse(&traits, options->detail));
    simulator *sim = calloc(1, sizeof *sim);
    if (sim == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for device sim");
    sim->base = (anepy_device){.type = &anepy_device_sim,
                               .ops = &OPS,
                               .options = *options,
                               .compile_budget = traits.budget};
    sim->traits = traits;
    anepy_mil_options_default(&sim->options, anepy_mil_chip(traits.chip));
    anepy_mil_options_limit(&sim->options, traits.fails);
    *out = &sim->base;
    return ANEPY_OK;
}

static int32_t sim_probe(void) { return anepy_kernels_get() != NULL ? ANEPY_OK : ANEPY_E_NAME; }

const anepy_device_type anepy_device_sim = {
    .name = "sim",
    .about = "simulator of the Neural Engine: interprets its MIL programs in fp16",
    .precisions = 1u << ANEPY_F16,
    .capabilities = 0,
    .probe = sim_probe,
    .open = sim_open,
};
