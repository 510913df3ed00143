/* device/cpu/cpu.c - the native device: its memory, surfaces and bindings.
 *
 * Tensors are bound to plain memory and weights are read in place, so nothing is packed for
 * transport or compiled. programs.c has the programs. */
#include "device/cpu/cpu.h"

#include <math.h>
#include <stdlib.h>

#include "runtime/memory.h"

/* ---------------------------------------------------------------------- memory the device owns */

typedef struct owned {
    struct owned *next;
    void *mapping; /* unmapped with this, if any */
    uint64_t nbytes;
    uint64_t reserved; /* keeps the memory behind it 16-byte aligned */
} owned;

/* Heap memory with a record in front, freed by close. */
static void *own(anepy_cpu *cpu, size_t size, void *mapping, uint64_t nbytes) {
    owned *record = calloc(1, sizeof *record + size);
    if (record == NULL) return NULL;
    *record = (owned){.next = cpu->owned, .mapping = mapping, .nbytes = nbytes};
    cpu->owned = record;
    return record + 1;
}

static float *own_floats(anepy_cpu *cpu, int64_t n) {
    uint64_t nbytes = (uint64_t)n * sizeof(float);
    float *memory = anepy_map(nbytes);
    if (memory != NULL && own(cpu, 0, memory, nbytes) != NULL) return memory;
    anepy_unmap(memory, nbytes);
    anepy_fail(ANEPY_E_MEMORY, "no memory for %lld bytes of activations", (long long)nbytes);
    return NULL;
}

static void cpu_close(anepy_device *device) {
    anepy_cpu *cpu = (anepy_cpu *)device;
    while (cpu->owned != NULL) {
        owned *record = cpu->owned;
        cpu->owned = record->next;
        anepy_unmap(record->mapping, record->nbytes);
        free(record);
    }
    free(cpu);
}

static int32_t cpu_surface_create(anepy_device *device, int32_t channels, int32_t width,
                                  int32_t factors, anepy_surface **out) {
    anepy_cpu *cpu = (anepy_cpu *)device;
    if (width == 0) width = device->options.width;
    anepy_dtype dtype = factors ? device->options.dtype : ANEPY_F32;
    int64_t n = (int64_t)channels * width / (dtype == ANEPY_F32 ? 1 : 2);
    float *data = own_floats(cpu, n);
    anepy_surface *surface = data != NULL ? own(cpu, sizeof *surface, NULL, 0) : NULL;
    if (surface == NULL) return ANEPY_E_MEMORY;
    *surface = (anepy_surface){device, dtype, channels, width, data};
    device->nbytes += (uint64_t)n * sizeof(float);
    *out = surface;
    return ANEPY_OK;
}

static int32_t cpu_lock(anepy_surface *surface, int32_t for_writing) {
    (void)surface, (void)for_writing; /* nothing to do: it is host memory */
    return ANEPY_OK;
}

static int32_t cpu_compile(anepy_device *device, const anepy_instance *instances, int32_t n,
                           const void *params, anepy_executable **out) {
    anepy_cpu *cpu = (anepy_cpu *)device;
    for (int32_t i = 0; i < n; i++) {
        const anepy_program *program = instances[i].program;
        if (!anepy_cpu_has(program->id))
            return anepy_fail(ANEPY_E_UNSUPPORTED, "device cpu has no program %s", program->name);
        anepy_executable *executable = own(cpu, sizeof *executable, NULL, 0);
        if (executable == NULL)
            return anepy_fail(ANEPY_E_MEMORY, "no memory for program %s", program->name);
        executable->cpu = cpu;
        executable->program = *program;
        executable->params = params;
        executable->layer = instances[i].layer;
        out[i] = executable;
    }
    return ANEPY_OK;
}

static void cpu_release(anepy_executable *executable) { (void)executable; /* freed by close */ }

/* Allocated only if sdpa_bwd2 is bound to scores, because it grows with the square of the sequence.
 */
static int32_t own_dscores(anepy_cpu *cpu) {
    int64_t rows = cpu->positions;
    if (cpu->dscores == NULL) cpu->dscores = own_floats(cpu, rows * cpu->base.options.width);
    return cpu->dscores != NULL ? ANEPY_OK : ANEPY_E_MEMORY;
}

static int32_t cpu_bind(anepy_executable *executable, int32_t index, anepy_surface *surface,
                        int32_t channel) {
    const anepy_program *program = &executable->program;
    int32_t n = program->input_n + program->output_n, host = index - ANEPY_HOST_TENSOR;
    if (index < 0 || (index >= n && (host < 0 || host >= program->host_n)))
        return anepy_fail(ANEPY_E_ARGUMENT, "%s has %d tensors, not %d", program->name, n, index);
    if (channel < 0 || channel + program->tensors[index].channels > surface->channels)
        return anepy_fail(ANEPY_E_ARGUMENT, "%s.%s does not fit its surface", program->name,
                          program->tensors[index].name);
    int64_t at = (int64_t)channel * surface->width;
    int rounds = surface->dtype == ANEPY_BF16;
    executable->tensors[index] = rounds ? NULL : (float *)surface->data + at;
    executable->rounded[index] = rounds ? (uint16_t *)surface->data + at : NULL;
    if (program->id == ANEPY_SDPA_BWD2 && index == SDPA_BWD2_P) return own_dscores(executable->cpu);
    return ANEPY_OK;
}

static int32_t cpu_evaluate(anepy_executable *executable, int32_t n, int32_t count) {
    anepy_cpu_run(executable, n, count * (int32_t)anepy_round_up(n, ANEPY_COLUMNS));
    return ANEPY_OK;
}

/* ---------------------------------------------------------------------------------------- open */

static const anepy_device_ops OPS = {
    .close = cpu_close,
    .surface_create = cpu_surface_create,
    .lock = cpu_lock,
    .unlock = cpu_lock,
    .compile = cpu_compile,
    .release = cpu_release,
    .bind = cpu_bind,
    .evaluate = cpu_evaluate,
};

static int32_t cpu_open(anepy_device **out, const anepy_device_options *options) {
    const anepy_model *m = options->model;
    if (options->detail != NULL)
        return anepy_fail(ANEPY_E_NAME, "device cpu takes no details: use cpu, not cpu:%.40s",
                          options->detail);
    int64_t width = options->width, positions = anepy_round_up(options->seq_len, ANEPY_COLUMNS);
    int64_t half = m->head_dim / 2;
    anepy_cpu *cpu = calloc(1, sizeof *cpu);
    if (cpu == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for device cpu");
    cpu->base = (anepy_device){.type = &anepy_device_cpu, .ops = &OPS, .options = *options};
    cpu->positions = (int32_t)positions;
    int64_t factors_n = anepy_cpu_factors_n(m->head_dim);
    int64_t blocks = m->config.n_heads * width / ANEPY_COLUMNS;
    /* For outputs before they are rounded: a panel of a norm, or two rows of both outputs of the
     * gate. */
    int64_t others = anepy_max_i64((int64_t)m->config.dim * ANEPY_COLUMNS, 4 * width);
    cpu->scratch_n = anepy_max_i64(anepy_cpu_attention_scratch_n(m->head_dim), others);
    int64_t low_n = anepy_cpu_low_panels_n(anepy_max_i32(1, m->adapter.rank), options->width);
    if (options->dtype == ANEPY_BF16) cpu->dgate = own_floats(cpu, m->config.hidden_dim * width);
    if ((options->dtype == ANEPY_BF16 && cpu->dgate == NULL) ||
        (cpu->cosine = own_floats(cpu, half * positions)) == NULL ||
        (cpu->sine = own_floats(cpu, half * positions)) == NULL ||
        (cpu->dattn = own_floats(cpu, m->q_dim * width)) == NULL ||
        (cpu->dq = own_floats(cpu, m->q_dim * width)) == NULL ||
        (cpu->factors = own_floats(cpu, 2 * blocks * factors_n)) == NULL ||
        (cpu->dot = own_floats(cpu, m->config.n_heads * width)) == NULL ||
        (cpu->turns = own(cpu, (size_t)blocks * sizeof *cpu->turns, NULL, 0)) == NULL ||
        (cpu->low_panels = own_floats(cpu, 3 * low_n)) == NULL ||
        (cpu->scratch =
             own_floats(cpu, cpu->scratch_n * anepy_pool_threads(options->gemm->pool))) == NULL) {
        cpu_close(&cpu->base);
        return ANEPY_E_MEMORY;
    }
    for (int64_t i = 0; i < half; i++) {
        double frequency = anepy_rope_frequency(m, (int32_t)i);
        for (int64_t s = 0; s < positions; s++) {
            cpu->cosine[i * positions + s] = (float)cos((double)s * frequency);
            cpu->sine[i * positions + s] = (float)sin((double)s * frequency);
        }
    }
    *out = &cpu->base;
    return ANEPY_OK;
}

static int32_t cpu_probe(void) { return anepy_kernels_get() != NULL ? ANEPY_OK : ANEPY_E_NAME; }

static int32_t cpu_has_precision(anepy_dtype dtype) {
    const anepy_kernels *kernels = anepy_kernels_get();
    if (kernels == NULL) return ANEPY_E_NAME;
    if (dtype != ANEPY_BF16 || kernels->bf16 != NULL) return ANEPY_OK;
    return anepy_fail(ANEPY_E_UNSUPPORTED,
                      "precision bf16 needs bf16 dot products (AVX512_BF16, or FEAT_BF16 on "
                      "AArch64), which kernel set %s has not; use --precision fp32",
                      kernels->isa);
}

const anepy_device_type anepy_device_cpu = {
    .name = "cpu",
    .about = "native kernels on this processor",
    .precisions = 1u << ANEPY_F32 | 1u << ANEPY_BF16,
    .capabilities = ANEPY_BINDS | ANEPY_LIVE_WEIGHTS | ANEPY_OFFLOADS | ANEPY_BATCHES | ANEPY_PACKS,
    .slow = ANEPY_OFFLOADS, /* slower than on the host, as they take more passes (anepy compare) */
    .probe = cpu_probe,
    .has_precision = cpu_has_precision,
    .open = cpu_open,
};
