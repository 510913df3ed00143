/* train/norm.c - RMSNorm outside the programs (final norm, all backward passes) and residuals. */
#include "train/norm.h"

#include <string.h>

#define COLS ANEPY_COLUMNS
typedef struct {
    anepy_engine *e;
    float *dx;
    const float *residual, *dy, *x, *through;
    int64_t weight; /* offset of the norm weight in the arenas */
    float *gradient;
} norm_task;

static void norm_panel(void *context, int32_t index, int32_t worker) {
    (void)worker;
    anepy_engine *e = context;
    float rstd[COLS];
    int64_t j = (int64_t)index * COLS;
    e->kernels->rmsnorm(e->room->xnorm + j, e->room->width, rstd,
                        (const float *)e->room->x_final.data + j,
                        e->room->effective + anepy_model_final_norm(e->model), e->model->norm_eps,
                        e->model->config.dim, e->room->width);
}

void anepy_final_norm(anepy_engine *e) { anepy_engine_run(e, e->run.columns / COLS, norm_panel); }

/* With r = rstd: dx = r (w dy) - x r^3/D sum(w dy x); dw = sum over tokens of dy x r. */
static void stats_panel(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const norm_task *t = context;
    int64_t j = (int64_t)index * COLS;
    t->e->kernels->rmsnorm_stats(t->e->room->rstd + j, t->e->room->coef + j, t->dy + j, t->x + j,
                                 t->e->room->effective + t->weight, t->e->model->norm_eps,
                                 t->e->model->config.dim, t->e->room->width);
}

static void backward_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const norm_task *t = context;
    anepy_engine *e = t->e;
    int32_t end = anepy_min_i32(e->model->config.dim, (index + 1) * ANEPY_PIECE_ROWS);
    for (int32_t c = index * ANEPY_PIECE_ROWS; c < end; c++) {
        int64_t row = (int64_t)c * e->room->width;
        const float *residual = t->residual != NULL ? t->residual + row : e->room->zeros;
        t->gradient[c] = e->kernels->rmsnorm_row(t->dx + row, residual, t->dy + row, t->x + row,
                                                 e->room->rstd, e->room->coef,
                                                 e->room->effective[t->weight + c], e->run.columns);
        if (t->through != NULL) /* the device has computed dx, rmsnorm_row only dw */
            e->kernels->add(t->dx + row, residual, t->through + row, e->run.columns);
    }
}

void anepy_norm_backward(anepy_engine *e, float *dx, const float *residual, const float *dy,
                         const float *x, const float *through, int64_t weight, int32_t which) {
    float *gradient = e->norm_gradients + (int64_t)which * e->model->config.dim;
    norm_task task = {e, dx, residual, dy, x, through, weight, gradient};
    anepy_pool_run(e->pool, e->run.columns / COLS, stats_panel, &task);
    anepy_pool_run(e->pool, anepy_pieces(e->model->config.dim, ANEPY_PIECE_ROWS), backward_rows,
                   &task);
}

void anepy_norm_accumulate(anepy_engine *e) {
    const anepy_model *m = e->model;
    int32_t dim = m->config.dim, layers = m->config.n_layers;
    for (int32_t i = 0; i <= 2 * layers; i++) {
        int32_t tensor = i % 2 == 0 ? ANEPY_ATTENTION_NORM : ANEPY_FFN_NORM;
        int64_t offset =
            i < 2 * layers ? anepy_model_layer(m, i / 2, tensor) : anepy_model_final_norm(m);
        float *gradient = e->grads + offset;
        const float *row = e->norm_gradients + (int64_t)i * dim;
        if (anepy_adds(e)) e->kernels->add(gradient, gradient, row, dim);
        else memcpy(gradient, row, (size_t)dim * sizeof(float));
    }
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
    anepy_pool_run(e->pool, anepy_pieces(e->model->config.dim, ANEPY_PIECE_ROWS), add_rows, &task);
}
