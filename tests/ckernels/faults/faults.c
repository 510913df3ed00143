/* tests/ckernels/faults/faults.c - the Nth allocation of the library fails, for every N.
 *
 * usage: faults [STRIDE]      (every STRIDEth N; default 1)
 *
 * Linked with the objects of the library and with --wrap for what gives memory and threads, so that
 * the calls of the library are counted and fail here. A scenario is run whole once, then with each
 * of its allocations failing: the call that needed it must say so in a sentence, the next call of
 * an engine that lives must give the loss of the undisturbed run, and in the end nothing is left.
 * Prints one line of figures as JSON. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fixture.h"

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *memory, size_t n);
int __real_posix_memalign(void **out, size_t align, size_t n);
void __real_free(void *memory);
void *__real_mmap(void *at, size_t n, int protection, int flags, int file, off_t offset);
int __real_munmap(void *memory, size_t n);
int __real_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

static _Atomic int64_t seen, fails_at, blocks, mapped;

static int fails(void) { return atomic_fetch_add(&seen, 1) + 1 == atomic_load(&fails_at); }
static void *counted(void *memory) {
    if (memory != NULL) atomic_fetch_add(&blocks, 1);
    return memory;
}

void *__wrap_malloc(size_t n) { return fails() ? NULL : counted(__real_malloc(n)); }
void *__wrap_calloc(size_t n, size_t size) {
    return fails() ? NULL : counted(__real_calloc(n, size));
}
void *__wrap_realloc(void *memory, size_t n) {
    if (fails()) return NULL;
    void *moved = __real_realloc(memory, n);
    return memory == NULL ? counted(moved) : moved;
}
int __wrap_posix_memalign(void **out, size_t align, size_t n) {
    if (fails()) return ENOMEM;
    int status = __real_posix_memalign(out, align, n);
    if (status == 0) counted(*out);
    return status;
}
void __wrap_free(void *memory) {
    if (memory != NULL) atomic_fetch_sub(&blocks, 1);
    __real_free(memory);
}
void *__wrap_mmap(void *at, size_t n, int protection, int flags, int file, off_t offset) {
    if (fails()) return errno = ENOMEM, MAP_FAILED;
    void *memory = __real_mmap(at, n, protection, flags, file, offset);
    if (memory != MAP_FAILED) atomic_fetch_add(&mapped, (int64_t)n);
    return memory;
}
int __wrap_munmap(void *memory, size_t n) {
    atomic_fetch_sub(&mapped, (int64_t)n);
    return __real_munmap(memory, n);
}
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *),
                          void *context) {
    return fails() ? EAGAIN : __real_pthread_create(thread, attributes, run, context);
}

static struct {
    int64_t cases, refused, borne, went_on;
} figures;
static const char *scenario;
static int64_t number;

static void die(const char *why) {
    char sentence[512] = "";
    anepy_last_error(sentence, sizeof sentence);
    printf("%s, allocation %lld: %s (%s)\n", scenario, (long long)number, why, sentence);
    exit(1);
}

static void check_sentence(void) {
    char sentence[512] = "";
    anepy_last_error(sentence, sizeof sentence);
    if (sentence[0] == 0 || strchr(sentence, '\n') != NULL) die("no sentence");
}

typedef struct {
    const char *device, *variant, *precision;
    uint32_t flags;
    int32_t sequences, threads;
} kind;

static const kind KINDS[] = {
    {"cpu", "max", "fp32", 0, 3, 2},
    {"cpu", "baseline", "fp32", 0, 1, 1},
    {"cpu", "ane", "fp32", ANEPY_ENGINE_RECOMPUTE, 2, 2},
    {"sim", "max", "fp16", 0, 1, 1},
    {"sim", "baseline", "fp16", 0, 1, 2},
};

/* Steps until the end of the scenario or the first error; 1: it was met. An engine that lives is
 * asked once more, without a fault. */
static int use_engine(fixture *f, const kind *k, double *loss) {
    anepy_engine_options options = fixture_options(f);
    options.device = k->device;
    options.variant = k->variant;
    options.precision = k->precision;
    options.threads = k->threads;
    options.flags = k->flags;
    anepy_engine *engine = NULL;
    if (anepy_engine_create(&engine, f->model, &options) != ANEPY_OK) {
        check_sentence();
        if (engine != NULL) die("an engine in spite of an error");
        return 1;
    }
    int32_t tokens[3 * 130], targets[3 * 130], n = 40;
    for (int32_t i = 0; i < k->sequences * n; i++)
        tokens[i] = f->tokens[i % n], targets[i] = f->targets[i % n];
    anepy_step_stats stats = {.struct_size = sizeof stats};
    int met =
        anepy_engine_step_batch(engine, &stats, tokens, targets, NULL, k->sequences, n) != ANEPY_OK;
    if (met) {
        check_sentence();
        atomic_store(&fails_at, 0);
        stats.struct_size = sizeof stats;
        if (anepy_engine_step_batch(engine, &stats, tokens, targets, NULL, k->sequences, n) !=
            ANEPY_OK)
            die("it does not go on");
        figures.went_on++;
    }
    if (*loss == 0.0) *loss = stats.loss;
    if (stats.loss != *loss) die("another loss");
    anepy_engine_free(engine);
    return met;
}

static int use_decoder(fixture *f) {
    anepy_decoder *decoder = NULL;
    float logits[1024];
    if (anepy_decoder_create(&decoder, f->model, f->params, 16, 2) != ANEPY_OK) {
        check_sentence();
        return 1;
    }
    int met = anepy_decoder_prefill(decoder, logits, f->tokens, 9, 0) != ANEPY_OK;
    if (met) check_sentence();
    anepy_decoder_free(decoder);
    return met;
}

/* Fails every strideth allocation of a scenario in turn. */
static void attack(fixture *f, const kind *k, int64_t stride) {
    double loss = 0.0;
    for (number = 0;; number += number == 0 ? 1 : stride) {
        int64_t blocks_before, mapped_before;
        fixture_reset(f);
        blocks_before = atomic_load(&blocks);
        mapped_before = atomic_load(&mapped);
        atomic_store(&seen, 0);
        atomic_store(&fails_at, number);
        int met = k != NULL ? use_engine(f, k, &loss) : use_decoder(f);
        int done = atomic_load(&seen) < number;
        atomic_store(&fails_at, 0);
        if (number > 1 && atomic_load(&blocks) != blocks_before) die("heap memory is left");
        if (number > 1 && atomic_load(&mapped) != mapped_before) die("a mapping is left");
        if (number == 0 && met) die("an error without a fault");
        if (done) return;
        figures.cases += number > 0;
        if (number > 0) met ? figures.refused++ : figures.borne++;
    }
}

int main(int argc, char **argv) {
    int64_t stride = argc > 1 ? atoll(argv[1]) : 1;
    fixture f = fixture_make(0);
    for (size_t i = 0; i < sizeof KINDS / sizeof KINDS[0]; i++) {
        scenario = KINDS[i].variant;
        attack(&f, &KINDS[i], stride);
    }
    scenario = "decoder";
    attack(&f, NULL, stride);
    fixture_free(&f);
    printf("{\"cases\": %lld, \"refused\": %lld, \"borne\": %lld, \"went_on\": %lld}\n",
           (long long)figures.cases, (long long)figures.refused, (long long)figures.borne,
           (long long)figures.went_on);
    return 0;
}
