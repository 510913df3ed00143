/* device/cpu/offload.c - norms, classifier and soft-max as programs, a panel of columns at a time.
 */
#include <math.h>
#include <string.h>

#include "device/cpu/cpu.h"

#define COLS ANEPY_COLUMNS

static const anepy_kernels *kernels_of(const anepy_executable *k) {
    return k->cpu->base.options.gemm->kernels;
}

static void each_panel(anepy_executable *k, int32_t columns, anepy_loop_fn fn) {
    anepy_pool_run(k->cpu->base.options.gemm->pool, columns / COLS, fn, k);
}

static void rmsnorm_bwd_panel(void *context, int32_t index, int32_t worker) {
    (void)worker;
    static const float ZEROS[COLS];
    const anepy_executable *k = context;
    const anepy_device_options *o = &k->cpu->base.options;
    int32_t dim = o->model->config.dim;
    int64_t j = (int64_t)index * COLS;
    const float *dy = k->tensors[RMSNORM_BWD_DY] + j, *x = k->tensors[RMSNORM_BWD_X] + j;
    float *dx = k->tensors[RMSNORM_BWD_DX] + j, rstd[COLS], coef[COLS];
    const float *w = anepy_weights_vector(anepy_cpu_weights(k, k->program.weights[0]));
    kernels_of(k)->rmsnorm_stats(rstd, coef, dy, x, w, o->model->norm_eps, dim, o->width);
    for (int32_t c = 0; c < dim; c++) {
        int64_t row = (int64_t)c * o->width;
        kernels_of(k)->rmsnorm_row(dx + row, ZEROS, dy + row, x + row, rstd, coef, w[c], COLS);
    }
}

void anepy_cpu_rmsnorm_bwd(anepy_executable *k, int32_t n, int32_t columns) {
    (void)n;
    each_panel(k, columns, rmsnorm_bwd_panel);
}

static void rmsnorm_panel(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_executable *k = context;
    const anepy_device_options *o = &k->cpu->base.options;
    int64_t j = (int64_t)index * COLS;
    const float *w = anepy_weights_vector(anepy_cpu_weights(k, ANEPY_FINAL_NORM));
    float rstd[COLS];
    kernels_of(k)->rmsnorm(k->tensors[FINAL_RMSNORM_XNORM] + j, o->width, rstd,
                           k->tensors[FINAL_RMSNORM_X] + j, w, o->model->norm_eps,
                           o->model->config.dim, o->width);
}

void anepy_cpu_final_rmsnorm(anepy_executable *k, int32_t n, int32_t columns) {
    (void)n;
    each_panel(k, columns, rmsnorm_panel);
}

/* Rows of the classifier for the program's part of the vocabulary. */
static anepy_storage classifier_rows(const anepy_executable *k, int32_t rows) {
    return anepy_storage_rows(anepy_cpu_weights(k, ANEPY_CLASSIFIER), k->program.first_row, rows);
}

void anepy_cpu_classifier_fwd(anepy_executable *k, int32_t n, int32_t columns) {
    (void)n;
    const anepy_device_options *o = &k->cpu->base.options;
    anepy_product product = {.c = k->tensors[CLASSIFIER_FWD_LOGITS],
                             .ldc = o->width,
                             .b = k->tensors[CLASSIFIER_FWD_X],
                             .ldb = o->width,
                             .n = columns};
    anepy_weights_factor(&product, classifier_rows(k, k->program.output_channels), 0);
    anepy_gemm_run(o->gemm, &product);
}

void anepy_cpu_classifier_bwd(anepy_executable *k, int32_t n, int32_t columns) {
    (void)n;
    const anepy_device_options *o = &k->cpu->base.options;
    anepy_product product = {.c = k->tensors[CLASSIFIER_BWD_DX],
                             .ldc = o->width,
                             .b = k->tensors[CLASSIFIER_BWD_DLOGITS],
                             .ldb = o->width,
                             .n = columns};
    anepy_weights_factor(&product, classifier_rows(k, k->program.input_channels), 1);
    anepy_gemm_run(o->gemm, &product);
}

/* Soft-max of one group of tokens in one panel of columns; rows of a group are `groups` rows apart.
 */
static void softmax_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_executable *k = context;
    const anepy_device_options *o = &k->cpu->base.options;
    int32_t groups = anepy_softmax_groups(o->model), group = index % groups;
    int32_t rows = (k->program.input_channels - group + groups - 1) / groups;
    int64_t start = (int64_t)group * o->width + (int64_t)(index / groups) * COLS;
    int64_t stride = (int64_t)groups * o->width;
    const float *x = k->tensors[SOFTMAX_LOGITS] + start;
    float *y = k->tensors[SOFTMAX_PROBS] + start, lse[COLS], sum[COLS];
    kernels_of(k)->logsumexp_columns(lse, sum, x, stride, rows);
    for (int32_t s = 0; s < COLS; s++) lse[s] += logf(sum[s]);
    for (int32_t c = 0; c < rows; c++) memcpy(y + c * stride, x + c * stride, COLS * sizeof *y);
    kernels_of(k)->softmax_gradient(y, lse, 1.0f, stride, rows);
}

void anepy_cpu_softmax(anepy_executable *k, int32_t n, int32_t columns) {
    (void)n;
    const anepy_device_options *o = &k->cpu->base.options;
    anepy_pool_run(o->gemm->pool, columns / COLS * anepy_softmax_groups(o->model), softmax_piece,
                   k);
}
