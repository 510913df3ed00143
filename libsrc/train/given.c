/* train/given.c - weight gradients from the device. */
#include "train/given.h"

#include <stdatomic.h>
#include <string.h>

#include "train/wiring.h"

#define ROWS ANEPY_GIVEN_ROWS
#define COLS ANEPY_COLUMNS
#define INFINITE 0x7c00u

/* ------------------------------------------------------------------------------------- which */

static void add_part(anepy_engine *e, anepy_node *node, int32_t tensor, int32_t role,
                     int32_t first_row, int32_t transposed) {
    anepy_given *g = &node->given;
    const anepy_program_tensor *t = &node->program.tensors[tensor];
    const anepy_tensor *weight = anepy_model_find(e->model, node->layer, role);
    if (anepy_gradient(e, weight) == NULL) return;
    g->parts[g->part_n].tensor = weight;
    g->parts[g->part_n].channel = t->channel;
    g->parts[g->part_n].rows = t->channels;
    g->parts[g->part_n].first_row = first_row;
    g->parts[g->part_n++].transposed = transposed;
    g->pieces += anepy_pieces(t->channels, ROWS);
}

static void find_parts(anepy_engine *e, anepy_node *node) {
    static const int32_t ROLES[] = {ANEPY_WQ, ANEPY_WK, ANEPY_WV, ANEPY_WO,
                                    ANEPY_W1, ANEPY_W3, ANEPY_W2};
    node->given.engine = e;
    node->given.surface = node->output;
    if (node->program.id == ANEPY_CLASSIFIER_DW)
        add_part(e, node, CLASSIFIER_DW_OUTPUT, ANEPY_CLASSIFIER, node->program.first_row, 0);
    if (node->program.id != ANEPY_LAYER_DW) return;
    for (int32_t i = 0; i < ANEPY_GIVEN_PARTS; i++)
        add_part(e, node, LAYER_DW_WQ + i, ROLES[i], 0,
                 ROLES[i] == ANEPY_WO || ROLES[i] == ANEPY_W2);
}

void anepy_given_wire(anepy_engine *e) {
    for (int32_t i = 0; i < e->room->node_n; i++) find_parts(e, &e->room->nodes[i]);
}

/* ---------------------------------------------------------------------------------- are finite */

static int finite(const uint16_t *x, int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= (x[i] & INFINITE) == INFINITE;
    return bad == 0;
}

typedef struct {
    anepy_engine *e;
    const uint16_t *rows;
    int32_t n, width;
} check_task;

static void check_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const check_task *t = context;
    int32_t rows = anepy_min_i32(ROWS, t->n - index * ROWS);
    if (!finite(t->rows + (int64_t)index * ROWS * t->width, (int64_t)rows * t->width))
        atomic_store(&t->e->room->overflow, 1);
}

/* Gradients that enter the products: on the ANE an infinity that goes into a program may come out
 * as a number (docs/neural-engine.md#wrong-results). */
static int32_t check_inputs(anepy_engine *e, const anepy_node *node) {
    static const int32_t OF_LAYER[] = {LAYER_DW_DQ,  LAYER_DW_DK,  LAYER_DW_DV, LAYER_DW_DX2,
                                       LAYER_DW_DH1, LAYER_DW_DH3, LAYER_DW_DY};
    static const int32_t OF_CLASSIFIER[] = {CLASSIFIER_DW_DLOGITS};
    const anepy_device_ops *ops = e->room->device->ops;
    int layer = node->program.id == ANEPY_LAYER_DW;
    const int32_t *tensors = layer ? OF_LAYER : OF_CLASSIFIER;
    for (int32_t i = 0; i < (layer ? 7 : 1); i++) {
        const anepy_link *link = &node->links[tensors[i]];
        anepy_surface *s = link->source;
        ANEPY_TRY(ops->lock(s, 0));
        check_task task = {e, (const uint16_t *)s->data + (int64_t)link->channel * s->width,
                           node->program.tensors[tensors[i]].channels, s->width};
        anepy_pool_run(e->pool, anepy_pieces(task.n, ROWS), check_piece, &task);
        ANEPY_TRY(ops->unlock(s, 0));
    }
    return ANEPY_OK;
}

/* --------------------------------------------------------------------------- to the gradients */

/* n values to where they belong. */
static void take(const anepy_given *g, float *to, float *values, int64_t n) {
    const anepy_kernels *kernels = g->engine->kernels;
    if (!g->adds) {
        memcpy(to, values, (size_t)n * sizeof(float));
        return;
    }
    if (g->sign < 0) kernels->scale(values, g->sign, n);
    kernels->add(to, to, values, n);
}

static void take_rows(const anepy_given *g, float *to, const uint16_t *from, int32_t rows,
                      int64_t columns) {
    float values[8 * COLS];
    for (int32_t r = 0; r < rows; r++) {
        for (int64_t at = 0; at < columns; at += 8 * COLS) {
            int64_t n = anepy_min_i64(8 * COLS, columns - at);
            g->engine->kernels->from_half(values, from + (int64_t)r * g->surface->width + at, n);
            take(g, to + r * columns + at, values, n);
        }
    }
}

/* Rows as columns of a gradient with rows of ld. */
static void take_columns(const anepy_given *g, float *to, const uint16_t *from, int32_t rows,
                         int32_t columns, int64_t ld) {
    float block[ROWS * COLS], turned[ROWS * COLS];
    for (int32_t at = 0; at < columns; at += COLS) {
        int32_t n = anepy_min_i32(COLS, columns - at);
        for (int32_t r = 0; r < rows; r++)
            g->engine->kernels->from_half(block + r * COLS,
                                          from + (int64_t)r * g->surface->width + at, n);
        g->engine->kernels->transpose_panel(turned, block, COLS, rows, n);
        for (int32_t c = 0; c < n; c++) take(g, to + (at + c) * ld, turned + c * ROWS, rows);
    }
}

static void take_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    anepy_given *g = context;
    anepy_engine *e = g->engine;
    int32_t part = 0, row = index, dim = e->model->config.dim;
    for (; row >= anepy_pieces(g->parts[part].rows, ROWS); part++)
        row -= anepy_pieces(g->parts[part].rows, ROWS);
    row *= ROWS;
    int32_t rows = anepy_min_i32(ROWS, g->parts[part].rows - row), first = g->parts[part].first_row;
    const anepy_tensor *tensor = g->parts[part].tensor;
    const uint16_t *from = (const uint16_t *)g->surface->data +
                           (int64_t)(g->parts[part].channel + row) * g->surface->width;
    float *to = anepy_gradient(e, tensor);
    if (g->sign < 0) {
        if (!g->taken[index]) return;
    } else if (!finite(from, (int64_t)rows * g->surface->width)) {
        g->taken[index] = 0;
        atomic_store(&e->room->overflow, 1);
        return;
    }
    g->taken[index] = 1;
    if (g->parts[part].transposed) take_columns(g, to + row, from, rows, dim, tensor->cols);
    else take_rows(g, to + (int64_t)(first + row) * dim, from, rows, dim);
}

/* ------------------------------------------------------------------------------ for the engine */

void anepy_given_begin(anepy_engine *e) { atomic_store(&e->room->overflow, 0); }

int32_t anepy_given_compute(anepy_engine *e, anepy_node *node, double *mark) {
    if (node == NULL || node->given.part_n == 0) return ANEPY_OK;
    anepy_given *g = &node->given;
    ANEPY_TRY(check_inputs(e, node));
    anepy_count(mark, &e->run.stats.elementwise_ms);
    ANEPY_TRY(anepy_evaluate(e, node, mark));
    ANEPY_TRY(e->room->device->ops->lock(g->surface, 0));
    g->started = 1;
    g->adds = anepy_adds(e);
    g->sign = 1.0f;
    e->run.dw_started++;
    for (int32_t i = 0; i < g->part_n; i++)
        e->run.stats.dw_nbytes += g->parts[i].rows * (int64_t)e->model->config.dim *
                                  (int64_t)(sizeof(uint16_t) + (g->adds ? 2 : 1) * sizeof(float));
    anepy_pool_submit(e->pool, &g->loop, g->pieces, take_piece, g, 0);
    anepy_count(mark, &e->run.stats.io_ms);
    return ANEPY_OK;
}

void anepy_given_wait(anepy_engine *e) {
    for (int32_t i = 0; i < e->room->node_n; i++)
        if (e->room->nodes[i].given.started)
            anepy_pool_wait_for(e->pool, &e->room->nodes[i].given.loop);
}

int anepy_given_finite(const anepy_engine *e) { return !atomic_load(&e->room->overflow); }

int32_t anepy_given_end(anepy_engine *e, int back) {
    int32_t status = ANEPY_OK;
    anepy_given_wait(e);
    for (int32_t i = 0; i < e->room->node_n; i++) {
        anepy_given *g = &e->room->nodes[i].given;
        if (!g->started) continue;
        g->sign = -1.0f;
        if (back && g->adds) anepy_pool_run(e->pool, g->pieces, take_piece, g);
        if (e->room->device->ops->unlock(g->surface, 0) != ANEPY_OK) status = ANEPY_E_DEVICE;
        g->started = 0;
    }
    return status;
}
