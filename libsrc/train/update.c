/* train/update.c - the optimizers over the flat arenas: one pass that scales, clips and steps. */
#include "train/update.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "train/compile.h"
#include "train/moments.h"
#include "train/muon.h"
#include "train/scaling.h"
#include "train/squares.h"

/* What an optimizer computes with, for tensors that decay or for others. */
typedef struct {
    const anepy_kernels *kernels;
    anepy_adam adam;
    float lr, decay, momentum;
    float l2; /* weight decay as a part of the gradient */
} rates;

/* Updates n elements; m and v are their moments, v NULL where the optimizer keeps none. */
typedef void (*step_fn)(float *p, float *g, float *m, float *v, int64_t n, const rates *r);

static void adamw(float *p, float *g, float *m, float *v, int64_t n, const rates *r) {
    r->kernels->adam(p, g, m, v, n, &r->adam);
}

/* Lion (Chen et al. 2023, arXiv 2302.06675): p = p (1 - lr weight_decay) - lr sign(beta1 m +
 * (1 - beta1) g), then m = beta2 m + (1 - beta2) g. */
static void lion(float *p, float *g, float *m, float *v, int64_t n, const rates *r) {
    (void)v;
    for (int64_t i = 0; i < n; i++) {
        float grad = g[i] * r->adam.grad_scale;
        float c = r->adam.beta1 * m[i] + r->adam.one_beta1 * grad;
        float sign = (float)(c > 0.0f) - (float)(c < 0.0f);
        p[i] = p[i] * r->decay - r->lr * sign;
        m[i] = r->adam.beta2 * m[i] + r->adam.one_beta2 * grad;
    }
    if (r->adam.clear) memset(g, 0, (size_t)n * sizeof *g);
}

/* As PyTorch's torch.optim.SGD without dampening: g += weight_decay p; m = momentum m + g; p -= lr
 * m. */
static void sgd(float *p, float *g, float *m, float *v, int64_t n, const rates *r) {
    (void)v;
    for (int64_t i = 0; i < n; i++) {
        m[i] = r->momentum * m[i] + (g[i] * r->adam.grad_scale + r->l2 * p[i]);
        p[i] -= r->lr * m[i];
    }
    if (r->adam.clear) memset(g, 0, (size_t)n * sizeof *g);
}

struct anepy_optimizer {
    const char *name;
    step_fn step;
    int moments; /* that step keeps: 1 or 2 */
    int muon;    /* of matrices of the layers muon.c keeps one, and step is for the others */
};

static const anepy_optimizer OPTIMIZERS[] = {
    {"adamw", adamw, 2, 0}, {"lion", lion, 1, 0}, {"sgd", sgd, 1, 0}, {"muon", adamw, 2, 1}};
#define OPTIMIZER_N ((int32_t)(sizeof OPTIMIZERS / sizeof OPTIMIZERS[0]))

const char *anepy_optimizer_name(int32_t index) {
    return index >= 0 && index < OPTIMIZER_N ? OPTIMIZERS[index].name : NULL;
}

int32_t anepy_optimizer_find(const anepy_optimizer **out, const char *name) {
    char known[128] = "";
    for (int32_t i = 0; i < OPTIMIZER_N; i++) {
        *out = &OPTIMIZERS[i];
        if (name == NULL || strcmp(name, OPTIMIZERS[i].name) == 0) return ANEPY_OK;
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", i > 0 ? ", " : "", OPTIMIZERS[i].name);
    }
    return anepy_fail(ANEPY_E_NAME, "unknown optimizer '%.40s': use one of %s", name, known);
}

static int by_muon(const anepy_optimizer *optimizer, const anepy_tensor *tensor) {
    return optimizer->muon && anepy_muon_takes(tensor);
}

int32_t anepy_optimizer_keeps(const anepy_optimizer *optimizer, const anepy_tensor *tensor) {
    return by_muon(optimizer, tensor) ? 1 : optimizer->moments;
}

int32_t anepy_optimizer_moments(const char *name, const anepy_tensor *tensor) {
    const anepy_optimizer *optimizer;
    ANEPY_TRY(anepy_optimizer_find(&optimizer, name));
    return anepy_optimizer_keeps(optimizer, tensor);
}

int32_t anepy_optimizer_open(anepy_engine *e) {
    return e->optimizer->muon ? anepy_muon_open(e) : ANEPY_OK;
}

#define BLOCK 1024 /* elements of moments that are widened at once */

/* Runs of elements whose moments are stored as bf16. */
static void step_bf16(const anepy_engine *e, float *p, float *g, int64_t at, int64_t n,
                      const rates *r) {
    float m[BLOCK], v[BLOCK];
    uint16_t *stored_m = e->adam_m, *stored_v = e->adam_v;
    for (int64_t i = 0; i < n; i += BLOCK, at += BLOCK) {
        int64_t part = anepy_min_i64(BLOCK, n - i);
        r->kernels->from_bf16(m, stored_m + at, part);
        if (stored_v != NULL) r->kernels->from_bf16(v, stored_v + at, part);
        e->optimizer->step(p + i, g + i, m, v, part, r);
        r->kernels->to_bf16_randomly(stored_m + at, m, part, at,
                                     anepy_moment_key(e, ANEPY_FIRST_MOMENT));
        if (stored_v != NULL)
            r->kernels->to_bf16_randomly(stored_v + at, v, part, at,
                                         anepy_moment_key(e, ANEPY_SECOND_MOMENT));
    }
}

static void step_f32(const anepy_engine *e, float *p, float *g, int64_t at, int64_t n,
                     const rates *r) {
    float *m = e->adam_m, *v = e->adam_v;
    e->optimizer->step(p, g, m + at, v != NULL ? v + at : NULL, n, r);
}

typedef struct {
    anepy_engine *e;
    rates decaying, others;
    int64_t first, n, stride; /* of the gradients: n elements from first on, every stride */
} update_task;

/* A piece of the gradients may span several tensors; each run of elements has weights of its own
 * and its tensor's weight decay. */
static void update_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const update_task *t = context;
    const anepy_engine *e = t->e;
    const anepy_model *m = e->model;
    int32_t pieces = anepy_pieces(t->n, ANEPY_PIECE_ELEMENTS);
    int64_t part = t->first + index / pieces * t->stride,
            at = part + (int64_t)(index % pieces) * ANEPY_PIECE_ELEMENTS,
            end =
                anepy_min_i64(anepy_min_i64(at + ANEPY_PIECE_ELEMENTS, part + t->n), m->gradient_n);
    for (int32_t i = 0; i < m->tensor_n && at < end; i++) {
        const anepy_tensor *tensor = &m->tensors[i];
        float *gradient = anepy_gradient(e, tensor);
        int64_t stop = tensor->gradient + anepy_tensor_n(tensor);
        int64_t done = /* mutate: frozen-update */ at - tensor->gradient;
        if (gradient == NULL || stop <= at) continue;
        if (stop > end) stop = end;
        if (!by_muon(e->optimizer, tensor))
            (e->bf16_moments ? step_bf16 : step_f32)(
                e, anepy_values(e, tensor) + done, gradient + done, at, stop - at,
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
    int given = (o->flags & ANEPY_SQUARES_GIVEN) != 0;
    int wanted = o->grad_clip > 0.0 || anepy_scaled(e) || e->squares.lent || given;
    int as_left = (o->flags & ANEPY_GRADIENTS_AS_LEFT) != 0 &&
                  /* mutate: update-lent */ !e->squares.lent;
    stats->grad_norm =
        wanted ? sqrt(given ? o->squares : anepy_squares_sum(e, as_left)) * scale : NAN;
    e->squares.step = wanted && as_left && !given ? e->accumulated : 0;
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
    rates others = {.kernels = anepy_on(e, ANEPY_SIMD_ADAM) ? e->kernels : anepy_kernels_scalar(),
                    .adam = adam,
                    .lr = (float)o->lr,
                    .decay = 1.0f,
                    .momentum = (float)o->momentum};
    int64_t all = e->model->gradient_n;
    update_task task = {e, others, others, 0, all, all};
    if (o->part_n > 0) task.first = o->part_first, task.n = o->part_n, task.stride = o->part_stride;
    task.decaying.adam.decay = task.decaying.decay = (float)(1.0 - o->lr * o->weight_decay);
    task.decaying.l2 = (float)o->weight_decay;
    int64_t parts = task.first < all ? (all - task.first - 1) / task.stride + 1 : 0;
    anepy_pool_run(e->pool, (int32_t)parts * anepy_pieces(task.n, ANEPY_PIECE_ELEMENTS),
                   update_piece, &task);
    if (o->part_n > 0 && adam.clear) memset(anepy_gradients(e), 0, (size_t)all * sizeof(float));
    if (e->muon != NULL) {
        anepy_muon_rates muon = {.lr = (float)o->matrix_lr,
                                 .momentum = (float)o->momentum,
                                 .decay = (float)(1.0 - o->matrix_lr * o->weight_decay),
                                 .grad_scale = adam.grad_scale,
                                 .clear = adam.clear};
        anepy_muon_update(e, &muon);
    }
    e->updates++;
    anepy_scale_forget(e);
    if (anepy_scaled(e)) anepy_scale_grow(e);
    stats->update_ms = 0.0;
    anepy_count(&start, &stats->update_ms);
    anepy_recompile(e, 0);
    if (baked) anepy_count(&start, &stats->compile_ms);
    return ANEPY_OK;
}
