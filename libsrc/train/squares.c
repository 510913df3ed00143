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
    e->squares.taking = e->accumulated + 1 == e->squares.step && e->room->metal == NULL &&
                        anepy_last_group(e) && !anepy_on(e, ANEPY_OFFLOAD_DW);
}

static const anepy_tensor *classifier(const anepy_engine *e) {
    return anepy_model_find(e->model, 0, ANEPY_CLASSIFIER);
}

/* A tied classifier's rows are read once more: the embedding's part was added after the product. */
void anepy_squares_end(anepy_engine *e) {
    const anepy_config *c = &e->model->config;
    const float *matrix = anepy_gradient(e, classifier(e));
    int again = c->tied && matrix != NULL;
    if (!e->squares.taking) return;
    for (int32_t t = 0; t < /* mutate: squares-tokens */ anepy_running_tokens(e) && again; t++)
        e->squares.rows[e->run.ids[t]] =
            e->kernels->sum_squares(matrix + (int64_t)e->run.ids[t] * c->dim, c->dim);
    e->squares.known = 1;
}

static void classifier_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_engine *e = context;
    const anepy_config *c = &e->model->config;
    anepy_product whole = {.c = anepy_gradient(e, classifier(e)),
                           .ldc = c->dim,
                           .n = c->dim,
                           .squares = e->squares.rows};
    anepy_gemm_row_squares(
        &e->room->gemm, &whole, index * ANEPY_PIECE_ROWS,
        anepy_min_i32(ANEPY_PIECE_ROWS, c->vocab_size - index * ANEPY_PIECE_ROWS));
}

static double sum_up(const double *sums, int32_t n) {
    double sum = 0.0;
    for (int32_t i = 0; i < n; i++) sum += sums[i];
    return sum;
}

/* Of the gradients that a product writes: read now, or as its pieces left it. */
static double of_product(anepy_engine *e, const anepy_dw_product *p, int now) {
    anepy_gemm_job job = {&e->room->gemm,
                          {.c = anepy_gradient(e, p->of.tensor),
                           .ldc = p->of.tensor->cols,
                           .m = p->of.rows,
                           .n = (int32_t)p->of.tensor->cols,
                           .squares = p->squares}};
    if (now) anepy_pool_run(e->pool, p->pieces, anepy_gemm_piece_squares, &job);
    return sum_up(p->squares, p->pieces);
}

static double of_classifier(anepy_engine *e, int now) {
    int32_t vocab = e->model->config.vocab_size;
    if (anepy_gradient(e, classifier(e)) == NULL) return 0.0;
    if (now) anepy_engine_run(e, anepy_pieces(vocab, ANEPY_PIECE_ROWS), classifier_rows);
    return sum_up(e->squares.rows, vocab);
}

/* Of a piece of a gradient that no product writes, from its first element on. */
typedef struct {
    anepy_engine *e;
    const float *gradient;
    int64_t n;
} whole;

static void whole_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const whole *w = context;
    int64_t at = (int64_t)index * ANEPY_PIECE_ELEMENTS, left = w->n - at;
    w->e->squares.sums[index] =
        w->e->kernels->sum_squares(w->gradient + at, anepy_min_i64(left, ANEPY_PIECE_ELEMENTS));
}

static double of_whole(anepy_engine *e, const float *gradient, int64_t n) {
    whole w = {e, gradient, n};
    int32_t pieces = anepy_pieces(n, ANEPY_PIECE_ELEMENTS);
    anepy_pool_run(e->pool, pieces, whole_piece, &w);
    return sum_up(e->squares.sums, pieces);
}

/* What no product writes: vectors, and an embedding of its own. */
static double of_others(anepy_engine *e) {
    const anepy_model *m = e->model;
    double sum = 0.0, embedding = 0.0;
    for (int32_t i = 0; i < m->tensor_n; i++) {
        const anepy_tensor *t = &m->tensors[i];
        const float *gradient = anepy_gradient(e, t);
        if (gradient == NULL || anepy_model_projects(m, t)) continue;
        if (t->role == ANEPY_EMBEDDING) embedding = of_whole(e, gradient, anepy_tensor_n(t));
        else sum += e->kernels->sum_squares(gradient, t->cols);
    }
    return sum + embedding;
}

double anepy_squares_sum(anepy_engine *e, int as_left) {
    int now = !as_left || !e->squares.known;
    if (e->adapter != NULL) return of_whole(e, anepy_gradients(e), e->model->gradient_n);
    double sum = of_classifier(e, now);
    for (int32_t l = 0; l < e->model->config.n_layers; l++) {
        for (int32_t i = 0; i < DW_N; i++) {
            const anepy_dw *dw = &e->room->layers[l].dw[i];
            for (int32_t p = 0; p < dw->product_n; p++) sum += of_product(e, &dw->products[p], now);
        }
    }
    return sum + of_others(e);
}
