/* runtime/storage.h - how weights lie in memory: model/ describes tensors with it, kernels/ read
 * it. */
#ifndef ANEPY_RUNTIME_STORAGE_H
#define ANEPY_RUNTIME_STORAGE_H

#include "runtime/common.h"

/* How one number is stored. */
typedef enum { ANEPY_F32, ANEPY_F16, ANEPY_BF16, ANEPY_Q8 } anepy_dtype;

/* ANEPY_Q8, as GGUF's Q8_0: 32 numbers of a row share a scale, number i is scale * value[i]. A row
 * is a multiple of 32 long; blocks lie behind each other. */
#define ANEPY_Q8_N 32
typedef struct {
    uint16_t scale; /* binary16 */
    int8_t value[ANEPY_Q8_N];
} anepy_q8;

/* Of one number; ANEPY_Q8 has only whole blocks. */
ANEPY_INLINE int64_t anepy_dtype_nbytes(anepy_dtype dtype) { return dtype == ANEPY_F32 ? 4 : 2; }

/* Of n numbers. */
ANEPY_INLINE int64_t anepy_stored_nbytes(anepy_dtype dtype, int64_t n) {
    return dtype == ANEPY_Q8 ? n / ANEPY_Q8_N * (int64_t)sizeof(anepy_q8)
                             : n * anepy_dtype_nbytes(dtype);
}

/* A matrix [rows, cols], row after row; a vector is one row. */
typedef struct {
    const void *data;
    anepy_dtype dtype;
    int32_t rows, cols;
} anepy_storage;

/* Rows [first, first + rows) of a matrix. */
ANEPY_INLINE anepy_storage anepy_storage_rows(anepy_storage s, int32_t first, int32_t rows) {
    int64_t nbytes = anepy_stored_nbytes(s.dtype, (int64_t)first * s.cols);
    return (anepy_storage){(const char *)s.data + nbytes, s.dtype, rows, s.cols};
}

/* Adds the rows of `next` if they lie right behind, so that one product covers both; returns
 * whether they do. */
ANEPY_INLINE int anepy_storage_extend(anepy_storage *s, anepy_storage next) {
    anepy_storage behind = anepy_storage_rows(*s, s->rows, next.rows);
    if (behind.data != next.data || behind.dtype != next.dtype || behind.cols != next.cols)
        return 0;
    s->rows += next.rows;
    return 1;
}

#endif
