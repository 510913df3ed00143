/* bench/bench.h - the benchmark's cases: parts of the training step at the shapes of a model.
 *
 * A case fills its buffers from a fixed sequence, runs once with the kernels under test and once
 * with the scalar ones, and compares; only then is it timed. Inputs of bf16 cases are exact in
 * bf16, so that the float32 reference multiplies the same numbers. */
#ifndef ANEPY_BENCH_BENCH_H
#define ANEPY_BENCH_BENCH_H

#include <stdio.h>

#include "device/device.h"

#define ANEPY_BENCH_BUFFERS 8
#define ANEPY_BENCH_ENDS 96 /* rows computed by the reference, at both ends of a product */

typedef enum { IN, OUT, INOUT, HALVES /* input of binary16 */ } anepy_bench_role;

typedef struct {
    float *data;
    int64_t n;
    anepy_bench_role role;
    float low, high; /* of the numbers in it */
} anepy_bench_buffer;

#define ANEPY_BENCH_FP32 1
#define ANEPY_BENCH_BF16 2

typedef struct anepy_bench anepy_bench;

typedef struct {
    const char *name;
    int32_t (*prepare)(anepy_bench *b); /* dimensions, buffers, limit; touches no buffer */
    void (*run)(anepy_bench *b);        /* one repetition */
    double tolerance; /* most |x - reference| / |reference| of an output; 0: equal bits */
    int32_t option;   /* tells cases apart that share their functions */
    int32_t forms; /* bits ANEPY_BENCH_FP32, ANEPY_BENCH_BF16: precisions of the factors, or of what
                      is converted */
    /* Only for cases on a device: open it and write the buffers to it, read the outputs, close it.
     */
    int32_t (*open)(anepy_bench *b);
    int32_t (*fetch)(anepy_bench *b);
    void (*close)(anepy_bench *b);
} anepy_bench_case;

struct anepy_bench {
    const anepy_bench_case *what;
    const anepy_model *model;
    const anepy_kernels *kernels;
    anepy_pool *pool;
    anepy_gemm gemm;
    anepy_dtype dtype;  /* of the factors of products */
    int32_t exact;      /* 1: inputs are exact in bf16 */
    int32_t seq, width; /* tokens; columns: tokens rounded up to 64 */
    anepy_bench_result *result;
    anepy_bench_buffer buffers[ANEPY_BENCH_BUFFERS];
    int32_t buffer_n;
    int32_t columns, valid; /* numbers per row of an output; how many of them are compared */
    int32_t rows, cols;     /* dimensions, with a meaning of their own in each case */
    int64_t n;
    int32_t reference; /* 1: the reference, of which products compute only the ends; only these are
                          compared */
    anepy_product product;
    int32_t reduction; /* longest reduction of anepy_gemm_piece */
    anepy_model *one;  /* the model with a single layer */
    anepy_device *device;
    anepy_executable *programs[3]; /* the program; or sdpa_fwd, sdpa_bwd1, sdpa_bwd2 of a layer */
    /* Input and output of programs[0]; gradients of q, k, v; gradient of the layer; what sdpa_fwd
     * saves. */
    anepy_surface *surfaces[5];
};

/* Adds a buffer of n numbers in [low, high). */
static inline int32_t anepy_bench_add(anepy_bench *b, int64_t n, anepy_bench_role role, float low,
                                      float high) {
    b->buffers[b->buffer_n] = (anepy_bench_buffer){NULL, n, role, low, high};
    return b->buffer_n++;
}

/* What bounds the case: "fp32", "bf16" (arithmetic), "read", "copy" or "triad" (memory); operations
 * and bytes of one repetition; repetitions per step, or per update. */
static inline void anepy_bench_limit(anepy_bench *b, const char *limit, double operations,
                                     double bytes, double calls) {
    snprintf(b->result->limit, sizeof b->result->limit, "%s", limit);
    b->result->operations = operations;
    b->result->bytes = bytes;
    b->result->calls = calls;
}

static inline const char *anepy_bench_arithmetic(const anepy_bench *b) {
    return b->dtype == ANEPY_BF16 ? "bf16" : "fp32";
}

#define ANEPY_BENCH_SHAPE(b, ...)                                                                  \
    snprintf((b)->result->shape, sizeof(b)->result->shape, __VA_ARGS__)

/* programs.c: programs of the CPU device, and attention alone. */
int32_t anepy_bench_prepare_program(anepy_bench *b);
int32_t anepy_bench_open_program(anepy_bench *b);
int32_t anepy_bench_fetch_program(anepy_bench *b);
void anepy_bench_close_program(anepy_bench *b);
void anepy_bench_run_program(anepy_bench *b);
void anepy_bench_run_attention(anepy_bench *b);

/* The case with this number; NULL beyond the last. */
const anepy_bench_case *anepy_bench_case_at(int32_t index);

#endif
