/* frozen.c - tensors that are not trained: the gradients of the others have the same bits as with
 * everything trained, in arenas without a byte to spare; frozen weights never move; what is not
 * trained is not counted. tests/engine/test_freeze.py has the other precisions and resuming. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fixture.h"
#include "groups.h"
#include "model/model.h"

enum { STEPS = 2, LENGTH = 65, COUNT = 3 };

/* An engine, what it left, and the table it was made with. */
typedef struct {
    anepy_model *model;
    float *grads, *m, *v, *params;
    double loss, norm, flops;
    uint64_t memory;
} result;

static void release(result *r) {
    anepy_model_free(r->model);
    free(r->grads), free(r->m), free(r->v), free(r->params);
}

static anepy_tensor row(const anepy_model *model, int32_t index) {
    anepy_tensor t = {.struct_size = sizeof t};
    CHECK(anepy_model_tensor(model, index, &t) == ANEPY_OK, "row %d", index);
    return t;
}

typedef int (*choice)(const anepy_tensor *t);

static int nothing(const anepy_tensor *t) { return t == NULL; }
static int embedding(const anepy_tensor *t) { return t->role == ANEPY_EMBEDDING; }
static int classifier(const anepy_tensor *t) { return t->role == ANEPY_CLASSIFIER; }
static int keys(const anepy_tensor *t) { return t->role == ANEPY_WK || t->role == ANEPY_BV; }
static int norms(const anepy_tensor *t) { return strstr(t->name, "norm") != NULL; }
static int not_norms(const anepy_tensor *t) { return !norms(t); }
static int matrices(const anepy_tensor *t) { return (t->flags & ANEPY_TENSOR_MATRIX) != 0; }
static int lower(const anepy_tensor *t) { return t->layer == 0 || embedding(t); }
static int layers(const anepy_tensor *t) { return t->layer >= 0 || embedding(t); }
static int not_w3(const anepy_tensor *t) { return t->role != ANEPY_W3; }
static int not_wo(const anepy_tensor *t) { return t->role != ANEPY_WO; }
static int not_final(const anepy_tensor *t) { return t->role != ANEPY_FINAL_NORM; }
static int odd(const anepy_tensor *t) { return (t->role + t->layer) % 2 != 0; }

static const struct {
    const char *about;
    choice frozen;
} CHOICES[] = {
    {"nothing", nothing},
    {"embedding", embedding},
    {"classifier", classifier},
    {"wk and bv", keys},
    {"norms", norms},
    {"all but norms", not_norms},
    {"matrices", matrices},
    {"the lower layer", lower},
    {"all layers", layers},
    {"all but w3", not_w3},
    {"all but wo", not_wo},
    {"every other", odd},
    {"all but the last norm", not_final},
};
enum { CHOICE_N = sizeof CHOICES / sizeof CHOICES[0] };

static result run(const fixture *f, choice frozen, const char *device, const char *variant,
                  int32_t threads) {
    result r = {0};
    anepy_engine *engine = NULL;
    anepy_step_stats stats = {.struct_size = sizeof stats};
    anepy_update_stats updated = {.struct_size = sizeof updated};
    anepy_engine_info info = {.struct_size = sizeof info};
    anepy_update_options o = {.struct_size = sizeof o,
                              .flags = ANEPY_LEAVE_GRADIENTS,
                              .lr = 0.01,
                              .beta1 = 0.9,
                              .beta2 = 0.999,
                              .eps = 1e-8,
                              .weight_decay = 0.1,
                              .grad_clip = 1e30};
    if (anepy_model_create(&r.model, &f->config) != ANEPY_OK) abort();
    for (int32_t i = 0; i < anepy_model_tensor_n(r.model); i++) {
        anepy_tensor t = row(r.model, i);
        if (frozen(&t)) CHECK(anepy_model_freeze(r.model, i) == ANEPY_OK, "freeze %s", t.name);
    }
    int64_t n = anepy_model_gradient_n(r.model);
    r.grads = fixture_exact(n), r.m = fixture_exact(n), r.v = fixture_exact(n),
    r.params = fixture_exact(f->n);
    memcpy(r.params, f->params, (size_t)f->n * sizeof(float));
    anepy_engine_options options = {.struct_size = sizeof options,
                                    .params = r.params,
                                    .grads = r.grads,
                                    .adam_m = r.m,
                                    .adam_v = r.v,
                                    .variant = variant,
                                    .device = device,
                                    .precision = strcmp(device, "cpu") == 0 ? "fp32" : "fp16",
                                    .threads = threads};
    int32_t tokens = anepy_min_i32(LENGTH, f->config.seq_len / COUNT);
    int32_t status = anepy_engine_create(&engine, r.model, &options);
    CHECK(status == ANEPY_OK, "no engine for %s on %s", variant, device);
    for (int i = 0; i < STEPS && status == ANEPY_OK; i++) {
        status =
            anepy_engine_step_batch(engine, &stats, f->tokens, f->targets, NULL, COUNT, tokens);
        r.loss += stats.loss;
        r.flops = stats.flops;
    }
    CHECK(status == ANEPY_OK && !stats.skipped, "%s on %s: step", variant, device);
    CHECK(anepy_engine_update(engine, &updated, &o) == ANEPY_OK && !updated.skipped, "update");
    CHECK(anepy_engine_get_info(engine, &info) == ANEPY_OK, "info");
    r.norm = updated.grad_norm;
    r.memory = info.memory;
    anepy_engine_free(engine);
    return r;
}

static void compare(const fixture *f, const result *part, const result *all, const char *what) {
    double sum = 0.0;
    int64_t next = 0;
    for (int32_t i = 0; i < anepy_model_tensor_n(f->model); i++) {
        anepy_tensor t = row(part->model, i);
        int64_t n = t.rows * t.cols;
        int trainable = (t.flags & ANEPY_TENSOR_TRAINABLE) != 0;
        CHECK(t.gradient == (trainable ? next : -1), "%s: %s is misplaced", what, t.name);
        const float *moved = trainable ? all->params : f->params;
        CHECK(all_same(part->params + t.offset, moved + t.offset, n), "%s: weights of %s", what,
              t.name);
        if (!trainable) continue;
        const float *gradient = part->grads + t.gradient;
        CHECK(all_same(gradient, all->grads + t.offset, n), "%s: gradient of %s", what, t.name);
        CHECK(all_same(part->m + t.gradient, all->m + t.offset, n) &&
                  all_same(part->v + t.gradient, all->v + t.offset, n),
              "%s: moments of %s", what, t.name);
        for (int64_t j = 0; j < n; j++) sum += (double)gradient[j] * gradient[j];
        next += n;
    }
    /* The gradients of two equal steps, times the loss scale, were added. */
    double ratio = part->norm / sqrt(sum);
    double wanted = all->norm;
    sum = 0.0;
    for (int64_t j = 0; j < f->n; j++) sum += (double)all->grads[j] * all->grads[j];
    wanted /= sqrt(sum);
    CHECK(fabs(ratio - wanted) <= 1e-6 * wanted, "%s: norm %g", what, part->norm);
    CHECK(part->loss == all->loss && part->flops <= all->flops, "%s: loss %g, %g operations", what,
          part->loss, part->flops);
}

static void check_choices(int which, const char *device, const char *variant) {
    fixture f = fixture_make(which);
    result all = run(&f, nothing, device, variant, 2);
    char what[160];
    for (int c = 0; c < CHOICE_N; c += brief ? 5 : 1) {
        int32_t left = 0;
        for (int32_t i = 0; i < anepy_model_tensor_n(f.model); i++) {
            anepy_tensor t = row(f.model, i);
            left += !CHOICES[c].frozen(&t);
        }
        if (left == 0) continue; /* a model without biases has nothing but matrices and norms */
        result part = run(&f, CHOICES[c].frozen, device, variant, 1 + c % 3);
        snprintf(what, sizeof what, "model %d, %s on %s, frozen: %s", which, variant, device,
                 CHOICES[c].about);
        compare(&f, &part, &all, what);
        release(&part);
    }
    release(&all);
    fixture_free(&f);
}

/* With nothing trained in the layers there are no factors to keep. */
static void check_savings(void) {
    fixture f = fixture_make(0);
    result all = run(&f, nothing, "cpu", "baseline+prealloc", 2);
    result head = run(&f, layers, "cpu", "baseline+prealloc", 2);
    double weights = 0.0;
    for (int32_t i = 0; i < anepy_model_tensor_n(f.model); i++) {
        anepy_tensor t = row(f.model, i);
        if (t.layer >= 0 && t.flags & ANEPY_TENSOR_MATRIX) weights += (double)(t.rows * t.cols);
    }
    double n = COUNT * anepy_min_i32(LENGTH, f.config.seq_len / COUNT);
    double classifier_flops = 2.0 * 2.0 * f.config.vocab_size * f.config.dim * n;
    CHECK(head.flops == 2.0 * weights * n + classifier_flops, "%g operations", head.flops);
    CHECK(head.memory < all.memory, "%llu bytes with and %llu without factors",
          (unsigned long long)all.memory, (unsigned long long)head.memory);
    release(&all);
    release(&head);
    fixture_free(&f);
}

static void check_refused(void) {
    fixture f = fixture_make(2);
    char text[200] = "";
    int32_t n = anepy_model_tensor_n(f.model);
    CHECK(anepy_model_freeze(f.model, n) == ANEPY_E_ARGUMENT &&
              anepy_model_freeze(f.model, -1) == ANEPY_E_ARGUMENT,
          "there is a tensor %d", n);
    for (int32_t i = 0; i < n - 1; i++)
        for (int again = 0; again < 2; again++)
            CHECK(anepy_model_freeze(f.model, i) == ANEPY_OK, "tensor %d is not frozen", i);
    CHECK(anepy_model_freeze(f.model, n - 1) == ANEPY_E_ARGUMENT, "nothing is left to train");
    anepy_last_error(text, sizeof text);
    CHECK(strstr(text, "norm.weight") != NULL, "says '%s'", text);
    anepy_tensor last = row(f.model, n - 1);
    CHECK(last.gradient == 0 && anepy_model_gradient_n(f.model) == last.cols,
          "a refused call changed the table");
    fixture_free(&f);
}

void checks_frozen(void) {
    check_choices(0, "cpu", "opt-prealloc");
    check_choices(0, "sim", "max");
    check_choices(0, "sim", "resident");
    for (int which = 0; which < (brief ? 1 : FIXTURE_N); which++)
        check_choices(which, "cpu", "baseline");
    if (!brief) {
        check_choices(1, "cpu", "opt");
        check_choices(1, "sim", "opt+offload_rmsnorm-skip_dead_reads");
    }
    check_savings();
    check_refused();
}
