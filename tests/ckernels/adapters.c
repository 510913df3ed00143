/* adapters.c - low-rank adapters: gradients of A and B against those of an engine whose weights are
 * W + scale B A, in arenas without a byte to spare; the same bits for any number of threads; the
 * base never moves. tests/engine/test_adapters.py compares with float64, in every precision. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fixture.h"
#include "groups.h"
#include "model/model.h"

enum { LENGTH = 65, COUNT = 3 };
#define SCALE 1.5

typedef struct {
    int32_t rank;
    uint32_t targets;
} shape;

static const shape SHAPES[] = {
    {8, 127},
    {3, ANEPY_TARGET_WQ | ANEPY_TARGET_WV | ANEPY_TARGET_W3},
    {1, ANEPY_TARGET_WK | ANEPY_TARGET_W2},
    {67, ANEPY_TARGET_WO | ANEPY_TARGET_W1},
};
enum { SHAPE_N = sizeof SHAPES / sizeof SHAPES[0] };

/* A table, its arenas, and what a step and an update left in them. */
typedef struct {
    anepy_model *model;
    float *params, *adapter, *grads, *m, *v;
    double loss, norm;
} result;

static void release(result *r) {
    anepy_model_free(r->model);
    free(r->params), free(r->adapter), free(r->grads), free(r->m), free(r->v);
}

static anepy_tensor row(const anepy_model *model, int32_t index) {
    anepy_tensor t = {.struct_size = sizeof t};
    CHECK(anepy_model_tensor(model, index, &t) == ANEPY_OK, "row %d", index);
    return t;
}

/* Between -1/8 and 1/8, equal in every run. */
static float value(int64_t i) { return (float)((i * 7919 + 13) % 257 - 128) / 1024.0f; }

static result make(const fixture *f, const shape *s) {
    result r = {0};
    if (anepy_model_create(&r.model, &f->config) != ANEPY_OK) abort();
    if (s != NULL)
        CHECK(anepy_model_adapt(r.model, s->rank, SCALE, s->targets) == ANEPY_OK, "adapt");
    int64_t n = anepy_model_gradient_n(r.model), adapter_n = anepy_model_adapter_n(r.model);
    CHECK(s == NULL || n == adapter_n, "%lld trained of %lld", (long long)n, (long long)adapter_n);
    r.params = fixture_exact(f->n), r.grads = fixture_exact(n), r.m = fixture_exact(n),
    r.v = fixture_exact(n);
    memcpy(r.params, f->params, (size_t)f->n * sizeof(float));
    if (adapter_n > 0) r.adapter = fixture_exact(adapter_n);
    for (int64_t i = 0; i < adapter_n; i++) r.adapter[i] = value(i);
    return r;
}

static void run(const fixture *f, result *r, const char *precision, const char *variant,
                int32_t threads) {
    anepy_engine *engine = NULL;
    anepy_step_stats stats = {.struct_size = sizeof stats};
    anepy_update_stats updated = {.struct_size = sizeof updated};
    anepy_update_options o = {.struct_size = sizeof o,
                              .flags = ANEPY_LEAVE_GRADIENTS,
                              .lr = 0.01,
                              .beta1 = 0.9,
                              .beta2 = 0.999,
                              .eps = 1e-8,
                              .grad_clip = 1e30};
    anepy_engine_options options = {.struct_size = sizeof options,
                                    .params = r->params,
                                    .adapter = r->adapter,
                                    .grads = r->grads,
                                    .adam_m = r->m,
                                    .adam_v = r->v,
                                    .variant = variant,
                                    .device = "cpu",
                                    .precision = precision,
                                    .threads = threads};
    int32_t tokens = anepy_min_i32(LENGTH, f->config.seq_len / COUNT);
    int32_t status = anepy_engine_create(&engine, r->model, &options);
    CHECK(status == ANEPY_OK, "no engine for %s", variant);
    if (status != ANEPY_OK) return;
    for (int i = 0; i < 2 && status == ANEPY_OK; i++)
        status =
            anepy_engine_step_batch(engine, &stats, f->tokens, f->targets, NULL, COUNT, tokens);
    CHECK(status == ANEPY_OK, "%s: step", variant);
    r->loss = stats.loss;
    CHECK(anepy_engine_update(engine, &updated, &o) == ANEPY_OK && !updated.skipped, "update");
    r->norm = updated.grad_norm;
    anepy_engine_free(engine);
}

/* The value of A or B of a layer's projection before the update. */
static float initial(const anepy_tensor *t, int64_t i, int64_t j) {
    return value(t->offset + i * t->cols + j);
}

/* Adds scale B A to the weight of an adapter, or turns the gradient of that sum into those of A and
 * B, and says how far the other ones are from these. */
static double through(const result *r, result *whole, int32_t layer, int32_t role, int compare) {
    const anepy_tensor *a = anepy_model_find(r->model, layer, role | ANEPY_LORA_A);
    const anepy_tensor *b = anepy_model_find(r->model, layer, role | ANEPY_LORA_B);
    const anepy_tensor *w = anepy_model_find(whole->model, layer, role);
    double error = 0.0, size = 0.0;
    if (a == NULL) return 0.0;
    int64_t rank = a->rows, in = a->cols, out = b->rows;
    if (!compare) {
        for (int64_t o = 0; o < out; o++)
            for (int64_t i = 0; i < in; i++)
                for (int64_t k = 0; k < rank; k++)
                    whole->params[w->offset + o * in + i] +=
                        (float)SCALE * initial(b, o, k) * initial(a, k, i);
        return 0.0;
    }
    const float *dw = whole->grads + w->gradient;
    for (int64_t k = 0; k < rank; k++) {
        for (int64_t i = 0; i < in; i++) {
            double wanted = 0.0, got = r->grads[a->gradient + k * in + i];
            for (int64_t o = 0; o < out; o++)
                wanted += SCALE * (double)initial(b, o, k) * dw[o * in + i];
            error += (got - wanted) * (got - wanted);
            size += wanted * wanted;
        }
        for (int64_t o = 0; o < out; o++) {
            double wanted = 0.0, got = r->grads[b->gradient + o * rank + k];
            for (int64_t i = 0; i < in; i++)
                wanted += SCALE * (double)initial(a, k, i) * dw[o * in + i];
            error += (got - wanted) * (got - wanted);
            size += wanted * wanted;
        }
    }
    return size > 0.0 ? sqrt(error / size) : sqrt(error);
}

static double all_through(const result *r, result *whole, int compare) {
    double worst = 0.0;
    for (int32_t l = 0; l < r->model->config.n_layers; l++)
        for (int32_t role = 0; role < ANEPY_LAYER_TENSORS; role++)
            worst = fmax(worst, through(r, whole, l, role, compare));
    return worst;
}

static void check_shape(int which, const shape *s, const char *variant) {
    fixture f = fixture_make(which);
    result one = make(&f, s), three = make(&f, s), whole = make(&f, NULL);
    run(&f, &one, "fp32", variant, 1);
    run(&f, &three, "fp32", variant, 3);
    int64_t n = anepy_model_adapter_n(one.model);
    CHECK(all_same(one.grads, three.grads, n) && all_same(one.adapter, three.adapter, n) &&
              one.norm == three.norm,
          "model %d, rank %d: other bits with three threads", which, s->rank);
    CHECK(all_same(one.params, f.params, f.n), "model %d, rank %d: the base moved", which, s->rank);
    all_through(&one, &whole, 0);
    run(&f, &whole, "fp32", variant, 2);
    double error = all_through(&one, &whole, 1);
    CHECK(error < 1e-4 && fabs(one.loss - whole.loss) < 1e-4,
          "model %d, rank %d, %s: gradients off by %g, loss %g and %g", which, s->rank, variant,
          error, one.loss, whole.loss);
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) sum += (double)one.grads[i] * one.grads[i];
    CHECK(fabs(one.norm - sqrt(sum) / 2.0) <= 1e-6 * one.norm, "norm %g", one.norm);
    release(&one);
    release(&three);
    release(&whole);
    fixture_free(&f);
}

/* Factors are rounded, so only that every thread computes the same, and near to float32. */
static void check_bf16(void) {
    fixture f = fixture_make(0);
    if (anepy_kernels_get()->bf16 != NULL) {
        result one = make(&f, &SHAPES[0]), two = make(&f, &SHAPES[0]), exact = make(&f, &SHAPES[0]);
        run(&f, &one, "bf16", "max", 1);
        run(&f, &two, "bf16", "max", 2);
        run(&f, &exact, "fp32", "max", 2);
        CHECK(all_same(one.grads, two.grads, anepy_model_adapter_n(one.model)), "other bits");
        CHECK(fabs(one.norm - exact.norm) < 0.05 * exact.norm, "norm %g and %g", one.norm,
              exact.norm);
        release(&one);
        release(&two);
        release(&exact);
    }
    fixture_free(&f);
}

static void check_table(void) {
    fixture f = fixture_make(1);
    result r = make(&f, &SHAPES[1]);
    int64_t next = 0, base = 0;
    for (int32_t i = 0; i < anepy_model_tensor_n(r.model); i++) {
        anepy_tensor t = row(r.model, i);
        int adapter = (t.flags & ANEPY_TENSOR_ADAPTER) != 0;
        CHECK(t.offset == (adapter ? next : base), "%s is misplaced", t.name);
        CHECK(t.gradient == (adapter ? next : -1), "%s has a gradient at %lld", t.name,
              (long long)t.gradient);
        CHECK(adapter == (strstr(t.name, ".lora_") != NULL), "%s", t.name);
        *(adapter ? &next : &base) += t.rows * t.cols;
    }
    CHECK(base == f.n && next == anepy_model_adapter_n(r.model), "%lld and %lld values",
          (long long)base, (long long)next);
    release(&r);
    fixture_free(&f);
}

static void check_refused(void) {
    fixture f = fixture_make(2);
    anepy_engine *engine = NULL;
    anepy_engine_options options = fixture_options(&f);
    CHECK(anepy_model_adapt(f.model, 0, 1.0, 1) == ANEPY_E_ARGUMENT &&
              anepy_model_adapt(f.model, ANEPY_ADAPTER_RANK + 1, 1.0, 1) == ANEPY_E_ARGUMENT &&
              anepy_model_adapt(f.model, 1, NAN, 1) == ANEPY_E_ARGUMENT &&
              anepy_model_adapt(f.model, 1, 0.0, 1) == ANEPY_E_ARGUMENT &&
              anepy_model_adapt(f.model, 1, 1.0, 0) == ANEPY_E_ARGUMENT &&
              anepy_model_adapt(f.model, 1, 1.0, 128) == ANEPY_E_ARGUMENT,
          "an adapter of no kind");
    CHECK(anepy_model_adapter_n(f.model) == 0, "a refused call changed the table");
    options.adapter = f.params;
    CHECK(anepy_engine_create(&engine, f.model, &options) == ANEPY_E_ARGUMENT, "an arena too many");
    options.adapter = NULL;
    CHECK(anepy_model_adapt(f.model, 1, 1.0, 1) == ANEPY_OK, "adapt");
    CHECK(anepy_engine_create(&engine, f.model, &options) == ANEPY_E_ARGUMENT, "an arena too few");
    CHECK(anepy_model_adapt(f.model, 1, 1.0, 1) == ANEPY_E_STATE &&
              anepy_model_freeze(f.model, 0) == ANEPY_E_STATE,
          "adapted twice");
    fixture_free(&f);
}

void checks_adapters(void) {
    for (int which = 0; which < (brief ? 1 : FIXTURE_N); which++)
        for (int s = 0; s < SHAPE_N; s++)
            check_shape(which, &SHAPES[s], s % 2 ? "baseline" : "max");
    check_bf16();
    check_table();
    check_refused();
}
