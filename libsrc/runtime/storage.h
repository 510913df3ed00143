/* runtime/storage.h - how weights lie in memory: model/ describes tensors with it, kernels/ read
 * it. */
#ifndef ANEPY_RUNTIME_STORAGE_H
#define ANEPY_RUNTIME_STORAGE_H

#include "runtime/common.h"

/* How one number is stored. */
typedef enum { ANEPY_F32, ANEPY_F16, ANEPY_BF16 } anepy_dtype;

ANEPY_INLINE int64_t anepy_dtype_nbytes(anepy_dtype dtype) { return dtype == ANEPY_F32 ? 4 : 2; }

/* A matrix [rows, cols], row after row; a vector is one row. */
typedef struct {
    const void *data;
    anepy_dtype dtype;
    int32_t rows, cols;
} anepy_storage;

/* Rows [first, first + rows) of a matrix. */
ANEPY_INLINE anepy_storage anepy_storage_rows(anepy_storage s, int32_t first, int32_t rows) {
    int64_t nbytes = (int64_t)first * s.cols * anepy_dtype_nbytes(s.dtype);
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
