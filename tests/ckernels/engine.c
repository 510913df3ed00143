/* engine.c - whole small models through the public functions: gradients against differences of the
 * loss, every variant and thread count alike, decoder against engine, update against its formula.
 * tests/reference has the exact comparison; this one runs under sanitizers and emulators. */
#define _GNU_SOURCE
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "fixture.h"
#include "groups.h"

static const char *const VARIANTS[] = {"baseline",
                                       "opt",
                                       "max",
                                       "opt-fp16_cache",
                                       "baseline+prealloc",
                                       "baseline+concurrent_dw+vector_embed-prealloc"};
enum { VARIANT_N = sizeof VARIANTS / sizeof VARIANTS[0] };

static float *floats(int64_t n) {
    float *x = calloc((size_t)n, sizeof *x);
    if (x == NULL) abort();
    return x;
}

static double step(anepy_engine *engine, const fixture *f, int32_t n) {
    anepy_step_stats stats = {.struct_size = sizeof stats};
    CHECK(anepy_engine_step(engine, &stats, f->tokens, f->targets, n) == ANEPY_OK, "step of %d", n);
    CHECK(stats.struct_size == sizeof stats && stats.skipped == 0 && stats.loss_scale == 1.0 &&
              stats.flops > 0.0 && stats.step_ms > 0.0 && stats.dw_ms >= 0.0 &&
              stats.allocations >= 0,
          "odd statistics of a step of %d", n);
    return stats.loss;
}

static double evaluate(anepy_engine *engine, const fixture *f, int32_t n) {
    double loss = NAN;
    CHECK(anepy_engine_evaluate(engine, &loss, f->tokens, f->targets, n) == ANEPY_OK, "evaluate %d",
          n);
    return loss;
}

static int32_t length(const fixture *f, int i) {
    static const int32_t lengths[] = {1, 7, 33, 64, 65, 130};
    return anepy_min_i32(lengths[i], f->config.seq_len);
}
#define LENGTH_N 6

/* ---------------------------------------------------------------------- gradients are gradients */

/* Along a random direction of one tensor: (loss(p + h d) - loss(p - h d)) / 2h = g . d. */
static void check_tensor_gradient(anepy_engine *engine, fixture *f, const float *grads,
                                  const anepy_tensor *t, int32_t n) {
    int64_t count = t->rows * t->cols;
    float *start = floats(count), *p = f->params + t->offset;
    double expected = 0.0, norm = 0.0, loss[2], h = 0.004;
    memcpy(start, p, (size_t)count * sizeof(float));
    for (int side = 0; side < 2; side++) {
        random_seed((uint64_t)t->offset);
        for (int64_t i = 0; i < count; i++) {
            float d = random_float(-1.0f, 1.0f) * (float)h, moved = start[i] + (side ? -d : d);
            p[i] = moved;
            if (side == 0) expected += (double)grads[t->offset + i] * ((double)moved - start[i]);
            if (side == 0) norm += pow((double)grads[t->offset + i] * d, 2);
        }
        loss[side] = evaluate(engine, f, n);
    }
    memcpy(p, start, (size_t)count * sizeof(float));
    free(start);
    double actual = 0.5 * (loss[0] - loss[1]);
    /* fp32 losses are rounded to 1e-6 or so; the cubic term is below 1 % at this h. */
    CHECK(fabs(actual - expected) <= 0.03 * sqrt(norm) + 4e-6,
          "%s: slope %.9g, gradient %.9g, n %d", t->name, actual, expected, n);
}

static void check_gradients(int which, int32_t n) {
    fixture f = fixture_make(which);
    anepy_engine *engine = fixture_engine(&f, "opt", 2);
    float *grads = floats(f.n);
    step(engine, &f, n);
    memcpy(grads, f.grads, (size_t)f.n * sizeof(float));
    for (int32_t i = 0; i < anepy_model_tensor_n(f.model); i++) {
        anepy_tensor t = {.struct_size = sizeof t};
        anepy_model_tensor(f.model, i, &t);
        check_tensor_gradient(engine, &f, grads, &t, n);
    }
    CHECK(all_same(f.grads, grads, f.n), "evaluate touches the gradients");
    anepy_engine_free(engine);
    free(grads);
    fixture_free(&f);
}

/* ------------------------------------------------------------------- variants, threads, repeats */

static double largest_difference(const float *a, const float *b, int64_t n) {
    double largest = 0.0, size = 0.0;
    for (int64_t i = 0; i < n; i++) {
        largest = fmax(largest, fabs((double)a[i] - b[i]));
        size = fmax(size, fabs(b[i]));
        if (isnan(a[i])) return INFINITY;
    }
    return largest / size;
}

/* Two steps of different lengths, then an update: gradients, then weights. */
static void run(const char *variant, fixture *f, int32_t threads, int32_t n, double *loss,
                float *grads, float *params) {
    fixture_reset(f);
    anepy_engine *engine = fixture_engine(f, variant, threads);
    anepy_update_options options = {.struct_size = sizeof options,
                                    .lr = 1e-3,
                                    .beta1 = 0.9,
                                    .beta2 = 0.95,
                                    .eps = 1e-5,
                                    .weight_decay = 0.1,
                                    .grad_clip = 1.0};
    anepy_update_stats stats = {.struct_size = sizeof stats};
    loss[0] = step(engine, f, n);
    loss[1] = step(engine, f, n / 2 + 1);
    memcpy(grads, f->grads, (size_t)f->n * sizeof(float));
    CHECK(anepy_engine_update(engine, &stats, &options) == ANEPY_OK && stats.skipped == 0 &&
              stats.grad_norm > 0.0,
          "update");
    loss[2] = evaluate(engine, f, n);
    memcpy(params, f->params, (size_t)f->n * sizeof(float));
    anepy_engine_free(engine);
}

static void check_alike(int which, int32_t n, const char *precision) {
    fixture f = fixture_make(which);
    f.precision = precision;
    /* Weights that differ in their last bit may be rounded to different bf16 numbers. */
    double after = strcmp(precision, "bf16") == 0 ? 2e-3 : 1e-5;
    float *grads[2] = {floats(f.n), floats(f.n)}, *params[2] = {floats(f.n), floats(f.n)};
    float *first = floats(f.n);
    double loss[2][3];
    run(VARIANTS[0], &f, 2, n, loss[0], grads[0], params[0]);
    CHECK(isfinite(loss[0][0]) && loss[0][2] < loss[0][0],
          "an update raises the loss from %g to %g", loss[0][0], loss[0][2]);
    for (int v = 0; v < VARIANT_N; v += brief ? 3 : 1) {
        for (int32_t threads = 1; threads <= (brief ? 2 : 3); threads++) {
            run(VARIANTS[v], &f, threads, n, loss[1], grads[1], params[1]);
            double off = largest_difference(grads[1], grads[0], f.n);
            double moved = largest_difference(params[1], params[0], f.n);
            CHECK(off <= 2e-6 && moved <= 2e-6 && fabs(loss[1][0] - loss[0][0]) <= 2e-6 &&
                      fabs(loss[1][2] - loss[0][2]) <= after,
                  "%s, %s on %d threads, n %d: gradients differ by %g, weights by %g", precision,
                  VARIANTS[v], threads, n, off, moved);
            if (threads == 1) memcpy(first, params[1], (size_t)f.n * sizeof(float));
            CHECK(all_same(params[1], first, f.n), "%s: other bits on %d threads, n %d",
                  VARIANTS[v], threads, n);
        }
    }
    for (int i = 0; i < 2; i++) free(grads[i]), free(params[i]);
    free(first);
    fixture_free(&f);
}

/* A short sequence after a long one leaves nothing of it behind. */
static void check_lengths(int which) {
    fixture f = fixture_make(which);
    float *grads = floats(f.n);
    for (int i = 0; i < LENGTH_N; i++) {
        int32_t n = length(&f, i);
        fixture_reset(&f);
        anepy_engine *engine = fixture_engine(&f, "max", 2);
        double loss = step(engine, &f, n);
        CHECK(fabs(evaluate(engine, &f, n) - loss) <= 1e-7 * fabs(loss), "evaluate and step, n %d",
              n);
        memcpy(grads, f.grads, (size_t)f.n * sizeof(float));
        evaluate(engine, &f, f.config.seq_len);
        memset(f.grads, 0, (size_t)f.n * sizeof(float));
        CHECK(fixture_restore(engine, 0, 0) == ANEPY_OK, "restore");
        CHECK(step(engine, &f, n) == loss && all_same(f.grads, grads, f.n),
              "a step of %d depends on what ran before", n);
        anepy_engine_free(engine);
    }
    free(grads);
    fixture_free(&f);
}

/* The gradients of two sequences add up, also across a checkpoint. */
static void check_accumulation(int which) {
    fixture f = fixture_make(which);
    float *once = floats(f.n);
    int32_t n = anepy_min_i32(40, f.config.seq_len);
    anepy_engine *engine = fixture_engine(&f, "opt", 2);
    step(engine, &f, n);
    memcpy(once, f.grads, (size_t)f.n * sizeof(float));
    step(engine, &f, n);
    for (int64_t i = 0; i < f.n; i++) once[i] *= 2.0f;
    double off = largest_difference(f.grads, once, f.n);
    CHECK(off <= 1e-6, "twice the same sequence is not twice the gradient: %g", off);
    anepy_engine_free(engine);
    engine = fixture_engine(&f, "opt", 2);
    CHECK(fixture_restore(engine, 2, 0) == ANEPY_OK, "restore");
    step(engine, &f, n);
    for (int64_t i = 0; i < f.n; i++) once[i] *= 1.5f;
    off = largest_difference(f.grads, once, f.n);
    CHECK(off <= 1e-6, "a restored engine does not go on accumulating: %g", off);
    anepy_engine_free(engine);
    free(once);
    fixture_free(&f);
}

/* With nothing accumulated, what the gradient arena holds does not count, whichever tensor. */
static void check_stale_gradients(int which) {
    fixture f = fixture_make(which);
    float *clean = floats(f.n);
    for (int v = 0; v < 2; v++) {
        fixture_reset(&f);
        anepy_engine *engine = fixture_engine(&f, VARIANTS[v], 2);
        step(engine, &f, f.config.seq_len);
        anepy_engine_free(engine);
        memcpy(clean, f.grads, (size_t)f.n * sizeof(float));
        for (int64_t i = 0; i < f.n; i++) f.grads[i] = 100.0f;
        engine = fixture_engine(&f, VARIANTS[v], 2);
        step(engine, &f, f.config.seq_len);
        anepy_engine_free(engine);
        int32_t wrong = 0;
        for (int64_t i = 0; i < f.n; i++) wrong += !same(f.grads[i], clean[i]);
        CHECK(wrong == 0, "%s: a first step adds to what was there, in %d elements", VARIANTS[v],
              wrong);
    }
    free(clean);
    fixture_free(&f);
}

/* An engine for longer sequences gives the same gradients, with other threads as well. */
static void check_longer(int32_t n, int32_t threads) {
    fixture f = fixture_make(FIXTURE_LONG);
    float *expected = floats(f.n);
    anepy_engine_options options = fixture_options(&f);
    anepy_engine *engine = NULL;
    options.threads = 1;
    options.device = "cpu";
    options.precision = "fp32";
    options.seq_len = n;
    CHECK(anepy_engine_create(&engine, f.model, &options) == ANEPY_OK, "an engine for %d", n);
    step(engine, &f, n);
    anepy_engine_free(engine);
    memcpy(expected, f.grads, (size_t)f.n * sizeof(float));
    options.threads = threads;
    options.seq_len = 0;
    CHECK(anepy_engine_create(&engine, f.model, &options) == ANEPY_OK, "an engine for 1024");
    step(engine, &f, n);
    anepy_engine_free(engine);
    CHECK(all_same(f.grads, expected, f.n), "a longer engine changes gradients, n %d", n);
    free(expected);
    fixture_free(&f);
}

/* An update that leaves the gradients changes nothing else, then and in the steps after it. */
static void check_left_gradients(int which) {
    fixture f = fixture_make(which);
    float *clean = floats(f.n), *left = floats(f.n);
    for (uint32_t flags = 0; flags <= ANEPY_LEAVE_GRADIENTS; flags++) {
        fixture_reset(&f);
        anepy_engine *engine = fixture_engine(&f, "max", 2);
        anepy_update_options o = {.struct_size = sizeof o,
                                  .flags = flags,
                                  .lr = 0.01,
                                  .beta1 = 0.9,
                                  .beta2 = 0.999,
                                  .eps = 1e-8,
                                  .grad_clip = 1.0};
        anepy_update_stats stats = {.struct_size = sizeof stats};
        int32_t changed = 0;
        for (int round = 0; round < 3; round++) {
            for (int i = 0; i <= round; i++) step(engine, &f, length(&f, i));
            memcpy(left, f.grads, (size_t)f.n * sizeof(float));
            CHECK(anepy_engine_update(engine, &stats, &o) == ANEPY_OK, "update, flags %u", flags);
            for (int64_t i = 0; i < f.n; i++) changed += !same(f.grads[i], flags ? left[i] : 0.0f);
        }
        CHECK(changed == 0, "flags %u: %d gradients are not what they should be", flags, changed);
        if (flags == 0) memcpy(clean, f.params, (size_t)f.n * sizeof(float));
        else CHECK(all_same(f.params, clean, f.n), "leaving the gradients changes the weights");
        anepy_engine_free(engine);
    }
    free(clean), free(left);
    fixture_free(&f);
}

/* -------------------------------------------------------------------------------------- decoder */

static void check_decoder(int which, int32_t threads) {
    fixture f = fixture_make(which);
    int32_t n = f.config.seq_len, vocab = f.config.vocab_size;
    anepy_engine *engine = fixture_engine(&f, "max", threads);
    anepy_decoder *decoder = NULL;
    float *rows = floats((int64_t)n * vocab), *row = floats(vocab);
    double worst = 0.0, loss = 0.0;
    CHECK(anepy_engine_logits(engine, rows, f.tokens, n) == ANEPY_OK, "logits");
    CHECK(anepy_decoder_create(&decoder, f.model, f.params, n, threads) == ANEPY_OK, "decoder");
    for (int round = 0; round < 2; round++) { /* position 0 starts anew */
        for (int32_t t = 0; t < n / (round + 1); t++) {
            CHECK(anepy_decoder_forward(decoder, row, f.tokens[t], t) == ANEPY_OK, "position %d",
                  t);
            worst = fmax(worst, largest_difference(row, rows + (int64_t)t * vocab, vocab));
        }
    }
    CHECK(worst <= 2e-5, "decoder and engine differ by %g", worst);
    for (int32_t t = 0; t < n; t++) {
        double sum = 0.0;
        for (int32_t v = 0; v < vocab; v++) sum += exp(rows[(int64_t)t * vocab + v]);
        loss += log(sum) - rows[(int64_t)t * vocab + f.targets[t]];
    }
    CHECK(fabs(loss / n - evaluate(engine, &f, n)) <= 1e-5, "the loss is not that of the logits");
    anepy_decoder_free(decoder);
    anepy_engine_free(engine);
    free(rows);
    free(row);
    fixture_free(&f);
}

/* --------------------------------------------------------------------------------------- update */

/* One update against PyTorch's AdamW in double precision. */
static void check_update(double clip, int restored) {
    fixture f = fixture_make(0);
    anepy_engine *engine = fixture_engine(&f, restored ? "opt" : "baseline", 2);
    anepy_update_options o = {.struct_size = sizeof o,
                              .lr = 0.01,
                              .beta1 = 0.9,
                              .beta2 = 0.999,
                              .eps = 1e-8,
                              .weight_decay = 0.1,
                              .grad_clip = clip};
    anepy_update_stats stats = {.struct_size = sizeof stats};
    anepy_engine_info info = {.struct_size = sizeof info};
    double t = restored ? 7.0 : 1.0, sum = 0.0, worst = 0.0;
    float *p = floats(f.n), *g = floats(f.n);
    if (restored)
        for (int64_t i = 0; i < f.n; i++) {
            f.adam_m[i] = random_float(-1e-3f, 1e-3f);
            f.adam_v[i] = random_float(0.0f, 1e-5f);
        }
    float *m = floats(f.n), *v = floats(f.n);
    memcpy(m, f.adam_m, (size_t)f.n * sizeof(float));
    memcpy(v, f.adam_v, (size_t)f.n * sizeof(float));
    if (restored) fixture_restore(engine, 0, 6);
    step(engine, &f, 50);
    step(engine, &f, 20);
    memcpy(p, f.params, (size_t)f.n * sizeof(float));
    memcpy(g, f.grads, (size_t)f.n * sizeof(float));
    CHECK(anepy_engine_update(engine, &stats, &o) == ANEPY_OK && stats.skipped == 0, "update");
    for (int64_t i = 0; i < f.n; i++) sum += (double)g[i] * g[i];
    /* The gradients are in units of the 50 targets of the first step; there were 70. */
    double mean = 50.0 / 70.0, norm = sqrt(sum) * mean;
    double scale = clip > 0.0 && norm > clip ? mean * clip / norm : mean;
    CHECK(clip > 0.0 ? fabs(stats.grad_norm - norm) <= 1e-6 * norm : isnan(stats.grad_norm),
          "norm %g, not %g", stats.grad_norm, norm);
    int cleared = 1;
    for (int32_t k = 0; k < anepy_model_tensor_n(f.model); k++) {
        anepy_tensor tensor = {.struct_size = sizeof tensor};
        anepy_model_tensor(f.model, k, &tensor);
        for (int64_t i = tensor.offset; i < tensor.offset + tensor.rows * tensor.cols; i++) {
            double gi = g[i] * scale, mi = 0.9 * m[i] + 0.1 * gi,
                   vi = 0.999 * v[i] + 0.001 * gi * gi;
            double expected =
                p[i] * (tensor.flags & ANEPY_TENSOR_DECAYS ? 1.0 - 0.01 * 0.1 : 1.0) -
                0.01 / (1.0 - pow(0.9, t)) * mi / (sqrt(vi) / sqrt(1.0 - pow(0.999, t)) + 1e-8);
            worst = fmax(worst, fabs(f.params[i] - expected));
            cleared &= f.grads[i] == 0.0f;
        }
    }
    CHECK(worst <= 1e-6, "update off by %g, clip %g", worst, clip);
    CHECK(cleared, "gradients are not cleared");
    CHECK(anepy_engine_get_info(engine, &info) == ANEPY_OK && info.accumulated == 0 &&
              info.updates == (int64_t)t,
          "after an update: %lld accumulated, %lld updates", (long long)info.accumulated,
          (long long)info.updates);
    anepy_engine_free(engine);
    free(p), free(g), free(m), free(v);
    fixture_free(&f);
}

/* A norm that is not finite leaves the weights alone; the next step and update work again. */
static void check_skipped(void) {
    fixture f = fixture_make(0);
    anepy_engine *engine = fixture_engine(&f, "max", 2);
    anepy_update_options o = {.struct_size = sizeof o,
                              .lr = 0.01,
                              .beta1 = 0.9,
                              .beta2 = 0.999,
                              .eps = 1e-8,
                              .grad_clip = 1.0};
    anepy_update_stats stats = {.struct_size = sizeof stats};
    float *p = floats(f.n);
    memcpy(p, f.params, (size_t)f.n * sizeof(float));
    step(engine, &f, 9);
    f.grads[f.n - 1] = INFINITY;
    CHECK(anepy_engine_update(engine, &stats, &o) == ANEPY_OK && stats.skipped == 1 &&
              !isfinite(stats.grad_norm),
          "a norm of %g is not skipped", stats.grad_norm);
    CHECK(all_same(f.params, p, f.n), "a skipped update moves the weights");
    step(engine, &f, 9);
    CHECK(anepy_engine_update(engine, &stats, &o) == ANEPY_OK && stats.skipped == 0,
          "after one skipped update all others are skipped too: norm %g", stats.grad_norm);
    anepy_engine_free(engine);
    free(p);
    fixture_free(&f);
}

/* A long sequence that made no numbers, refused and corrected, is forgotten by a shorter one, which
 * does not compute all the columns the long one left behind. */
static void check_damage_is_forgotten(void) {
    fixture f = fixture_make(1);
    anepy_engine *engine = fixture_engine(&f, "max", 2);
    anepy_update_options o = {
        .struct_size = sizeof o, .lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8};
    anepy_update_stats stats = {.struct_size = sizeof stats};
    int32_t last = f.config.vocab_size - 1, n = f.config.seq_len;
    float *broken = &f.params[(int64_t)last * f.config.dim], kept = *broken;
    for (int32_t i = 0; i < n; i++) f.tokens[i] %= last;
    f.tokens[n - 1] = last;
    *broken = NAN;
    CHECK(isnan(step(engine, &f, n)), "the loss of NaN");
    CHECK(anepy_engine_update(engine, &stats, &o) == ANEPY_OK && stats.skipped == 1,
          "a step of NaN is not refused");
    *broken = kept;
    step(engine, &f, 20);
    CHECK(anepy_engine_update(engine, &stats, &o) == ANEPY_OK && stats.skipped == 0,
          "a short step is refused for what a long one left behind");
    anepy_engine_free(engine);
    fixture_free(&f);
}

/* ----------------------------------------------------------------------------------------- fork */

static void check_engine_fork(void) {
    fixture f = fixture_make(0);
    anepy_engine *engine = fixture_engine(&f, "max", 3);
    double loss = step(engine, &f, 60);
    pid_t child = fork();
    if (child == 0) {
        anepy_step_stats stats = {.struct_size = sizeof stats};
        int right = !forked_child_may_start_threads() ||
                    (anepy_engine_step(engine, &stats, f.tokens, f.targets, 60) == ANEPY_OK &&
                     stats.loss == loss);
        anepy_engine_free(engine);
        _exit(right ? 0 : 1);
    }
    CHECK(step(engine, &f, 60) == loss, "the parent's loss after fork");
    CHECK(child > 0 && child_succeeds(child), "the child's step");
    anepy_engine_free(engine);
    fixture_free(&f);
}

void checks_engine(void) {
    for (int which = 0; which < FIXTURE_N; which++) {
        for (int i = brief ? 2 : 0; i < (brief ? 3 : LENGTH_N); i += 2) {
            fixture f = fixture_make(which);
            int32_t n = length(&f, i);
            fixture_free(&f);
            check_gradients(which, n);
            check_alike(which, n, "fp32");
            if (anepy_kernels_get()->bf16 != NULL) check_alike(which, n, "bf16");
        }
        check_lengths(which);
        check_accumulation(which);
        check_stale_gradients(which);
        check_left_gradients(which);
        for (int32_t threads = 1; threads <= 3; threads += 2) check_decoder(which, threads);
    }
    check_longer(130, 3);
    check_longer(64, 2);
    check_longer(1000, 4);
    check_update(0.0, 0);
    check_update(0.5, 0);
    check_update(1e9, 1);
    check_skipped();
    check_damage_is_forgotten();
    check_engine_fork();
}
