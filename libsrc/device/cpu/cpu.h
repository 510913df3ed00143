/* device/cpu/cpu.h - inside of the native CPU device. */
#ifndef ANEPY_DEVICE_CPU_H
#define ANEPY_DEVICE_CPU_H

#include "device/device.h"
#include "kernels/weights.h"

typedef struct {
    anepy_device base;
    int32_t positions;             /* columns of the longest sequence */
    float *cosine, *sine;          /* RoPE angles [head_dim / 2, positions] */
    float *dattn;                  /* [q_dim, width]: gradient of attn inside sdpa_bwd1 */
    float *dscores;                /* [positions, width]: inside sdpa_bwd2 if it is given scores */
    float *factors;                /* two per block of a head: inside attention */
    float *dot;                    /* [n_heads, width]: inside sdpa_bwd2 */
    float *dgate;                  /* [hidden, width]: inside ffn_bwd if it rounds */
    float *dq;                     /* [q_dim, width], block by block: inside sdpa_bwd2 */
    _Atomic int32_t *turns;        /* [n_heads, width / 64]: inside sdpa_bwd2 */
    const anepy_kernel **forwards; /* sdpa_fwd of each layer */
    const anepy_kernel *forward, *bwd1; /* of the layer whose sdpa_bwd1 was the last */
    float *scratch;                     /* per worker: scratch_n floats */
    int64_t scratch_n;
    void *owned; /* every surface, kernel and mapping, for close */
} anepy_cpu;

struct anepy_kernel {
    anepy_cpu *cpu;
    anepy_program program;
    float *tensors[ANEPY_PROGRAM_TENSORS];    /* first element of each bound range */
    uint16_t *rounded[ANEPY_PROGRAM_TENSORS]; /* in their place, where the surface is bf16 */
    const float *params;                      /* the arena it was compiled for */
    int32_t layer;
    float *lse; /* of sdpa_fwd: [n_heads, width] */
};

/* The weights of its layer, or of none, for this. */
static inline anepy_storage anepy_cpu_weights(const anepy_kernel *k, int32_t role) {
    return anepy_stored(anepy_model_find(k->cpu->base.options.model, k->layer, role), k->params);
}

static inline float *anepy_cpu_scratch(const anepy_cpu *cpu, int32_t worker) {
    return cpu->scratch + worker * cpu->scratch_n;
}

/* programs.c: any program of the table. columns: of all sequences of n tokens beside each other. */
void anepy_cpu_run(anepy_kernel *kernel, int32_t n, int32_t columns);

/* attention.c: sequences of n tokens beside each other, each in n rounded up to 64 of the columns.
 */
void anepy_cpu_rope(const anepy_cpu *cpu, float *x, int32_t heads, int32_t n, int32_t columns,
                    float sign);
void anepy_cpu_attention(const anepy_kernel *kernel, int32_t n, int32_t columns);
/* As sdpa_bwd2 of the layer whose sdpa_bwd1 was the last, after its sdpa_fwd: dv as well. */
void anepy_cpu_attention_backward(const anepy_kernel *kernel, int32_t n, int32_t columns);
int64_t anepy_cpu_factors_n(int32_t head_dim);           /* floats of a block's copy */
int64_t anepy_cpu_attention_scratch_n(int32_t head_dim); /* floats per worker */

/* scores.c: the backward pass with scores in memory. */
void anepy_cpu_scores_backward1(const anepy_kernel *kernel, int32_t n, int32_t columns);
void anepy_cpu_scores_backward2(const anepy_kernel *kernel, int32_t n, int32_t columns);

/* offload.c: programs of the table. */
void anepy_cpu_rmsnorm_bwd(anepy_kernel *kernel, int32_t n, int32_t columns);
void anepy_cpu_final_rmsnorm(anepy_kernel *kernel, int32_t n, int32_t columns);
void anepy_cpu_classifier_fwd(anepy_kernel *kernel, int32_t n, int32_t columns);
void anepy_cpu_classifier_bwd(anepy_kernel *kernel, int32_t n, int32_t columns);
void anepy_cpu_softmax(anepy_kernel *kernel, int32_t n, int32_t columns);

#endif
