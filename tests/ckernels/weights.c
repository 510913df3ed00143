/* weights.c - which weights a step computes with on a device that bakes them: those of the last
 * update, or with background_compile one whole set that is one update older, never a mixture. */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fixture.h"
#include "groups.h"

#define UPDATES 6
#define STEPS 2

static const anepy_update_options UPDATE = {.struct_size = sizeof UPDATE,
                                            .lr = 3e-3,
                                            .beta1 = 0.9,
                                            .beta2 = 0.999,
                                            .eps = 1e-8,
                                            .grad_clip = 1.0};

static double step(anepy_engine *engine, const fixture *f, int32_t n) {
    anepy_step_stats stats = {.struct_size = sizeof stats};
    int32_t status = anepy_engine_step(engine, &stats, f->tokens, f->targets, n);
    CHECK(status == ANEPY_OK && !stats.skipped, "a step fails or is skipped: %s",
          anepy_status_name(status));
    return stats.loss;
}

static int32_t update(anepy_engine *engine, double lr) {
    anepy_update_stats stats = {.struct_size = sizeof stats};
    anepy_update_options options = UPDATE;
    options.lr = lr;
    return anepy_engine_update(engine, &stats, &options);
}

static double evaluate(anepy_engine *engine, const fixture *f, int32_t n) {
    double loss = -1.0;
    CHECK(anepy_engine_evaluate(engine, &loss, f->tokens, f->targets, n) == ANEPY_OK,
          "evaluate fails");
    return loss;
}

/* Gradients of a step at given weights, by an engine that has just been made for them. */
static double gradients_at(fixture *shadow, const float *weights, const char *variant) {
    memcpy(shadow->params, weights, (size_t)shadow->n * sizeof(float));
    memset(shadow->grads, 0, (size_t)shadow->n * sizeof(float));
    anepy_engine *engine = fixture_engine_on(shadow, "sim", variant, 2);
    double loss = 0.0;
    for (int i = 0; i < STEPS; i++) loss = step(engine, shadow, shadow->config.seq_len);
    anepy_engine_free(engine);
    return loss;
}

static void check_stale(int which, const char *variant, const char *plain) {
    fixture f = fixture_make(which), shadow = fixture_make(which);
    size_t nbytes = (size_t)f.n * sizeof(float);
    float *older = malloc(nbytes), *newer = malloc(nbytes);
    if (older == NULL || newer == NULL) abort();
    anepy_engine *engine = fixture_engine_on(&f, "sim", variant, 2);
    memcpy(older, f.params, nbytes);
    for (int u = 0; u < (brief ? UPDATES / 2 : UPDATES); u++) {
        memcpy(newer, f.params, nbytes);
        double loss = 0.0;
        for (int i = 0; i < STEPS; i++) loss = step(engine, &f, f.config.seq_len);
        double expected = gradients_at(&shadow, older, plain);
        CHECK(loss == expected, "update %d: loss %.9g, at the older weights %.9g", u, loss,
              expected);
        CHECK(memcmp(f.grads, shadow.grads, nbytes) == 0,
              "update %d: gradients are not those of the older weights", u);
        if (u == 3) { /* an evaluation sees the newest weights, and so do the steps after it */
            memcpy(shadow.params, newer, nbytes);
            anepy_engine *fresh = fixture_engine_on(&shadow, "sim", plain, 2);
            double now = evaluate(engine, &f, f.config.seq_len);
            CHECK(now == evaluate(fresh, &shadow, f.config.seq_len), "evaluate is stale");
            anepy_engine_free(fresh);
        }
        CHECK(update(engine, UPDATE.lr) == ANEPY_OK, "update %d fails", u);
        memcpy(older, newer, nbytes);
    }
    anepy_engine_free(engine); /* while the last set compiles */
    free(older);
    free(newer);
    fixture_free(&f);
    fixture_free(&shadow);
}

/* Weights beyond fp16 cannot be baked. */
static void check_failing_compile(void) {
    fixture f = fixture_make(0);
    size_t nbytes = (size_t)f.n * sizeof(float);
    float *kept = malloc(nbytes);
    char text[512];
    if (kept == NULL) abort();
    anepy_engine *engine = fixture_engine_on(&f, "sim", "double-buffer", 2);
    double before = step(engine, &f, 64);
    CHECK(update(engine, 1e6) == ANEPY_OK, "the update that starts the compilation fails");
    memcpy(kept, f.params, nbytes);
    CHECK(step(engine, &f, 64) == before, "the step after it does not use the older weights");
    int32_t status = update(engine, UPDATE.lr);
    anepy_last_error(text, sizeof text);
    CHECK(status != ANEPY_OK && strstr(text, "in the background failed") != NULL &&
              strstr(text, "fp16") != NULL,
          "a failed compilation goes unnoticed or unexplained: %s, '%s'", anepy_status_name(status),
          text);
    CHECK(memcmp(kept, f.params, nbytes) == 0, "the failed update changed the weights");
    CHECK(step(engine, &f, 64) == before, "the last good set is gone");
    anepy_engine_free(engine);
    free(kept);
    fixture_free(&f);
}

/* A checkpoint that is loaded while a set compiles replaces it. */
static void check_restore(void) {
    fixture f = fixture_make(0), fresh = fixture_make(0);
    anepy_engine *engine = fixture_engine_on(&f, "sim", "double-buffer", 2);
    step(engine, &f, 64);
    CHECK(update(engine, UPDATE.lr) == ANEPY_OK, "update fails");
    fixture_reset(&f);
    CHECK(fixture_restore(engine, 0, 0) == ANEPY_OK, "restore fails");
    anepy_engine *other = fixture_engine_on(&fresh, "sim", "baseline", 2);
    CHECK(step(engine, &f, 64) == step(other, &fresh, 64), "restored weights are not used");
    anepy_engine_free(other);
    anepy_engine_free(engine);
    fixture_free(&f);
    fixture_free(&fresh);
}

void checks_weights(void) {
    check_stale(0, "double-buffer", "baseline");
    if (!brief) check_stale(1, "max+background_compile", "max");
    check_failing_compile();
    check_restore();
}
