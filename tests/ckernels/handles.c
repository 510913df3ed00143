/* handles.c - what the public functions refuse, with which sentence, and what they leave alone: bad
 * arguments and names, calls in the wrong order, handles used from two threads, the caller's
 * floating-point mode. */
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "check.h"
#include "fixture.h"
#include "groups.h"
#include "runtime/clock.h"

/* Clears the sentence, so that an old one does not pass for the new. */
static void forget(void) { anepy_fail(ANEPY_OK, "-"); }

/* Whether the status is right and there is one line that mentions what is wrong. */
static int refuses(int32_t status, int32_t expected, const char *about) {
    char text[512];
    int32_t n = anepy_last_error(text, sizeof text);
    int right =
        status == expected && n > 10 && strchr(text, '\n') == NULL && strstr(text, about) != NULL;
    CHECK(right, "status %s, not %s, or '%s' does not mention '%s'", anepy_status_name(status),
          anepy_status_name(expected), text, about);
    forget();
    return right;
}

/* -------------------------------------------------------------------------------------- engines */

static void try_engine(fixture *f, anepy_engine_options o, int32_t expected, const char *about) {
    anepy_engine *engine = (anepy_engine *)f;
    int32_t status = anepy_engine_create(&engine, f->model, &o);
    if (!refuses(status, expected, about) && status == ANEPY_OK) anepy_engine_free(engine);
    else CHECK(engine == (anepy_engine *)f, "a refused create writes its output");
}

static void check_engine_options(fixture *f) {
    static const struct {
        const char *text;
        int32_t status;
        const char *about;
    } variants[] = {
        {"fast", ANEPY_E_NAME, "'fast': use one of baseline"},
        {"", ANEPY_E_NAME, "variant ''"},
        {"opt+", ANEPY_E_NAME, "switch ''"},
        {"opt+fast", ANEPY_E_NAME, "'fast': use one of simd_adam"},
        {"opt-prealloc+nope", ANEPY_E_NAME, "'nope'"},
        {"optprealloc", ANEPY_E_NAME, "'optprealloc'"},
        {"opt+metal_dw", ANEPY_E_UNSUPPORTED, "metal_dw"},
    };
    anepy_engine_options good = fixture_options(f), o;
    good.device = "cpu";
    for (size_t i = 0; i < sizeof variants / sizeof variants[0]; i++) {
        uint32_t switches = 12345;
        o = good;
        o.variant = variants[i].text;
        try_engine(f, o, variants[i].status, variants[i].about);
        refuses(anepy_variant_parse(variants[i].text, "cpu", NULL, &switches), variants[i].status,
                variants[i].about);
        CHECK(switches == 12345, "a refused variant writes its output");
    }
    o = good;
    o.device = "gpu";
    try_engine(f, o, ANEPY_E_NAME, "'gpu': use one of auto, ");
    o = good;
    o.precision = "fp8";
    try_engine(f, o, ANEPY_E_NAME, "'fp8'");
    o = good;
    o.precision = "fp16";
    try_engine(f, o, ANEPY_E_UNSUPPORTED, "fp16");
    o = good;
    o.struct_size = 8;
    try_engine(f, o, ANEPY_E_ARGUMENT, "8 bytes");
    o = good;
    o.params = NULL;
    try_engine(f, o, ANEPY_E_ARGUMENT, "arena");
    o = good;
    o.adam_v = NULL;
    try_engine(f, o, ANEPY_E_ARGUMENT, "arena");
    o = good;
    o.seq_len = f->config.seq_len + 1;
    try_engine(f, o, ANEPY_E_ARGUMENT, "sequence");
    o = good;
    o.seq_len = -1;
    try_engine(f, o, ANEPY_E_ARGUMENT, "sequence");
    o = good;
    o.threads = -2;
    try_engine(f, o, ANEPY_E_ARGUMENT, "-2");
    o = good;
    o.threads = 100000;
    try_engine(f, o, ANEPY_E_ARGUMENT, "100000");
    anepy_device_info device = {.struct_size = sizeof device};
    for (int32_t i = 0; anepy_device_get_info(i, &device) == ANEPY_OK; i++) {
        if (device.usable) continue;
        o = good;
        o.device = device.name;
        try_engine(f, o, ANEPY_E_UNAVAILABLE, device.name);
    }
    anepy_engine_free(NULL);
    anepy_decoder_free(NULL);
}

static void check_sequences(fixture *f) {
    anepy_engine *engine = fixture_engine(f, "max", 2);
    anepy_step_stats stats = {.struct_size = sizeof stats, .loss = 7.0};
    double loss = 7.0;
    float logits[1] = {7.0f};
    int32_t longest = f->config.seq_len, vocab = f->config.vocab_size;
    int32_t lengths[] = {0, -1, INT32_MIN, longest + 1, INT32_MAX};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        int32_t n = lengths[i];
        refuses(anepy_engine_step(engine, &stats, f->tokens, f->targets, n), ANEPY_E_ARGUMENT,
                "tokens");
        refuses(anepy_engine_evaluate(engine, &loss, f->tokens, f->targets, n), ANEPY_E_ARGUMENT,
                "tokens");
        refuses(anepy_engine_logits(engine, logits, f->tokens, n), ANEPY_E_ARGUMENT, "tokens");
    }
    int32_t ids[] = {-1, INT32_MIN, vocab, INT32_MAX};
    for (size_t i = 0; i < sizeof ids / sizeof ids[0]; i++) {
        for (int which = 0; which < (ids[i] < 0 ? 1 : 2); which++) { /* below 0: not counted */
            int32_t *at = which ? &f->targets[longest - 1] : &f->tokens[3], kept = *at;
            const char *about = which ? "targets[" : "tokens[3]";
            *at = ids[i];
            refuses(anepy_engine_step(engine, &stats, f->tokens, f->targets, longest),
                    ANEPY_E_TOKEN, about);
            refuses(anepy_engine_evaluate(engine, &loss, f->tokens, f->targets, longest),
                    ANEPY_E_TOKEN, about);
            if (which == 0)
                refuses(anepy_engine_logits(engine, logits, f->tokens, longest), ANEPY_E_TOKEN,
                        about);
            *at = kept;
        }
    }
    int32_t none[2] = {-1, INT32_MIN};
    refuses(anepy_engine_step(engine, &stats, f->tokens, none, 2), ANEPY_E_ARGUMENT, "all 2 are");
    refuses(anepy_engine_evaluate(engine, &loss, f->tokens, none, 2), ANEPY_E_ARGUMENT, "all 2");
    CHECK(stats.loss == 7.0 && loss == 7.0 && logits[0] == 7.0f,
          "a refused call writes its output");
    anepy_engine_info info = {.struct_size = sizeof info};
    anepy_engine_get_info(engine, &info);
    CHECK(info.accumulated == 0 && info.updates == 0, "a refused step counts");
    CHECK(info.seq_len == longest && info.threads == 2 && strcmp(info.device, "cpu") == 0 &&
              strcmp(info.precision, "fp32") == 0 &&
              strcmp(info.isa, anepy_kernels_get()->isa) == 0,
          "info: %s %s %s", info.device, info.precision, info.isa);
    for (int64_t i = 0; i < f->n; i++)
        if (f->grads[i] != 0.0f) {
            CHECK(0, "a refused step writes gradients");
            break;
        }
    anepy_engine_free(engine);
}

static void check_updates(fixture *f) {
    anepy_engine *engine = fixture_engine(f, "max", 2);
    anepy_update_options good = {.struct_size = sizeof good,
                                 .lr = 0.0,
                                 .beta1 = 0.9,
                                 .beta2 = 0.999,
                                 .eps = 1e-8},
                         o;
    anepy_update_stats stats = {.struct_size = sizeof stats, .grad_norm = 7.0};
    anepy_step_stats step = {.struct_size = sizeof step};
    refuses(anepy_engine_update(engine, &stats, &good), ANEPY_E_STATE, "no step");
    CHECK(anepy_engine_step(engine, &step, f->tokens, f->targets, 5) == ANEPY_OK, "step");
    o = good;
    o.lr = -1.0;
    refuses(anepy_engine_update(engine, &stats, &o), ANEPY_E_ARGUMENT, "lr");
    o = good;
    o.lr = NAN;
    refuses(anepy_engine_update(engine, &stats, &o), ANEPY_E_ARGUMENT, "lr");
    o = good;
    o.lr = INFINITY;
    refuses(anepy_engine_update(engine, &stats, &o), ANEPY_E_ARGUMENT, "lr");
    o = good;
    o.beta1 = 1.0;
    refuses(anepy_engine_update(engine, &stats, &o), ANEPY_E_ARGUMENT, "beta1");
    o = good;
    o.beta2 = -0.1;
    refuses(anepy_engine_update(engine, &stats, &o), ANEPY_E_ARGUMENT, "beta2");
    o = good;
    o.beta2 = NAN;
    refuses(anepy_engine_update(engine, &stats, &o), ANEPY_E_ARGUMENT, "beta2");
    o = good;
    o.eps = 0.0;
    refuses(anepy_engine_update(engine, &stats, &o), ANEPY_E_ARGUMENT, "eps");
    o = good;
    o.eps = NAN;
    refuses(anepy_engine_update(engine, &stats, &o), ANEPY_E_ARGUMENT, "eps");
    o = good;
    o.weight_decay = -1.0;
    refuses(anepy_engine_update(engine, &stats, &o), ANEPY_E_ARGUMENT, "weight_decay");
    o = good;
    o.grad_clip = -1.0;
    refuses(anepy_engine_update(engine, &stats, &o), ANEPY_E_ARGUMENT, "grad_clip");
    o = good;
    o.grad_clip = NAN;
    refuses(anepy_engine_update(engine, &stats, &o), ANEPY_E_ARGUMENT, "grad_clip");
    o = good;
    o.struct_size = 0;
    refuses(anepy_engine_update(engine, &stats, &o), ANEPY_E_ARGUMENT, "bytes");
    CHECK(stats.grad_norm == 7.0, "a refused update writes its output");
    float before = f->params[0];
    CHECK(anepy_engine_update(engine, &stats, &good) == ANEPY_OK && f->params[0] == before,
          "lr 0 moves a weight");
    refuses(anepy_engine_update(engine, &stats, &good), ANEPY_E_STATE, "no step");
    refuses(fixture_restore(engine, -1, 0), ANEPY_E_ARGUMENT, "-1");
    refuses(fixture_restore(engine, 0, -1), ANEPY_E_ARGUMENT, "-1");
    static const struct {
        int64_t counted;
        double unit;
    } odd[] = {{-1, 1.0}, {1, -1.0}, {1, NAN}, {1, INFINITY}, {1, 0.0}};
    for (size_t i = 0; i < sizeof odd / sizeof odd[0]; i++) {
        anepy_engine_info info = {.struct_size = sizeof info};
        anepy_engine_get_info(engine, &info);
        info.accumulated = 1;
        info.counted = odd[i].counted;
        info.unit = odd[i].unit;
        refuses(anepy_engine_restore(engine, &info), ANEPY_E_ARGUMENT, "in units of");
    }
    anepy_engine_free(engine);
}

/* eps and lr are doubles here and floats in the kernel: what vanishes or overflows there must be
 * refused, not turn weights without a gradient into NaN (0 / 0). */
static void check_narrowing(fixture *f) {
    static const struct {
        double lr, eps;
    } cases[] = {{1e-3, 1e-60}, {1e-3, 1e-42}, {1e39, 1e-8}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        fixture_reset(f);
        anepy_engine *engine = fixture_engine(f, "max", 1);
        anepy_update_options o = {.struct_size = sizeof o,
                                  .lr = cases[i].lr,
                                  .beta1 = 0.9,
                                  .beta2 = 0.999,
                                  .eps = cases[i].eps};
        anepy_update_stats stats = {.struct_size = sizeof stats};
        fixture_restore(engine, 1, 0); /* gradients are zero */
        int32_t status = anepy_engine_update(engine, &stats, &o);
        int finite = 1;
        for (int64_t k = 0; k < f->n; k++) finite &= isfinite(f->params[k]) != 0;
        CHECK(finite && (status == ANEPY_OK || status == ANEPY_E_ARGUMENT),
              "lr %g, eps %g at zero gradients: the weights are no numbers", o.lr, o.eps);
        anepy_engine_free(engine);
    }
    fixture_reset(f);
}

/* ----------------------------------------------------------------------------- decoder, queries */

static void check_decoder_arguments(fixture *f) {
    anepy_decoder *decoder = (anepy_decoder *)f, *d = NULL;
    int32_t longest = f->config.seq_len, vocab = f->config.vocab_size;
    float logits[1024];
    refuses(anepy_decoder_create(&decoder, f->model, f->params, -1, 1), ANEPY_E_ARGUMENT, "-1");
    refuses(anepy_decoder_create(&decoder, f->model, f->params, longest + 1, 1), ANEPY_E_ARGUMENT,
            "positions");
    refuses(anepy_decoder_create(&decoder, f->model, f->params, 4, -1), ANEPY_E_ARGUMENT,
            "threads");
    CHECK(decoder == (anepy_decoder *)f, "a refused create writes its output");
    if (!CHECK(anepy_decoder_create(&d, f->model, f->params, 3, 2) == ANEPY_OK, "decoder")) return;
    refuses(anepy_decoder_forward(d, logits, 0, 1), ANEPY_E_STATE, "position");
    refuses(anepy_decoder_forward(d, logits, 0, -1), ANEPY_E_STATE, "position");
    refuses(anepy_decoder_forward(d, logits, -1, 0), ANEPY_E_TOKEN, "token");
    refuses(anepy_decoder_forward(d, logits, vocab, 0), ANEPY_E_TOKEN, "token");
    for (int32_t i = 0; i < 3; i++)
        CHECK(anepy_decoder_forward(d, logits, 0, i) == ANEPY_OK, "position %d", i);
    refuses(anepy_decoder_forward(d, logits, 0, 3), ANEPY_E_ARGUMENT, "position 3");
    refuses(anepy_decoder_forward(d, logits, 0, 1), ANEPY_E_STATE, "position");
    CHECK(anepy_decoder_forward(d, logits, 0, 0) == ANEPY_OK, "a new start");
    anepy_decoder_free(d);
}

/* What names there are, and that each variant either works on the CPU or says which switch does
 * not. */
static void check_names(void) {
    int32_t switches = 0, variants = 0, working = 0;
    while (anepy_switch_name(switches) != NULL) switches++;
    while (anepy_variant_name(variants) != NULL) variants++;
    CHECK(switches >= 12 && switches <= 32 && variants >= 6, "%d switches, %d variants", switches,
          variants);
    CHECK(anepy_switch_name(-1) == NULL && anepy_variant_name(-1) == NULL,
          "names before the first");
    for (int32_t i = 0; i < variants; i++) {
        uint32_t bits = 0;
        int32_t status = anepy_variant_parse(anepy_variant_name(i), "cpu", NULL, &bits);
        CHECK(status != ANEPY_OK || bits >> (switches - 1) <= 1, "%s has switches without a name",
              anepy_variant_name(i));
        if (status == ANEPY_OK) working++;
        else refuses(status, ANEPY_E_UNSUPPORTED, "switch");
    }
    CHECK(working >= 3, "%d variants work on the CPU", working);
    static const struct {
        const char *text;
        uint32_t bits;
    } known[] = {{"baseline", 0},
                 {"opt", 0x3f},
                 {"opt-prealloc", 0x3b},
                 {"baseline+simd_adam", 1},
                 {"opt-prealloc+prealloc", 0x3f}};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        uint32_t bits = 12345;
        CHECK(anepy_variant_parse(known[i].text, "cpu", NULL, &bits) == ANEPY_OK &&
                  bits == known[i].bits,
              "%s means %x", known[i].text, bits);
    }
    uint32_t best = 0, unnamed = 0;
    CHECK(anepy_variant_parse("max", "cpu", NULL, &best) == ANEPY_OK && (best & 0x3f) == 0x3f &&
              anepy_variant_parse(NULL, NULL, NULL, &unnamed) == ANEPY_OK,
          "max means %x, nothing means %x", best, unnamed);
}

static void check_queries(void) {
    int32_t devices = 0, usable = 0;
    anepy_device_info device = {.struct_size = sizeof device};
    for (; anepy_device_get_info(devices, &device) == ANEPY_OK; devices++) {
        CHECK(device.struct_size == sizeof device && device.name[0] && device.reason[0],
              "device %d", devices);
        usable += device.usable;
    }
    CHECK(devices >= 2 && usable >= 1, "%d of %d devices are usable", usable, devices);
    refuses(anepy_device_get_info(-1, &device), ANEPY_E_ARGUMENT, "-1");
    anepy_library_info info = {.struct_size = sizeof info};
    CHECK(anepy_library_get_info(&info) == ANEPY_OK && info.struct_size == sizeof info &&
              strstr(info.isa_all, info.isa) != NULL && strstr(info.isa_all, "scalar") != NULL &&
              info.compiler[0] && info.gemm[0] && info.threads >= 1 && info.cores >= 1,
          "library info: %s of %s", info.isa, info.isa_all);
}

static void check_peaks(void) {
    anepy_peaks peaks = {.struct_size = sizeof peaks};
    refuses(anepy_peaks_measure(&peaks, "avx1024", 1, 1), ANEPY_E_NAME, "avx1024");
    refuses(anepy_peaks_measure(&peaks, NULL, -1, 1), ANEPY_E_ARGUMENT, "threads");
    const char *best = anepy_kernels_at(0)->isa;
    CHECK(anepy_peaks_measure(&peaks, best, 2, 1) == ANEPY_OK &&
              peaks.struct_size == sizeof peaks && peaks.threads == 2 &&
              strcmp(peaks.isa, best) == 0 && peaks.fp32_gflops > 0.0 && peaks.bf16_gflops >= 0.0 &&
              peaks.read_gbs > 0.0 && peaks.copy_gbs > 0.0 && peaks.triad_gbs > 0.0,
          "peaks of %s: %g GFLOP/s, %g GB/s", peaks.isa, peaks.fp32_gflops, peaks.triad_gbs);
}

/* ---------------------------------------------------------------------- two threads, one handle */

typedef struct {
    fixture *f;
    anepy_engine *engine; /* one of the two */
    anepy_decoder *decoder;
    _Atomic int32_t busy, odd, started, stop;
} shared;

/* One call; counts what came back. */
static void call_once(shared *s) {
    float logits[1024];
    double loss;
    int32_t n = s->f->config.seq_len, status;
    if (s->engine != NULL)
        status = anepy_engine_evaluate(s->engine, &loss, s->f->tokens, s->f->targets, n);
    else status = anepy_decoder_forward(s->decoder, logits, 1, 0);
    if (status == ANEPY_E_BUSY) atomic_fetch_add(&s->busy, 1);
    else if (status != ANEPY_OK) atomic_fetch_add(&s->odd, 1);
}

static void *call_until_busy(void *argument) {
    shared *s = argument;
    atomic_store(&s->started, 1);
    while (!atomic_load(&s->stop)) call_once(s);
    return NULL;
}

/* anepy.h: a second caller gets ANEPY_E_BUSY, and nothing happens to the first. */
static void check_second_caller(shared *s, const char *what, double patience) {
    pthread_t thread;
    if (!CHECK(pthread_create(&thread, NULL, call_until_busy, s) == 0, "no thread")) return;
    double end = anepy_now_ms() + patience;
    while (atomic_load(&s->busy) == 0 && anepy_now_ms() < end)
        if (atomic_load(&s->started)) call_once(s);
    atomic_store(&s->stop, 1);
    pthread_join(thread, NULL);
    CHECK(atomic_load(&s->busy) > 0, "%s: nobody is told that it is busy", what);
    CHECK(atomic_load(&s->odd) == 0, "%s: two callers get another status", what);
}

static void check_busy(fixture *f) {
    shared engine = {.f = f, .engine = fixture_engine(f, "max", 2)}, decoder = {.f = f};
    check_second_caller(&engine, "engine", PATIENCE_MS);
    anepy_engine_free(engine.engine);
    if (CHECK(anepy_decoder_create(&decoder.decoder, f->model, f->params, 1, 1) == ANEPY_OK,
              "decoder"))
        check_second_caller(&decoder, "decoder", 3000.0);
    anepy_decoder_free(decoder.decoder);
}

/* ------------------------------------------------------------------ the caller's floating point */

static int subnormals_live(void) {
    volatile float smallest = FLT_MIN, half = 0.5f;
    return smallest * half > 0.0f;
}

static void check_mode(fixture *f) {
    anepy_engine *engine = fixture_engine(f, "max", 2);
    anepy_decoder *decoder = NULL;
    anepy_step_stats step = {.struct_size = sizeof step};
    anepy_update_options o = {
        .struct_size = sizeof o, .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8};
    anepy_update_stats stats = {.struct_size = sizeof stats};
    static float logits[1024 * 200];
    double loss;
    int32_t n = f->config.seq_len;
    CHECK(subnormals_live(), "create changes the mode");
    anepy_engine_step(engine, &step, f->tokens, f->targets, n);
    CHECK(subnormals_live(), "step changes the mode");
    anepy_engine_step(engine, &step, f->tokens, f->targets, n + 1);
    CHECK(subnormals_live(), "a refused step changes the mode");
    anepy_engine_update(engine, &stats, &o);
    CHECK(subnormals_live(), "update changes the mode");
    anepy_engine_update(engine, &stats, &o);
    CHECK(subnormals_live(), "a refused update changes the mode");
    anepy_engine_evaluate(engine, &loss, f->tokens, f->targets, n);
    CHECK(subnormals_live(), "evaluate changes the mode");
    anepy_engine_logits(engine, logits, f->tokens, n);
    CHECK(subnormals_live(), "logits changes the mode");
    anepy_decoder_create(&decoder, f->model, f->params, n, 2);
    anepy_decoder_forward(decoder, logits, 0, 0);
    CHECK(subnormals_live(), "the decoder changes the mode");
    anepy_decoder_free(decoder);
    anepy_engine_free(engine);
}

void checks_handles(void) {
    fixture f = fixture_make(0);
    forget();
    check_engine_options(&f);
    check_sequences(&f);
    check_updates(&f);
    check_narrowing(&f);
    check_decoder_arguments(&f);
    check_names();
    check_queries();
    check_peaks();
    check_mode(&f);
    check_busy(&f);
    fixture_free(&f);
}
