/* masks.c - targets that are not counted: the loss is that of the others' logits, gradients of
 * parts of the targets add up to those of all, whatever the variant, the precision and the threads.
 * tests/test_masks.py has float64. */
#define _GNU_SOURCE
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fixture.h"
#include "groups.h"

enum { COUNT = 11, LENGTH = 65 }; /* more columns than run at once */

typedef struct {
    int32_t tokens[COUNT * LENGTH], targets[COUNT * LENGTH], part[COUNT * LENGTH];
    int32_t n;
} batch;

static float *floats(int64_t n) {
    float *x = calloc((size_t)n, sizeof *x);
    if (x == NULL) abort();
    return x;
}

static batch draw(const fixture *f) {
    batch b = {.n = anepy_min_i32(LENGTH, f->config.seq_len)};
    random_seed(0x3a5c);
    for (int32_t i = 0; i < COUNT * b.n; i++) {
        b.tokens[i] = random_below(f->config.vocab_size);
        b.targets[i] = random_below(f->config.vocab_size);
    }
    return b;
}

/* Which of two parts a target is in. Some sequences are in one altogether; so are, where sequences
 * run side by side, all of a group. */
static int second(const batch *b, int32_t i) {
    int32_t sequence = i / b->n;
    return sequence < 4 ? 0 : sequence < 6 ? 1 : i % 7 == 3 || i % 5 == 0;
}

/* Counts the targets of one part; returns how many they are. */
static int32_t take(batch *b, int part) {
    static const int32_t NOT[] = {-100, -1, INT32_MIN};
    int32_t counted = 0;
    for (int32_t i = 0; i < COUNT * b->n; i++) {
        int in = second(b, i) == part;
        b->part[i] = in ? b->targets[i] : NOT[i % 3];
        counted += in;
    }
    return counted;
}

static double step(anepy_engine *engine, const batch *b, const int32_t *targets, int32_t counted) {
    anepy_step_stats stats = {.struct_size = sizeof stats};
    CHECK(anepy_engine_step_batch(engine, &stats, b->tokens, targets, NULL, COUNT, b->n) ==
                  ANEPY_OK &&
              stats.skipped == 0 && stats.tokens == counted,
          "a step with %d targets counted %lld", counted, (long long)stats.tokens);
    return stats.loss;
}

/* Sum of the losses of the targets that are counted, from logits. */
static double loss_of(const fixture *f, const batch *b, const int32_t *targets,
                      const float *logits) {
    double loss = 0.0;
    int64_t vocab = f->config.vocab_size;
    for (int32_t i = 0; i < COUNT * b->n; i++, logits += vocab) {
        double sum = 0.0;
        if (targets[i] < 0) continue;
        for (int64_t v = 0; v < vocab; v++) sum += exp(logits[v]);
        loss += log(sum) - logits[targets[i]];
    }
    return loss;
}

static void check_parts(int which, const char *variant, const char *precision, int32_t threads) {
    fixture f = fixture_make(which);
    f.precision = precision;
    batch b = draw(&f);
    int32_t all = COUNT * b.n, bf16 = strcmp(precision, "bf16") == 0;
    float *whole = floats(f.n), *logits = floats((int64_t)all * f.config.vocab_size);
    anepy_engine *engine = fixture_engine(&f, variant, threads);
    CHECK(anepy_engine_logits_batch(engine, logits, b.tokens, NULL, COUNT, b.n) == ANEPY_OK,
          "logits");
    double loss = step(engine, &b, b.targets, all), sum = 0.0, found = NAN;
    memcpy(whole, f.grads, (size_t)f.n * sizeof(float));
    CHECK(fixture_restore(engine, 0, 0) == ANEPY_OK, "restore");
    int32_t unit = take(&b, 1), other = all - unit;
    for (int part = 1; part >= 0; part--) {
        int32_t counted = take(&b, part);
        double of_part = step(engine, &b, b.part, counted), expected;
        CHECK(counted == (part ? unit : other), "%d targets in part %d", counted, part);
        expected = loss_of(&f, &b, b.part, logits) / counted;
        CHECK(fabs(of_part - expected) <= 1e-5, "%s, %s: loss %.9g, not %.9g", precision, variant,
              of_part, expected);
        double *losses = calloc((size_t)all, sizeof *losses), total = 0.0;
        if (losses == NULL) abort();
        CHECK(anepy_engine_evaluate_batch(engine, &found, losses, b.tokens, b.part, NULL, COUNT,
                                          b.n) == ANEPY_OK &&
                  fabs(found - of_part) <= 1e-6,
              "%s, %s: evaluate %.9g, step %.9g", precision, variant, found, of_part);
        for (int32_t i = 0; i < all; i++) {
            total += losses[i];
            if (b.part[i] < 0 ? losses[i] != 0.0 : losses[i] <= 0.0)
                CHECK(0, "%s, %s: target %d has loss %g", precision, variant, i, losses[i]);
        }
        CHECK(fabs(total / counted - found) <= 1e-6, "%s, %s: losses of mean %.9g, not %.9g",
              precision, variant, total / counted, found);
        free(losses);
        sum += of_part * counted;
    }
    CHECK(fabs(sum / all - loss) <= 1e-6 * loss, "the parts' losses are %.9g together, not %.9g",
          sum / all, loss);
    /* In bf16 the gradients of the logits are rounded when they have their factor. */
    double off = fixture_difference(f.grads, whole, f.n, (double)unit / all);
    CHECK(off <= (bf16 ? 8e-3 : 3e-6), "%s, %s, %d threads: the parts' gradients are off by %g",
          precision, variant, threads, off);
    anepy_engine_info info = {.struct_size = sizeof info};
    CHECK(anepy_engine_get_info(engine, &info) == ANEPY_OK && info.counted == all &&
              info.unit == unit && info.accumulated == 2,
          "%lld counted in units of %g", (long long)info.counted, info.unit);
    anepy_engine_free(engine);
    free(whole), free(logits);
    fixture_free(&f);
}

/* A sequence beside others gives nothing if no target of it is counted, whatever its tokens are. */
static void check_uncounted_sequence(const char *precision) {
    fixture f = fixture_make(1);
    f.precision = precision;
    batch b = draw(&f);
    float *alone = floats(f.n);
    anepy_engine *engine = fixture_engine(&f, "max", 2);
    anepy_step_stats stats = {.struct_size = sizeof stats};
    CHECK(anepy_engine_step(engine, &stats, b.tokens, b.targets, b.n) == ANEPY_OK, "step");
    double loss = stats.loss;
    memcpy(alone, f.grads, (size_t)f.n * sizeof(float));
    for (int32_t i = b.n; i < 3 * b.n; i++) b.targets[i] = -100;
    CHECK(fixture_restore(engine, 0, 0) == ANEPY_OK, "restore");
    CHECK(anepy_engine_step_batch(engine, &stats, b.tokens, b.targets, NULL, 3, b.n) == ANEPY_OK,
          "step");
    double off = fixture_difference(f.grads, alone, f.n, 1.0);
    CHECK(stats.loss == loss && stats.tokens == b.n && off <= 2e-6,
          "%s: loss %.17g, not %.17g, gradients off by %g", precision, stats.loss, loss, off);
    anepy_engine_free(engine);
    free(alone);
    fixture_free(&f);
}

void checks_masks(void) {
    static const char *const VARIANTS[] = {"max", "baseline", "opt+offload_softmax", "ane"};
    for (int p = 0; p < (anepy_kernels_get()->bf16 != NULL ? 2 : 1); p++) {
        const char *precision = p > 0 ? "bf16" : "fp32";
        for (int which = 0; which < (brief ? 1 : FIXTURE_N); which++)
            for (int v = 0; v < (brief ? 1 : 4); v++)
                check_parts(which, VARIANTS[v], precision, 1 + v % 3);
        check_uncounted_sequence(precision);
    }
}
