/* bench/peaks.c - measures the limits of this machine with the shortest code that reaches them. */
#include <string.h>

#include "kernels/kernels.h"
#include "runtime/clock.h"
#include "runtime/fpmode.h"
#include "runtime/memory.h"
#include "runtime/threads.h"

_Static_assert(sizeof(anepy_peaks) == 80, "peaks");

/* ------------------------------------------------------------------------------------ arithmetic
 */

#define CHAIN_ROUNDS 32768 /* 0.2 ms of a 4 GHz core */
#define CHAIN_PIECES 8     /* per thread: a late thread costs little */
#define TRIALS_MIN 4       /* the best of 4 to 24 trials counts */
#define TRIALS_MAX 24
#define TRIALS_MS 30.0 /* after this time no further trial begins */

typedef struct {
    const anepy_kernels *kernels;
    float *mean; /* result of each piece, so that the compiler leaves no work out */
} chains;

static void fma_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const chains *c = context;
    c->mean[index] = c->kernels->fma_chains(0.5f, 1.0f, CHAIN_ROUNDS);
}

#define ONE 0x3f800000u  /* a pair of bf16 numbers: 0 and 1 */
#define TINY 0x38803880u /* 2^-14 twice */
#define SUM_OF_TINY 2.0f /* after CHAIN_ROUNDS */

static void dot_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const chains *c = context;
    c->mean[index] = c->kernels->bf16->dot_chains(ONE, TINY, CHAIN_ROUNDS);
}

typedef void (*trial_fn)(void *context);

/* The shortest of several trials in milliseconds, because disturbances only make trials longer. */
static double shortest_ms(trial_fn trial, void *context) {
    double best = 1e300, start = anepy_now_ms(), mark = start;
    for (int i = 0; i < TRIALS_MAX && (i < TRIALS_MIN || mark - start < TRIALS_MS); i++) {
        trial(context);
        double now = anepy_now_ms();
        if (now - mark < best) best = now - mark;
        mark = now;
    }
    return best;
}

typedef struct {
    anepy_pool *pool;
    int32_t count;
    anepy_loop_fn fn;
    void *context;
} loop_trial;

static void run_loop(void *context) {
    const loop_trial *t = context;
    anepy_pool_stream(t->pool, t->count, t->fn, t->context);
}

static double loop_ms(anepy_pool *pool, int32_t count, anepy_loop_fn fn, void *context) {
    return shortest_ms(run_loop, &(loop_trial){pool, count, fn, context});
}

/* operations: of a round of all chains. Fails if a chain does not end at the expected number. */
static int32_t measure_chains(double *gflops, const chains *c, anepy_pool *pool, anepy_loop_fn fn,
                              double operations, float expected) {
    int32_t count = CHAIN_PIECES * anepy_pool_threads(pool);
    operations *= (double)CHAIN_ROUNDS * count;
    *gflops = operations / loop_ms(pool, count, fn, (void *)(uintptr_t)c) * 1e-6;
    for (int32_t i = 0; i < count; i++)
        if (c->mean[i] != expected)
            return anepy_fail(ANEPY_E_STATE, "a chain of %s instructions gave %g instead of %g",
                              c->kernels->isa, (double)c->mean[i], (double)expected);
    return ANEPY_OK;
}

static int32_t measure_arithmetic(anepy_peaks *out, const anepy_kernels *kernels,
                                  anepy_pool *pool) {
    int32_t count = CHAIN_PIECES * anepy_pool_threads(pool);
    chains c = {kernels, anepy_heap_alloc((uint64_t)count * sizeof(float))};
    if (c.mean == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for %d results", count);
    /* 2 is the fixed point of x / 2 + 1. */
    int32_t status =
        measure_chains(&out->fp32_gflops, &c, pool, fma_piece, 2.0 * kernels->chain_n, 2.0f);
    if (status == ANEPY_OK && kernels->bf16 != NULL) {
        float start = kernels->bf16->dot_chains(ONE, TINY, 0);
        status = measure_chains(&out->bf16_gflops, &c, pool, dot_piece,
                                kernels->bf16->dot_operations, start + SUM_OF_TINY);
    }
    anepy_heap_free(c.mean);
    return status;
}

/* ---------------------------------------------------------------------------------------- memory
 */

#define STREAM_N ((int64_t)32 << 20) /* floats per array, 128 MiB: several times any cache */
#define PIECE_N ((int64_t)1 << 18)   /* 1 MiB at a time */
#define PIECES ((int32_t)(STREAM_N / PIECE_N))

typedef struct {
    const anepy_kernels *kernels; /* the best set: the speed of memory does not depend on it */
    float *a, *b;
    float sums[2 * PIECES];
} streams;

static void fill_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    streams *s = context;
    for (int64_t i = index * PIECE_N; i < (index + 1) * PIECE_N; i++) s->a[i] = s->b[i] = 1.0f;
}

static void copy_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    streams *s = context;
    memcpy(s->a + index * PIECE_N, s->b + index * PIECE_N, (size_t)PIECE_N * sizeof(float));
}

static void read_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    streams *s = context; /* a and b are contiguous */
    s->sums[index] = s->kernels->sum(s->a + index * PIECE_N, PIECE_N);
}

static void triad_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    streams *s = context;
    float *a = s->a + index * PIECE_N;
    s->kernels->add(a, a, s->b + index * PIECE_N, PIECE_N);
}

static int32_t measure_memory(anepy_peaks *out, anepy_pool *pool) {
    uint64_t nbytes = 2 * (uint64_t)STREAM_N * sizeof(float);
    streams s = {.kernels = anepy_kernels_at(0), .a = anepy_map(nbytes)};
    if (s.a == NULL)
        return anepy_fail(ANEPY_E_MEMORY, "no memory for %llu bytes to measure the memory with",
                          (unsigned long long)nbytes);
    s.b = s.a + STREAM_N;
    anepy_pool_run(pool, PIECES, fill_piece, &s);        /* touches the pages for the first time */
    double mb = (double)STREAM_N * sizeof(float) * 1e-6; /* of one array; MB per ms are GB per s */
    out->read_gbs = 2.0 * mb / loop_ms(pool, 2 * PIECES, read_piece, &s);
    out->copy_gbs = 2.0 * mb / loop_ms(pool, PIECES, copy_piece, &s);
    out->triad_gbs = 3.0 * mb / loop_ms(pool, PIECES, triad_piece, &s);
    anepy_unmap(s.a, nbytes);
    return ANEPY_OK;
}

/* -------------------------------------------------------------------------------------- the call
 */

int32_t anepy_peaks_measure(anepy_peaks *out, const char *isa, int32_t threads, int32_t memory) {
    const anepy_kernels *kernels;
    anepy_pool *pool;
    ANEPY_TRY(anepy_kernels_named(&kernels, isa));
    ANEPY_TRY(anepy_pool_create(&pool, threads));
    uint32_t size = out->struct_size;
    memset(out, 0, sizeof *out);
    out->struct_size = size;
    out->threads = anepy_pool_threads(pool);
    strncpy(out->isa, kernels->isa, sizeof out->isa - 1);
    uint64_t fpmode = anepy_fpmode_enter();
    int32_t status = measure_arithmetic(out, kernels, pool);
    if (status == ANEPY_OK && memory) status = measure_memory(out, pool);
    anepy_fpmode_leave(fpmode);
    anepy_pool_free(pool);
    return status;
}
