/* packing.c - documents packed into sequences: loss, logits and gradients are those of each alone,
 * with the same bits on any number of threads, whatever ran before. tests/engine/test_packing.py
 * has families of models and float64. */
#define _GNU_SOURCE
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fixture.h"
#include "groups.h"

enum { COUNT = 3, MOST = 400 };

/* COUNT sequences of n tokens. About a third of the targets are not counted, nor those of last
 * tokens of documents. */
typedef struct {
    int32_t tokens[COUNT * MOST], targets[COUNT * MOST];
    uint8_t starts[COUNT * MOST];
    int32_t n;
} packed;

/* A document begins at the first token, at and around multiples of 64, twice in a row, and here and
 * there. The first token of the second sequence is not said to begin one: it does all the same. */
static void draw(packed *b, const fixture *f, int32_t n) {
    b->n = n;
    random_seed(0xd0c5);
    for (int32_t i = 0; i < COUNT * n; i++) {
        int32_t sequence = i / n, t = i % n, edge = 64 * (1 + sequence);
        b->tokens[i] = random_below(f->config.vocab_size);
        b->targets[i] = random_below(3) ? random_below(f->config.vocab_size) : -100;
        b->starts[i] = (uint8_t)(t == 0 ? sequence != 1
                                        : t == edge - 1 || t == edge || t == edge + 2 * sequence ||
                                              random_below(70) == 0);
        if (i > 0 && b->starts[i]) b->targets[i - 1] = -100;
    }
    b->targets[0] = 1;
}

static int32_t document_end(const packed *b, int32_t at) {
    int32_t end = at + 1;
    while (end % b->n != 0 && !b->starts[end]) end++;
    return end;
}

static float *floats(int64_t n) {
    float *x = calloc((size_t)n, sizeof *x);
    if (x == NULL) abort();
    return x;
}

/* All documents, each in a call of its own. Returns the sum of the losses; `unit` of the gradients.
 */
static double run_alone(anepy_engine *engine, const packed *b, float *logits, int64_t vocab,
                        double *unit) {
    double sum = 0.0;
    for (int32_t at = 0, end; at < COUNT * b->n; at = end) {
        anepy_step_stats stats = {.struct_size = sizeof stats};
        int32_t counted = 0;
        end = document_end(b, at);
        for (int32_t i = at; i < end; i++) counted += b->targets[i] >= 0;
        CHECK(anepy_engine_logits(engine, logits + at * vocab, b->tokens + at, end - at) ==
                  ANEPY_OK,
              "logits");
        if (counted == 0) continue;
        CHECK(anepy_engine_step(engine, &stats, b->tokens + at, b->targets + at, end - at) ==
                  ANEPY_OK,
              "step");
        sum += stats.loss * counted;
    }
    anepy_engine_info info = {.struct_size = sizeof info};
    CHECK(anepy_engine_get_info(engine, &info) == ANEPY_OK, "info");
    *unit = info.unit;
    return sum;
}

static void check_packed(int which, const char *variant, const char *precision, int32_t n) {
    fixture f = fixture_make(which);
    packed *b = calloc(1, sizeof *b);
    if (b == NULL) abort();
    f.precision = precision;
    n = anepy_min_i32(n, f.config.seq_len);
    draw(b, &f, n);
    int64_t vocab = f.config.vocab_size, all = COUNT * n * vocab;
    int bf16 = strcmp(precision, "bf16") == 0;
    float *alone = floats(f.n), *first = floats(f.n), *logits = floats(all), *found = floats(all);
    anepy_engine *engine = fixture_engine(&f, variant, 2);
    double unit = NAN, sum = run_alone(engine, b, logits, vocab, &unit), loss = NAN;
    memcpy(alone, f.grads, (size_t)f.n * sizeof(float));
    anepy_engine_free(engine);
    for (int32_t threads = 1; threads <= (brief ? 2 : 3); threads++) {
        fixture_reset(&f);
        engine = fixture_engine(&f, variant, threads);
        anepy_step_stats stats = {.struct_size = sizeof stats};
        CHECK(anepy_engine_step_batch(engine, &stats, b->tokens, b->targets, b->starts, COUNT, n) ==
                  ANEPY_OK,
              "step");
        double counted = (double)stats.tokens;
        double off = fixture_difference(f.grads, alone, f.n, counted / unit);
        CHECK(fabs(stats.loss * counted - sum) <= (bf16 ? 1e-4 : 1e-6) * sum &&
                  off <= (bf16 ? 2e-2 : 3e-6),
              "%s, %s, %d x %d: loss %.9g, not %.9g, gradients off by %g", precision, variant,
              COUNT, n, stats.loss * counted, sum, off);
        if (threads == 1) memcpy(first, f.grads, (size_t)f.n * sizeof(float));
        CHECK(all_same(f.grads, first, f.n), "%s, %s, %d: other bits on %d threads", precision,
              variant, n, threads);
        CHECK(anepy_engine_logits_batch(engine, found, b->tokens, b->starts, COUNT, n) == ANEPY_OK,
              "logits");
        off = fixture_difference(found, logits, all, 1.0);
        CHECK(off <= (bf16 ? 1e-2 : 3e-6), "%s, %s, %d: logits off by %g", precision, variant, n,
              off);
        CHECK(anepy_engine_evaluate_batch(engine, &loss, NULL, b->tokens, b->targets, b->starts,
                                          COUNT, n) == ANEPY_OK &&
                  fabs(loss - stats.loss) <= 1e-6 * loss,
              "%s: evaluate %.9g, step %.9g", precision, loss, stats.loss);
        anepy_engine_free(engine);
    }
    free(alone), free(first), free(logits), free(found), free(b);
    fixture_free(&f);
}

/* One document in each sequence: the bits of no starts at all, before and after others. */
static void check_whole(int which, const char *precision, int32_t n) {
    fixture f = fixture_make(which);
    packed *b = calloc(1, sizeof *b);
    uint8_t *none = calloc(COUNT * MOST, 1);
    if (b == NULL || none == NULL) abort();
    f.precision = precision;
    n = anepy_min_i32(n, f.config.seq_len);
    draw(b, &f, n);
    float *plain = floats(f.n);
    double loss = NAN;
    anepy_engine *engine = fixture_engine(&f, "max", 2);
    for (int i = 0; i < 4; i++) {
        const uint8_t *starts = i == 1 ? none : i == 2 ? b->starts : NULL;
        anepy_step_stats stats = {.struct_size = sizeof stats};
        CHECK(fixture_restore(engine, 0, 0) == ANEPY_OK &&
                  anepy_engine_step_batch(engine, &stats, b->tokens, b->targets, starts, COUNT,
                                          n) == ANEPY_OK,
              "step");
        if (i == 0) loss = stats.loss;
        if (i == 0) memcpy(plain, f.grads, (size_t)f.n * sizeof(float));
        int same = stats.loss == loss && all_same(f.grads, plain, f.n);
        CHECK(same == (i != 2), "%s, %d tokens: round %d has %s bits", precision, n, i,
              same ? "the same" : "other");
    }
    anepy_engine_free(engine);
    free(plain), free(none), free(b);
    fixture_free(&f);
}

void checks_packing(void) {
    for (int p = 0; p < (anepy_kernels_get()->bf16 != NULL ? 2 : 1); p++) {
        const char *precision = p > 0 ? "bf16" : "fp32";
        for (int which = 0; which < (brief ? 1 : FIXTURE_N - 1); which++) {
            check_packed(which, "max", precision, 130);
            if (brief) continue;
            check_packed(which, "baseline", precision, 129);
            check_whole(which, precision, 130);
        }
        check_packed(FIXTURE_LONG, "max", precision, brief ? 200 : MOST);
        check_whole(FIXTURE_LONG, precision, brief ? 70 : MOST);
    }
}
