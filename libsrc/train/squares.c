/* train/squares.c - the sum of squares of the gradients, for their norm. So that an update need not
 * read them once more, the products of the last sequences of an accumulation note it for each piece
 * of what they write, while that is in the cache: if the last update could have used it, of the
 * step whose number that update came after. What is not known is computed for the same pieces. All
 * are added in one order, so the sum is the same bit for bit. */
#include "train/update.h"

#define PIECE ANEPY_UPDATE_PIECE
#define PIECE_ROWS 64

void anepy_squares_begin(anepy_engine *e) {
    e->knows_squares = 0;
    e->notes_squares = e->accumulated + 1 == e->squares_step && e->metal == NULL &&
                       e->added + e->beside == e->sequences;
}

/* A tied classifier's rows: the embedding's part was added behind the product. */
void anepy_squares_end(anepy_engine *e) {
    const anepy_config *c = &e->model->config;
    const float *matrix = e->grads + anepy_model_embedding(e->model);
    if (!e->notes_squares) return;
    for (int32_t t = 0; t < anepy_running_tokens(e) && c->tied; t++)
        e->row_squares[e->tokens[t]] =
            anepy_vector(e)->sum_squares(matrix + (int64_t)e->tokens[t] * c->dim, c->dim);
    e->knows_squares = 1;
}

static anepy_gemm_job gradient_of(const anepy_engine *e, const anepy_dw *dw) {
    return (anepy_gemm_job){&e->gemm,
                            {.c = e->grads + dw->gradient,
                             .ldc = dw->x.channels,
                             .m = dw->dy.channels,
                             .n = dw->x.channels,
                             .squares = dw->squares}};
}

static void classifier_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_engine *e = context;
    const anepy_config *c = &e->model->config;
    anepy_product whole = {.c = e->grads + anepy_model_classifier(e->model),
                           .ldc = c->dim,
                           .n = c->dim,
                           .squares = e->row_squares};
    anepy_gemm_row_squares(&e->gemm, &whole, index * PIECE_ROWS,
                           anepy_min_i32(PIECE_ROWS, c->vocab_size - index * PIECE_ROWS));
}

/* Reads the gradients. */
static void compute(anepy_engine *e) {
    anepy_engine_run(e, (e->model->config.vocab_size + PIECE_ROWS - 1) / PIECE_ROWS,
                     classifier_rows);
    for (int32_t l = 0; l < e->model->config.n_layers; l++) {
        for (int32_t i = 0; i < DW_N; i++) {
            anepy_gemm_job job = gradient_of(e, &e->layers[l].dw[i]);
            anepy_pool_run(e->pool, anepy_gemm_pieces(&job.product), anepy_gemm_piece_squares,
                           &job);
        }
    }
}

static void embedding_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    anepy_engine *e = context;
    const anepy_tensor *t = &e->model->tensors[0];
    int64_t at = (int64_t)index * PIECE, left = t->rows * t->cols - at;
    e->sums[index] =
        anepy_vector(e)->sum_squares(e->grads + t->offset + at, left < PIECE ? left : PIECE);
}

static double sum_up(const double *sums, int32_t n) {
    double sum = 0.0;
    for (int32_t i = 0; i < n; i++) sum += sums[i];
    return sum;
}

/* What no product writes: norm weights, and an embedding of its own. */
static double of_others(anepy_engine *e) {
    const anepy_model *m = e->model;
    double sum = 0.0;
    for (int32_t i = 0; i < m->tensor_n; i++) {
        const anepy_tensor *t = &m->tensors[i];
        if (!t->is_matrix) sum += anepy_vector(e)->sum_squares(e->grads + t->offset, t->cols);
    }
    if (m->config.tied) return sum;
    int32_t pieces = (int32_t)((m->tensors[0].rows * m->tensors[0].cols + PIECE - 1) / PIECE);
    anepy_engine_run(e, pieces, embedding_piece);
    return sum + sum_up(e->sums, pieces);
}

double anepy_squares_sum(anepy_engine *e, int as_left) {
    if (!as_left || !e->knows_squares) compute(e);
    double sum = sum_up(e->row_squares, e->model->config.vocab_size);
    for (int32_t l = 0; l < e->model->config.n_layers; l++) {
        for (int32_t i = 0; i < DW_N; i++) {
            anepy_gemm_job job = gradient_of(e, &e->layers[l].dw[i]);
            sum += sum_up(job.product.squares, anepy_gemm_pieces(&job.product));
        }
    }
    return sum + of_others(e);
}
