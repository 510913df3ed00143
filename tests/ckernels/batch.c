/* batch.c - several sequences in one step, beside each other on the CPU: the sum of what each gives
 * alone, on any number of threads, whatever ran before. tests/engine/test_batch.py has float64. */
#define _GNU_SOURCE
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fixture.h"
#include "groups.h"

enum { MOST = 24 }; /* of 65 tokens they are more columns than run at once */

static float *floats(int64_t n) {
    float *x = calloc((size_t)n, sizeof *x);
    if (x == NULL) abort();
    return x;
}

/* MOST sequences, one behind the other, of any length that the model takes. */
typedef struct {
    int32_t *tokens, *targets;
} drawn;

static drawn draw(const fixture *f) {
    int32_t n = MOST * f->config.seq_len;
    drawn d = {calloc((size_t)n, sizeof *d.tokens), calloc((size_t)n, sizeof *d.targets)};
    if (d.tokens == NULL || d.targets == NULL) abort();
    random_seed(0xba7c4);
    for (int32_t i = 0; i < n; i++) {
        d.tokens[i] = random_below(f->config.vocab_size);
        d.targets[i] = random_below(f->config.vocab_size);
    }
    return d;
}

static void discard(drawn d) {
    free(d.tokens);
    free(d.targets);
}

static double step(anepy_engine *engine, drawn d, int32_t first, int32_t count, int32_t n) {
    anepy_step_stats stats = {.struct_size = sizeof stats};
    int32_t at = first * n;
    CHECK(anepy_engine_step_batch(engine, &stats, d.tokens + at, d.targets + at, NULL, count, n) ==
                  ANEPY_OK &&
              stats.skipped == 0,
          "a step of %d sequences of %d", count, n);
    return stats.loss;
}

/* Each sequence in a step of its own against all of them in one, after a smaller one that has gone
 * into the same accumulation. */
static void check_sum(int which, const char *variant, const char *precision, int32_t count,
                      int32_t n) {
    fixture f = fixture_make(which);
    drawn d = draw(&f);
    f.precision = precision;
    n = anepy_min_i32(n, f.config.seq_len);
    float *alone = floats(f.n), *first = floats(f.n), *one = floats(f.n);
    anepy_engine *engine = fixture_engine(&f, variant, 2);
    double loss = 0.0, sum = 0.0;
    step(engine, d, 0, 1, n);
    memcpy(one, f.grads, (size_t)f.n * sizeof(float));
    CHECK(fixture_restore(engine, 0, 0) == ANEPY_OK, "restore");
    for (int32_t i = 0; i < count; i++) sum += step(engine, d, i, 1, n) / count;
    memcpy(alone, f.grads, (size_t)f.n * sizeof(float));
    anepy_engine_free(engine);
    for (int64_t i = 0; i < f.n; i++) alone[i] += one[i];
    for (int32_t threads = 1; threads <= (brief ? 2 : 3); threads++) {
        fixture_reset(&f);
        engine = fixture_engine(&f, variant, threads);
        step(engine, d, 0, 1, n);
        loss = step(engine, d, 0, count, n);
        double off = fixture_difference(f.grads, alone, f.n, 1.0);
        CHECK(fabs(loss - sum) <= 1e-6 * sum && off <= 2e-6,
              "%s, %s, %d x %d: loss %.9g, not %.9g, gradients off by %g", precision, variant,
              count, n, loss, sum, off);
        if (threads == 1) memcpy(first, f.grads, (size_t)f.n * sizeof(float));
        CHECK(all_same(f.grads, first, f.n), "%s, %s, %d x %d: other bits on %d threads", precision,
              variant, count, n, threads);
        anepy_engine_free(engine);
    }
    free(alone), free(first), free(one);
    discard(d);
    fixture_free(&f);
}

/* Steps of other sizes before, and numbers that are none in every column they had, leave nothing:
 * neither in a batch nor in a sequence alone. */
static void check_sizes(int which, const char *precision) {
    static const int32_t COUNTS[] = {1, 3, 2, MOST, 5, 1}, LENGTHS[] = {65, 40, 1, 65, 33, 64};
    fixture f = fixture_make(which);
    drawn d = draw(&f);
    f.precision = precision;
    float *clean = floats(f.n), kept = f.params[0];
    anepy_engine *used = fixture_engine(&f, "max", 2);
    uint64_t memory = 0;
    for (int i = 0; i < (brief ? 3 : 6); i++) {
        int32_t count = COUNTS[i], n = anepy_min_i32(LENGTHS[i], f.config.seq_len);
        anepy_engine *fresh = fixture_engine(&f, "max", 2);
        double loss = step(fresh, d, 0, count, n);
        memcpy(clean, f.grads, (size_t)f.n * sizeof(float));
        anepy_engine_free(fresh);
        CHECK(step(used, d, 0, count, n) == loss && all_same(f.grads, clean, f.n),
              "%s: a step of %d x %d depends on what ran before", precision, count, n);
        for (int64_t k = 0; k < f.config.dim; k++)
            f.params[(int64_t)d.tokens[0] * f.config.dim + k] = NAN;
        step(used, d, 0, count, n);
        fixture_reset(&f);
        CHECK(f.params[0] == kept && fixture_restore(used, 0, 0) == ANEPY_OK, "restore");
        anepy_engine_info info = {.struct_size = sizeof info};
        CHECK(anepy_engine_get_info(used, &info) == ANEPY_OK && info.memory >= memory,
              "%llu bytes after %llu", (unsigned long long)info.memory, (unsigned long long)memory);
        memory = info.memory;
    }
    anepy_engine_free(used);
    free(clean);
    discard(d);
    fixture_free(&f);
}

/* The norm that a batch notes on the way is that of its gradients. */
static void check_norm(int which, const char *precision) {
    fixture f = fixture_make(which);
    drawn d = draw(&f);
    f.precision = precision;
    anepy_engine *engine = fixture_engine(&f, "max", 2);
    anepy_update_options o = {.struct_size = sizeof o,
                              .flags = ANEPY_GRADIENTS_AS_LEFT,
                              .lr = 1e-3,
                              .beta1 = 0.9,
                              .beta2 = 0.999,
                              .eps = 1e-8,
                              .grad_clip = 1.0};
    anepy_update_stats stats = {.struct_size = sizeof stats};
    for (int round = 0; round < 3; round++) {
        double sum = 0.0;
        int32_t n = anepy_min_i32(33 + round, f.config.seq_len);
        step(engine, d, 0, 1, n);
        step(engine, d, 1, round == 1 ? MOST - 1 : 3, n);
        for (int64_t i = 0; i < f.n; i++) sum += (double)f.grads[i] * f.grads[i];
        CHECK(anepy_engine_update(engine, &stats, &o) == ANEPY_OK && stats.skipped == 0, "update");
        double norm = sqrt(sum) / (round == 1 ? MOST : 4);
        CHECK(fabs(stats.grad_norm - norm) <= 1e-6 * norm, "%s, round %d: norm %.9g, not %.9g",
              precision, round, stats.grad_norm, norm);
    }
    anepy_engine_free(engine);
    discard(d);
    fixture_free(&f);
}

void checks_batch(void) {
    static const char *const VARIANTS[] = {"max", "baseline", "opt-prealloc",
                                           "opt+offload_softmax+offload_classifier"};
    for (int p = 0; p < (anepy_kernels_get()->bf16 != NULL ? 2 : 1); p++) {
        const char *precision = p > 0 ? "bf16" : "fp32";
        for (int which = 0; which < (brief ? 1 : FIXTURE_N); which++) {
            for (int v = 0; v < (brief ? 1 : 4); v++) {
                check_sum(which, VARIANTS[v], precision, 3, 65);
                check_sum(which, VARIANTS[v], precision, 4, 1);
            }
            if (!brief) check_sum(which, "max", precision, MOST, 65);
            check_sizes(which, precision);
            check_norm(which, precision);
        }
    }
    check_sum(FIXTURE_LONG, "max", "fp32", 2, brief ? 65 : 150); /* without scores in memory */
}
