/* device/cpu/cpu.h - types and functions shared by the files of the native CPU device. */
#ifndef ANEPY_DEVICE_CPU_H
#define ANEPY_DEVICE_CPU_H

#include "device/device.h"
#include "kernels/weights.h"

typedef struct {
    anepy_device base;
    int32_t positions;      /* columns of the longest sequence */
    float *cosine, *sine;   /* RoPE angles [head_dim / 2, positions] */
    float *dattn;           /* [q_dim, width]: gradient of attn, from sdpa_bwd1 to sdpa_bwd2 */
    float *dscores;         /* [positions, width]: for scores.c */
    float *factors;         /* two per block of a head: for attention.c */
    float *dot;             /* [n_heads, width]: for sdpa_bwd2 */
    float *dgate;           /* [hidden, width]: for ffn_bwd with rounded outputs */
    float *dq;              /* [q_dim, width], block by block: for sdpa_bwd2 */
    _Atomic int32_t *turns; /* [n_heads, width / 64]: next block of keys to add to dq */
    float *low_panels;      /* adapters: scale A x or scale B^T dy of three projections, packed */
    float *scratch;         /* per worker: scratch_n floats */
    int64_t scratch_n;
    void *owned; /* every surface, executable and mapping, for close */
} anepy_cpu;

struct anepy_executable {
    anepy_cpu *cpu;
    anepy_program program;
    float *tensors[ANEPY_PROGRAM_TENSORS];    /* first element of each bound range */
    uint16_t *rounded[ANEPY_PROGRAM_TENSORS]; /* instead of tensors where the surface is bf16 */
    const void *params;                       /* the arena it was compiled for */
    int32_t layer;
};

/* Weight with this role of the program's layer, or of the model if it belongs to no layer. */
static inline anepy_storage anepy_cpu_weights(const anepy_executable *k, int32_t role) {
    return anepy_stored(anepy_model_find(k->cpu->base.options.model, k->layer, role), k->params);
}

static inline float *anepy_cpu_scratch(const anepy_cpu *cpu, int32_t worker) {
    return cpu->scratch + worker * cpu->scratch_n;
}

/* programs.c: runs any program of the table. columns: of all sequences of n tokens together. */
int anepy_cpu_has(anepy_program_id id);
void anepy_cpu_run(anepy_executable *executable, int32_t n, int32_t columns);

/* Floats of low_panels for one projection. */
static inline int64_t anepy_cpu_low_panels_n(int32_t rank, int32_t width) {
    return (int64_t)rank * width;
}

/* attention.c: for sequences of n tokens side by side, each with n columns rounded up to 64. */
void anepy_cpu_rope(const anepy_cpu *cpu, float *x, int32_t heads, int32_t n, int32_t columns,
                    float sign);
void anepy_cpu_attention(const anepy_executable *executable, int32_t n, int32_t columns);
/* Computes sdpa_bwd2 from its host tensors, after sdpa_bwd1 of the same layer. */
void anepy_cpu_attention_backward(const anepy_executable *executable, int32_t n, int32_t columns);
int64_t anepy_cpu_factors_n(int32_t head_dim);           /* floats of the factors of a block */
int64_t anepy_cpu_attention_scratch_n(int32_t head_dim); /* floats per worker */

/* scores.c: the backward pass with scores in memory. */
void anepy_cpu_scores_backward1(const anepy_executable *executable, int32_t n, int32_t columns);
void anepy_cpu_scores_backward2(const anepy_executable *executable, int32_t n, int32_t columns);

/* offload.c: the programs of offloads. */
void anepy_cpu_rmsnorm_bwd(anepy_executable *executable, int32_t n, int32_t columns);
void anepy_cpu_final_rmsnorm(anepy_executable *executable, int32_t n, int32_t columns);
void anepy_cpu_classifier_fwd(anepy_executable *executable, int32_t n, int32_t columns);
void anepy_cpu_classifier_bwd(anepy_executable *executable, int32_t n, int32_t columns);
void anepy_cpu_softmax(anepy_executable *executable, int32_t n, int32_t columns);

#endif
