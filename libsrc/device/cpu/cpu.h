/* device/cpu/cpu.h - inside of the native CPU device. */
#ifndef ANEPY_DEVICE_CPU_H
#define ANEPY_DEVICE_CPU_H

#include "device/device.h"

typedef struct {
    anepy_device base;
    int32_t positions;        /* columns of the longest sequence */
    float *cosine, *sine;     /* RoPE angles [head_dim / 2, positions] */
    float *dattn;             /* [dim, width]: gradient of attn inside sdpa_bwd1 */
    float *dscores;           /* as the scores: inside sdpa_bwd2 if it is given them */
    float *lse, *dot;         /* [n_heads, width]: inside sdpa_bwd2 if it is not */
    const anepy_kernel *bwd1; /* the last sdpa_bwd1 */
    float *scratch;           /* per worker: scratch_n floats */
    int64_t scratch_n;
    void *owned; /* every surface, kernel and mapping, for close */
} anepy_cpu;

struct anepy_kernel {
    anepy_cpu *cpu;
    anepy_program program;
    float *tensors[ANEPY_PROGRAM_TENSORS];       /* first element of each bound range */
    const float *weights[ANEPY_PROGRAM_WEIGHTS]; /* in the parameter arena, in program order */
};

/* attention.c: sequences of n tokens beside each other, each in n rounded up to 64 of the columns.
 * Scores lie beside each other as well: [n_heads * columns of the longest sequence, width]. */
void anepy_cpu_rope(const anepy_cpu *cpu, float *x, int32_t heads, int32_t n, int32_t columns,
                    float sign);
void anepy_cpu_attention(const anepy_kernel *kernel, int32_t n, int32_t columns);
void anepy_cpu_attention_backward1(const anepy_kernel *kernel, int32_t n, int32_t columns);
void anepy_cpu_attention_backward2(const anepy_kernel *kernel, int32_t n, int32_t columns);
/* Both at once without scores in memory, as sdpa_bwd2 of the layer whose sdpa_bwd1 was the last. */
void anepy_cpu_attention_backward(const anepy_kernel *kernel, int32_t n, int32_t columns);

/* offload.c: programs of the table. */
void anepy_cpu_rmsnorm_bwd(anepy_kernel *kernel, int32_t n, int32_t columns);
void anepy_cpu_final_rmsnorm(anepy_kernel *kernel, int32_t n, int32_t columns);
void anepy_cpu_classifier_fwd(anepy_kernel *kernel, int32_t n, int32_t columns);
void anepy_cpu_classifier_bwd(anepy_kernel *kernel, int32_t n, int32_t columns);
void anepy_cpu_softmax(anepy_kernel *kernel, int32_t n, int32_t columns);

#endif
