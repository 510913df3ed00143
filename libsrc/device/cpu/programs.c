/* device/cpu/programs.c - every program of the table as fused kernels.
 *
 * Attention is in attention.c; norms, classifier and soft-max are in offload.c. */
#include "device/cpu/cpu.h"

#define COLS ANEPY_COLUMNS

/* ----------------------------------------------------------------------------- building blocks */

/* A run of weights [rows[i], cols] whose outputs (or output gradients) are y[i], or y16[i] if those
 * are rounded. */
typedef struct {
    const float *w[3];
    float *y[3];
    const uint16_t *y16[3];
    int32_t rows[3];
    int32_t count;
    int32_t packed; /* the other factor is in the panels already */
} projections;

/* Merges neighbours that follow each other in both memories, so that one product covers them. */
static void merge(projections *p, int32_t cols, int32_t width) {
    int32_t n = 0;
    for (int32_t i = 1; i < p->count; i++) {
        int64_t behind = (int64_t)p->rows[n] * width;
        if (p->w[i] == p->w[n] + (int64_t)p->rows[n] * cols &&
            (p->y[n] != NULL ? p->y[i] == p->y[n] + behind : p->y16[i] == p->y16[n] + behind)) {
            p->rows[n] += p->rows[i];
        } else {
            n++;
            p->w[n] = p->w[i];
            p->y[n] = p->y[i];
            p->y16[n] = p->y16[i];
            p->rows[n] = p->rows[i];
        }
    }
    p->count = n + 1;
}

/* Does whoever computes and rounds a factor pack it for the product that sums over its k rows? */
static int packs(const anepy_cpu *cpu, const uint16_t *rounded, int32_t k) {
    return rounded != NULL && k <= anepy_gemm_depth(cpu->base.options.gemm);
}

static void multiply(const anepy_cpu *cpu, const anepy_product *product, int packed) {
    const anepy_gemm *gemm = cpu->base.options.gemm;
    if (packed) anepy_gemm_multiply(gemm, product);
    else anepy_gemm_run(gemm, product);
}

/* y[i] = w[i] . x; x, or x16 if it is rounded, is [cols, width]. */
static void project(const anepy_cpu *cpu, projections p, const float *x, const uint16_t *x16,
                    int32_t cols, int32_t columns) {
    int32_t width = cpu->base.options.width;
    merge(&p, cols, width);
    for (int32_t i = 0; i < p.count; i++)
        multiply(cpu,
                 &(anepy_product){.c = p.y[i],
                                  .ldc = width,
                                  .a = p.w[i],
                                  .a_row = cols,
                                  .a_step = 1,
                                  .b = x,
                                  .b16 = x16,
                                  .ldb = width,
                                  .m = p.rows[i],
                                  .n = columns,
                                  .k = cols},
                 p.packed);
}

/* dx = sum_i w[i]^T . y[i]; dx is [cols, width]. */
static void project_backward(const anepy_cpu *cpu, float *dx, projections p, int32_t cols,
                             int32_t columns) {
    int32_t width = cpu->base.options.width;
    merge(&p, cols, width);
    for (int32_t i = 0; i < p.count; i++)
        multiply(cpu,
                 &(anepy_product){.c = dx,
                                  .ldc = width,
                                  .a = p.w[i],
                                  .a_row = 1,
                                  .a_step = cols,
                                  .b = p.y[i],
                                  .b16 = p.y16[i],
                                  .ldb = width,
                                  .m = cols,
                                  .n = columns,
                                  .k = p.rows[i],
                                  .accumulate = i > 0},
                 p.packed);
}

/* Operands of an element-wise loop over rows of [rows, width], n columns of each. An output is
 * rounded instead, and packed for the product that reads it next, where rounded is given. */
typedef struct {
    const anepy_cpu *cpu;
    float *out[2];
    uint16_t *rounded[2];
    const float *in[3];
    int32_t rows, columns;
    int32_t packed_k; /* the reduction of that product; 0: it is not packed */
} elementwise;

#define PIECE_ROWS 64

/* Rows of a factor as they were computed. k: packed_k; `row`: the first of them there. */
static void put_rows(const anepy_cpu *cpu, uint16_t *dst, int32_t k, int32_t row, int32_t rows,
                     int32_t column, int32_t columns, const float *src, int64_t ld) {
    const anepy_device_options *o = &cpu->base.options;
    for (int32_t r = 0; r < rows; r++)
        o->gemm->bf16->to_bf16(dst + (int64_t)r * o->width + column, src + r * ld, columns);
    if (k > 0) anepy_gemm_pack_rows(o->gemm, k, src, ld, row, rows, column, columns);
}

static void norm_panel(void *context, int32_t index, int32_t worker) {
    const elementwise *e = context;
    const anepy_device_options *o = &e->cpu->base.options;
    float rstd[COLS], *panel = anepy_cpu_scratch(e->cpu, worker);
    int32_t dim = o->model->config.dim, j = index * COLS;
    int rounds = e->rounded[0] != NULL;
    o->gemm->kernels->rmsnorm(rounds ? panel : e->out[0] + j, rounds ? COLS : o->width, rstd,
                              e->in[0] + j, e->in[1], o->model->norm_eps, dim, o->width);
    if (rounds) put_rows(e->cpu, e->rounded[0], e->packed_k, 0, dim, j, COLS, panel, COLS);
}

/* xnorm, or xnorm16 if it is rounded; returns whether it is packed as well. */
static int normalize(const anepy_cpu *cpu, float *xnorm, uint16_t *xnorm16, const float *x,
                     const float *weight, int32_t columns) {
    int32_t dim = cpu->base.options.model->config.dim;
    elementwise e = {.cpu = cpu,
                     .out = {xnorm},
                     .rounded = {xnorm16},
                     .in = {x, weight},
                     .packed_k = packs(cpu, xnorm16, dim) ? dim : 0};
    anepy_pool_run(cpu->base.options.gemm->pool, columns / COLS, norm_panel, &e);
    return e.packed_k > 0;
}

static void swiglu_rows(void *context, int32_t index, int32_t worker) {
    const elementwise *e = context;
    const anepy_kernels *kernels = e->cpu->base.options.gemm->kernels;
    int64_t width = e->cpu->base.options.width;
    int32_t end = anepy_min_i32(e->rows, (index + 1) * PIECE_ROWS);
    float *pair = anepy_cpu_scratch(e->cpu, worker);
    for (int32_t row = index * PIECE_ROWS; row < end; row += 2) {
        int32_t count = anepy_min_i32(2, end - row);
        for (int32_t r = 0; r < count; r++) {
            int64_t i = (row + r) * width;
            kernels->swiglu(e->out[0] != NULL ? e->out[0] + i : pair + r * width, e->in[0] + i,
                            e->in[1] + i, e->columns);
        }
        if (e->rounded[0] != NULL)
            put_rows(e->cpu, e->rounded[0] + row * width, e->packed_k, row, count, 0, e->columns,
                     pair, width);
    }
}

static void swiglu_backward_rows(void *context, int32_t index, int32_t worker) {
    const elementwise *e = context;
    const anepy_kernels *kernels = e->cpu->base.options.gemm->kernels;
    int64_t width = e->cpu->base.options.width;
    int32_t end = anepy_min_i32(e->rows, (index + 1) * PIECE_ROWS);
    float *pair = anepy_cpu_scratch(e->cpu, worker), *other = pair + 2 * width;
    for (int32_t row = index * PIECE_ROWS; row < end; row += 2) {
        int32_t count = anepy_min_i32(2, end - row);
        for (int32_t r = 0; r < count; r++) {
            int64_t i = (row + r) * width;
            kernels->swiglu_backward(e->out[0] != NULL ? e->out[0] + i : pair + r * width,
                                     e->out[1] != NULL ? e->out[1] + i : other + r * width,
                                     e->in[0] + i, e->in[1] + i, e->in[2] + i, e->columns);
        }
        if (e->rounded[0] == NULL) continue;
        put_rows(e->cpu, e->rounded[0] + row * width, e->packed_k, row, count, 0, e->columns, pair,
                 width);
        put_rows(e->cpu, e->rounded[1] + row * width, e->packed_k, e->rows + row, count, 0,
                 e->columns, other, width);
    }
}

static void run_rows(elementwise *e, anepy_loop_fn fn) {
    anepy_pool_run(e->cpu->base.options.gemm->pool, (e->rows + PIECE_ROWS - 1) / PIECE_ROWS, fn, e);
}

/* ------------------------------------------------------------------------------------ programs */

static void sdpa_fwd(anepy_kernel *k, int32_t n, int32_t columns) {
    const anepy_cpu *cpu = k->cpu;
    const anepy_model *m = cpu->base.options.model;
    int32_t dim = m->config.dim, q = m->q_dim, kv = m->kv_dim;
    float **t = k->tensors;
    int packed = normalize(cpu, t[SDPA_FWD_XNORM], k->rounded[SDPA_FWD_XNORM], t[SDPA_FWD_X],
                           k->weights[0], columns);
    project(cpu,
            (projections){.w = {k->weights[1], k->weights[2], k->weights[3]},
                          .y = {t[SDPA_FWD_Q], t[SDPA_FWD_K], t[SDPA_FWD_V]},
                          .rows = {q, kv, kv},
                          .count = 3,
                          .packed = packed},
            t[SDPA_FWD_XNORM], k->rounded[SDPA_FWD_XNORM], dim, columns);
    anepy_cpu_rope(cpu, t[SDPA_FWD_Q], m->config.n_heads, n, columns, 1.0f);
    anepy_cpu_rope(cpu, t[SDPA_FWD_K], m->config.n_kv_heads, n, columns, 1.0f);
    anepy_cpu_attention(k, n, columns);
    project(cpu,
            (projections){.w = {k->weights[4]}, .y = {t[SDPA_FWD_OUT]}, .rows = {dim}, .count = 1},
            t[SDPA_FWD_ATTN], NULL, q, columns);
}

static void ffn_fwd(anepy_kernel *k, int32_t n, int32_t columns) {
    (void)n;
    const anepy_cpu *cpu = k->cpu;
    const anepy_config *c = &cpu->base.options.model->config;
    int32_t dim = c->dim, hidden = c->hidden_dim;
    float **t = k->tensors;
    uint16_t *gate16 = k->rounded[FFN_FWD_GATE];
    int gate_packed = packs(cpu, gate16, hidden);
    int packed = normalize(cpu, t[FFN_FWD_XNORM], k->rounded[FFN_FWD_XNORM], t[FFN_FWD_X],
                           k->weights[0], columns);
    project(cpu,
            (projections){.w = {k->weights[1], k->weights[2]},
                          .y = {t[FFN_FWD_H1], t[FFN_FWD_H3]},
                          .rows = {hidden, hidden},
                          .count = 2,
                          .packed = packed},
            t[FFN_FWD_XNORM], k->rounded[FFN_FWD_XNORM], dim, columns);
    elementwise e = {.cpu = cpu,
                     .out = {t[FFN_FWD_GATE]},
                     .rounded = {gate16},
                     .packed_k = gate_packed ? hidden : 0,
                     .in = {t[FFN_FWD_H1], t[FFN_FWD_H3]},
                     .rows = hidden,
                     .columns = columns};
    run_rows(&e, swiglu_rows);
    project(cpu,
            (projections){.w = {k->weights[3]},
                          .y = {t[FFN_FWD_OUT]},
                          .rows = {dim},
                          .count = 1,
                          .packed = gate_packed},
            t[FFN_FWD_GATE], gate16, hidden, columns);
}

static void ffn_bwd(anepy_kernel *k, int32_t n, int32_t columns) {
    (void)n;
    const anepy_cpu *cpu = k->cpu;
    const anepy_config *c = &cpu->base.options.model->config;
    int32_t dim = c->dim, hidden = c->hidden_dim;
    float **t = k->tensors;
    uint16_t *dh1 = k->rounded[FFN_BWD_DH1], *dh3 = k->rounded[FFN_BWD_DH3];
    /* Rows are packed in pairs, for one product of both gradients. */
    int packed = packs(cpu, dh1, 2 * hidden) && hidden % 2 == 0 &&
                 dh3 == dh1 + (int64_t)hidden * cpu->base.options.width;
    /* The gradient of gate goes where that of h1 will be, unless that is rounded. */
    float *dgate = dh1 != NULL ? cpu->dgate : t[FFN_BWD_DH1];
    project_backward(
        cpu, dgate,
        (projections){.w = {k->weights[0]}, .y = {t[FFN_BWD_DY]}, .rows = {dim}, .count = 1},
        hidden, columns);
    elementwise e = {.cpu = cpu,
                     .out = {t[FFN_BWD_DH1], t[FFN_BWD_DH3]},
                     .rounded = {dh1, dh3},
                     .packed_k = packed ? 2 * hidden : 0,
                     .in = {dgate, t[FFN_BWD_H1], t[FFN_BWD_H3]},
                     .rows = hidden,
                     .columns = columns};
    run_rows(&e, swiglu_backward_rows);
    project_backward(cpu, t[FFN_BWD_DX],
                     (projections){.w = {k->weights[1], k->weights[2]},
                                   .y = {t[FFN_BWD_DH1], t[FFN_BWD_DH3]},
                                   .y16 = {dh1, dh3},
                                   .rows = {hidden, hidden},
                                   .count = 2,
                                   .packed = packed},
                     dim, columns);
}

static void sdpa_bwd1(anepy_kernel *k, int32_t n, int32_t columns) {
    const anepy_cpu *cpu = k->cpu;
    const anepy_model *m = cpu->base.options.model;
    project_backward(cpu, cpu->dattn,
                     (projections){.w = {k->weights[0]},
                                   .y = {k->tensors[SDPA_BWD1_DY]},
                                   .rows = {m->config.dim},
                                   .count = 1},
                     m->q_dim, columns);
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
                                   .rows = {m->q_dim, m->kv_dim, m->kv_dim},
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

void anepy_cpu_run(anepy_kernel *kernel, int32_t n, int32_t columns) {
    PROGRAMS[kernel->program.id](kernel, n, columns);
}
