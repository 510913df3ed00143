/* train/adapter.c - dB = dy (scale A x)^T and dA = (scale B^T dy) x^T.
 *
 * One factor has as many rows as the rank, and stays in the cache; each row of the other, dy or x,
 * is read once, where it lies, and multiplied with all of these. Always in float32. */
#include "train/adapter.h"

#define ROWS ANEPY_PIECE_ROWS

static int32_t a_pieces(const anepy_dw *dw) {
    return dw->adapter.part_n > 0 ? anepy_pieces(dw->adapter.a->cols, ROWS) : 0;
}

static int32_t b_pieces(const anepy_dw *dw, int32_t part) {
    return anepy_pieces(dw->adapter.parts[part].b->rows, ROWS);
}

int32_t anepy_adapter_pieces(const anepy_dw *dw) {
    int32_t n = a_pieces(dw);
    for (int32_t i = 0; i < dw->adapter.part_n; i++) n += b_pieces(dw, i);
    return n;
}

/* Row r of a factor as float32. */
static const float *row_of(const anepy_engine *e, const anepy_factor *f, int32_t r, float *room) {
    int64_t at = (int64_t)r * e->room->width;
    if (f->rows != NULL) return f->rows + at;
    e->kernels->from_bf16(room, f->rounded + at, anepy_reduction(e));
    return room;
}

/* out = or += values */
static void put(const anepy_engine *e, float *out, const float *values, int32_t n) {
    for (int32_t i = 0; i < n; i++) out[i] = anepy_adds(e) ? out[i] + values[i] : values[i];
}

/* Columns of dA for up to 64 rows of x. */
static void a_piece(const anepy_dw *dw, int32_t index, float *room) {
    const anepy_engine *e = dw->engine;
    const anepy_dw_adapter *adapter = &dw->adapter;
    int32_t in = (int32_t)adapter->a->cols, first = index * ROWS;
    int32_t columns = anepy_min_i32(ROWS, in - first), all = adapter->backward.channels;
    float *gradient = anepy_gradient(e, adapter->a) + first, block[ROWS * ROWS], row[ROWS];
    for (int32_t j = 0; j < all; j += ROWS) {
        int32_t rows = anepy_min_i32(ROWS, all - j);
        for (int32_t c = 0; c < columns; c++)
            e->kernels->gemv(block + c * ROWS, adapter->backward_rows + (int64_t)j * e->room->width,
                             e->room->width, row_of(e, &adapter->x, first + c, room), rows,
                             anepy_reduction(e));
        for (int32_t r = 0; r < rows; r++) {
            for (int32_t c = 0; c < columns; c++) row[c] = block[c * ROWS + r];
            put(e, gradient + (int64_t)(j + r) * in, row, columns);
        }
    }
}

/* Up to 64 rows of a dB. */
static void b_piece(const anepy_dw *dw, int32_t part, int32_t index, float *room) {
    const anepy_engine *e = dw->engine;
    const anepy_dw_adapter *adapter = &dw->adapter;
    const anepy_tensor *b = adapter->parts[part].b;
    const float *low =
        adapter->forward_rows + (int64_t)adapter->parts[part].low_row * e->room->width;
    int32_t rank = (int32_t)b->cols, end = anepy_min_i32((int32_t)b->rows, (index + 1) * ROWS);
    float values[ROWS];
    for (int32_t r = index * ROWS; r < end; r++) {
        const float *dy = row_of(e, &adapter->dy, adapter->parts[part].row + r, room);
        float *gradient = anepy_gradient(e, b) + (int64_t)r * rank;
        for (int32_t j = 0; j < rank; j += ROWS) {
            int32_t n = anepy_min_i32(ROWS, rank - j);
            e->kernels->gemv(values, low + (int64_t)j * e->room->width, e->room->width, dy, n,
                             anepy_reduction(e));
            put(e, gradient + j, values, n);
        }
    }
}

void anepy_adapter_piece(const anepy_dw *dw, int32_t index, int32_t worker) {
    const anepy_gemm *gemm = &dw->engine->room->gemm;
    float *room = gemm->scratch + worker * gemm->scratch_n;
    if (index < a_pieces(dw)) {
        a_piece(dw, index, room);
        return;
    }
    index -= a_pieces(dw);
    int32_t part = 0;
    for (; index >= b_pieces(dw, part); part++) index -= b_pieces(dw, part);
    b_piece(dw, part, index, room);
}
