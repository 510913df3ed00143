/* recompute.c - activations that are computed again: the bits of an engine that keeps them, less
 * memory, whatever the variant, the precision and the threads, whatever is frozen. */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fixture.h"
#include "groups.h"

enum { COUNT = 5, MOST = 65 }; /* more columns than run at once */

static anepy_engine *make(const fixture *f, const char *device, const char *variant,
                          int32_t threads, uint32_t flags) {
    anepy_engine_options o = fixture_options(f);
    anepy_engine *engine = NULL;
    char text[512] = "";
    o.device = device;
    o.variant = variant;
    o.threads = threads;
    o.flags = flags;
    if (strcmp(device, "cpu") == 0) o.precision = f->precision;
    int32_t status = anepy_engine_create(&engine, f->model, &o);
    if (status != ANEPY_OK) anepy_last_error(text, sizeof text);
    CHECK(status == ANEPY_OK, "no engine for %s on %s: %s", variant, device, text);
    return engine;
}

/* Two steps into one accumulation; returns the sum of the losses. */
static double steps(anepy_engine *engine, const int32_t *tokens, int32_t n) {
    double sum = 0.0;
    for (int32_t i = 0; i < 2; i++) {
        anepy_step_stats stats = {.struct_size = sizeof stats};
        int32_t count = i == 0 ? 1 : COUNT;
        CHECK(anepy_engine_step_batch(engine, &stats, tokens, tokens + 1, NULL, count, n) ==
                      ANEPY_OK &&
                  stats.skipped == 0,
              "step");
        sum += stats.loss;
    }
    return sum;
}

static uint64_t memory_of(const anepy_engine *engine) {
    anepy_engine_info info = {.struct_size = sizeof info};
    CHECK(anepy_engine_get_info(engine, &info) == ANEPY_OK, "info");
    return info.memory;
}

/* frozen: the first so many tensors of the model are. */
static void check_bits(int which, const char *device, const char *variant, const char *precision,
                       int32_t frozen) {
    fixture f = fixture_make(which);
    int32_t tokens[COUNT * MOST + 1], n = anepy_min_i32(MOST, f.config.seq_len);
    f.precision = precision;
    random_seed(0x4ec0);
    for (int32_t i = 0; i <= COUNT * n; i++) tokens[i] = random_below(f.config.vocab_size);
    for (int32_t i = 0; i < frozen; i++)
        CHECK(anepy_model_freeze(f.model, i) == ANEPY_OK, "freeze");
    float *kept = calloc((size_t)f.n, sizeof *kept);
    if (kept == NULL) abort();
    anepy_engine *engine = make(&f, device, variant, 2, 0);
    double loss = steps(engine, tokens, n);
    uint64_t memory = memory_of(engine);
    memcpy(kept, f.grads, (size_t)f.n * sizeof(float));
    anepy_engine_free(engine);
    for (int32_t threads = 1; threads <= (brief ? 2 : 3); threads++) {
        fixture_reset(&f);
        engine = make(&f, device, variant, threads, ANEPY_ENGINE_RECOMPUTE);
        double again = steps(engine, tokens, n);
        CHECK(again == loss && all_same(f.grads, kept, f.n),
              "%s, %s, %s, %d frozen: other bits on %d threads", device, variant, precision, frozen,
              threads);
        if (threads == 2 && f.config.n_layers > 1)
            CHECK(memory_of(engine) < memory, "%s, %s: %llu bytes with recompute, %llu without",
                  device, variant, (unsigned long long)memory_of(engine),
                  (unsigned long long)memory);
        anepy_engine_free(engine);
    }
    free(kept);
    fixture_free(&f);
}

void checks_recompute(void) {
    static const char *const VARIANTS[] = {"max", "baseline", "opt-prealloc", "ane"};
    for (int p = 0; p < (anepy_kernels_get()->bf16 != NULL ? 2 : 1); p++) {
        for (int which = 0; which < (brief ? 1 : FIXTURE_N); which++)
            for (int v = 0; v < (brief ? 2 : 4); v++)
                check_bits(which, "cpu", VARIANTS[v], p > 0 ? "bf16" : "fp32", 0);
        check_bits(0, "cpu", "max", p > 0 ? "bf16" : "fp32", 15); /* into the second layer */
    }
    check_bits(0, "sim", "max", NULL, 0);
    check_bits(0, "sim", "resident", NULL, 0);
    if (!brief) check_bits(0, "sim", "baseline", NULL, 3);
}
