/* decode/project.c - projections of one token or of several.
 *
 * Every product of one token has one column, so the time is that of reading the weights once, as
 * they lie in memory: each thread goes through neighbouring rows, nothing is packed. */
#include "decode/decoder.h"

#define PIECE_BYTES 65536 /* of weights: 2 us, so that threads end together */

typedef struct {
    const anepy_decoder *d;
    float *y;
    anepy_storage w;
    const float *x;
    int32_t piece; /* rows of one */
} product;

static void product_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const product *p = context;
    int32_t first = index * p->piece, rows = anepy_min_i32(p->piece, p->w.rows - first);
    anepy_weights_gemv(p->d->kernels, p->y + first, anepy_storage_rows(p->w, first, rows), p->x);
}

static void multiply(const anepy_decoder *d, float *y, anepy_storage w, const float *x,
                     int32_t columns) {
    if (columns > 1) {
        anepy_product many = {.c = y, .ldc = columns, .b = x, .ldb = columns, .n = columns};
        anepy_weights_factor(&many, w, 0);
        anepy_gemm_run(&d->gemm, &many);
        return;
    }
    int64_t row_nbytes = anepy_stored_nbytes(w.dtype, w.cols);
    int32_t piece = anepy_max_i32(1, (int32_t)(PIECE_BYTES / row_nbytes));
    product p = {d, y, w, x, piece};
    anepy_pool_stream(d->pool, (w.rows + piece - 1) / piece, product_rows, &p);
}

static void add_bias(const anepy_decoder *d, float *y, const float *bias, int32_t rows,
                     int32_t columns) {
    if (columns == 1) {
        d->kernels->add(y, y, bias, rows);
        return;
    }
    for (int32_t r = 0; r < rows; r++, y += columns)
        for (int32_t j = 0; j < columns; j++) y[j] += bias[r];
}

/* Weights that lie behind each other are one product. */
void anepy_decoder_project(const anepy_decoder *d, float *y, int32_t layer, int32_t role,
                           int32_t count, const float *x, int32_t columns) {
    anepy_storage w = {0};
    float *out = y;
    for (int32_t i = 0; i < count; i++) {
        anepy_projection p = anepy_model_projection(d->model, layer, role + i);
        anepy_storage next = anepy_stored(p.weight, d->params);
        if (i > 0 && anepy_storage_extend(&w, next)) continue;
        if (i > 0) multiply(d, y, w, x, columns);
        y += (int64_t)w.rows * columns;
        w = next;
    }
    multiply(d, y, w, x, columns);
    for (int32_t i = 0; i < count; i++) {
        anepy_projection p = anepy_model_projection(d->model, layer, role + i);
        if (p.bias != NULL)
            add_bias(d, out, anepy_weights_vector(anepy_stored(p.bias, d->params)), p.out, columns);
        out += (int64_t)p.out * columns;
    }
}
