/* train/loss.c - classifier, soft-max cross-entropy, and their gradients. Logits are [vocab,
 * columns], so all sums over the vocabulary run down columns, lane-parallel over tokens. */
#include "train/loss.h"

#include <math.h>
#include <string.h>

#include "kernels/weights.h"

#define COLS ANEPY_COLUMNS
#define WINDOW 128 /* columns of logits at a time: the classifier is read that much more often */

int32_t anepy_logits_width(const anepy_engine *e, int32_t width) {
    const anepy_tensor *classifier = anepy_model_find(e->model, 0, ANEPY_CLASSIFIER);
    int whole = anepy_gradient(e, classifier) != NULL || anepy_on(e, ANEPY_OFFLOAD_CLASSIFIER) ||
                anepy_on(e, ANEPY_OFFLOAD_SOFTMAX);
    return whole ? width : anepy_min_i32(width, WINDOW);
}

int anepy_logits_next(anepy_engine *e) {
    anepy_window *w = &e->run.window;
    int32_t first = w->first + w->columns;
    *w = (anepy_window){0};
    if (first == e->run.columns) return 0;
    *w = (anepy_window){first, anepy_min_i32(e->room->logits_width, e->run.columns - first)};
    return 1;
}

/* Logits from a token of the vocabulary on, at a column of the run. */
static float *logits_at(const anepy_engine *e, int32_t token, int32_t column) {
    return e->room->logits + (int64_t)token * e->room->logits_width + column - e->run.window.first;
}

int32_t anepy_loss_chunks(const anepy_engine *e) {
    return anepy_pieces(e->model->config.vocab_size, ANEPY_LOSS_ROWS);
}

/* A piece of work: a chunk of the vocabulary in a panel of 64 columns. */
typedef struct {
    int32_t chunk, row, rows, column;
} place;

static place locate(const anepy_engine *e, int32_t index) {
    int32_t panels = e->run.window.columns / COLS, chunk = index / panels;
    return (place){
        chunk, chunk * ANEPY_LOSS_ROWS,
        anepy_min_i32(ANEPY_LOSS_ROWS, e->model->config.vocab_size - chunk * ANEPY_LOSS_ROWS),
        e->run.window.first + index % panels * COLS};
}

static void partial_sums(void *context, int32_t index, int32_t worker) {
    (void)worker;
    anepy_engine *e = context;
    place p = locate(e, index);
    float *max = e->room->partial + (int64_t)p.chunk * e->room->width + p.column;
    float *sum = max + (int64_t)anepy_loss_chunks(e) * e->room->width;
    e->kernels->logsumexp_columns(max, sum, logits_at(e, p.row, p.column), e->room->logits_width,
                                  p.rows);
}

static void logits_gradient(void *context, int32_t index, int32_t worker) {
    (void)worker;
    anepy_engine *e = context;
    place p = locate(e, index);
    e->kernels->softmax_gradient(logits_at(e, p.row, p.column), e->room->lse + p.column,
                                 (float)anepy_target_scale(e), e->room->logits_width, p.rows);
}

/* The loss of the token in a column whose target is counted; its log-sum-exp to room->lse. */
static double join_column(anepy_engine *e, const float *max, const float *sum, int32_t parts,
                          int32_t column, int32_t target) {
    int64_t width = e->room->width;
    float top = -INFINITY;
    double total = 0.0;
    for (int64_t p = 0; p < parts; p++) top = fmaxf(top, max[p * width + column]);
    for (int64_t p = 0; p < parts; p++)
        total += (sum != NULL ? sum[p * width + column] : 1.0f) *
                 exp((double)max[p * width + column] - top);
    double lse = top + log(total);
    e->room->lse[column] = (float)lse;
    return lse - *logits_at(e, target, column);
}

void anepy_loss_join(anepy_engine *e, const float *max, const float *sum, int32_t parts,
                     double *loss) {
    anepy_window w = e->run.window;
    for (int32_t column = w.first; column < w.first + w.columns; column += COLS) {
        anepy_span tokens = anepy_span_at(e, column);
        for (int32_t s = tokens.count; s < COLS; s++)
            e->room->lse[/* mutate: loss-padding */ column + s] = INFINITY;
        for (int32_t s = 0; s < tokens.count; s++) {
            int32_t t = tokens.first + s, target = e->run.targets[t];
            double own = 0.0;
            if (target < 0) e->room->lse[column + s] = INFINITY;
            else own = join_column(e, max, sum, parts, column + s, target);
            if (e->run.losses != NULL) e->run.losses[t] = own;
            *loss += own;
        }
    }
}

void anepy_loss_targets(anepy_engine *e) {
    float scale = (float)anepy_target_scale(e);
    anepy_window w = e->run.window;
    for (int32_t column = w.first; column < w.first + w.columns; column += COLS) {
        anepy_span tokens = anepy_span_at(e, column);
        for (int32_t s = 0; s < tokens.count; s++) {
            int32_t target = e->run.targets[tokens.first + s];
            if (target >= 0) *logits_at(e, target, column + s) -= scale;
        }
    }
}

int anepy_loss_any(anepy_engine *e) {
    anepy_window w = e->run.window;
    for (int32_t column = w.first; column < w.first + w.columns; column += COLS) {
        anepy_span tokens = anepy_span_at(e, column);
        if (anepy_counted(e->run.targets + tokens.first, tokens.count) > 0) return 1;
        for (int32_t t = 0; e->run.losses != NULL && t < tokens.count; t++)
            e->run.losses[tokens.first + t] = 0.0;
    }
    for (int32_t i = 0; i < e->model->config.dim; i++)
        memset(e->room->dxnorm + (int64_t)i * e->room->width + w.first, 0,
               (size_t)w.columns * sizeof(float));
    return 0;
}

/* Whether the gradients of the logits are computed by anepy_classifier_backward, in chunks. */
static int in_chunks(const anepy_engine *e) {
    return e->room->gemm.bf16 != NULL && e->room->tail[ANEPY_SOFTMAX] == NULL &&
           e->room->tail[ANEPY_CLASSIFIER_BWD] == NULL;
}

void anepy_loss(anepy_engine *e, int gradient, double *loss) {
    int32_t chunks = anepy_loss_chunks(e), pieces = chunks * (e->run.window.columns / COLS);
    const float *max = e->room->partial, *sum = max + (int64_t)chunks * e->room->width;
    anepy_engine_run(e, pieces, partial_sums);
    anepy_touch(e, e->model->config.vocab_size, gradient ? 3 : 1);
    e->run.stats.host_exps +=
        (int64_t)e->model->config.vocab_size * e->run.window.columns * (gradient ? 2 : 1);
    anepy_loss_join(e, max, sum, chunks, loss);
    if (gradient && !in_chunks(e)) {
        anepy_engine_run(e, pieces, logits_gradient);
        anepy_loss_targets(e);
    }
}

void anepy_classifier(anepy_engine *e) {
    anepy_product product = {.c = e->room->logits,
                             .ldc = e->room->logits_width,
                             .b = e->room->xnorm + e->run.window.first,
                             .ldb = e->room->width,
                             .n = e->run.window.columns};
    anepy_weights_factor(&product, anepy_weights(e, 0, ANEPY_CLASSIFIER), 0);
    e->run.stats.host_flops += anepy_product_flops(&product);
    anepy_gemm_run(&e->room->gemm, &product);
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
    anepy_window w = e->run.window;
    int32_t end = anepy_min_i32(w.first + w.columns, anepy_reduction(e));
    float block[COLS * COLS];
    for (int32_t column = w.first; column < end; column += COLS) {
        anepy_span tokens = anepy_span_at(e, column);
        e->kernels->transpose_panel(block, logits_at(e, first, column), e->room->logits_width, rows,
                                    tokens.count);
        for (int32_t t = 0; t < tokens.count; t++)
            memcpy(task->out + (int64_t)(tokens.first + t) * vocab + first, block + t * COLS,
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

/* 64 rows of the chunk in one panel of the window: as rows for dW, as pairs of rows for dX. */
static void round_gradient(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const chunk *c = context;
    anepy_engine *e = c->e;
    int32_t panels = e->run.window.columns / COLS, row = index / panels * COLS,
            at = index % panels * COLS, column = e->run.window.first + at;
    int32_t rows = anepy_min_i32(COLS, c->rows - row), first = c->first + row;
    float block[COLS * COLS], scale = (float)anepy_target_scale(e);
    for (int32_t r = 0; r < rows; r++)
        memcpy(block + r * COLS, logits_at(e, first + r, column), COLS * sizeof(float));
    e->kernels->softmax_gradient(block, e->room->lse + column, scale, COLS, rows);
    anepy_span tokens = anepy_span_at(e, column);
    for (int32_t s = 0; s < tokens.count; s++) {
        int32_t target = e->run.targets[tokens.first + s];
        if (target >= first && target < first + rows) block[(target - first) * COLS + s] -= scale;
    }
    for (int32_t r = 0; r < rows; r++)
        e->room->gemm.bf16->to_bf16(e->room->dlogits + (int64_t)(row + r) * e->room->width + column,
                                    block + r * COLS, COLS);
    anepy_gemm_pack_rows(&e->room->gemm, c->rows, block, COLS, row, rows, at, COLS);
}

/* NULL: the classifier is frozen. */
static float *gradient_of(const anepy_engine *e) {
    return anepy_gradient(e, anepy_model_find(e->model, 0, ANEPY_CLASSIFIER));
}

static void backward_in_chunks(anepy_engine *e) {
    int32_t dim = e->model->config.dim, vocab = e->model->config.vocab_size;
    anepy_storage matrix = anepy_weights(e, 0, ANEPY_CLASSIFIER);
    float *gradient = gradient_of(e);
    anepy_gemm for_dw = e->room->gemm;
    anepy_window w = e->run.window;
    anepy_product dx = {.c = e->room->dxnorm + w.first, .ldc = e->room->width, .n = w.columns};
    anepy_product dw = {.ldc = dim,
                        .a16 = e->room->dlogits,
                        .a_row = e->room->width,
                        .a_step = 1,
                        .b = e->room->xnorm,
                        .ldb = e->room->width,
                        .b_transposed = 1,
                        .n = dim,
                        .k = anepy_reduction(e),
                        .accumulate = anepy_adds(e)};
    for_dw.panels = e->room->xnorm_panels;
    if (gradient != NULL) {
        e->run.dw_started++;
        anepy_gemm_pack(&for_dw, &dw);
    }
    for (int32_t first = 0; first < vocab; first += ANEPY_CHUNK_ROWS) {
        chunk c = {e, first, anepy_min_i32(ANEPY_CHUNK_ROWS, vocab - first)};
        anepy_pool_run(e->pool, (c.rows + COLS - 1) / COLS * (w.columns / COLS), round_gradient,
                       &c);
        anepy_weights_factor(&dx, anepy_storage_rows(matrix, first, c.rows), 1);
        dx.accumulate = first > 0;
        e->run.stats.host_flops += anepy_product_flops(&dx);
        anepy_gemm_multiply(&e->room->gemm, &dx);
        if (gradient == NULL) continue;
        dw.c = gradient + (int64_t)first * dim;
        dw.m = c.rows;
        dw.squares = e->squares.taking ? e->squares.rows + first : NULL;
        e->run.stats.host_flops += anepy_product_flops(&dw);
        anepy_gemm_multiply(&for_dw, &dw);
    }
}

void anepy_classifier_backward(anepy_engine *e) {
    if (in_chunks(e)) {
        backward_in_chunks(e);
        return;
    }
    anepy_product product = {.c = e->room->dxnorm + e->run.window.first,
                             .ldc = e->room->width,
                             .b = e->room->logits,
                             .ldb = e->room->logits_width,
                             .n = e->run.window.columns};
    anepy_weights_factor(&product, anepy_weights(e, 0, ANEPY_CLASSIFIER), 1);
    e->run.stats.host_flops += anepy_product_flops(&product);
    anepy_gemm_run(&e->room->gemm, &product);
}

void anepy_classifier_dw(anepy_engine *e) {
    int32_t dim = e->model->config.dim;
    if (e->room->tail[ANEPY_CLASSIFIER_DW] != NULL) return;
    if (gradient_of(e) == NULL || in_chunks(e)) return; /* in chunks: computed together with dX */
    e->run.dw_started++;
    anepy_product product = {.c = gradient_of(e),
                             .ldc = dim,
                             .a = e->room->logits,
                             .a_row = e->room->width,
                             .a_step = 1,
                             .b = e->room->xnorm,
                             .ldb = e->room->width,
                             .b_transposed = 1,
                             .m = e->model->config.vocab_size,
                             .n = dim,
                             .k = anepy_reduction(e),
                             .accumulate = anepy_adds(e),
                             .squares = e->squares.taking ? e->squares.rows : NULL};
    e->run.stats.host_flops += anepy_product_flops(&product);
    anepy_gemm_run(&e->room->gemm, &product);
}
