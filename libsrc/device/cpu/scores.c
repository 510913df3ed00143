/* device/cpu/scores.c - sdpa_bwd1 and sdpa_bwd2 each by itself, with probabilities and their
 * gradients in memory.
 *
 * Training never comes here: a step computes both programs at once in attention.c, which keeps no
 * scores. Only anepy_program_run_native runs this form, and the tests and the probe `programs`
 * compare the ANE's results with it. One sequence; heads one after the other. */
#include <math.h>

#include "device/cpu/cpu.h"

typedef struct {
    const anepy_executable *executable;
    const anepy_kernels *kernels;
    float *probs, *dprobs, *dscores; /* of one head, [columns, width] */
    int64_t width;
    int32_t columns;
    float scale;
} rows;

static rows rows_of(const anepy_executable *executable, float *probs, float *dprobs, int32_t head,
                    int32_t columns) {
    const anepy_device_options *o = &executable->cpu->base.options;
    int64_t first = (int64_t)head * executable->program.width * o->width;
    return (rows){executable,
                  o->gemm->kernels,
                  probs + first,
                  dprobs + first,
                  executable->cpu->dscores,
                  o->width,
                  columns,
                  1.0f / sqrtf((float)o->model->head_dim)};
}

static void each_row(rows *r, anepy_loop_fn fn) {
    anepy_pool_run(r->executable->cpu->base.options.gemm->pool, r->columns, fn, r);
}

static float *head_of(const anepy_executable *executable, float *tensor, int32_t head) {
    const anepy_device_options *o = &executable->cpu->base.options;
    return tensor + (int64_t)head * o->model->head_dim * o->width;
}

static int32_t group_of(const anepy_executable *executable) {
    const anepy_config *c = &executable->cpu->base.options.model->config;
    return c->n_heads / c->n_kv_heads;
}

/* scores[q, t] = sum_d left[d, q] right[d, t]. */
static void over_channels(const rows *r, float *scores, const float *left, const float *right) {
    const anepy_device_options *o = &r->executable->cpu->base.options;
    anepy_product product = {.c = scores,
                             .ldc = r->width,
                             .a = left,
                             .a_row = 1,
                             .a_step = r->width,
                             .b = right,
                             .ldb = r->width,
                             .m = r->columns,
                             .n = r->columns,
                             .k = o->model->head_dim};
    anepy_gemm_run(o->gemm, &product);
}

/* out[d, t] = or += sum_q left[d, q] scores[q, t], or with scores[t, q]. */
static void over_tokens(const rows *r, float *out, const float *left, const float *scores,
                        int32_t transposed, int32_t tokens, int32_t accumulate) {
    const anepy_device_options *o = &r->executable->cpu->base.options;
    anepy_product product = {.c = out,
                             .ldc = r->width,
                             .a = left,
                             .a_row = r->width,
                             .a_step = 1,
                             .b = scores,
                             .ldb = r->width,
                             .b_transposed = transposed,
                             .m = o->model->head_dim,
                             .n = r->columns,
                             .k = tokens,
                             .accumulate = accumulate};
    anepy_gemm_run(o->gemm, &product);
}

static void softmax_row(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const rows *r = context;
    r->kernels->softmax_row(r->probs + index * r->width, index + 1, r->columns, r->scale);
}

void anepy_cpu_scores_backward1(const anepy_executable *executable, int32_t n, int32_t columns) {
    float *const *t = executable->tensors;
    int32_t heads = executable->cpu->base.options.model->config.n_heads,
            group = group_of(executable);
    for (int32_t head = 0; head < heads; head++) {
        rows r = rows_of(executable, t[SDPA_BWD1_P], t[SDPA_BWD1_DP], head, columns);
        const float *dattn = head_of(executable, executable->cpu->dattn, head);
        over_channels(&r, r.probs, head_of(executable, t[SDPA_BWD1_Q], head),
                      head_of(executable, t[SDPA_BWD1_K], head / group));
        each_row(&r, softmax_row);
        over_channels(&r, r.dprobs, dattn, head_of(executable, t[SDPA_BWD1_V], head / group));
        over_tokens(&r, head_of(executable, t[SDPA_BWD1_DV], head / group), dattn, r.probs, 0, n,
                    head % group > 0);
    }
}

static void softmax_row_backward(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const rows *r = context;
    int64_t at = index * r->width;
    r->kernels->softmax_row_backward(r->dscores + at, r->probs + at, r->dprobs + at, r->scale,
                                     r->columns);
}

void anepy_cpu_scores_backward2(const anepy_executable *executable, int32_t n, int32_t columns) {
    float *const *t = executable->tensors;
    int32_t heads = executable->cpu->base.options.model->config.n_heads,
            group = group_of(executable);
    for (int32_t head = 0; head < heads; head++) {
        rows r = rows_of(executable, t[SDPA_BWD2_P], t[SDPA_BWD2_DP], head, columns);
        each_row(&r, softmax_row_backward);
        over_tokens(&r, head_of(executable, t[SDPA_BWD2_DQ], head),
                    head_of(executable, t[SDPA_BWD2_K], head / group), r.dscores, 1, columns, 0);
        over_tokens(&r, head_of(executable, t[SDPA_BWD2_DK], head / group),
                    head_of(executable, t[SDPA_BWD2_Q], head), r.dscores, 0, n, head % group > 0);
    }
}
