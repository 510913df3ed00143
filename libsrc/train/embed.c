/* train/embed.c - token embeddings: rows of [vocab, dim] to columns of [dim, width] and back. */
#include "train/embed.h"

#include <string.h>

#include "kernels/weights.h"

#define COLS ANEPY_COLUMNS

/* Without vector_embed: element by element, as the research programs do
 * (docs/neural-engine.md#research-programs). */
static void gather_scalar(anepy_engine *e) {
    const float *table = anepy_weights(e, 0, ANEPY_EMBEDDING).data;
    float *x = e->room->layers[0].x.data;
    int64_t dim = e->model->config.dim;
    for (int64_t d = 0; d < dim; d++, x += e->room->width) {
        const int32_t *token = e->run.ids;
        for (int32_t start = 0; start < e->run.columns; start += e->run.padded) {
            for (int32_t s = 0; s < e->run.tokens; s++) x[start + s] = table[*token++ * dim + d];
            for (int32_t s = e->run.tokens; s < e->run.padded; s++) x[start + s] = 0.0f;
        }
    }
}

static float *gradient_of(const anepy_engine *e) {
    return anepy_gradient(e, anepy_model_find(e->model, 0, ANEPY_EMBEDDING));
}

static void scatter_scalar(anepy_engine *e) {
    float *gradient = gradient_of(e);
    const float *dx = e->room->dx.data;
    int64_t dim = e->model->config.dim;
    for (int64_t d = 0; d < dim; d++, dx += e->room->width) {
        const int32_t *token = e->run.ids;
        for (int32_t start = 0; start < e->run.columns; start += e->run.padded)
            for (int32_t s = 0; s < e->run.tokens; s++)
                gradient[*token++ * dim + d] += dx[start + s];
    }
}

/* With vector_embed: 64 rows x 64 channels are copied together and transposed as a block. */
static void gather_block(void *context, int32_t index, int32_t worker) {
    (void)worker;
    anepy_engine *e = context;
    anepy_storage table = anepy_weights(e, 0, ANEPY_EMBEDDING);
    int32_t dim = e->model->config.dim, panels = e->run.columns / COLS;
    int32_t first = index % panels * COLS, d0 = index / panels * COLS;
    int32_t depth = anepy_min_i32(COLS, dim - d0);
    anepy_span tokens = anepy_span_at(e, first);
    float block[COLS * COLS], transposed[COLS * COLS];
    for (int32_t j = 0; j < tokens.count; j++)
        anepy_weights_read(e->kernels, block + j * COLS, table, e->run.ids[tokens.first + j], d0,
                           depth);
    e->kernels->transpose_panel(transposed, block, COLS, tokens.count, depth);
    float *x = (float *)e->room->layers[0].x.data + first;
    for (int32_t d = 0; d < depth; d++)
        memcpy(x + (int64_t)(d0 + d) * e->room->width, transposed + d * COLS, COLS * sizeof(float));
}

/* A piece owns 64 channels of every row, so equal tokens never meet on two threads. */
static void scatter_block(void *context, int32_t index, int32_t worker) {
    (void)worker;
    anepy_engine *e = context;
    int32_t dim = e->model->config.dim, d0 = index * COLS, depth = anepy_min_i32(COLS, dim - d0);
    float *gradient = gradient_of(e) + d0;
    const float *dx = (const float *)e->room->dx.data + (int64_t)d0 * e->room->width;
    float transposed[COLS * COLS];
    for (int32_t s0 = 0; s0 < anepy_reduction(e); s0 += COLS) {
        anepy_span tokens = anepy_span_at(e, s0);
        e->kernels->transpose_panel(transposed, dx + s0, e->room->width, depth, tokens.count);
        for (int32_t s = 0; s < tokens.count; s++) {
            float *row = gradient + (int64_t)e->run.ids[tokens.first + s] * dim;
            e->kernels->add(row, row, transposed + s * COLS, depth);
        }
    }
}

void anepy_embed(anepy_engine *e) {
    int32_t blocks = (e->model->config.dim + COLS - 1) / COLS * (e->run.columns / COLS);
    int plain = anepy_weights(e, 0, ANEPY_EMBEDDING).dtype == ANEPY_F32;
    anepy_touch(e, e->model->config.dim, 2);
    if (anepy_on(e, ANEPY_VECTOR_EMBED) || !plain) anepy_engine_run(e, blocks, gather_block);
    else gather_scalar(e);
}

static void clear_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    anepy_engine *e = context;
    const anepy_config *c = &e->model->config;
    int32_t rows = anepy_min_i32(COLS, c->vocab_size - index * COLS);
    memset(gradient_of(e) + (int64_t)index * COLS * c->dim, 0,
           (size_t)rows * (size_t)c->dim * sizeof(float));
}

void anepy_embed_clear(anepy_engine *e) {
    const anepy_config *c = &e->model->config;
    if (gradient_of(e) != NULL && !anepy_adds(e) && !c->tied)
        anepy_engine_run(e, (c->vocab_size + COLS - 1) / COLS, clear_rows);
}

int anepy_embed_holds(const anepy_engine *e) { return e->hold_embedding && anepy_last_group(e); }

void anepy_embed_held(anepy_engine *e, float *rows) {
    const float *dx = e->room->dx.data;
    int64_t dim = e->model->config.dim, width = e->room->width;
    for (int32_t start = 0; start < e->run.columns; start += e->run.padded)
        for (int32_t s = 0; s < e->run.tokens; s++, rows += dim)
            for (int64_t d = 0; d < dim; d++) rows[d] = dx[d * width + start + s];
}

void anepy_embed_backward(anepy_engine *e) {
    if (gradient_of(e) == NULL || anepy_embed_holds(e)) return;
    anepy_touch(e, e->model->config.dim, 3);
    if (anepy_on(e, ANEPY_VECTOR_EMBED))
        anepy_engine_run(e, (e->model->config.dim + COLS - 1) / COLS, scatter_block);
    else scatter_scalar(e);
}
