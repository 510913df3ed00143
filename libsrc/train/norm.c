/* train/norm.c - RMSNorm outside the programs (final norm, all backward passes) and residuals. */
#include "train/norm.h"

#include <string.h>

#include "kernels/weights.h"

#define COLS ANEPY_COLUMNS

typedef struct {
    anepy_engine *e;
    float *dx;
    const float *residual, *dy, *x, *through;
    const float *weight;
    float *gradient; /* its own; NULL: frozen */
} norm_task;

static void norm_panel(void *context, int32_t index, int32_t worker) {
    (void)worker;
    anepy_engine *e = context;
    float rstd[COLS];
    int64_t j = (int64_t)index * COLS;
    e->kernels->rmsnorm(e->room->xnorm + j, e->room->width, rstd,
                        (const float *)e->room->x_final.data + j,
                        anepy_weights(e, 0, ANEPY_FINAL_NORM).data, e->model->norm_eps,
                        e->model->config.dim, e->room->width);
}

void anepy_final_norm(anepy_engine *e) {
    anepy_touch(e, e->model->config.dim, 3);
    anepy_engine_run(e, e->run.columns / COLS, norm_panel);
}

/* Whether rows go through the kernel: not where a device has computed dx and there is no dw. */
static int needs_row(const norm_task *t) { return t->through == NULL || t->gradient != NULL; }

/* With r = rstd: dx = r (w dy) - x r^3/D sum(w dy x); dw = sum over tokens of dy x r. */
static void stats_panel(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const norm_task *t = context;
    int64_t j = (int64_t)index * COLS;
    t->e->kernels->rmsnorm_stats(t->e->room->rstd + j, t->e->room->coef + j, t->dy + j, t->x + j,
                                 t->weight, t->e->model->norm_eps, t->e->model->config.dim,
                                 t->e->room->width);
}

static void backward_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const norm_task *t = context;
    anepy_engine *e = t->e;
    int32_t end = anepy_min_i32(e->model->config.dim, (index + 1) * ANEPY_PIECE_ROWS);
    for (int32_t c = index * ANEPY_PIECE_ROWS; c < end; c++) {
        int64_t row = (int64_t)c * e->room->width;
        const float *residual = t->residual != NULL ? t->residual + row : e->room->zeros;
        if (needs_row(t)) {
            float own =
                e->kernels->rmsnorm_row(t->dx + row, residual, t->dy + row, t->x + row,
                                        e->room->rstd, e->room->coef, t->weight[c], e->run.columns);
            if (t->gradient != NULL) t->gradient[c] = own;
        }
        if (t->through != NULL) /* the device has computed dx, rmsnorm_row only dw */
            e->kernels->add(t->dx + row, residual, t->through + row, e->run.columns);
    }
}

/* The place of a norm's gradient among those of this step. */
static float *own_gradient(const anepy_engine *e, int32_t layer, int32_t role) {
    int64_t first = 2 * (int64_t)layer;
    switch (role) {
    case ANEPY_Q_NORM: return e->head_gradients + first * e->model->head_dim;
    case ANEPY_K_NORM: return e->head_gradients + (first + 1) * e->model->head_dim;
    case ANEPY_FFN_NORM: return e->norm_gradients + (first + 1) * e->model->config.dim;
    case ANEPY_FINAL_NORM: first = 2 * (int64_t)e->model->config.n_layers; break;
    }
    return e->norm_gradients + first * e->model->config.dim;
}

void anepy_norm_backward(anepy_engine *e, float *dx, const float *residual, const float *dy,
                         const float *x, const float *through, int32_t layer, int32_t role) {
    const anepy_tensor *tensor = anepy_model_find(e->model, layer, role);
    norm_task task = {.e = e,
                      .dx = dx,
                      .residual = residual,
                      .dy = dy,
                      .x = x,
                      .through = through,
                      .weight = anepy_weights(e, layer, role).data};
    if (anepy_gradient(e, tensor) != NULL) task.gradient = own_gradient(e, layer, role);
    anepy_touch(e, e->model->config.dim, (needs_row(&task) ? 6 : 0) + (through != NULL ? 3 : 0));
    if (needs_row(&task)) anepy_pool_run(e->pool, e->run.columns / COLS, stats_panel, &task);
    anepy_pool_run(e->pool, anepy_pieces(e->model->config.dim, ANEPY_PIECE_ROWS), backward_rows,
                   &task);
}

typedef struct {
    anepy_engine *e;
    float *dx;
    const float *dy, *x, *weight;
} heads_task;

/* A head is one piece, panel by panel: its rows of a panel are read twice while they are near. */
static void head_backward(void *context, int32_t head, int32_t worker) {
    (void)worker;
    const heads_task *t = context;
    anepy_engine *e = t->e;
    int32_t channels = e->model->head_dim;
    int64_t width = e->room->width, first = (int64_t)head * channels * width;
    float rstd[COLS], coef[COLS], *gradient = e->room->head_partial + (int64_t)head * channels;
    memset(gradient, 0, (size_t)channels * sizeof(float));
    for (int64_t at = first; at < first + e->run.columns; at += COLS) {
        e->kernels->rmsnorm_stats(rstd, coef, t->dy + at, t->x + at, t->weight, e->model->norm_eps,
                                  channels, width);
        for (int32_t c = 0; c < channels; c++) {
            int64_t row = at + c * width;
            gradient[c] += e->kernels->rmsnorm_row(t->dx + row, e->room->zeros, t->dy + row,
                                                   t->x + row, rstd, coef, t->weight[c], COLS);
        }
    }
}

void anepy_heads_backward(anepy_engine *e, float *dx, const float *dy, const float *x,
                          int32_t layer, int32_t role) {
    const anepy_config *c = &e->model->config;
    const float *weight = anepy_weights_vector(anepy_weights(e, layer, role));
    int32_t heads = role == ANEPY_Q_NORM ? c->n_heads : c->n_kv_heads, n = e->model->head_dim;
    float *gradient = own_gradient(e, layer, role);
    heads_task task = {e, dx, dy, x, weight};
    anepy_touch(e, (int64_t)heads * n, 5);
    anepy_pool_run(e->pool, heads, head_backward, &task);
    if (anepy_gradient(e, anepy_model_find(e->model, layer, role)) == NULL) return;
    memcpy(gradient, e->room->head_partial, (size_t)n * sizeof(float));
    for (int32_t h = 1; h < heads; h++)
        e->kernels->add(gradient, gradient, e->room->head_partial + (int64_t)h * n, n);
}

static void accumulate(anepy_engine *e, int32_t layer, int32_t role) {
    const anepy_tensor *tensor = anepy_model_find(e->model, layer, role);
    float *gradient = tensor != NULL ? anepy_gradient(e, tensor) : NULL;
    if (gradient == NULL) return;
    const float *own = own_gradient(e, layer, role);
    if (anepy_adds(e)) e->kernels->add(gradient, gradient, own, tensor->cols);
    else memcpy(gradient, own, (size_t)tensor->cols * sizeof(float));
}

void anepy_norm_accumulate(anepy_engine *e, int32_t layer) {
    static const int32_t ROLES[] = {ANEPY_ATTENTION_NORM, ANEPY_FFN_NORM, ANEPY_Q_NORM,
                                    ANEPY_K_NORM};
    if (layer == e->model->config.n_layers) {
        accumulate(e, 0, ANEPY_FINAL_NORM);
        return;
    }
    for (size_t i = 0; i < sizeof ROLES / sizeof ROLES[0]; i++) accumulate(e, layer, ROLES[i]);
}

typedef struct {
    anepy_engine *e;
    float *out;
    const float *a, *b;
} add_task;

static void add_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const add_task *t = context;
    int32_t end = anepy_min_i32(t->e->model->config.dim, (index + 1) * ANEPY_PIECE_ROWS);
    for (int32_t c = index * ANEPY_PIECE_ROWS; c < end; c++) {
        int64_t row = (int64_t)c * t->e->room->width;
        t->e->kernels->add(t->out + row, t->a + row, t->b + row, t->e->run.columns);
    }
}

void anepy_residual_add(anepy_engine *e, float *out, const float *a, const float *b) {
    add_task task = {e, out, a, b};
    anepy_touch(e, e->model->config.dim, 3);
    anepy_pool_run(e->pool, anepy_pieces(e->model->config.dim, ANEPY_PIECE_ROWS), add_rows, &task);
}
