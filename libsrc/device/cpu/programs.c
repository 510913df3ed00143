/* device/cpu/programs.c - every program of the table as fused kernels.
 *
 * Attention is in attention.c; norms, classifier and soft-max are in offload.c. */
#include "device/cpu/cpu.h"

#define COLS ANEPY_COLUMNS
/* ----------------------------------------------------------------------------- building blocks */

/* Projections of one input: y[i], or y16[i] if those are rounded, are their outputs, or gradients
 * of these. */
typedef struct {
    int32_t into; /* which ones, ANEPY_INTO_W2... */
    float *y[3];
    const uint16_t *y16[3];
    int32_t packed; /* the other factor is in the panels already */
} projections;

static anepy_projection projection(const anepy_executable *k, const projections *p, int32_t i) {
    int32_t role = anepy_siblings[p->into].role + i;
    return anepy_model_projection(k->cpu->base.options.model, k->layer, role);
}

/* What one product covers: `count` projections from `first` on. */
typedef struct {
    anepy_storage w;
    float *y;
    const uint16_t *y16;
    int32_t first, count;
} run;

static int follows(const run *r, const projections *p, int32_t i, int64_t width) {
    int64_t behind = r->w.rows * width;
    return r->y != NULL ? p->y[i] == r->y + behind : p->y16[i] == r->y16 + behind;
}

/* Neighbours that follow each other in both memories are one run. Returns how many there are. */
static int32_t merge(const anepy_executable *k, const projections *p, run runs[3]) {
    int32_t n = 0;
    for (int32_t i = 0; i < anepy_siblings[p->into].count; i++) {
        anepy_storage w = anepy_cpu_weights(k, anepy_siblings[p->into].role + i);
        if (n > 0 && follows(&runs[n - 1], p, i, k->cpu->base.options.width) &&
            anepy_storage_extend(&runs[n - 1].w, w))
            runs[n - 1].count++;
        else runs[n++] = (run){w, p->y[i], p->y16[i], i, 1};
    }
    return n;
}

/* Whether what computes and rounds a factor also packs it for the product over its k rows. */
static int packs(const anepy_cpu *cpu, const uint16_t *rounded, int32_t k) {
    return rounded != NULL && k <= anepy_gemm_depth(cpu->base.options.gemm);
}

static void multiply(const anepy_cpu *cpu, const anepy_product *product, int packed) {
    const anepy_gemm *gemm = cpu->base.options.gemm;
    if (packed) anepy_gemm_multiply(gemm, product);
    else anepy_gemm_run(gemm, product);
}

/* ------------------------------------------------------------------------------------ adapters
 *
 * y = W x + B (scale A x): A is multiplied with x as it was packed for W, and the product with B is
 * added to each block of y while that is in the cache. Backward alike: scale B^T dy with dy as it
 * was packed for W^T, then A^T of that beside W^T dy. */

/* Rows of scale A x, or of scale B^T dy, that the adapters of projections before this one have. */
static int32_t low_row(const anepy_executable *k, const projections *p, int32_t end) {
    int32_t row = 0;
    for (int32_t i = 0; i < end; i++)
        if (projection(k, p, i).a != NULL) row += k->cpu->base.options.model->adapter.rank;
    return row;
}

static float *low_at(const anepy_executable *k, const projections *p, int32_t i) {
    return k->tensors[k->program.low[p->into]] +
           (int64_t)low_row(k, p, i) * k->cpu->base.options.width;
}

/* A of the adapters of projections [first, end), which lie behind each other. */
static anepy_storage stacked_a(const anepy_executable *k, const projections *p, int32_t first,
                               int32_t end) {
    anepy_storage a = {0};
    for (int32_t i = first; i < end; i++) {
        const anepy_tensor *tensor = projection(k, p, i).a;
        if (tensor == NULL) continue;
        anepy_storage next = anepy_stored(tensor, k->cpu->base.options.adapter);
        if (a.rows == 0) a = next;
        else anepy_storage_extend(&a, next);
    }
    return a;
}

/* Multiplies rows by the adapter's scale and packs them for the product that takes them next. */
static void finish_low(const anepy_executable *k, float *low, int32_t rows, int32_t columns,
                       float *panels) {
    const anepy_device_options *o = &k->cpu->base.options;
    anepy_gemm gemm = *o->gemm;
    anepy_product factor = {.b = low, .ldb = o->width, .n = columns, .k = rows};
    for (int32_t r = 0; r < rows; r++)
        gemm.kernels->scale(low + (int64_t)r * o->width, o->model->adapter.scale, columns);
    gemm.panels = panels;
    if (anepy_gemm_packs(&gemm)) anepy_gemm_pack(&gemm, &factor);
}

static void project_adapted(const anepy_executable *k, const projections *p, const float *x,
                            const uint16_t *x16, int32_t columns) {
    const anepy_device_options *o = &k->cpu->base.options;
    int32_t count = anepy_siblings[p->into].count, rank = o->model->adapter.rank;
    int32_t in = projection(k, p, 0).in, depth = anepy_gemm_depth(o->gemm);
    int64_t panels_n = anepy_cpu_low_panels_n(rank, o->width);
    anepy_product into_x = {.b = x, .b16 = x16, .ldc = o->width, .ldb = o->width, .n = columns};
    anepy_product a = into_x, w[3], b[3];
    a.c = low_at(k, p, 0);
    anepy_weights_factor(&a, stacked_a(k, p, 0, count), 0);
    for (int32_t i = 0; i < count; i++) {
        anepy_projection q = projection(k, p, i);
        float *panels = k->cpu->low_panels + i * panels_n;
        w[i] = into_x;
        w[i].c = p->y[i];
        anepy_weights_factor(&w[i], anepy_stored(q.weight, k->params), 0);
        if (q.b == NULL) continue;
        b[i] = (anepy_product){.b = low_at(k, p, i), .ldb = o->width, .panels = panels};
        anepy_weights_factor(&b[i], anepy_stored(q.b, o->adapter), 0);
        w[i].also = &b[i];
    }
    int parts = p->packed || anepy_gemm_packs(o->gemm);
    for (int32_t first = 0; first < in; first += parts ? depth : in) {
        int32_t n = parts ? depth : in;
        anepy_product part = anepy_gemm_part(&a, first, n);
        if (parts && !p->packed) anepy_gemm_pack(o->gemm, &part);
        multiply(k->cpu, &part, parts);
        for (int32_t i = 0; i < count && first + n >= in; i++)
            if (w[i].also != NULL)
                finish_low(k, low_at(k, p, i), rank, columns, k->cpu->low_panels + i * panels_n);
        for (int32_t i = 0; i < count; i++) {
            part = anepy_gemm_part(&w[i], first, n);
            multiply(k->cpu, &part, parts);
        }
    }
}

/* The gradient of x through the projections of a run: dx is the product with their weights. */
static void run_backward_adapted(const anepy_executable *k, const projections *p, const run *r,
                                 anepy_product *dx) {
    const anepy_device_options *o = &k->cpu->base.options;
    int32_t end = r->first + r->count, row = 0, rows = 0;
    float *low = low_at(k, p, r->first);
    /* What follows reads dy from the panels of the whole run. */
    int pairs = r->count == 1 || projection(k, p, r->first).out % 2 == 0;
    int shares = pairs && anepy_gemm_packs(o->gemm) && dx->k <= anepy_gemm_depth(o->gemm);
    if (shares && !p->packed) anepy_gemm_pack(o->gemm, dx);
    for (int32_t i = r->first; i < end; i++) {
        anepy_projection q = projection(k, p, i);
        anepy_product b = {.c = low_at(k, p, i),
                           .ldc = o->width,
                           .b = p->y[i],
                           .b16 = p->y16[i],
                           .ldb = o->width,
                           .n = dx->n,
                           .b_row = shares ? row : 0,
                           .packed_k = shares ? dx->k : 0};
        row += q.out;
        if (q.b == NULL) continue;
        anepy_weights_factor(&b, anepy_stored(q.b, o->adapter), 1);
        multiply(k->cpu, &b, shares);
        rows += o->model->adapter.rank;
    }
    anepy_product a = {.b = low, .ldb = o->width, .panels = k->cpu->low_panels};
    if (rows > 0) {
        finish_low(k, low, rows, dx->n, k->cpu->low_panels);
        anepy_weights_factor(&a, stacked_a(k, p, r->first, end), 1);
        dx->also = &a;
    }
    multiply(k->cpu, dx, shares);
}

/* ---------------------------------------------------------------------------------- projections */

/* The biases of projections, added to all columns of their outputs. */
typedef struct {
    const anepy_cpu *cpu;
    float *y;
    const float *bias;
    int32_t rows, columns;
} biased;

static void add_bias_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const biased *b = context;
    int32_t end = anepy_min_i32(b->rows, (index + 1) * ANEPY_PIECE_ROWS);
    for (int32_t row = index * ANEPY_PIECE_ROWS; row < end; row++) {
        float *y = b->y + (int64_t)row * b->cpu->base.options.width, bias = b->bias[row];
        for (int32_t j = 0; j < b->columns; j++) y[j] += bias;
    }
}

static void add_biases(const anepy_executable *k, const projections *p, int32_t columns) {
    const anepy_device_options *o = &k->cpu->base.options;
    for (int32_t i = 0; i < anepy_siblings[p->into].count; i++) {
        const anepy_tensor *bias = projection(k, p, i).bias;
        if (bias == NULL) continue;
        biased b = {k->cpu, p->y[i], anepy_weights_vector(anepy_stored(bias, k->params)),
                    (int32_t)bias->cols, columns};
        anepy_pool_run(o->gemm->pool, anepy_pieces(b.rows, ANEPY_PIECE_ROWS), add_bias_rows, &b);
    }
}

/* The projections of x, or of x16 if it is rounded. */
static void project(const anepy_executable *k, projections p, const float *x, const uint16_t *x16,
                    int32_t columns) {
    int32_t width = k->cpu->base.options.width;
    run runs[3];
    int32_t count = merge(k, &p, runs);
    if (k->program.low[p.into] > 0) {
        project_adapted(k, &p, x, x16, columns);
    } else {
        for (int32_t i = 0; i < count; i++) {
            anepy_product product = {
                .c = runs[i].y, .ldc = width, .b = x, .b16 = x16, .ldb = width, .n = columns};
            anepy_weights_factor(&product, runs[i].w, 0);
            multiply(k->cpu, &product, p.packed);
        }
    }
    add_biases(k, &p, columns);
}

/* dx, the gradient of x: what the projections make of y, added up. */
static void project_backward(const anepy_executable *k, float *dx, projections p, int32_t columns) {
    int32_t width = k->cpu->base.options.width;
    run runs[3];
    int32_t count = merge(k, &p, runs);
    for (int32_t i = 0; i < count; i++) {
        anepy_product product = {.c = dx,
                                 .ldc = width,
                                 .b = runs[i].y,
                                 .b16 = runs[i].y16,
                                 .ldb = width,
                                 .n = columns,
                                 .accumulate = i > 0};
        anepy_weights_factor(&product, runs[i].w, 1);
        if (k->program.low[p.into] > 0) run_backward_adapted(k, &p, &runs[i], &product);
        else multiply(k->cpu, &product, p.packed);
    }
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
static int normalize(const anepy_executable *k, float *xnorm, uint16_t *xnorm16, const float *x,
                     int32_t role, int32_t columns) {
    const anepy_cpu *cpu = k->cpu;
    int32_t dim = cpu->base.options.model->config.dim;
    const float *weight = anepy_weights_vector(anepy_cpu_weights(k, role));
    elementwise e = {.cpu = cpu,
                     .out = {xnorm},
                     .rounded = {xnorm16},
                     .in = {x, weight},
                     .packed_k = packs(cpu, xnorm16, dim) ? dim : 0};
    anepy_pool_run(cpu->base.options.gemm->pool, columns / COLS, norm_panel, &e);
    return e.packed_k > 0;
}

/* Heads of q or k, before RoPE. */
typedef struct {
    const anepy_cpu *cpu;
    float *y;
    const float *x, *weight;
    int32_t panels; /* of a row */
} heads_norm;

static void head_panel(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const heads_norm *t = context;
    const anepy_device_options *o = &t->cpu->base.options;
    float rstd[COLS];
    int64_t at =
        (int64_t)(index / t->panels) * o->model->head_dim * o->width + index % t->panels * COLS;
    o->gemm->kernels->rmsnorm(t->y + at, o->width, rstd, t->x + at, t->weight, o->model->norm_eps,
                              o->model->head_dim, o->width);
}

static void normalize_heads(const anepy_executable *k, float *y, const float *x, int32_t role,
                            int32_t heads, int32_t columns) {
    const float *weight = anepy_weights_vector(anepy_cpu_weights(k, role));
    heads_norm t = {k->cpu, y, x, weight, columns / COLS};
    anepy_pool_run(k->cpu->base.options.gemm->pool, heads * t.panels, head_panel, &t);
}

static void swiglu_rows(void *context, int32_t index, int32_t worker) {
    const elementwise *e = context;
    const anepy_kernels *kernels = e->cpu->base.options.gemm->kernels;
    int64_t width = e->cpu->base.options.width;
    int32_t end = anepy_min_i32(e->rows, (index + 1) * ANEPY_PIECE_ROWS);
    float *pair = anepy_cpu_scratch(e->cpu, worker);
    for (int32_t row = index * ANEPY_PIECE_ROWS; row < end; row += 2) {
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
    int32_t end = anepy_min_i32(e->rows, (index + 1) * ANEPY_PIECE_ROWS);
    float *pair = anepy_cpu_scratch(e->cpu, worker), *other = pair + 2 * width;
    for (int32_t row = index * ANEPY_PIECE_ROWS; row < end; row += 2) {
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
    anepy_pool_run(e->cpu->base.options.gemm->pool, anepy_pieces(e->rows, ANEPY_PIECE_ROWS), fn, e);
}

/* ------------------------------------------------------------------------------------ programs */

static void sdpa_fwd(anepy_executable *k, int32_t n, int32_t columns) {
    const anepy_cpu *cpu = k->cpu;
    const anepy_config *c = &cpu->base.options.model->config;
    float **t = k->tensors;
    float *q = t[c->qk_norm ? SDPA_FWD_Q_RAW : SDPA_FWD_Q];
    float *key = t[c->qk_norm ? SDPA_FWD_K_RAW : SDPA_FWD_K];
    int packed = normalize(k, t[SDPA_FWD_XNORM], k->rounded[SDPA_FWD_XNORM], t[SDPA_FWD_X],
                           ANEPY_ATTENTION_NORM, columns);
    project(k,
            (projections){.into = ANEPY_INTO_QKV, .y = {q, key, t[SDPA_FWD_V]}, .packed = packed},
            t[SDPA_FWD_XNORM], k->rounded[SDPA_FWD_XNORM], columns);
    if (c->qk_norm) {
        normalize_heads(k, t[SDPA_FWD_Q], q, ANEPY_Q_NORM, c->n_heads, columns);
        normalize_heads(k, t[SDPA_FWD_K], key, ANEPY_K_NORM, c->n_kv_heads, columns);
    }
    anepy_cpu_rope(cpu, t[SDPA_FWD_Q], c->n_heads, n, columns, 1.0f);
    anepy_cpu_rope(cpu, t[SDPA_FWD_K], c->n_kv_heads, n, columns, 1.0f);
    anepy_cpu_attention(k, n, columns);
    project(k, (projections){.into = ANEPY_INTO_WO, .y = {t[SDPA_FWD_OUT]}}, t[SDPA_FWD_ATTN], NULL,
            columns);
}

static void ffn_fwd(anepy_executable *k, int32_t n, int32_t columns) {
    (void)n;
    const anepy_cpu *cpu = k->cpu;
    int32_t hidden = cpu->base.options.model->config.hidden_dim;
    float **t = k->tensors;
    uint16_t *gate16 = k->rounded[FFN_FWD_GATE];
    /* What the adapter of w2 makes of the gate is saved, too. */
    int wanted = !cpu->base.again || k->program.low[ANEPY_INTO_W2] > 0;
    int gate_packed = wanted && packs(cpu, gate16, hidden);
    int packed = normalize(k, t[FFN_FWD_XNORM], k->rounded[FFN_FWD_XNORM], t[FFN_FWD_X],
                           ANEPY_FFN_NORM, columns);
    project(k,
            (projections){
                .into = ANEPY_INTO_W13, .y = {t[FFN_FWD_H1], t[FFN_FWD_H3]}, .packed = packed},
            t[FFN_FWD_XNORM], k->rounded[FFN_FWD_XNORM], columns);
    elementwise e = {.cpu = cpu,
                     .out = {t[FFN_FWD_GATE]},
                     .rounded = {gate16},
                     .packed_k = gate_packed ? hidden : 0,
                     .in = {t[FFN_FWD_H1], t[FFN_FWD_H3]},
                     .rows = hidden,
                     .columns = columns};
    run_rows(&e, swiglu_rows);
    if (!wanted) return;
    project(k, (projections){.into = ANEPY_INTO_W2, .y = {t[FFN_FWD_OUT]}, .packed = gate_packed},
            t[FFN_FWD_GATE], gate16, columns);
}

static void ffn_bwd(anepy_executable *k, int32_t n, int32_t columns) {
    (void)n;
    const anepy_cpu *cpu = k->cpu;
    int32_t hidden = cpu->base.options.model->config.hidden_dim;
    float **t = k->tensors;
    uint16_t *dh1 = k->rounded[FFN_BWD_DH1], *dh3 = k->rounded[FFN_BWD_DH3];
    /* Rows are packed in pairs, for one product of both gradients. */
    int packed = packs(cpu, dh1, 2 * hidden) && hidden % 2 == 0 &&
                 dh3 == dh1 + (int64_t)hidden * cpu->base.options.width;
    /* The gradient of gate goes where that of h1 will be, unless that is rounded. */
    float *dgate = dh1 != NULL ? cpu->dgate : t[FFN_BWD_DH1];
    project_backward(k, dgate, (projections){.into = ANEPY_INTO_W2, .y = {t[FFN_BWD_DY]}}, columns);
    elementwise e = {.cpu = cpu,
                     .out = {t[FFN_BWD_DH1], t[FFN_BWD_DH3]},
                     .rounded = {dh1, dh3},
                     .packed_k = packed ? 2 * hidden : 0,
                     .in = {dgate, t[FFN_BWD_H1], t[FFN_BWD_H3]},
                     .rows = hidden,
                     .columns = columns};
    run_rows(&e, swiglu_backward_rows);
    project_backward(k, t[FFN_BWD_DX],
                     (projections){.into = ANEPY_INTO_W13,
                                   .y = {t[FFN_BWD_DH1], t[FFN_BWD_DH3]},
                                   .y16 = {dh1, dh3},
                                   .packed = packed},
                     columns);
}

static void sdpa_bwd1(anepy_executable *k, int32_t n, int32_t columns) {
    const anepy_cpu *cpu = k->cpu;
    project_backward(k, cpu->dattn,
                     (projections){.into = ANEPY_INTO_WO, .y = {k->tensors[SDPA_BWD1_DY]}},
                     columns);
    if (k->tensors[SDPA_BWD1_P] != NULL) anepy_cpu_scores_backward1(k, n, columns);
}

static void sdpa_bwd2(anepy_executable *k, int32_t n, int32_t columns) {
    const anepy_cpu *cpu = k->cpu;
    const anepy_config *c = &cpu->base.options.model->config;
    if (k->tensors[SDPA_BWD2_P] != NULL) anepy_cpu_scores_backward2(k, n, columns);
    else anepy_cpu_attention_backward(k, n, columns);
    anepy_cpu_rope(cpu, k->tensors[SDPA_BWD2_DQ], c->n_heads, n, columns, -1.0f);
    anepy_cpu_rope(cpu, k->tensors[SDPA_BWD2_DK], c->n_kv_heads, n, columns, -1.0f);
}

static void qkv_bwd(anepy_executable *k, int32_t n, int32_t columns) {
    (void)n;
    float **t = k->tensors;
    project_backward(
        k, t[QKV_BWD_DX],
        (projections){.into = ANEPY_INTO_QKV, .y = {t[QKV_BWD_DQ], t[QKV_BWD_DK], t[QKV_BWD_DV]}},
        columns);
}

static void (*const PROGRAMS[ANEPY_PROGRAM_N])(anepy_executable *, int32_t n, int32_t columns) = {
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

int anepy_cpu_has(anepy_program_id id) { return PROGRAMS[id] != NULL; }

void anepy_cpu_run(anepy_executable *executable, int32_t n, int32_t columns) {
    PROGRAMS[executable->program.id](executable, n, columns);
}
