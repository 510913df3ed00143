/* train/scaling.c - dynamic loss scaling (Micikevicius et al. 2018, arXiv 1710.03740): fp16
 * gradients are lifted above the subnormals; a step in which one of them overflowed is not
 * accumulated and halves the scale; a long run without that doubles it. */
#include "train/scaling.h"

#include <math.h>
#include <string.h>

#include "train/dw.h"
#include "train/given.h"

#define GROWTH_STEPS 2000
#define LARGEST_SCALE 0x1p24
static int finite(const anepy_engine *e, const float *x, int64_t n) {
    return isfinite(e->kernels->sum_squares(x, n));
}

/* The columns of this step only: further ones hold what a longer step left. */
static int finite_rows(const anepy_engine *e, const float *x, int64_t rows, int64_t ld) {
    for (int64_t r = 0; r < rows; r++)
        if (!finite(e, x + r * ld, e->run.columns)) return 0;
    return 1;
}

static int finite_raw(const anepy_engine *e, const uint16_t *x, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
        e->kernels->from_half(e->room->staging[0], x + r * e->room->width, e->run.columns);
        if (!finite(e, e->room->staging[0], e->run.columns)) return 0;
    }
    return 1;
}

/* rows: where it is unless it was read back raw. */
static int finite_operand(const anepy_engine *e, const anepy_operand *o, const float *rows) {
    if (o->channels == 0) return 1;
    const uint16_t *raw = anepy_capture_raw(e, o);
    return raw != NULL ? finite_raw(e, raw, o->channels)
                       : finite_rows(e, rows, o->channels, e->room->width);
}

int anepy_input_gradient_finite(anepy_engine *e) {
    const anepy_config *c = &e->model->config;
    return finite_rows(e, e->run.reached, c->dim, e->room->width) &&
           finite(e, e->norm_gradients, (2 * (int64_t)c->n_layers + 1) * c->dim) &&
           finite(e, e->head_gradients, anepy_head_gradients_n(e->model));
}

/* Every gradient that enters a weight gradient, as the host will use it: on the ANE a NaN that goes
 * into a program may come out as a number (docs/neural-engine.md#wrong-results). */
int anepy_gradients_finite(anepy_engine *e) {
    const anepy_config *c = &e->model->config;
    if (!anepy_input_gradient_finite(e) || !anepy_given_finite(e)) return 0;
    for (int32_t l = 0; l < c->n_layers; l++) {
        for (int32_t i = 0; i < DW_N; i++) {
            const anepy_dw *dw = &e->room->layers[l].dw[i];
            if (dw->dy.channels == 0) continue;
            if (!finite_operand(e, &dw->dy, dw->dy_rows) ||
                !finite_operand(e, &dw->adapter.backward, dw->adapter.backward_rows))
                return 0;
        }
    }
    return 1;
}

typedef struct {
    anepy_engine *e;
    float factor;
} scale_task;

static void scale_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const scale_task *t = context;
    anepy_engine *e = t->e;
    int64_t first = (int64_t)index * ANEPY_PIECE_ELEMENTS, left = e->model->gradient_n - first;
    e->kernels->scale(anepy_gradients(e) + first, t->factor,
                      anepy_min_i64(left, ANEPY_PIECE_ELEMENTS));
}

static void scale_gradients(anepy_engine *e, double factor) {
    scale_task task = {e, (float)factor};
    e->squares.known = 0;
    anepy_pool_run(e->pool, anepy_pieces(e->model->gradient_n, ANEPY_PIECE_ELEMENTS), scale_piece,
                   &task);
}

void anepy_scale_begin(anepy_engine *e) {
    anepy_scaling *s = &e->scaling;
    double counted = e->run.counted, all = (double)e->run.sequences * e->run.tokens;
    if (e->counted > 0 && s->unit > 0.0) return;
    if (e->counted == 0 && anepy_scaled(e))
        s->loss_scale =
            fmin(s->loss_scale * counted / (s->unit > 0.0 ? s->unit : all), ANEPY_LOSS_SCALE_LIMIT);
    e->counted *= e->run.counted;
    s->unit = counted;
}

/* What has been accumulated always carries the current scale. */
void anepy_scale_step(anepy_engine *e, int skipped) {
    if (!skipped) {
        e->scaling.clean_steps++;
        return;
    }
    e->scaling.skipped = 1;
    e->scaling.clean_steps = 0;
    e->scaling.loss_scale *= 0.5;
    e->squares.known = 0;
    if (anepy_adds(e)) scale_gradients(e, 0.5);
}

void anepy_scale_join(anepy_engine *e, int64_t counted, double scale, int reduced) {
    anepy_scaling *s = &e->scaling;
    int none = e->counted == 0 && !s->skipped, lost = s->damaged || (e->counted == 0 && !none);
    if (none && !reduced)
        memset(anepy_gradients(e), 0, (size_t)e->model->gradient_n * sizeof(float));
    if (s->unit == 0.0) s->unit = 1.0;
    double own = anepy_target_scale(e);
    if (!reduced && !none && (lost || scale != own))
        scale_gradients(e, lost ? /* mutate: join-lost */ NAN : scale / own);
    /* All see one sequence of scales, so that they raise theirs after the same update. */
    if (scale < 0.75 * s->joint) s->clean_steps = 0;
    s->joint = scale;
    if (scale != own && anepy_scaled(e)) s->loss_scale = scale * s->unit;
    else if (scale != own) s->unit = 1.0 / scale;
    s->damaged |= counted == 0;
    e->counted = counted > 0 ? counted : 1;
    e->squares.lent = 1;
}

void anepy_scale_forget(anepy_engine *e) {
    e->accumulated = e->counted = 0;
    e->scaling.damaged = e->scaling.skipped = e->squares.lent = 0;
}

void anepy_scale_discard(anepy_engine *e) {
    memset(anepy_gradients(e), 0, (size_t)e->model->gradient_n * sizeof(float));
    anepy_scale_forget(e);
}

void anepy_scale_grow(anepy_engine *e) {
    if (e->scaling.clean_steps < GROWTH_STEPS || e->scaling.loss_scale >= LARGEST_SCALE) return;
    e->scaling.clean_steps = 0;
    e->scaling.loss_scale *= 2.0;
}
