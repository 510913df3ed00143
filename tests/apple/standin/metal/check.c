/* check.c - weight gradients on the stand-in GPU: numbers, rules, and every call failing.
 *
 * Built by test_metal.py from the library, device/metal/metal.m as it is, the stand-ins, and the
 * frame of tests/ckernels. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/lsan_interface.h>
#endif
#endif

#include "anepy.h"
#include "check.h"
#include "fault.h"
#include "fixture.h"
#include "gpu.h"
#include "model/model.h"

static anepy_engine *make(fixture *f, const char *variant, const char *device, int32_t *status) {
    anepy_engine_options options = fixture_options(f);
    anepy_engine *engine = NULL;
    options.variant = variant;
    options.device = device;
    if (strcmp(device, "cpu") == 0) options.precision = "fp32";
    options.threads = 2;
    *status = anepy_engine_create(&engine, f->model, &options);
    return engine;
}

static const char *sentence(void) {
    static char text[512];
    anepy_last_error(text, sizeof text);
    return text;
}

static int32_t step(anepy_engine *engine, const fixture *f, int32_t n, anepy_step_stats *stats) {
    memset(stats, 0, sizeof *stats);
    stats->struct_size = sizeof *stats;
    return anepy_engine_step(engine, stats, f->tokens, f->targets, n);
}

static int32_t update(anepy_engine *engine, anepy_update_stats *stats) {
    anepy_update_options options = {.struct_size = sizeof options,
                                    .lr = 1e-3,
                                    .beta1 = 0.9,
                                    .beta2 = 0.95,
                                    .eps = 1e-5,
                                    .weight_decay = 0.1};
    memset(stats, 0, sizeof *stats);
    stats->struct_size = sizeof *stats;
    return anepy_engine_update(engine, stats, &options);
}

/* All objects gone, no rule broken. */
static void check_clean(const char *what) {
    int32_t broken = gpu_take_broken(), live = gpu_live();
    CHECK(broken == 0, "%s: %d rules broken", what, broken);
    CHECK(live == 0, "%s: %d objects are left", what, live);
}

/* -------------------------------------------------------------------------------------- numbers */

#define STEPS 4

/* Steps of different lengths, an update in the middle; the gradients after each step. */
static int run(fixture *f, const char *variant, const char *device, float *grads, float *params) {
    anepy_step_stats stats;
    anepy_update_stats updated;
    int32_t status, longest = f->config.seq_len,
                    lengths[STEPS] = {longest, longest / 2 + 1, 1, longest};
    fixture_reset(f);
    for (int64_t i = 0; i < f->n; i++) f->grads[i] = 1.0f; /* the first step has to overwrite */
    anepy_engine *engine = make(f, variant, device, &status);
    CHECK(status == ANEPY_OK, "%s on %s: %s", variant, device, status ? sentence() : "");
    if (status != ANEPY_OK) return 0;
    for (int i = 0; i < STEPS; i++) {
        status = step(engine, f, lengths[i], &stats);
        CHECK(status == ANEPY_OK && stats.skipped == 0, "%s on %s: step %d", variant, device, i);
        CHECK(stats.dw_ms > 0.0 && stats.dw_wait_ms > 0.0, "%s: products take no time", variant);
        memcpy(grads + i * f->n, f->grads, (size_t)f->n * sizeof(float));
        if (i == 1)
            CHECK(update(engine, &updated) == ANEPY_OK && !updated.skipped, "%s: update", variant);
    }
    memcpy(params, f->params, (size_t)f->n * sizeof(float));
    anepy_engine_free(engine);
    return 1;
}

static double difference(const float *a, const float *b, int64_t n) {
    double largest = 0.0, size = 1e-30;
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(a[i])) return INFINITY;
        largest = fmax(largest, fabs((double)a[i] - b[i]));
        size = fmax(size, fabs(b[i]));
    }
    return largest / size;
}

/* Products of fewer rows, two of one group, and a layer whose last one is another. */
static void freeze(fixture *f) {
    for (int32_t i = 0; i < anepy_model_tensor_n(f->model); i++) {
        anepy_tensor t = {.struct_size = sizeof t};
        anepy_model_tensor(f->model, i, &t);
        int top = t.layer == f->config.n_layers - 1 && t.role >= ANEPY_WQ && t.role <= ANEPY_WO;
        if (top || t.role == ANEPY_WK || t.role == ANEPY_W1)
            CHECK(anepy_model_freeze(f->model, i) == ANEPY_OK, "freeze %s", t.name);
    }
}

static void check_alike(int which, const char *variant, const char *device, int frozen) {
    fixture f = fixture_make(which);
    if (frozen) freeze(&f);
    size_t size = (size_t)f.n * sizeof(float);
    float *host = malloc(STEPS * size), *gpu = malloc(STEPS * size), *moved = malloc(2 * size);
    char with[128];
    snprintf(with, sizeof with, "%s+metal_dw", variant);
    if (run(&f, variant, device, host, moved) && run(&f, with, device, gpu, moved + f.n)) {
        for (int i = 0; i < STEPS; i++) {
            double off = difference(gpu + i * f.n, host + i * f.n, f.n);
            /* After the update weights differ in their last bits, and the simulator may round some
             * to other fp16 numbers: 2^-11 of each, and sums with some of them differ by more. */
            double bar = i > 1 && strcmp(device, "sim") == 0 ? 0x1p-10 : 2e-6;
            CHECK(off <= bar, "%s on %s, model %d, step %d: off by %g", with, device, which, i,
                  off);
        }
        CHECK(memcmp(gpu, host, STEPS * size) != 0 || which == 2,
              "%s on %s: the GPU computed nothing, or its sums have the host's very order", with,
              device);
    }
    free(host);
    free(gpu);
    free(moved);
    fixture_free(&f);
    check_clean(with);
}

static void checks_numbers(const char *device) {
    static const char *const VARIANTS[] = {
        "baseline", "opt", "opt-prealloc", "opt-fp16_cache", "max",          "baseline+prealloc",
        "ane",      NULL,  "dynamic",      "max-prealloc",   "double-buffer"};
    for (int which = 0; which < FIXTURE_N; which++) {
        for (size_t v = 0; v < sizeof VARIANTS / sizeof VARIANTS[0]; v++) {
            if (VARIANTS[v] != NULL) check_alike(which, VARIANTS[v], device, 0);
            else if (strcmp(device, "cpu") == 0) break; /* the others mean nothing on it */
        }
        check_alike(which, "opt", device, 1);
        check_alike(which, "baseline", device, 1);
    }
}

/* Nothing is allocated, and what Metal needs is kept: the second step makes no object. */
static void checks_steady(void) {
    fixture f = fixture_make(0);
    anepy_step_stats stats;
    int32_t status, live = 0;
    anepy_engine *engine = make(&f, "opt+metal_dw", "cpu", &status);
    for (int i = 0; i < 4; i++) {
        CHECK(step(engine, &f, 40, &stats) == ANEPY_OK && stats.allocations == 0, "step %d", i);
        if (i == 1) live = gpu_live();
    }
    CHECK(live > 0 && gpu_live() == live, "%d objects after two steps, %d after four", live,
          gpu_live());
    anepy_engine *second = make(&f, "baseline+metal_dw", "cpu", &status);
    CHECK(step(second, &f, 9, &stats) == ANEPY_OK, "a second engine beside the first");
    anepy_engine_free(engine);
    anepy_engine_free(second);
    fixture_free(&f);
    check_clean("steady");
}

/* Four sequences in a step on the host and on the GPU. bar: of the largest gradient. On the CPU
 * they need more room than one: all is shared with the GPU anew, and nothing is lost if that fails.
 */
static void check_batch(const char *device, const char *precision, double bar) {
    enum { N = 30 };
    fixture f = fixture_make(0);
    float *host = malloc((size_t)f.n * sizeof(float));
    for (int gpu = 0; gpu < 2; gpu++) {
        anepy_engine_options options = fixture_options(&f);
        anepy_engine *engine = NULL;
        anepy_step_stats stats = {.struct_size = sizeof stats};
        options.variant = gpu ? "opt+metal_dw" : "opt";
        options.device = device;
        options.precision = precision;
        int32_t status = anepy_engine_create(&engine, f.model, &options);
        if (status == ANEPY_E_UNSUPPORTED && strcmp(precision, "bf16") == 0) break;
        if (gpu && strcmp(device, "cpu") == 0) {
            gpu_arm("newCommandQueue", 1, GPU_NIL);
            status = anepy_engine_step_batch(engine, &stats, f.tokens, f.targets, NULL, 4, N);
            CHECK(status == ANEPY_E_DEVICE && strstr(sentence(), "4 sequences of 30") != NULL,
                  "no room beside a broken GPU: status %d, '%s'", status, sentence());
            gpu_arm(NULL, 1, GPU_WORKS);
            CHECK(step(engine, &f, N, &stats) == ANEPY_OK && fixture_restore(engine, 0, 0) == 0,
                  "the room there was: %s", sentence());
        }
        status = anepy_engine_step_batch(engine, &stats, f.tokens, f.targets, NULL, 4, N);
        CHECK(status == ANEPY_OK, "a step of four on %s in %s: %s", device, precision, sentence());
        double off = gpu ? difference(f.grads, host, f.n) : 0.0;
        CHECK(off <= bar, "four sequences on %s in %s: off by %g", device, precision, off);
        memcpy(host, f.grads, (size_t)f.n * sizeof(float));
        anepy_engine_free(engine);
    }
    free(host);
    fixture_free(&f);
    check_clean("batch");
}

/* A slow GPU changes nothing; an engine may go while the GPU works on a step that was given up. */
static void checks_delay(void) {
    gpu_set_delay_us(20000);
    check_alike(0, "opt", "cpu", 0);
    check_alike(1, "opt", "sim", 0);
    gpu_set_delay_us(500);
}

/* A scaled step that overflows starts no product; the next one is as if it had not been. */
static void checks_skipped(void) {
    fixture f = fixture_make(0);
    anepy_engine_options options = fixture_options(&f);
    anepy_engine *engine = NULL;
    anepy_step_stats stats;
    options.variant = "opt+metal_dw";
    options.device = "sim";
    options.loss_scale = 0x1p40;
    CHECK(anepy_engine_create(&engine, f.model, &options) == ANEPY_OK, "%s", sentence());
    int32_t skipped = 0, status = ANEPY_OK;
    for (int i = 0; i < 40 && status == ANEPY_OK; i++) {
        status = step(engine, &f, 20, &stats);
        if (status != ANEPY_OK || !stats.skipped) break;
        CHECK(stats.dw_ms == 0.0, "the GPU worked on a step that was skipped");
        skipped++;
    }
    CHECK(status == ANEPY_OK && skipped > 0 && !stats.skipped && stats.dw_ms > 0.0,
          "%d steps skipped, then status %d", skipped, status);
    anepy_engine_free(engine);
    fixture_free(&f);
    check_clean("skipped");
}

/* --------------------------------------------------------------------------------------- faults */

enum { AT_CREATE, AT_STEP };

typedef struct {
    const char *call;
    int32_t nth;
    gpu_outcome outcome;
    int when;
    int32_t status;
    const char *words; /* in the error sentence */
} fault;

#define UNSUPPORTED ANEPY_E_UNSUPPORTED /* what the machine lacks: the switch is refused */
static const fault FAULTS[] = {
    {"NSClassFromString", 1, GPU_NIL, AT_CREATE, UNSUPPORTED, "MPSMatrixMultiplication"},
    {"NSClassFromString", 2, GPU_NIL, AT_CREATE, UNSUPPORTED, "no class MPSMatrix"},
    {"NSClassFromString", 3, GPU_NIL, AT_CREATE, UNSUPPORTED, "MPSMatrixDescriptor"},
    {"NSClassFromString", 2, GPU_THROW, AT_CREATE, UNSUPPORTED, "told to throw"},
    {"MTLCopyAllDevices", 1, GPU_NIL, AT_CREATE, UNSUPPORTED, "has no Metal GPU"},
    {"MTLCopyAllDevices", 2, GPU_NIL, AT_CREATE, ANEPY_E_UNAVAILABLE, "has no Metal GPU"},
    {"MTLCopyAllDevices", 1, GPU_THROW, AT_CREATE, UNSUPPORTED, "told to throw"},
    {"hasUnifiedMemory", 1, GPU_NIL, AT_CREATE, UNSUPPORTED, "shares the processor's memory"},
    {"hasUnifiedMemory", 1, GPU_THROW, AT_CREATE, UNSUPPORTED, "told to throw"},
    {"MPSSupportsMTLDevice", 1, GPU_NIL, AT_CREATE, UNSUPPORTED, "MetalPerformanceShaders"},
    {"dlsym", 1, GPU_NIL, AT_CREATE, UNSUPPORTED, "MPSSupportsMTLDevice is missing"},
    {"newCommandQueue", 1, GPU_NIL, AT_CREATE, ANEPY_E_DEVICE, "newCommandQueue gave nothing"},
    {"newCommandQueue", 1, GPU_THROW, AT_CREATE, ANEPY_E_DEVICE, "newCommandQueue threw"},
    {"maxBufferLength", 1, GPU_NIL, AT_CREATE, UNSUPPORTED, "this GPU takes 4096"},
    {"maxBufferLength", 1, GPU_THROW, AT_CREATE, ANEPY_E_DEVICE, "told to throw"},
    {"newBufferWithBytesNoCopy", 1, GPU_NIL, AT_CREATE, ANEPY_E_DEVICE, "gave nothing"},
    {"newBufferWithBytesNoCopy", 3, GPU_NIL, AT_CREATE, ANEPY_E_DEVICE, "gave nothing"},
    {"newBufferWithBytesNoCopy", 2, GPU_THROW, AT_CREATE, ANEPY_E_DEVICE, "told to throw"},
    {"matrixDescriptor", 1, GPU_NIL, AT_STEP, ANEPY_E_DEVICE, "matrixDescriptor"},
    {"matrixDescriptor", 5, GPU_THROW, AT_STEP, ANEPY_E_DEVICE, "told to throw"},
    {"MPSMatrix", 1, GPU_NIL, AT_STEP, ANEPY_E_DEVICE, "MPSMatrix initWithBuffer"},
    {"MPSMatrix", 3, GPU_NIL, AT_STEP, ANEPY_E_DEVICE, "MPSMatrix initWithBuffer"},
    {"MPSMatrix", 7, GPU_THROW, AT_STEP, ANEPY_E_DEVICE, "told to throw"},
    {"MPSMatrixMultiplication", 1, GPU_NIL, AT_STEP, ANEPY_E_DEVICE, "gave nothing"},
    {"MPSMatrixMultiplication", 6, GPU_THROW, AT_STEP, ANEPY_E_DEVICE, "told to throw"},
    {"commandBuffer", 1, GPU_NIL, AT_STEP, ANEPY_E_DEVICE, "commandBuffer gave nothing"},
    {"commandBuffer", 2, GPU_THROW, AT_STEP, ANEPY_E_DEVICE, "told to throw"},
    {"encode", 1, GPU_THROW, AT_STEP, ANEPY_E_DEVICE, "told to throw in encode"},
    {"encode", 6, GPU_THROW, AT_STEP, ANEPY_E_DEVICE, "told to throw in encode"},
    {"commit", 1, GPU_THROW, AT_STEP, ANEPY_E_DEVICE, "told to throw in commit"},
    {"waitUntilCompleted", 1, GPU_THROW, AT_STEP, ANEPY_E_DEVICE, "waitUntilCompleted threw"},
    {"execute", 1, GPU_ERROR, AT_STEP, ANEPY_E_DEVICE, "Caused GPU Timeout Error"},
    {"execute", 3, GPU_ERROR, AT_STEP, ANEPY_E_DEVICE, "the GPU failed"},
};
#define FAULT_N (sizeof FAULTS / sizeof FAULTS[0])

/* After a failed step: what was accumulated before is not applied, and a broken GPU stays so. */
static void check_after(anepy_engine *engine, fixture *f, const fault *t, int accumulated) {
    int broken = strcmp(t->call, "execute") == 0 || strcmp(t->call, "waitUntilCompleted") == 0;
    anepy_update_stats updated;
    anepy_step_stats stats;
    float *params = malloc((size_t)f->n * sizeof(float));
    memcpy(params, f->params, (size_t)f->n * sizeof(float));
    int32_t status = update(engine, &updated);
    if (accumulated)
        CHECK(status == ANEPY_OK && updated.skipped, "%s: update over half a step", t->call);
    else CHECK(status == ANEPY_E_STATE, "%s: update without a step", t->call);
    CHECK(memcmp(params, f->params, (size_t)f->n * sizeof(float)) == 0, "%s: weights", t->call);
    status = step(engine, f, 9, &stats);
    if (broken)
        CHECK(status == ANEPY_E_STATE && strstr(sentence(), "failed before"), "%s", t->call);
    else CHECK(status == ANEPY_OK, "%s: no step after it: %s", t->call, sentence());
    free(params);
}

static void check_fault(const fault *t, const char *device, int accumulated) {
    fixture f = fixture_make(0);
    anepy_step_stats stats;
    int32_t status;
    if (t->when == AT_CREATE) gpu_arm(t->call, t->nth, t->outcome);
    anepy_engine *engine = make(&f, "opt+metal_dw", device, &status);
    if (t->when == AT_STEP && engine != NULL) {
        /* The second step has another length, so that everything is made anew. */
        if (accumulated) CHECK(step(engine, &f, 30, &stats) == ANEPY_OK, "%s", sentence());
        gpu_arm(t->call, accumulated && strstr(t->call, "atri") && t->call[3] != 'M' ? 99 : t->nth,
                t->outcome);
        status = step(engine, &f, 33, &stats);
    }
    if (gpu_fired()) {
        CHECK(status == t->status && strstr(sentence(), t->words) != NULL,
              "%s %d on %s: status %d, '%s'", t->call, t->nth, device, status, sentence());
        if (t->when == AT_STEP) check_after(engine, &f, t, accumulated);
        else CHECK(engine == NULL, "%s: an engine all the same", t->call);
    } else {
        /* Matrices are made once: only the first step can fail there. */
        CHECK(accumulated && status == ANEPY_OK, "%s %d never happened", t->call, t->nth);
    }
    gpu_arm(NULL, 1, GPU_WORKS);
    anepy_engine_free(engine);
    engine = make(&f, "opt+metal_dw", device, &status);
    CHECK(status == ANEPY_OK && step(engine, &f, 9, &stats) == ANEPY_OK, "%s: no way back",
          t->call);
    anepy_engine_free(engine);
    fixture_free(&f);
    check_clean(t->call);
}

static void checks_faults(void) {
    for (size_t i = 0; i < FAULT_N; i++) {
        check_fault(&FAULTS[i], "cpu", 0);
        check_fault(&FAULTS[i], "cpu", 1);
        check_fault(&FAULTS[i], "sim", 0);
    }
}

/* Gradients that start inside a page are refused before anything is computed. */
static void checks_arena(void) {
    fixture f = fixture_make(0);
    anepy_engine_options options = fixture_options(&f);
    anepy_engine *engine = NULL;
    float *shifted = NULL;
    void *memory = NULL;
    CHECK(anepy_memory_alloc(&memory, (uint64_t)(f.n + 16) * sizeof(float)) == ANEPY_OK, "memory");
    shifted = (float *)memory + 16;
    options.variant = "opt+metal_dw";
    options.device = "cpu";
    options.grads = shifted;
    CHECK(anepy_engine_create(&engine, f.model, &options) == ANEPY_E_ARGUMENT &&
              strstr(sentence(), "anepy_memory_alloc"),
          "gradients inside a page: '%s'", sentence());
    anepy_engine_free(engine);
    anepy_memory_free(memory, (uint64_t)(f.n + 16) * sizeof(float));
    fixture_free(&f);
    check_clean("arena");
}

/* GNUstep keeps what it makes when a class is loaded or first used: the functions named here make
 * no objects, and the first use is where the leak checker does not look. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void) {
    return "leak:objc_malloc\nleak:class_copyMethodList\n";
}

static void warm_up(void) {
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
    __lsan_disable();
    check_alike(0, "opt", "cpu", 0);
    for (size_t i = 0; i < FAULT_N; i++) check_fault(&FAULTS[i], "cpu", 0);
    __lsan_enable();
#endif
#endif
}

int main(int argc, char **argv) {
    int all = argc < 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    check_group("warm");
    warm_up();
    if (all || strcmp(argv[1], "numbers") == 0) {
        check_group("cpu");
        checks_numbers("cpu");
        check_group("sim");
        checks_numbers("sim");
        check_group("delay");
        checks_delay();
    }
    if (all || strcmp(argv[1], "steady") == 0) {
        check_group("steady");
        checks_steady();
        check_group("skipped");
        checks_skipped();
        check_group("batch");
        check_batch("cpu", "fp32", 2e-6);
        check_batch("sim", "fp16", 2e-6);
        check_batch("cpu", "bf16", 2e-2); /* the GPU does not round the factors */
        check_group("arena");
        checks_arena();
    }
    if (all || strcmp(argv[1], "faults") == 0) {
        check_group("faults");
        checks_faults();
    }
    return check_summary();
}
