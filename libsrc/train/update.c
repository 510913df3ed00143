/* train/update.c - AdamW over the flat arenas: one pass that scales, clips and steps. */
#include "train/update.h"

#include <math.h>

#include "train/compile.h"
#include "train/scaling.h"
#include "train/squares.h"

typedef struct {
    anepy_engine *e;
    const anepy_kernels *kernels;
    anepy_adam decaying, others;
} update_task;

/* A piece of the gradients may span several tensors; each run of elements has weights of its own
 * and its tensor's weight decay. */
static void update_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const update_task *t = context;
    const anepy_engine *e = t->e;
    const anepy_model *m = e->model;
    int64_t at = (int64_t)index * ANEPY_PIECE_ELEMENTS,
            end = anepy_min_i64(at + ANEPY_PIECE_ELEMENTS, m->gradient_n);
    for (int32_t i = 0; i < m->tensor_n && at < end; i++) {
        const anepy_tensor *tensor = &m->tensors[i];
        float *gradient = anepy_gradient(e, tensor);
        int64_t stop = tensor->gradient + anepy_tensor_n(tensor);
        int64_t done = /* mutate: frozen-update */ at - tensor->gradient;
        if (gradient == NULL || stop <= at) continue;
        if (stop > end) stop = end;
        t->kernels->adam(anepy_values(e, tensor) + done, gradient + done, e->adam_m + at,
                         e->adam_v + at, stop - at,
                         anepy_tensor_has(tensor, ANEPY_TENSOR_DECAYS) ? &t->decaying : &t->others);
        at = stop;
    }
}

int32_t anepy_update(anepy_engine *e, anepy_update_stats *stats, const anepy_update_options *o) {
    double start = anepy_now_ms();
    int baked = !anepy_can(e, ANEPY_LIVE_WEIGHTS); /* or copied to surfaces: both take time */
    stats->compile_ms = 0.0;
    ANEPY_TRY(anepy_compile_settle(e));
    if (baked) anepy_count(&start, &stats->compile_ms);
    double unit = e->scaling.unit > 0.0 ? e->scaling.unit : 1.0;
    double scale = 1.0 / ((double)e->counted / unit * e->scaling.loss_scale);
    int wanted = o->grad_clip > 0.0 || anepy_scaled(e) || e->squares.lent;
    int as_left = (o->flags & ANEPY_GRADIENTS_AS_LEFT) != 0 &&
                  /* mutate: update-lent */ !e->squares.lent;
    stats->grad_norm = wanted ? sqrt(anepy_squares_sum(e, as_left)) * scale : NAN;
    e->squares.step = wanted && as_left ? e->accumulated : 0;
    stats->skipped = e->scaling.damaged || (wanted && !isfinite(stats->grad_norm));
    if (stats->skipped) { /* infinities and NaN must not reach the weights */
        anepy_scale_discard(e);
        stats->update_ms = anepy_now_ms() - start;
        return ANEPY_OK;
    }
    if (o->grad_clip > 0.0 && stats->grad_norm > o->grad_clip)
        scale *= o->grad_clip / stats->grad_norm;
    double t = (double)(e->updates + 1);
    anepy_adam adam = {.lr = (float)(o->lr / (1.0 - pow(o->beta1, t))),
                       .beta1 = (float)o->beta1,
                       .beta2 = (float)o->beta2,
                       .one_beta1 = (float)(1.0 - o->beta1),
                       .one_beta2 = (float)(1.0 - o->beta2),
                       .eps = (float)o->eps,
                       .decay = 1.0f,
                       .inv_sqrt_c2 = (float)(1.0 / sqrt(1.0 - pow(o->beta2, t))),
                       .grad_scale = (float)scale,
                       .clear = !(o->flags & ANEPY_LEAVE_GRADIENTS)};
    update_task task = {e, anepy_on(e, ANEPY_SIMD_ADAM) ? e->kernels : anepy_kernels_scalar(), adam,
                        adam};
    task.decaying.decay = (float)(1.0 - o->lr * o->weight_decay);
    anepy_pool_run(e->pool, anepy_pieces(e->model->gradient_n, ANEPY_PIECE_ELEMENTS), update_piece,
                   &task);
    e->updates++;
    anepy_scale_forget(e);
    if (anepy_scaled(e)) anepy_scale_grow(e);
    stats->update_ms = 0.0;
    anepy_count(&start, &stats->update_ms);
    anepy_recompile(e, 0);
    if (baked) anepy_count(&start, &stats->compile_ms);
    return ANEPY_OK;
}
