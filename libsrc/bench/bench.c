/* bench/bench.c - one case: memory, numbers, the check against the scalar kernels, the clock. */
#include "bench/bench.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "runtime/clock.h"
#include "runtime/fpmode.h"
#include "runtime/memory.h"

_Static_assert(sizeof(anepy_bench_options) == 56, "bench options");
_Static_assert(sizeof(anepy_bench_result) == 200, "bench result");

#define MAX_ROUNDS 1000
#define MAX_REPETITIONS 100000.0
#define BF16_TOLERANCE 5e-3 /* of programs, which round between their products */

/* --------------------------------------------------------------------------------------- numbers
 */

typedef struct {
    const anepy_bench_buffer *to;
    uint64_t seed;
    int exact_in_bf16;
} filling;

static uint64_t mix(uint64_t x) { /* splitmix64 (Steele, Lea & Flood 2014) */
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

static void fill_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const filling *f = context;
    const anepy_bench_buffer *to = f->to;
    int64_t first = (int64_t)index * ANEPY_PIECE_ELEMENTS;
    int64_t end = anepy_min_i64(to->n, first + ANEPY_PIECE_ELEMENTS);
    for (int64_t i = first; i < end; i++) {
        uint64_t x = mix(f->seed + (uint64_t)i);
        float value = to->low + (to->high - to->low) * ((float)(x >> 40) * 0x1p-24f);
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        if (f->exact_in_bf16) bits &= 0xffff0000u;
        if (to->role == HALVES) bits = (uint32_t)x & 0xbfffbfffu; /* two numbers below 2 */
        memcpy(&to->data[i], &bits, sizeof bits);
    }
}

static void fill(anepy_bench *b) {
    for (int32_t i = 0; i < b->buffer_n; i++) {
        filling f = {&b->buffers[i], (uint64_t)(i + 1) << 40, b->exact};
        anepy_pool_run(b->pool, anepy_pieces(f.to->n, ANEPY_PIECE_ELEMENTS), fill_piece, &f);
    }
}

/* ----------------------------------------------------------------------------- against the scalar
 */

/* |x - expected| / |expected| over the compared rows and columns of an output; infinite if any is
 * not a number. */
static double difference(const anepy_bench *b, const float *x, const float *expected, int64_t n) {
    double error = 0.0, size = 0.0;
    int32_t columns = b->columns > 0 && n % b->columns == 0 ? b->columns : 1;
    int32_t valid = columns > 1 ? b->valid : 1;
    int64_t rows = n / columns;
    for (int64_t r = 0; r < rows; r++) {
        if (b->reduction > 0 && r >= ANEPY_BENCH_ENDS && r < rows - ANEPY_BENCH_ENDS) continue;
        for (int64_t i = r * columns; i < r * columns + valid; i++) {
            double d = (double)x[i] - (double)expected[i];
            error += d * d;
            size += (double)expected[i] * (double)expected[i];
        }
    }
    if (!(error <= 1e300) || !(size <= 1e300)) return INFINITY;
    return error == 0.0 ? 0.0 : sqrt(error / size);
}

static double compare(const anepy_bench *b, const float *saved) {
    double worst = 0.0;
    for (int32_t i = 0; i < b->buffer_n; i++) {
        const anepy_bench_buffer *o = &b->buffers[i];
        if (o->role != OUT && o->role != INOUT) continue;
        double d = difference(b, saved, o->data, o->n);
        if (b->what->tolerance == 0.0)
            d = memcmp(saved, o->data, (size_t)o->n * sizeof(float)) == 0 ? 0.0 : INFINITY;
        if (d > worst) worst = d;
        saved += o->n;
    }
    return worst;
}

static void save(const anepy_bench *b, float *to) {
    for (int32_t i = 0; i < b->buffer_n; i++) {
        const anepy_bench_buffer *o = &b->buffers[i];
        if (o->role != OUT && o->role != INOUT) continue;
        memcpy(to, o->data, (size_t)o->n * sizeof(float));
        to += o->n;
    }
}

static int has_bf16(const anepy_bench *b) {
    if (b->kernels->bf16 == NULL || !(b->what->forms & ANEPY_BENCH_BF16)) return 0;
    return b->what->open == NULL || (anepy_device_cpu.precisions >> ANEPY_BF16 & 1u) != 0;
}

static void choose(anepy_bench *b, const anepy_kernels *kernels, anepy_dtype dtype) {
    b->gemm.kernels = b->kernels = kernels;
    b->gemm.bf16 = dtype == ANEPY_BF16 ? kernels->bf16 : NULL;
    b->dtype = dtype;
}

static int32_t run_once(anepy_bench *b) {
    int32_t status = b->what->open != NULL ? b->what->open(b) : ANEPY_OK;
    if (status == ANEPY_OK) b->what->run(b);
    if (status == ANEPY_OK && b->what->fetch != NULL) status = b->what->fetch(b);
    if (b->what->close != NULL) b->what->close(b);
    return status;
}

static int32_t verify(anepy_bench *b, float *saved) {
    const anepy_kernels *kernels = b->kernels, *scalar = anepy_kernels_scalar();
    anepy_dtype dtype = b->dtype;
    double tolerance = b->what->tolerance;
    if (dtype == ANEPY_BF16 && b->what->open != NULL) tolerance = BF16_TOLERANCE;
    fill(b);
    ANEPY_TRY(run_once(b));
    save(b, saved);
    fill(b);
    choose(b, scalar, ANEPY_F32);
    b->reference = 1;
    int32_t status = run_once(b);
    b->reference = 0;
    choose(b, kernels, dtype);
    if (status != ANEPY_OK) return status;
    double error = b->result->error = compare(b, saved);
    if (error <= tolerance) return ANEPY_OK;
    return anepy_fail(
        ANEPY_E_STATE,
        "%s (%s) with %s, %s differs from the scalar kernels by %.2g, at most %.2g is "
        "right: nothing was timed",
        b->what->name, b->result->shape, kernels->isa, b->result->precision, error, tolerance);
}

/* ---------------------------------------------------------------------------------------- timing
 */

static double run_ms(anepy_bench *b, int32_t repetitions) {
    double start = anepy_now_ms();
    for (int32_t i = 0; i < repetitions; i++) b->what->run(b);
    return anepy_now_ms() - start;
}

static int32_t measure(anepy_bench *b, double *seconds, const anepy_bench_options *o) {
    ANEPY_TRY(b->what->open != NULL ? b->what->open(b) : ANEPY_OK);
    double once = run_ms(b, 1), wanted = o->round_ms / (once > 1e-3 ? once : 1e-3);
    int32_t repetitions =
        wanted < 1.0 ? 1 : (int32_t)(wanted < MAX_REPETITIONS ? wanted : MAX_REPETITIONS);
    b->result->repetitions = repetitions;
    double start = anepy_now_ms();
    while (b->result->rounds < o->rounds) {
        if (b->result->rounds >= 3 && o->limit_ms > 0.0 && anepy_now_ms() - start > o->limit_ms)
            break;
        seconds[b->result->rounds++] = run_ms(b, repetitions) / repetitions * 1e-3;
    }
    if (b->what->close != NULL) b->what->close(b);
    return ANEPY_OK;
}

/* Runs and times the case in one zeroed mapping: buffers, a copy of the outputs, then scratch and
 * panels of products. */
static int32_t with_memory(anepy_bench *b, double *seconds, const anepy_bench_options *o) {
    int64_t n = 0, outputs = 0;
    int32_t columns = anepy_max_i32(b->width, b->product.n);
    for (int32_t i = 0; i < b->buffer_n; i++) {
        n += anepy_round_up(b->buffers[i].n, 16);
        if (b->buffers[i].role == OUT || b->buffers[i].role == INOUT) outputs += b->buffers[i].n;
    }
    b->gemm.scratch_n =
        anepy_round_up(anepy_gemm_scratch_n(anepy_max_i32(b->width, b->reduction)), 16);
    int64_t scratch = b->gemm.scratch_n * anepy_pool_threads(b->pool);
    outputs = anepy_round_up(outputs, 16);
    uint64_t nbytes =
        (uint64_t)(n + outputs + scratch + anepy_gemm_panels_n(columns)) * sizeof(float);
    float *memory = anepy_map(nbytes), *next = memory;
    if (memory == NULL)
        return anepy_fail(ANEPY_E_MEMORY, "%s needs %llu bytes", b->what->name,
                          (unsigned long long)nbytes);
    for (int32_t i = 0; i < b->buffer_n; i++) {
        b->buffers[i].data = next;
        next += anepy_round_up(b->buffers[i].n, 16);
    }
    b->gemm.scratch = next + outputs;
    b->gemm.panels = b->gemm.scratch + scratch;
    int32_t status = b->kernels == anepy_kernels_scalar() ? ANEPY_OK : verify(b, next);
    if (status == ANEPY_OK) {
        fill(b);
        status = measure(b, seconds, o);
    }
    anepy_unmap(memory, nbytes);
    return status;
}

/* -------------------------------------------------------------------------------------- the call
 */

const char *anepy_bench_at(int32_t index) {
    const anepy_bench_case *found = anepy_bench_case_at(index);
    return found != NULL ? found->name : NULL;
}

static int32_t check(const anepy_bench_options *o) {
    if (o->struct_size < sizeof *o)
        return anepy_fail(ANEPY_E_ARGUMENT, "bench options have %u bytes, expected %zu",
                          o->struct_size, sizeof *o);
    if (o->seq_len < 1 || o->seq_len > 65536)
        return anepy_fail(ANEPY_E_ARGUMENT, "%d tokens, expected 1 to 65536", o->seq_len);
    if (o->rounds < 0 || o->rounds > MAX_ROUNDS)
        return anepy_fail(ANEPY_E_ARGUMENT, "%d rounds, expected 0 to %d", o->rounds, MAX_ROUNDS);
    if (!(o->round_ms >= 0.0 && o->round_ms <= 60000.0 && o->limit_ms >= 0.0))
        return anepy_fail(ANEPY_E_ARGUMENT, "rounds of %g ms, expected 0 to 60000", o->round_ms);
    return ANEPY_OK;
}

static int32_t find(anepy_bench *b, const anepy_bench_options *o) {
    for (int32_t i = 0; (b->what = anepy_bench_case_at(i)) != NULL; i++)
        if (strcmp(b->what->name, o->name) == 0) break;
    if (b->what == NULL)
        return anepy_fail(ANEPY_E_NAME, "there is no case '%.40s' in the benchmark", o->name);
    ANEPY_TRY(anepy_kernels_named(&b->kernels, o->isa));
    const char *precision = o->precision != NULL ? o->precision : "fp32";
    snprintf(b->result->precision, sizeof b->result->precision, "%s", precision);
    int only_bf16 = !(b->what->forms & ANEPY_BENCH_FP32) && o->rounds > 0;
    if (strcmp(precision, "fp32") == 0 && !only_bf16) return ANEPY_OK;
    if (strcmp(precision, "fp32") == 0)
        return anepy_fail(ANEPY_E_UNSUPPORTED, "%s has no fp32 form", b->what->name);
    if (strcmp(precision, "bf16") != 0)
        return anepy_fail(ANEPY_E_NAME, "precision '%.20s' has no benchmark: use fp32 or bf16",
                          precision);
    if (!has_bf16(b))
        return anepy_fail(ANEPY_E_UNSUPPORTED, "%s has no bf16 form with instruction set %s",
                          b->what->name, b->kernels->isa);
    b->dtype = ANEPY_BF16;
    return ANEPY_OK;
}

int32_t anepy_bench_run(const anepy_model *model, anepy_bench_result *out, double *seconds,
                        const anepy_bench_options *options) {
    uint32_t size = out->struct_size;
    memset(out, 0, sizeof *out);
    out->struct_size = size;
    anepy_bench b = {.model = model,
                     .result = out,
                     .seq = options->seq_len,
                     .width = (int32_t)anepy_round_up(options->seq_len, ANEPY_COLUMNS)};
    ANEPY_TRY(check(options));
    ANEPY_TRY(find(&b, options));
    ANEPY_TRY(anepy_pool_create(&b.pool, options->threads));
    b.gemm.pool = b.pool;
    out->threads = anepy_pool_threads(b.pool);
    snprintf(out->isa, sizeof out->isa, "%s", b.kernels->isa);
    out->bf16 = has_bf16(&b);
    out->fp32 = (b.what->forms & ANEPY_BENCH_FP32) != 0;
    choose(&b, b.kernels, b.dtype);
    uint64_t fpmode = anepy_fpmode_enter();
    int32_t status = b.what->prepare(&b);
    if (status == ANEPY_OK && options->rounds > 0) status = with_memory(&b, seconds, options);
    anepy_fpmode_leave(fpmode);
    anepy_model_free(b.one);
    anepy_pool_free(b.pool);
    return status;
}
