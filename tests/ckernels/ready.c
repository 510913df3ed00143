/* ready.c - gradients that another thread takes while a step runs, as soon as they are final, are
 * those that the step leaves; and gradients that the caller changes before an update. */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fixture.h"
#include "groups.h"
#include "runtime/threads.h"

enum { COUNT = 11, LENGTH = 65 }; /* more columns than run at once */

/* The other thread. It reads gradients without any lock: the cursor alone must order that. */
typedef struct {
    const fixture *f;
    anepy_engine *engine;
    float *copy;
    int64_t first[1024], end[1024]; /* of the buckets, in the arena */
    int32_t buckets, steps;
    _Atomic int64_t done; /* steps */
} poller;

static void find_buckets(poller *p) {
    int32_t layers = p->f->config.n_layers;
    p->buckets = layers + 2;
    for (int32_t b = 0; b < p->buckets; b++) p->first[b] = p->f->n;
    for (int32_t i = 0; i < anepy_model_tensor_n(p->f->model); i++) {
        anepy_tensor t = {.struct_size = sizeof t};
        int layer;
        anepy_model_tensor(p->f->model, i, &t);
        int32_t b = sscanf(t.name, "layers.%d.", &layer) == 1 ? layers - layer : 0;
        if (i == 0) b = layers + 1; /* the embedding */
        if (t.offset < p->first[b]) p->first[b] = t.offset;
        if (t.offset + t.rows * t.cols > p->end[b]) p->end[b] = t.offset + t.rows * t.cols;
    }
}

static void *poll_main(void *argument) {
    poller *p = argument;
    for (int64_t step = 1; step <= p->steps; step++) {
        int64_t steps = 0;
        for (int32_t taken = 0; taken < p->buckets;) {
            int32_t ready = anepy_engine_ready(p->engine, &steps);
            if (steps < step) ready = 0;
            for (; taken < ready; taken++)
                memcpy(p->copy + p->first[taken], p->f->grads + p->first[taken],
                       (size_t)(p->end[taken] - p->first[taken]) * sizeof(float));
            sched_yield();
        }
        atomic_store(&p->done, step);
    }
    return NULL;
}

static void check_polled(int which, const char *device, const char *variant, const char *precision,
                         int32_t threads, int32_t sequences) {
    fixture f = fixture_make(which);
    f.precision = precision;
    int32_t n = anepy_min_i32(LENGTH, f.config.seq_len), right = 1;
    int32_t *tokens = calloc((size_t)(2 * COUNT * n), sizeof *tokens), *targets;
    float *copy = calloc((size_t)f.n, sizeof *copy);
    poller *p = calloc(1, sizeof *p);
    if (tokens == NULL || copy == NULL || p == NULL) abort();
    targets = tokens + COUNT * n;
    anepy_engine *engine = fixture_engine_on(&f, device, variant, threads);
    int64_t steps = -1;
    p->f = &f, p->engine = engine, p->copy = copy, p->steps = brief ? 2 : 15;
    find_buckets(p);
    CHECK(anepy_engine_ready(engine, &steps) == p->buckets && steps == 0, "before the first step");
    pthread_t thread;
    CHECK(anepy_thread_start(&thread, poll_main, p) == ANEPY_OK, "a thread");
    for (int64_t step = 1; step <= p->steps; step++) {
        anepy_step_stats stats = {.struct_size = sizeof stats};
        for (int32_t i = 0; i < 2 * COUNT * n; i++) tokens[i] = random_below(f.config.vocab_size);
        right &= anepy_engine_step_batch(engine, &stats, tokens, targets, NULL, sequences, n) ==
                 ANEPY_OK;
        right &= anepy_engine_ready(engine, &steps) == p->buckets && steps == step;
        while (atomic_load(&p->done) < step) sched_yield();
        right &= all_same(copy, f.grads, f.n);
    }
    pthread_join(thread, NULL);
    CHECK(right, "%s, %s, %s, %d threads, %d sequences: taken too early", device, variant,
          precision, threads, sequences);
    anepy_engine_free(engine);
    free(tokens), free(copy), free(p);
    fixture_free(&f);
}

static double norm_of(const fixture *f) {
    double sum = 0.0;
    for (int64_t i = 0; i < f->n; i++) sum += (double)f->grads[i] * f->grads[i];
    return sqrt(sum);
}

static anepy_step_stats step(anepy_engine *engine, const fixture *f) {
    anepy_step_stats stats = {.struct_size = sizeof stats};
    CHECK(anepy_engine_step(engine, &stats, f->tokens, f->targets, 9) == ANEPY_OK, "step");
    return stats;
}

/* After a reduction an update takes the norm of what is there, whatever it is told. */
static void check_norm(int which, const char *precision) {
    fixture f = fixture_make(which);
    f.precision = precision;
    anepy_engine *engine = fixture_engine(&f, "max", 2);
    anepy_update_options o = {.struct_size = sizeof o,
                              .flags = ANEPY_GRADIENTS_AS_LEFT,
                              .beta1 = 0.9,
                              .beta2 = 0.999,
                              .eps = 1e-8,
                              .grad_clip = 1.0};
    anepy_update_stats stats = {.struct_size = sizeof stats};
    for (int round = 0; round < 4; round++) {
        step(engine, &f);
        double norm = norm_of(&f);
        if (round % 2 == 1) {
            int own = round == 1; /* else of two engines: 18 targets, and another scale */
            double scale = own ? 1.0 : 0.25;
            CHECK(anepy_engine_reduce(engine, own ? -1 : 18, own ? 0.0 : scale / 9.0, 0) ==
                      ANEPY_OK,
                  "reduce");
            double now = norm_of(&f);
            CHECK(fabs(now - scale * norm) <= 1e-6 * norm, "a norm of %g becomes %g", norm, now);
            for (int64_t i = 0; i < f.n; i++) f.grads[i] *= 3.0f;
            norm *= own ? 3.0 : 1.5;
        }
        CHECK(anepy_engine_update(engine, &stats, &o) == ANEPY_OK &&
                  fabs(stats.grad_norm - norm) <= 1e-5 * norm,
              "%s, round %d: norm %.9g, not %.9g", precision, round, stats.grad_norm, norm);
    }
    anepy_engine_free(engine);
    fixture_free(&f);
}

/* Gradients that must not reach an update are told to all, by NaN. */
static void check_lost(void) {
    fixture f = fixture_make(2);
    anepy_engine *engine = fixture_engine_on(&f, "sim", "opt", 1);
    anepy_engine_info info = {.struct_size = sizeof info};
    CHECK(anepy_engine_reduce(engine, -1, 0.0, 0) == ANEPY_E_STATE, "reduce without a step");
    CHECK(anepy_engine_get_info(engine, &info) == ANEPY_OK, "info");
    info.loss_scale = 0x1p40;
    CHECK(anepy_engine_restore(engine, &info) == ANEPY_OK, "restore");
    CHECK(step(engine, &f).skipped == 1, "no overflow");
    CHECK(anepy_engine_reduce(engine, 9, 16.0, 0) == ANEPY_OK, "reduce with others");
    int32_t all = 1;
    for (int64_t i = 0; i < f.n; i++) all &= isnan(f.grads[i]);
    CHECK(all, "a skipped step leaves gradients for others");
    CHECK(anepy_engine_discard(engine) == ANEPY_OK && norm_of(&f) == 0.0, "discard");
    f.grads[0] = 1.0f; /* of an engine without a step there are none */
    CHECK(anepy_engine_reduce(engine, 9, 16.0, 0) == ANEPY_OK && norm_of(&f) == 0.0, "zeros");
    CHECK(anepy_engine_reduce(engine, 0, 16.0, 0) == ANEPY_OK, "nobody may update");
    anepy_update_stats stats = {.struct_size = sizeof stats};
    anepy_update_options o = {.struct_size = sizeof o, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8};
    CHECK(anepy_engine_update(engine, &stats, &o) == ANEPY_OK && stats.skipped, "nobody does");
    CHECK(step(engine, &f).loss_scale == 16.0 * 9, "the scale of all is kept");
    anepy_engine_free(engine);
    fixture_free(&f);
}

void checks_ready(void) {
    int bf16 = anepy_kernels_get()->bf16 != NULL;
    for (int which = 0; which < (brief ? 1 : FIXTURE_N); which++) {
        for (int32_t threads = 1; threads <= 3; threads++) {
            int32_t sequences = threads == 2 ? 1 : COUNT;
            check_polled(which, "cpu", "max", "fp32", threads, sequences);
            if (brief) continue;
            check_polled(which, "cpu", "baseline", "fp32", threads, sequences);
            if (bf16) check_polled(which, "cpu", "max", "bf16", threads, sequences);
        }
        check_norm(which, "fp32");
        if (bf16) check_norm(which, "bf16");
    }
    check_polled(2, "sim", "opt", "fp16", 2, 3);
    check_lost();
}
