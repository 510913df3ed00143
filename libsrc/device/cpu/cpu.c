/* device/cpu/cpu.c - the native device: every program of the table as fused kernels.
 *
 * Surfaces are plain memory that tensors are bound to directly, and weights are read in place, so
 * nothing is packed for transport and nothing is compiled. Attention lives in attention.c, norms,
 * classifier and soft-max in offload.c. */
#include "device/cpu/cpu.h"

#include <math.h>
#include <stdlib.h>

#include "runtime/memory.h"

#define COLS ANEPY_COLUMNS

/* ---------------------------------------------------------------------- memory the device owns */

typedef struct owned {
    struct owned *next;
    void *mapping; /* unmapped with this, if any */
    uint64_t nbytes;
    uint64_t reserved; /* keeps what follows 16-byte aligned */
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

static int32_t cpu_surface_create(anepy_device *device, int32_t channels, anepy_surface **out) {
    anepy_cpu *cpu = (anepy_cpu *)device;
    int32_t width = device->options.width;
    float *data = own_floats(cpu, (int64_t)channels * width);
    anepy_surface *surface = data != NULL ? own(cpu, sizeof *surface, NULL, 0) : NULL;
    if (surface == NULL) return ANEPY_E_MEMORY;
    *surface = (anepy_surface){device, ANEPY_F32, channels, width, data};
    device->nbytes += (uint64_t)channels * (uint64_t)width * sizeof(float);
    *out = surface;
    return ANEPY_OK;
}

static int32_t cpu_lock(anepy_surface *surface, int32_t for_writing) {
    (void)surface, (void)for_writing; /* host memory */
    return ANEPY_OK;
}

/* What the backward pass of the same layer computes probabilities from. */
static int32_t own_lse(anepy_cpu *cpu, anepy_kernel *kernel) {
    const anepy_device_options *o = &cpu->base.options;
    kernel->lse = own_floats(cpu, (int64_t)o->model->config.n_heads * o->width);
    cpu->forwards[kernel->layer] = kernel;
    return kernel->lse != NULL ? ANEPY_OK : ANEPY_E_MEMORY;
}

static int32_t cpu_compile(anepy_device *device, const anepy_instance *instances, int32_t n,
                           const float *params, anepy_kernel **out) {
    anepy_cpu *cpu = (anepy_cpu *)device;
    for (int32_t i = 0; i < n; i++) {
        const anepy_program *program = instances[i].program;
        anepy_kernel *kernel = own(cpu, sizeof *kernel, NULL, 0);
        if (kernel == NULL)
            return anepy_fail(ANEPY_E_MEMORY, "no memory for program %s", program->name);
        kernel->cpu = cpu;
        kernel->program = *program;
        kernel->layer = instances[i].layer;
        for (int32_t w = 0; w < program->weight_n; w++) {
            anepy_program_matrix matrix;
            anepy_program_weight(&matrix, program, device->options.model, instances[i].layer, w);
            kernel->weights[w] = params + matrix.offset;
        }
        if (program->id == ANEPY_SDPA_FWD) ANEPY_TRY(own_lse(cpu, kernel));
        out[i] = kernel;
    }
    return ANEPY_OK;
}

static void cpu_release(anepy_kernel *kernel) { (void)kernel; /* close frees it */ }

/* Only where scores are kept: they grow with the square of the sequence. */
static int32_t own_dscores(anepy_cpu *cpu) {
    int64_t rows = cpu->positions;
    if (cpu->dscores == NULL) cpu->dscores = own_floats(cpu, rows * cpu->base.options.width);
    return cpu->dscores != NULL ? ANEPY_OK : ANEPY_E_MEMORY;
}

static int32_t cpu_bind(anepy_kernel *kernel, int32_t index, anepy_surface *surface,
                        int32_t channel) {
    const anepy_program *program = &kernel->program;
    int32_t n = program->input_n + program->output_n;
    if (index < 0 || index >= n)
        return anepy_fail(ANEPY_E_ARGUMENT, "%s has %d tensors, not %d", program->name, n, index);
    if (channel < 0 || channel + program->tensors[index].channels > surface->channels)
        return anepy_fail(ANEPY_E_ARGUMENT, "%s.%s does not fit its surface", program->name,
                          program->tensors[index].name);
    kernel->tensors[index] = (float *)surface->data + (int64_t)channel * surface->width;
    if (program->id == ANEPY_SDPA_BWD2 && index == SDPA_BWD2_P) return own_dscores(kernel->cpu);
    return ANEPY_OK;
}

/* ----------------------------------------------------------------------------- building blocks */

/* A run of weights [rows[i], cols] whose outputs (or output gradients) are y[i]. */
typedef struct {
    const float *w[3];
    float *y[3];
    int32_t rows[3];
    int32_t count;
} projections;

/* Merges neighbours that follow each other in both memories, so that one product covers them. */
static void merge(projections *p, int32_t cols, int32_t width) {
    int32_t n = 0;
    for (int32_t i = 1; i < p->count; i++) {
        if (p->w[i] == p->w[n] + (int64_t)p->rows[n] * cols &&
            p->y[i] == p->y[n] + (int64_t)p->rows[n] * width) {
            p->rows[n] += p->rows[i];
        } else {
            n++;
            p->w[n] = p->w[i];
            p->y[n] = p->y[i];
            p->rows[n] = p->rows[i];
        }
    }
    p->count = n + 1;
}

/* y[i] = w[i] . x; x is [cols, width]. */
static void project(const anepy_cpu *cpu, projections p, const float *x, int32_t cols,
                    int32_t columns) {
    int32_t width = cpu->base.options.width;
    merge(&p, cols, width);
    for (int32_t i = 0; i < p.count; i++) {
        anepy_product product = {.c = p.y[i],
                                 .ldc = width,
                                 .a = p.w[i],
                                 .a_row = cols,
                                 .a_step = 1,
                                 .b = x,
                                 .ldb = width,
                                 .m = p.rows[i],
                                 .n = columns,
                                 .k = cols};
        anepy_gemm_run(cpu->base.options.gemm, &product);
    }
}

/* dx = sum_i w[i]^T . y[i]; dx is [cols, width]. */
static void project_backward(const anepy_cpu *cpu, float *dx, projections p, int32_t cols,
                             int32_t columns) {
    int32_t width = cpu->base.options.width;
    merge(&p, cols, width);
    for (int32_t i = 0; i < p.count; i++) {
        anepy_product product = {.c = dx,
                                 .ldc = width,
                                 .a = p.w[i],
                                 .a_row = 1,
                                 .a_step = cols,
                                 .b = p.y[i],
                                 .ldb = width,
                                 .m = cols,
                                 .n = columns,
                                 .k = p.rows[i],
                                 .accumulate = i > 0};
        anepy_gemm_run(cpu->base.options.gemm, &product);
    }
}

/* Operands of an element-wise loop over rows of [rows, width], n columns of each. */
typedef struct {
    const anepy_cpu *cpu;
    float *out[2];
    const float *in[3];
    int32_t rows, columns;
} elementwise;

#define PIECE_ROWS 64

static void norm_panel(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const elementwise *e = context;
    const anepy_device_options *o = &e->cpu->base.options;
    float rstd[COLS];
    int64_t j = (int64_t)index * COLS;
    o->gemm->kernels->rmsnorm(e->out[0] + j, rstd, e->in[0] + j, e->in[1], o->model->config.dim,
                              o->width);
}

static void normalize(const anepy_cpu *cpu, float *xnorm, const float *x, const float *weight,
                      int32_t columns) {
    elementwise e = {.cpu = cpu, .out = {xnorm}, .in = {x, weight}};
    anepy_pool_run(cpu->base.options.gemm->pool, columns / COLS, norm_panel, &e);
}

static void swiglu_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const elementwise *e = context;
    int64_t width = e->cpu->base.options.width;
    int32_t end = anepy_min_i32(e->rows, (index + 1) * PIECE_ROWS);
    for (int64_t i = (int64_t)index * PIECE_ROWS * width; i < end * width; i += width)
        e->cpu->base.options.gemm->kernels->swiglu(e->out[0] + i, e->in[0] + i, e->in[1] + i,
                                                   e->columns);
}

static void swiglu_backward_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const elementwise *e = context;
    int64_t width = e->cpu->base.options.width;
    int32_t end = anepy_min_i32(e->rows, (index + 1) * PIECE_ROWS);
    for (int64_t i = (int64_t)index * PIECE_ROWS * width; i < end * width; i += width)
        e->cpu->base.options.gemm->kernels->swiglu_backward(
            e->out[0] + i, e->out[1] + i, e->in[0] + i, e->in[1] + i, e->in[2] + i, e->columns);
}

static void run_rows(elementwise *e, anepy_loop_fn fn) {
    anepy_pool_run(e->cpu->base.options.gemm->pool, (e->rows + PIECE_ROWS - 1) / PIECE_ROWS, fn, e);
}

/* ------------------------------------------------------------------------------------ programs */

static void sdpa_fwd(anepy_kernel *k, int32_t n, int32_t columns) {
    const anepy_cpu *cpu = k->cpu;
    const anepy_model *m = cpu->base.options.model;
    int32_t dim = m->config.dim, kv = m->kv_dim;
    float **t = k->tensors;
    normalize(cpu, t[SDPA_FWD_XNORM], t[SDPA_FWD_X], k->weights[0], columns);
    project(cpu,
            (projections){.w = {k->weights[1], k->weights[2], k->weights[3]},
                          .y = {t[SDPA_FWD_Q], t[SDPA_FWD_K], t[SDPA_FWD_V]},
                          .rows = {dim, kv, kv},
                          .count = 3},
            t[SDPA_FWD_XNORM], dim, columns);
    anepy_cpu_rope(cpu, t[SDPA_FWD_Q], m->config.n_heads, n, columns, 1.0f);
    anepy_cpu_rope(cpu, t[SDPA_FWD_K], m->config.n_kv_heads, n, columns, 1.0f);
    anepy_cpu_attention(k, n, columns);
    project(cpu,
            (projections){.w = {k->weights[4]}, .y = {t[SDPA_FWD_OUT]}, .rows = {dim}, .count = 1},
            t[SDPA_FWD_ATTN], dim, columns);
}

static void ffn_fwd(anepy_kernel *k, int32_t n, int32_t columns) {
    (void)n;
    const anepy_cpu *cpu = k->cpu;
    const anepy_config *c = &cpu->base.options.model->config;
    int32_t dim = c->dim, hidden = c->hidden_dim;
    float **t = k->tensors;
    normalize(cpu, t[FFN_FWD_XNORM], t[FFN_FWD_X], k->weights[0], columns);
    project(cpu,
            (projections){.w = {k->weights[1], k->weights[2]},
                          .y = {t[FFN_FWD_H1], t[FFN_FWD_H3]},
                          .rows = {hidden, hidden},
                          .count = 2},
            t[FFN_FWD_XNORM], dim, columns);
    elementwise e = {.cpu = cpu,
                     .out = {t[FFN_FWD_GATE]},
                     .in = {t[FFN_FWD_H1], t[FFN_FWD_H3]},
                     .rows = hidden,
                     .columns = columns};
    run_rows(&e, swiglu_rows);
    project(cpu,
            (projections){.w = {k->weights[3]}, .y = {t[FFN_FWD_OUT]}, .rows = {dim}, .count = 1},
            t[FFN_FWD_GATE], hidden, columns);
}

static void ffn_bwd(anepy_kernel *k, int32_t n, int32_t columns) {
    (void)n;
    const anepy_cpu *cpu = k->cpu;
    const anepy_config *c = &cpu->base.options.model->config;
    int32_t dim = c->dim, hidden = c->hidden_dim;
    float **t = k->tensors;
    /* The gradient of gate goes where that of h1 will be. */
    project_backward(
        cpu, t[FFN_BWD_DH1],
        (projections){.w = {k->weights[0]}, .y = {t[FFN_BWD_DY]}, .rows = {dim}, .count = 1},
        hidden, columns);
    elementwise e = {.cpu = cpu,
                     .out = {t[FFN_BWD_DH1], t[FFN_BWD_DH3]},
                     .in = {t[FFN_BWD_DH1], t[FFN_BWD_H1], t[FFN_BWD_H3]},
                     .rows = hidden,
                     .columns = columns};
    run_rows(&e, swiglu_backward_rows);
    project_backward(cpu, t[FFN_BWD_DX],
                     (projections){.w = {k->weights[1], k->weights[2]},
                                   .y = {t[FFN_BWD_DH1], t[FFN_BWD_DH3]},
                                   .rows = {hidden, hidden},
                                   .count = 2},
                     dim, columns);
}

static void sdpa_bwd1(anepy_kernel *k, int32_t n, int32_t columns) {
    const anepy_cpu *cpu = k->cpu;
    int32_t dim = cpu->base.options.model->config.dim;
    project_backward(
        cpu, cpu->dattn,
        (projections){
            .w = {k->weights[0]}, .y = {k->tensors[SDPA_BWD1_DY]}, .rows = {dim}, .count = 1},
        dim, columns);
    k->cpu->bwd1 = k;
    k->cpu->forward = cpu->forwards[k->layer];
    if (k->tensors[SDPA_BWD1_P] != NULL) anepy_cpu_scores_backward1(k, n, columns);
}

static void sdpa_bwd2(anepy_kernel *k, int32_t n, int32_t columns) {
    const anepy_cpu *cpu = k->cpu;
    const anepy_config *c = &cpu->base.options.model->config;
    if (k->tensors[SDPA_BWD2_P] != NULL) anepy_cpu_scores_backward2(k, n, columns);
    else anepy_cpu_attention_backward(k, n, columns);
    anepy_cpu_rope(cpu, k->tensors[SDPA_BWD2_DQ], c->n_heads, n, columns, -1.0f);
    anepy_cpu_rope(cpu, k->tensors[SDPA_BWD2_DK], c->n_kv_heads, n, columns, -1.0f);
}

static void qkv_bwd(anepy_kernel *k, int32_t n, int32_t columns) {
    (void)n;
    const anepy_model *m = k->cpu->base.options.model;
    float **t = k->tensors;
    project_backward(k->cpu, t[QKV_BWD_DX],
                     (projections){.w = {k->weights[0], k->weights[1], k->weights[2]},
                                   .y = {t[QKV_BWD_DQ], t[QKV_BWD_DK], t[QKV_BWD_DV]},
                                   .rows = {m->config.dim, m->kv_dim, m->kv_dim},
                                   .count = 3},
                     m->config.dim, columns);
}

static void (*const PROGRAMS[ANEPY_PROGRAM_N])(anepy_kernel *, int32_t n, int32_t columns) = {
    [ANEPY_SDPA_FWD] = sdpa_fwd,
    [ANEPY_FFN_FWD] = ffn_fwd,
    [ANEPY_FFN_BWD] = ffn_bwd,
    [ANEPY_SDPA_BWD1] = sdpa_bwd1,
    [ANEPY_SDPA_BWD2] = sdpa_bwd2,
    [ANEPY_QKV_BWD] = qkv_bwd,
    [ANEPY_RMSNORM_BWD] = anepy_cpu_rmsnorm_bwd,
    [ANEPY_RMSNORM_BWD_FFN] = anepy_cpu_rmsnorm_bwd,
    [ANEPY_RMSNORM_BWD_FINAL] = anepy_cpu_rmsnorm_bwd,
    [ANEPY_FINAL_RMSNORM] = anepy_cpu_final_rmsnorm,
    [ANEPY_CLASSIFIER_FWD] = anepy_cpu_classifier_fwd,
    [ANEPY_CLASSIFIER_BWD] = anepy_cpu_classifier_bwd,
    [ANEPY_SOFTMAX] = anepy_cpu_softmax,
};

static int32_t cpu_evaluate(anepy_kernel *kernel, int32_t n, int32_t count) {
    PROGRAMS[kernel->program.id](kernel, n, count * (int32_t)anepy_round_up(n, COLS));
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
    int64_t width = options->width, positions = anepy_round_up(options->seq_len, COLS);
    int64_t half = m->head_dim / 2;
    anepy_cpu *cpu = calloc(1, sizeof *cpu);
    if (cpu == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for device cpu");
    cpu->base = (anepy_device){.type = &anepy_device_cpu, .ops = &OPS, .options = *options};
    cpu->positions = (int32_t)positions;
    /* Attention scratch: four squares, two blocks of a head and the factors of two. */
    int64_t factors_n = anepy_cpu_factors_n(m->head_dim), blocks = m->config.n_heads * width / COLS;
    cpu->scratch_n = (4 * COLS + 2 * (int64_t)m->head_dim) * COLS + 2 * factors_n;
    if ((cpu->cosine = own_floats(cpu, half * positions)) == NULL ||
        (cpu->sine = own_floats(cpu, half * positions)) == NULL ||
        (cpu->dattn = own_floats(cpu, m->config.dim * width)) == NULL ||
        (cpu->dq = own_floats(cpu, m->config.dim * width)) == NULL ||
        (cpu->factors = own_floats(cpu, 2 * blocks * factors_n)) == NULL ||
        (cpu->dot = own_floats(cpu, m->config.n_heads * width)) == NULL ||
        (cpu->turns = own(cpu, (size_t)blocks * sizeof *cpu->turns, NULL, 0)) == NULL ||
        (cpu->forwards = own(cpu, (size_t)m->config.n_layers * sizeof(anepy_kernel *), NULL, 0)) ==
            NULL ||
        (cpu->scratch =
             own_floats(cpu, cpu->scratch_n * anepy_pool_threads(options->gemm->pool))) == NULL) {
        cpu_close(&cpu->base);
        return ANEPY_E_MEMORY;
    }
    for (int64_t i = 0; i < half; i++) {
        double frequency = pow(ANEPY_ROPE_THETA, -2.0 * (double)i / m->head_dim);
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
    .capabilities = ANEPY_BINDS | ANEPY_LIVE_WEIGHTS | ANEPY_OFFLOADS | ANEPY_BATCHES,
    .slow = ANEPY_OFFLOADS, /* they are the host's work done in more passes (anepy compare) */
    .probe = cpu_probe,
    .has_precision = cpu_has_precision,
    .open = cpu_open,
};
