/* programs/mil_baked.c - constants in the weight file: weights, masks, angles and the like.
 *
 * Each is stored once per file and declared once per function. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/weights.h"
#include "programs/mil_writer.h"
#include "runtime/half.h"

#define ONE 0x3c00u
#define MINUS_ONE 0xbc00u

/* Added to masked scores. It is so far below any score that its probability is exactly 0 (exp
 * underflows fp16 at -17), and so near to 0 that scores down to -24000 stay finite where the ANE
 * saturates at 32752. The -65504 of the research programs becomes infinite with any negative score.
 */
#define MASKED (-8192.0f)

enum {
    MATRIX,
    TRANSPOSED,
    VECTOR,
    COLUMN,
    HEAD_SQUARE,
    HEAD_CONV,
    SQUARE,
    ZEROS,
    NO_LOGIT,
    MASK,
    COSINE,
    SINE,
    TURN,
    TURN_CONV,
    PAD,
    UNPAD
};

/* The record with this key; NULL after a failure. *fresh points to the zeroed data of a new record,
 * which the caller fills, else it is NULL. */
static mil_record *find(mil_writer *w, mil_key key, int64_t n, uint16_t **fresh) {
    *fresh = NULL;
    if (w->status != ANEPY_OK) return NULL;
    for (int32_t i = 0; i < w->record_n; i++) {
        const mil_key *k = &w->records[i].key;
        if (k->kind == key.kind && k->a == key.a && k->b == key.b && k->c == key.c)
            return &w->records[i];
    }
    if (w->record_n == w->record_cap) {
        int32_t cap = 2 * w->record_cap + 32;
        mil_record *grown = realloc(w->records, (size_t)cap * sizeof *grown);
        if (grown == NULL) {
            anepy_emit_fail(w, ANEPY_E_MEMORY, "no memory for its list of weights");
            return NULL;
        }
        w->records = grown;
        w->record_cap = cap;
    }
    mil_record *record = &w->records[w->record_n];
    *record = (mil_record){.key = key, .function = -1};
    int32_t status =
        anepy_blob_add(&w->out->blob, ANEPY_BLOB_F16, NULL, (uint64_t)n * 2, &record->offset);
    if (status != ANEPY_OK) {
        w->status = status;
        return NULL;
    }
    w->record_n++;
    *fresh = (uint16_t *)(void *)(w->out->blob.data + record->offset + ANEPY_BLOB_ALIGN);
    return record;
}

static mil_tensor declare(mil_writer *w, mil_record *record, int32_t d0, int32_t d1, int32_t d2,
                          int32_t d3, const char *hint) {
    const int32_t dims[4] = {d0, d1, d2, d3};
    if (record == NULL || w->status != ANEPY_OK) {
        mil_tensor none = {.dims = {d0, d1, d2, d3}};
        return none;
    }
    if (record->function != w->function) {
        record->tensor = anepy_emit_declare_blob(w, dims, record->offset, hint);
        record->function = w->function;
    }
    return record->tensor;
}

/* ------------------------------------------------------------------------------------- weights */

/* Fails if a weight is infinite or NaN in fp16, because that would reach every output. */
static void check_finite(mil_writer *w, const char *name, const uint16_t *data, int64_t n) {
    int bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= (data[i] & 0x7c00) == 0x7c00;
    if (bad)
        anepy_emit_fail(w, ANEPY_E_UNSUPPORTED,
                        "layer %d: a value of %s does not fit fp16 (above 65504, or not a number)",
                        w->layer, name);
}

mil_tensor anepy_emit_baked_matrix(mil_writer *w, const anepy_program_matrix *m, int transposed,
                                   int32_t first, int32_t rows) {
    int64_t offset = anepy_program_offset(m) + (int64_t)first * m->cols,
            n = (int64_t)rows * m->cols;
    uint16_t *fresh;
    mil_record *record =
        find(w, (mil_key){transposed ? TRANSPOSED : MATRIX, offset, rows, m->cols}, n, &fresh);
    if (fresh != NULL) {
        anepy_storage part = anepy_storage_rows(anepy_program_stored(m, w->params), first, rows);
        anepy_weights_to_half(anepy_kernels_get(), fresh, part, transposed);
        check_finite(w, m->name, fresh, n);
    }
    return transposed ? declare(w, record, m->cols, rows, 1, 1, m->name)
                      : declare(w, record, rows, m->cols, 1, 1, m->name);
}

mil_tensor anepy_emit_baked_vector(mil_writer *w, const anepy_program_matrix *m, double factor,
                                   int of_head) {
    uint16_t *fresh;
    mil_record *record = find(w, (mil_key){VECTOR, anepy_program_offset(m), 0, 0}, m->cols, &fresh);
    if (fresh != NULL) {
        const float *values = anepy_weights_vector(anepy_program_stored(m, w->params));
        for (int32_t i = 0; i < m->cols; i++) fresh[i] = anepy_to_half((float)(values[i] * factor));
        check_finite(w, m->name, fresh, m->cols);
    }
    return of_head ? declare(w, record, 1, 1, m->cols, 1, m->name)
                   : declare(w, record, 1, m->cols, 1, 1, m->name);
}

/* ------------------------------------------------------------------------------------ constants */

static void fill(uint16_t *data, int64_t n, uint16_t value) {
    for (int64_t i = 0; data != NULL && i < n; i++) data[i] = value;
}

mil_tensor anepy_emit_ones_column(mil_writer *w, double value) {
    int32_t dim = w->model->config.dim;
    uint16_t *fresh, bits = anepy_to_half((float)value);
    mil_record *record = find(w, (mil_key){COLUMN, dim, bits, 0}, dim, &fresh);
    fill(fresh, dim, bits);
    return declare(w, record, 1, dim, 1, 1, "sum");
}

mil_tensor anepy_emit_head_sum(mil_writer *w, int32_t heads, double value, int as_conv) {
    int32_t head = w->model->head_dim, rows = heads * head, cols = as_conv ? rows : head;
    uint16_t *fresh, bits = anepy_to_half((float)value);
    mil_record *record = find(w, (mil_key){as_conv ? HEAD_CONV : HEAD_SQUARE, heads, head, bits},
                              (int64_t)rows * cols, &fresh);
    for (int32_t i = 0; fresh != NULL && i < rows; i++)
        fill(fresh + (int64_t)i * cols + (as_conv ? i / head * head : 0), head, bits);
    return as_conv ? declare(w, record, rows, rows, 1, 1, "sum")
                   : declare(w, record, 1, heads, head, head, "sum");
}

mil_tensor anepy_emit_ones_square(mil_writer *w, int32_t channels) {
    int64_t n = (int64_t)channels * w->width * w->width;
    uint16_t *fresh;
    mil_record *record = find(w, (mil_key){SQUARE, channels, w->width, 0}, n, &fresh);
    fill(fresh, n, ONE);
    return declare(w, record, 1, channels, w->width, w->width, "ones");
}

mil_tensor anepy_emit_zeros(mil_writer *w, int32_t channels) {
    int64_t n = (int64_t)channels * w->width;
    uint16_t *fresh;
    mil_record *record = find(w, (mil_key){ZEROS, channels, w->width, 0}, n, &fresh);
    return declare(w, record, 1, channels, 1, w->width, "zeros");
}

mil_tensor anepy_emit_masked(mil_writer *w, int32_t channels) {
    int64_t n = (int64_t)channels * w->width;
    uint16_t *fresh;
    mil_record *record = find(w, (mil_key){NO_LOGIT, channels, w->width, 0}, n, &fresh);
    fill(fresh, n, anepy_to_half(MASKED));
    return declare(w, record, 1, channels, 1, w->width, "masked");
}

mil_tensor anepy_emit_causal_mask(mil_writer *w) {
    int64_t width = w->width;
    uint16_t *fresh, masked = anepy_to_half(MASKED);
    mil_record *record = find(w, (mil_key){MASK, width, 0, 0}, width * width, &fresh);
    for (int64_t q = 0; fresh != NULL && q < width; q++)
        for (int64_t t = q + 1; t < width; t++) fresh[q * width + t] = masked;
    return declare(w, record, 1, 1, w->width, w->width, "mask");
}

mil_tensor anepy_emit_angles(mil_writer *w, int sine) {
    int64_t width = w->width, head = w->model->head_dim;
    uint16_t *fresh;
    mil_record *record =
        find(w, (mil_key){sine ? SINE : COSINE, head, width, 0}, head * width, &fresh);
    for (int64_t i = 0; fresh != NULL && i < head; i++) {
        double frequency = anepy_rope_frequency(w->model, (int32_t)i / 2);
        for (int64_t s = 0; s < width; s++) {
            double angle = (double)s * frequency;
            fresh[i * width + s] = anepy_to_half((float)(sine ? sin(angle) : cos(angle)));
        }
    }
    return declare(w, record, 1, 1, (int32_t)head, (int32_t)width, sine ? "sine" : "cosine");
}

mil_tensor anepy_emit_quarter_turn(mil_writer *w, int32_t heads, int as_conv) {
    int32_t head = w->model->head_dim, rows = heads * head, cols = as_conv ? rows : head;
    uint16_t *fresh;
    mil_record *record = find(w, (mil_key){as_conv ? TURN_CONV : TURN, heads, head, 0},
                              (int64_t)rows * cols, &fresh);
    /* Turns each pair by 90 degrees: channels 2i, 2i + 1 become minus channel 2i + 1, and channel
     * 2i. */
    for (int32_t i = 0; fresh != NULL && i < rows; i += 2) {
        int32_t col = as_conv ? i : i % head;
        fresh[(int64_t)i * cols + col + 1] = MINUS_ONE;
        fresh[(int64_t)(i + 1) * cols + col] = ONE;
    }
    return as_conv ? declare(w, record, rows, rows, 1, 1, "turn")
                   : declare(w, record, 1, heads, head, head, "turn");
}

mil_tensor anepy_emit_head_padding(mil_writer *w, int32_t heads, int32_t padded, int remove) {
    int32_t head = w->model->head_dim, flat = heads * head, wide = heads * padded;
    uint16_t *fresh;
    mil_record *record =
        find(w, (mil_key){remove ? UNPAD : PAD, heads, head, padded}, (int64_t)wide * flat, &fresh);
    for (int64_t i = 0; fresh != NULL && i < flat; i++) {
        int64_t j = i / head * padded + i % head;
        fresh[remove ? i * wide + j : j * flat + i] = ONE;
    }
    return remove ? declare(w, record, flat, wide, 1, 1, "unpad")
                  : declare(w, record, wide, flat, 1, 1, "pad");
}
