/* train/squares.c - the sum of squares of the gradients, for their norm.
 *
 * So that an update need not read the gradients once more, the products of the last step of an
 * accumulation take it of each piece that they write, while that is in the cache. Which step is the
 * last is not known until the update: the accumulation is expected to be as long as the one before.
 * Otherwise the sums are computed at the update, of the same pieces. All are added in one order, so
 * both ways give the same bits. */
#include "train/squares.h"

void anepy_squares_begin(anepy_engine *e) {
    e->squares.known = 0;
    e->squares.taking =
        e->accumulated + 1 == e->squares.step && e->room->metal == NULL && anepy_last_group(e);
}

/* A tied classifier's rows are read once more: the embedding's part was added after the product. */
void anepy_squares_end(anepy_engine *e) {
    const anepy_config *c = &e->model->config;
    const float *matrix = e->grads + anepy_model_embedding(e->model);
    if (!e->squares.taking) return;
    for (int32_t t = 0; t < /* mutate: squares-tokens */ anepy_running_tokens(e) && c->tied; t++)
        e->squares.rows[e->run.ids[t]] =
            e->kernels->sum_squares(matrix + (int64_t)e->run.ids[t] * c->dim, c->dim);
    e->squares.known = 1;
}

static anepy_gemm_job gradient_of(const anepy_engine *e, const anepy_dw *dw) {
    return (anepy_gemm_job){&e->room->gemm,
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
                           .squares = e->squares.rows};
    anepy_gemm_row_squares(
        &e->room->gemm, &whole, index * ANEPY_PIECE_ROWS,
        anepy_min_i32(ANEPY_PIECE_ROWS, c->vocab_size - index * ANEPY_PIECE_ROWS));
}

/* Reads the gradients. */
static void compute(anepy_engine *e) {
    anepy_engine_run(e, anepy_pieces(e->model->config.vocab_size, ANEPY_PIECE_ROWS),
                     classifier_rows);
    for (int32_t l = 0; l < e->model->config.n_layers; l++) {
        for (int32_t i = 0; i < DW_N; i++) {
            anepy_gemm_job job = gradient_of(e, &e->room->layers[l].dw[i]);
            anepy_pool_run(e->pool, anepy_gemm_pieces(&job.product), anepy_gemm_piece_squares,
                           &job);
        }
    }
}

static void embedding_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    anepy_engine *e = context;
    const anepy_tensor *t = &e->model->tensors[0];
    int64_t at = (int64_t)index * ANEPY_PIECE_ELEMENTS, left = t->rows * t->cols - at;
    e->squares.sums[index] = e->kernels->sum_squares(e->grads + t->offset + at,
                                                     anepy_min_i64(left, ANEPY_PIECE_ELEMENTS));
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
        if (!t->is_matrix) sum += e->kernels->sum_squares(e->grads + t->offset, t->cols);
    }
    if (m->config.tied) return sum;
    int32_t pieces = anepy_pieces(m->tensors[0].rows * m->tensors[0].cols, ANEPY_PIECE_ELEMENTS);
    anepy_engine_run(e, pieces, embedding_piece);
    return sum + sum_up(e->squares.sums, pieces);
}

double anepy_squares_sum(anepy_engine *e, int as_left) {
    if (!as_left || !e->squares.known) compute(e);
    double sum = sum_up(e->squares.rows, e->model->config.vocab_size);
    for (int32_t l = 0; l < e->model->config.n_layers; l++) {
        for (int32_t i = 0; i < DW_N; i++) {
            anepy_gemm_job job = gradient_of(e, &e->room->layers[l].dw[i]);
            sum += sum_up(job.product.squares, anepy_gemm_pieces(&job.product));
        }
    }
    return sum + of_others(e);
}
