/* train/loss.c - classifier, soft-max cross-entropy, and their gradients. Logits are [vocab,
 * width], so all sums over the vocabulary run down columns, lane-parallel over tokens. */
#include <math.h>
#include <string.h>

#include "train/engine.h"

#define COLS ANEPY_COLUMNS
#define CHUNK 512 /* vocabulary rows per piece: fixed, so that sums do not depend on threads */

int32_t anepy_chunks(const anepy_engine *e) {
    return (e->model->config.vocab_size + CHUNK - 1) / CHUNK;
}

/* Piece -> (chunk of the vocabulary, panel of tokens). */
typedef struct {
    int32_t chunk, row, rows, column;
} place;

static place locate(const anepy_engine *e, int32_t index) {
    int32_t panels = e->columns / COLS, chunk = index / panels;
    return (place){chunk, chunk * CHUNK,
                   anepy_min_i32(CHUNK, e->model->config.vocab_size - chunk * CHUNK),
                   index % panels * COLS};
}

static void partial_sums(void *context, int32_t index, int32_t worker) {
    (void)worker;
    anepy_engine *e = context;
    place p = locate(e, index);
    float *max = e->partial + (int64_t)p.chunk * e->width + p.column;
    float *sum = max + (int64_t)anepy_chunks(e) * e->width;
    anepy_vector(e)->logsumexp_columns(max, sum, e->logits + (int64_t)p.row * e->width + p.column,
                                       e->width, p.rows);
}

static void logits_gradient(void *context, int32_t index, int32_t worker) {
    (void)worker;
    anepy_engine *e = context;
    place p = locate(e, index);
    anepy_vector(e)->softmax_gradient(e->logits + (int64_t)p.row * e->width + p.column,
                                      e->lse + p.column, (float)anepy_token_scale(e), e->width,
                                      p.rows);
}

void anepy_loss_padding(anepy_engine *e) {
    for (int32_t start = 0; start < e->columns; start += e->stride)
        for (int32_t s = e->n; s < e->stride; s++) e->lse[start + s] = INFINITY;
}

void anepy_loss_targets(anepy_engine *e) {
    for (int32_t t = 0; t < anepy_running_tokens(e); t++)
        e->logits[(int64_t)e->targets[t] * e->width + anepy_column(e, t)] -=
            (float)anepy_token_scale(e);
}

/* Gradients of the logits in chunks, by anepy_classifier_backward? */
static int in_chunks(const anepy_engine *e) {
    return e->gemm.bf16 != NULL && e->tail[ANEPY_SOFTMAX] == NULL &&
           e->tail[ANEPY_CLASSIFIER_BWD] == NULL;
}

double anepy_loss(anepy_engine *e, int gradient) {
    int32_t count = anepy_chunks(e), pieces = count * (e->columns / COLS);
    double loss = 0.0;
    anepy_engine_run(e, pieces, partial_sums);
    for (int32_t t = 0; t < anepy_running_tokens(e); t++) {
        int32_t s = anepy_column(e, t);
        const float *max = e->partial + s, *sum = max + (int64_t)count * e->width;
        float top = -INFINITY;
        double total = 0.0;
        for (int32_t c = 0; c < count; c++) top = fmaxf(top, max[(int64_t)c * e->width]);
        for (int32_t c = 0; c < count; c++)
            total += sum[(int64_t)c * e->width] * exp((double)max[(int64_t)c * e->width] - top);
        double lse = top + log(total);
        e->lse[s] = (float)lse;
        loss += lse - e->logits[(int64_t)e->targets[t] * e->width + s];
    }
    if (gradient) anepy_loss_padding(e);
    if (gradient && !in_chunks(e)) {
        anepy_engine_run(e, pieces, logits_gradient);
        anepy_loss_targets(e);
    }
    return loss / e->n;
}

void anepy_classifier(anepy_engine *e) {
    int32_t dim = e->model->config.dim;
    anepy_product product = {.c = e->logits,
                             .ldc = e->width,
                             .a = e->weights + anepy_model_classifier(e->model),
                             .a_row = dim,
                             .a_step = 1,
                             .b = e->xnorm,
                             .ldb = e->width,
                             .m = e->model->config.vocab_size,
                             .n = e->columns,
                             .k = dim};
    anepy_gemm_run(&e->gemm, &product);
}

typedef struct {
    anepy_engine *e;
    float *out;
} copy_task;

/* 64 rows of the vocabulary, transposed in blocks. */
static void copy_logits(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const copy_task *task = context;
    const anepy_engine *e = task->e;
    int32_t vocab = e->model->config.vocab_size, first = index * COLS;
    int32_t rows = anepy_min_i32(COLS, vocab - first);
    float block[COLS * COLS];
    for (int32_t t0 = 0; t0 < e->n; t0 += COLS) {
        int32_t count = anepy_min_i32(COLS, e->n - t0);
        anepy_vector(e)->transpose_panel(block, e->logits + (int64_t)first * e->width + t0,
                                         e->width, rows, count);
        for (int32_t t = 0; t < count; t++)
            memcpy(task->out + (int64_t)(t0 + t) * vocab + first, block + t * COLS,
                   (size_t)rows * sizeof(float));
    }
}

void anepy_logits_copy(anepy_engine *e, float *out) {
    copy_task task = {e, out};
    anepy_pool_run(e->pool, (e->model->config.vocab_size + COLS - 1) / COLS, copy_logits, &task);
}

/* In bf16 the gradients of the logits are made a chunk of the vocabulary at a time, rounded while
 * they are in the cache, and used up there by both products: they are never written as float32. All
 * threads work on one chunk, chunk after chunk, so every sum keeps its order. */
typedef struct {
    anepy_engine *e;
    int32_t first, rows;
} chunk;

/* 64 rows of the chunk in one panel of tokens: as rows for dW, as pairs of rows for dX. */
static void round_gradient(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const chunk *c = context;
    anepy_engine *e = c->e;
    int32_t panels = e->columns / COLS, row = index / panels * COLS, column = index % panels * COLS;
    int32_t rows = anepy_min_i32(COLS, c->rows - row), first = c->first + row;
    float block[COLS * COLS], scale = (float)anepy_token_scale(e);
    for (int32_t r = 0; r < rows; r++)
        memcpy(block + r * COLS, e->logits + (int64_t)(first + r) * e->width + column,
               COLS * sizeof(float));
    anepy_vector(e)->softmax_gradient(block, e->lse + column, scale, COLS, rows);
    anepy_span tokens = anepy_span_at(e, column);
    for (int32_t s = 0; s < tokens.count; s++) {
        int32_t target = e->targets[tokens.first + s] - first;
        if (target >= 0 && target < rows) block[target * COLS + s] -= scale;
    }
    for (int32_t r = 0; r < rows; r++)
        e->gemm.bf16->to_bf16(e->dlogits + (int64_t)(row + r) * e->width + column, block + r * COLS,
                              COLS);
    anepy_gemm_pack_rows(&e->gemm, c->rows, block, COLS, row, rows, column, COLS);
}

static void backward_in_chunks(anepy_engine *e) {
    int32_t dim = e->model->config.dim, vocab = e->model->config.vocab_size;
    int64_t matrix = anepy_model_classifier(e->model);
    anepy_gemm for_dw = e->gemm;
    anepy_product dx = {
        .c = e->dxnorm, .ldc = e->width, .a_row = 1, .a_step = dim, .m = dim, .n = e->columns};
    anepy_product dw = {.ldc = dim,
                        .a16 = e->dlogits,
                        .a_row = e->width,
                        .a_step = 1,
                        .b = e->xnorm,
                        .ldb = e->width,
                        .b_transposed = 1,
                        .n = dim,
                        .k = anepy_reduction(e),
                        .accumulate = anepy_adds(e)};
    for_dw.panels = e->xnorm_panels;
    e->dw_started++;
    anepy_gemm_pack(&for_dw, &dw);
    for (int32_t first = 0; first < vocab; first += ANEPY_CHUNK_ROWS) {
        chunk c = {e, first, anepy_min_i32(ANEPY_CHUNK_ROWS, vocab - first)};
        int64_t at = matrix + (int64_t)first * dim;
        anepy_pool_run(e->pool, (c.rows + COLS - 1) / COLS * (e->columns / COLS), round_gradient,
                       &c);
        dx.a = e->weights + at;
        dx.k = c.rows;
        dx.accumulate = first > 0;
        anepy_gemm_multiply(&e->gemm, &dx);
        dw.c = e->grads + at;
        dw.m = c.rows;
        dw.squares = e->notes_squares ? e->row_squares + first : NULL;
        anepy_gemm_multiply(&for_dw, &dw);
    }
}

void anepy_classifier_backward(anepy_engine *e) {
    int32_t dim = e->model->config.dim;
    if (in_chunks(e)) {
        backward_in_chunks(e);
        return;
    }
    anepy_product product = {.c = e->dxnorm,
                             .ldc = e->width,
                             .a = e->weights + anepy_model_classifier(e->model),
                             .a_row = 1,
                             .a_step = dim,
                             .b = e->logits,
                             .ldb = e->width,
                             .m = dim,
                             .n = e->columns,
                             .k = e->model->config.vocab_size};
    anepy_gemm_run(&e->gemm, &product);
}

void anepy_classifier_dw(anepy_engine *e) {
    int32_t dim = e->model->config.dim;
    if (in_chunks(e)) return; /* done with dX */
    anepy_product product = {.c = e->grads + anepy_model_classifier(e->model),
                             .ldc = dim,
                             .a = e->logits,
                             .a_row = e->width,
                             .a_step = 1,
                             .b = e->xnorm,
                             .ldb = e->width,
                             .b_transposed = 1,
                             .m = e->model->config.vocab_size,
                             .n = dim,
                             .k = anepy_reduction(e),
                             .accumulate = anepy_adds(e),
                             .squares = e->notes_squares ? e->row_squares : NULL};
    anepy_gemm_run(&e->gemm, &product);
}
