/* guard.h - float buffers that an access out of bounds cannot leave unnoticed.
 *
 * A buffer either starts right behind an unreadable page, ends right before one, or lies shifted by
 * one element from every alignment; sides without such a page carry a pattern that is checked.
 * Buffers come filled with the pattern, which is a NaN, so that using an element nobody wrote
 * shows. They are taken in any number up to GUARD_N and all given back at once. */
#ifndef GUARD_H
#define GUARD_H

#include "runtime/common.h"

enum { GUARD_START, GUARD_END, GUARD_SHIFTED, GUARD_PLACES };

#define GUARD_N 16
#define GUARD_MAX ((int64_t)1 << 20) /* floats in one buffer */

/* n floats; n = 0 gives a pointer that must not be followed. */
float *guard_take(int64_t n, int place);

/* n binary16 numbers between the same guards. */
uint16_t *guard_halves(int64_t n, int place);

/* Whether the pattern around every taken buffer is whole. */
int guard_intact(void);

/* Gives all buffers back. */
void guard_reset(void);

/* ------------------------------------------------------------------- matrices with gaps between */

/* Floats from the first to the last element of [rows, cols] with rows `ld` apart. */
int64_t span(int64_t rows, int64_t cols, int64_t ld);

/* A guarded matrix filled by next(), the gaps between its rows left as the pattern. */
float *guard_matrix(int64_t rows, int64_t cols, int64_t ld, int place, float (*next)(void));

/* Whether nobody wrote between the rows. */
int gaps_intact(const float *x, int64_t rows, int64_t cols, int64_t ld);

/* A second, equal matrix. */
float *guard_copy(const float *x, int64_t n, int place);

#endif
