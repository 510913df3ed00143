/* decoder.c - a prompt that is read in one pass: as token by token, at every border, on any number
 * of threads. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fixture.h"
#include "groups.h"

static anepy_decoder *decoder_of(const fixture *f, int32_t threads) {
    anepy_decoder *d = NULL;
    int32_t status = anepy_decoder_create(&d, f->model, f->params, 0, threads);
    CHECK(status == ANEPY_OK, "no decoder on %d threads: %s", threads, anepy_status_name(status));
    return d;
}

/* Sums differ in order only. */
static int near(const float *actual, const float *expected, int32_t n) {
    double error = 0.0, size = 0.0;
    for (int32_t i = 0; i < n; i++) {
        error += ((double)actual[i] - expected[i]) * ((double)actual[i] - expected[i]);
        size += (double)expected[i] * expected[i];
    }
    return sqrt(error) <= 1e-5 * sqrt(size);
}

/* Tokens [0, first), then [first, n) in one pass each, then one more by itself. */
static void check_split(const fixture *f, const float *expected, int32_t first, int32_t n,
                        int32_t threads) {
    int32_t vocab = f->config.vocab_size;
    float *logits = malloc((size_t)vocab * sizeof(float));
    anepy_decoder *d = decoder_of(f, threads);
    if (logits == NULL) abort();
    int ok = first == 0 || anepy_decoder_prefill(d, NULL, f->tokens, first, 0) == ANEPY_OK;
    ok &= anepy_decoder_prefill(d, logits, f->tokens + first, n - first, first) == ANEPY_OK;
    CHECK(ok && near(logits, expected + (int64_t)(n - 1) * vocab, vocab),
          "%d tokens after %d on %d threads", n - first, first, threads);
    if (n < f->config.seq_len) {
        ok = anepy_decoder_forward(d, logits, f->tokens[n], n) == ANEPY_OK;
        CHECK(ok && near(logits, expected + (int64_t)n * vocab, vocab), "the one after %d", n);
    }
    anepy_decoder_free(d);
    free(logits);
}

static void check_prefill(int which, const int32_t *lengths, int32_t count) {
    fixture f = fixture_make(which);
    int32_t vocab = f.config.vocab_size, seq_len = f.config.seq_len;
    size_t row = (size_t)vocab * sizeof(float);
    float *expected = malloc(row * (size_t)seq_len), *one = malloc(row), *many = malloc(row);
    anepy_decoder *d = decoder_of(&f, 2);
    if (expected == NULL || one == NULL || many == NULL) abort();
    for (int32_t i = 0; i < seq_len; i++)
        anepy_decoder_forward(d, expected + (int64_t)i * vocab, f.tokens[i], i);
    anepy_decoder_free(d);
    for (int32_t i = 0; i < count; i++) {
        int32_t n = lengths[i] < seq_len ? lengths[i] : seq_len;
        check_split(&f, expected, 0, n, 1 + i % 3);
        if (n > 1) check_split(&f, expected, 1, n, 1 + i % 2);
        if (n > 70) check_split(&f, expected, n - 67, n, 2);
        for (int32_t threads = 1; threads <= 3; threads += 2) {
            anepy_decoder *again = decoder_of(&f, threads);
            anepy_decoder_prefill(again, threads == 1 ? one : many, f.tokens, n, 0);
            anepy_decoder_free(again);
        }
        CHECK(memcmp(one, many, row) == 0, "%d tokens depend on the threads", n);
    }
    free(expected);
    free(one);
    free(many);
    fixture_free(&f);
}

static void check_refusals(void) {
    fixture f = fixture_make(0);
    int32_t vocab = f.config.vocab_size, seq_len = f.config.seq_len;
    float *logits = malloc((size_t)vocab * sizeof(float));
    anepy_decoder *d = decoder_of(&f, 1);
    if (logits == NULL) abort();
    CHECK(anepy_decoder_prefill(d, logits, f.tokens, 0, 0) == ANEPY_E_ARGUMENT, "no tokens");
    CHECK(anepy_decoder_prefill(d, logits, f.tokens, 9, 1) == ANEPY_E_STATE, "position 1 first");
    CHECK(anepy_decoder_prefill(d, logits, f.tokens, seq_len + 1, 0) == ANEPY_E_ARGUMENT,
          "more than there is room for"); /* targets follow the tokens */
    CHECK(anepy_decoder_prefill(d, NULL, f.tokens, 9, 0) == ANEPY_OK, "9 tokens fail");
    CHECK(anepy_decoder_prefill(d, NULL, f.tokens, seq_len - 8, 9) == ANEPY_E_ARGUMENT,
          "one more than there is room for");
    f.tokens[4] = vocab;
    CHECK(anepy_decoder_prefill(d, logits, f.tokens, 9, 9) == ANEPY_E_TOKEN, "a token too large");
    f.tokens[4] = -1;
    CHECK(anepy_decoder_prefill(d, logits, f.tokens, 9, 9) == ANEPY_E_TOKEN, "a negative token");
    CHECK(anepy_decoder_prefill(d, NULL, f.tokens + 5, 9, 9) == ANEPY_OK,
          "refused tokens were counted");
    anepy_decoder_free(d);
    free(logits);
    fixture_free(&f);
}

void checks_decoder(void) {
    static const int32_t SHORT[] = {1, 2, 3, 4, 63, 64, 65, 128, 129, 130};
    static const int32_t LONG[] = {256, 257, 260, 511, 1024};
    for (int which = 0; which < FIXTURE_N; which++)
        check_prefill(which, SHORT, brief ? 5 : (int32_t)(sizeof SHORT / sizeof SHORT[0]));
    check_prefill(FIXTURE_LONG, LONG, brief ? 2 : (int32_t)(sizeof LONG / sizeof LONG[0]));
    check_refusals();
}
