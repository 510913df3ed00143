/* optimizers.c - updates by each optimizer: the same bits on any number of threads, arenas of
 * second moments that nothing needs left out. tests/engine/test_optimizers.py has float64. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fixture.h"
#include "groups.h"

enum { UPDATES = 2 };

static anepy_engine *make(const fixture *f, const char *optimizer, float *adam_v, int32_t threads,
                          uint32_t flags) {
    anepy_engine_options o = fixture_options(f);
    anepy_engine *engine = NULL;
    o.adam_v = adam_v;
    o.optimizer = optimizer;
    o.device = "cpu";
    o.flags = flags;
    o.precision = "fp32";
    o.threads = threads;
    return anepy_engine_create(&engine, f->model, &o) == ANEPY_OK ? engine : NULL;
}

static void train(anepy_engine *engine, const fixture *f) {
    anepy_step_stats stats = {.struct_size = sizeof stats};
    anepy_update_stats update = {.struct_size = sizeof update};
    anepy_update_options o = {.struct_size = sizeof o,
                              .lr = 1e-3,
                              .beta1 = 0.9,
                              .beta2 = 0.99,
                              .eps = 1e-8,
                              .weight_decay = 0.1,
                              .grad_clip = 1.0,
                              .momentum = 0.9,
                              .matrix_lr = 0.02};
    for (int32_t i = 0; i < UPDATES; i++)
        CHECK(anepy_engine_step(engine, &stats, f->tokens, f->targets, f->config.seq_len) ==
                      ANEPY_OK &&
                  anepy_engine_update(engine, &update, &o) == ANEPY_OK && update.skipped == 0,
              "update");
}

/* second: whether the optimizer keeps a second moment of any tensor. */
static void check_optimizer(int which, const char *name, int second, uint32_t flags) {
    fixture f = fixture_make(which);
    float *first = calloc((size_t)f.n, sizeof *first);
    if (first == NULL) abort();
    anepy_engine *engine = make(&f, name, NULL, 1, flags);
    CHECK((engine != NULL) == !second, "%s takes a missing arena wrongly", name);
    anepy_engine_free(engine);
    for (int32_t threads = 1; threads <= 3; threads++) {
        fixture_reset(&f);
        float before = f.params[0];
        engine = make(&f, name, second ? f.adam_v : NULL, threads, flags);
        CHECK(engine != NULL, "no engine for %s", name);
        if (engine == NULL) break;
        train(engine, &f);
        int finite = 1, moved = 0;
        for (int64_t i = 0; i < f.n; i++) {
            finite &= isfinite(f.params[i]) && f.grads[i] == 0.0f;
            moved += f.adam_v[i] != 0.0f;
        }
        CHECK(finite && f.params[0] != before, "%s: weights that are not finite, or did not move",
              name);
        CHECK((moved > 0) == second, "%s: %d second moments", name, moved);
        for (int64_t i = f.n / 2 + 1; flags && i < f.n; i++)
            finite &= f.adam_m[i] == 0.0f && f.adam_v[i] == 0.0f;
        CHECK(finite, "%s: moments in bf16 need more than half of their arenas", name);
        if (threads == 1) memcpy(first, f.params, (size_t)f.n * sizeof(float));
        CHECK(all_same(f.params, first, f.n), "%s: other bits on %d threads", name, threads);
        anepy_engine_free(engine);
    }
    free(first);
    fixture_free(&f);
}

void checks_optimizers(void) {
    static const struct {
        const char *name;
        int second;
    } OPTIMIZERS[] = {{"adamw", 1}, {"lion", 0}, {"sgd", 0}, {"muon", 1}};
    for (int i = 0; i < 4; i++) {
        const char *name = anepy_optimizer_name(i);
        CHECK(name != NULL && strcmp(name, OPTIMIZERS[i].name) == 0, "optimizer %d", i);
        for (int which = 0; which < (brief ? 1 : FIXTURE_N); which++)
            for (uint32_t flags = 0; flags <= ANEPY_ENGINE_BF16_MOMENTS;
                 flags += ANEPY_ENGINE_BF16_MOMENTS)
                check_optimizer(which, OPTIMIZERS[i].name, OPTIMIZERS[i].second, flags);
    }
    CHECK(anepy_optimizer_name(4) == NULL && anepy_optimizer_name(-1) == NULL, "a fifth");
    fixture f = fixture_make(0);
    CHECK(make(&f, "adam", f.adam_v, 1, 0) == NULL, "an unknown optimizer is taken");
    fixture_free(&f);
}
