/* fixture.c - makes small models. */
#define _GNU_SOURCE
#include "fixture.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

static const anepy_config CONFIGS[FIXTURE_N + 1] = {
    {.dim = 24,
     .hidden_dim = 52,
     .n_layers = 3,
     .n_heads = 6,
     .n_kv_heads = 2,
     .vocab_size = 75,
     .seq_len = 130,
     .tied = 1},
    {.dim = 70,
     .hidden_dim = 33,
     .n_layers = 2,
     .n_heads = 5,
     .n_kv_heads = 5,
     .vocab_size = 601,
     .seq_len = 65,
     .tied = 0,
     .head_dim = 18,
     .qkv_bias = 1,
     .qk_norm = 1,
     .norm_eps = 1e-3,
     .rope_theta = 500.0,
     .rope_scaling = ANEPY_ROPE_LINEAR,
     .rope_factor = 3.0},
    {.dim = 2,
     .hidden_dim = 1,
     .n_layers = 1,
     .n_heads = 1,
     .n_kv_heads = 1,
     .vocab_size = 2,
     .seq_len = 9,
     .tied = 1},
    {.dim = 24,
     .hidden_dim = 20,
     .n_layers = 2,
     .n_heads = 6,
     .n_kv_heads = 2,
     .vocab_size = 30,
     .seq_len = 1024,
     .tied = 1},
};

static float *arena(const fixture *f) {
    void *memory = NULL;
    if (anepy_memory_alloc(&memory, (uint64_t)f->n * sizeof(float)) != ANEPY_OK) abort();
    return memory;
}

float *fixture_exact(int64_t n) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, (size_t)n * sizeof(float)) != 0) abort();
    memset(memory, 0, (size_t)n * sizeof(float));
    return memory;
}

double fixture_difference(const float *a, const float *b, int64_t n, double factor) {
    double largest = 0.0, size = 0.0;
    for (int64_t i = 0; i < n; i++) {
        largest = fmax(largest, fabs((double)a[i] * factor - b[i]));
        size = fmax(size, fabs(b[i]));
        if (isnan(a[i]) || isnan(b[i])) return INFINITY;
    }
    return largest / size;
}

void fixture_reset(fixture *f) {
    random_seed(0xf1c5 + (uint64_t)f->config.dim);
    for (int32_t i = 0; i < anepy_model_tensor_n(f->model); i++) {
        anepy_tensor t = {.struct_size = sizeof t};
        anepy_model_tensor(f->model, i, &t);
        float width = 1.5f / sqrtf((float)t.cols);
        for (int64_t e = t.offset; e < t.offset + t.rows * t.cols; e++)
            f->params[e] = t.flags & ANEPY_TENSOR_MATRIX ? random_float(-width, width)
                                                         : random_float(0.5f, 1.5f);
    }
    for (int32_t i = 0; i < f->config.seq_len; i++) {
        f->tokens[i] = random_below(f->config.vocab_size);
        f->targets[i] = random_below(f->config.vocab_size);
    }
    size_t nbytes = (size_t)f->n * sizeof(float);
    memset(f->grads, 0, nbytes);
    memset(f->adam_m, 0, nbytes);
    memset(f->adam_v, 0, nbytes);
}

fixture fixture_make(int which) {
    fixture f = {.config = CONFIGS[which]};
    f.config.struct_size = sizeof f.config;
    if (anepy_model_create(&f.model, &f.config) != ANEPY_OK) abort();
    f.n = anepy_model_arena_n(f.model);
    f.params = arena(&f);
    f.grads = arena(&f);
    f.adam_m = arena(&f);
    f.adam_v = arena(&f);
    f.tokens = calloc(2 * (size_t)f.config.seq_len, sizeof *f.tokens);
    if (f.tokens == NULL) abort();
    f.targets = f.tokens + f.config.seq_len;
    fixture_reset(&f);
    return f;
}

void fixture_free(fixture *f) {
    uint64_t nbytes = (uint64_t)f->n * sizeof(float);
    anepy_memory_free(f->params, nbytes);
    anepy_memory_free(f->grads, nbytes);
    anepy_memory_free(f->adam_m, nbytes);
    anepy_memory_free(f->adam_v, nbytes);
    anepy_model_free(f->model);
    free(f->tokens);
}

anepy_engine_options fixture_options(const fixture *f) {
    return (anepy_engine_options){.struct_size = sizeof(anepy_engine_options),
                                  .params = f->params,
                                  .grads = f->grads,
                                  .adam_m = f->adam_m,
                                  .adam_v = f->adam_v};
}

anepy_engine *fixture_engine_on(fixture *f, const char *device, const char *variant,
                                int32_t threads) {
    anepy_engine_options options = fixture_options(f);
    anepy_engine *engine = NULL;
    char text[512] = "";
    options.variant = variant;
    options.device = device;
    if (strcmp(device, "cpu") == 0) options.precision = f->precision ? f->precision : "fp32";
    options.threads = threads;
    int32_t status = anepy_engine_create(&engine, f->model, &options);
    if (status != ANEPY_OK) anepy_last_error(text, sizeof text);
    CHECK(status == ANEPY_OK, "no engine for %s on %d threads: %s", variant, threads, text);
    return engine;
}

anepy_engine *fixture_engine(fixture *f, const char *variant, int32_t threads) {
    return fixture_engine_on(f, "cpu", variant, threads);
}

int32_t fixture_restore(anepy_engine *engine, int64_t accumulated, int64_t updates) {
    anepy_engine_info info = {.struct_size = sizeof info};
    int32_t status = anepy_engine_get_info(engine, &info);
    if (status != ANEPY_OK) return status;
    info.accumulated = accumulated;
    info.counted = 0;
    info.unit = 0.0;
    info.updates = updates;
    return anepy_engine_restore(engine, &info);
}
