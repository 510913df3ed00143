/* guard.c - slots of memory between two unreadable pages. */
#define _GNU_SOURCE
#include "guard.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

#define PATTERN 0x7fc5a5a5u /* a NaN no computation produces */
#define MARGIN 256          /* floats of pattern beside a buffer */

typedef struct {
    float *low, *high; /* readable: [low, high) */
    float *at;
    int64_t n;
} slot;

static slot slots[GUARD_N];
static int taken;

static void make(slot *s) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t size = ((size_t)(GUARD_MAX + 4 * MARGIN) * sizeof(float) + page - 1) / page * page;
    char *base = mmap(NULL, size + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (base == MAP_FAILED || mprotect(base + page, size, PROT_READ | PROT_WRITE) != 0) {
        fprintf(stderr, "no memory for guarded buffers\n");
        exit(2);
    }
    s->low = (float *)(void *)(base + page);
    s->high = (float *)(void *)(base + page + size);
}

static void paint(float *from, const float *to) {
    for (uint32_t pattern = PATTERN; from < to; from++) memcpy(from, &pattern, sizeof pattern);
}

static int painted(const float *from, const float *to) {
    for (; from < to; from++)
        if (to_bits(*from) != PATTERN) return 0;
    return 1;
}

static float *lower(const slot *s) { return s->at - s->low > MARGIN ? s->at - MARGIN : s->low; }

static float *upper(const slot *s) {
    float *end = s->at + s->n;
    return s->high - end > MARGIN ? end + MARGIN : s->high;
}

float *guard_take(int64_t n, int place) {
    if (taken == GUARD_N || n > GUARD_MAX) {
        fprintf(stderr, "guard_take: %d buffers taken, %lld floats asked for\n", taken,
                (long long)n);
        exit(2);
    }
    slot *s = &slots[taken++];
    if (s->low == NULL) make(s);
    s->n = n;
    s->at = place == GUARD_START ? s->low : place == GUARD_END ? s->high - n : s->low + MARGIN + 1;
    paint(lower(s), upper(s));
    return s->at;
}

uint16_t *guard_halves(int64_t n, int place) {
    uint16_t *at = (uint16_t *)(void *)guard_take((n + 1) / 2, place);
    return at + (place == GUARD_END ? n % 2 : 0); /* the odd one ends at the page */
}

int guard_intact(void) {
    for (const slot *s = slots; s < slots + taken; s++)
        if (!painted(lower(s), s->at) || !painted(s->at + s->n, upper(s))) return 0;
    return 1;
}

void guard_reset(void) { taken = 0; }

int64_t span(int64_t rows, int64_t cols, int64_t ld) {
    return rows > 0 ? (rows - 1) * ld + cols : 0;
}

float *guard_matrix(int64_t rows, int64_t cols, int64_t ld, int place, float (*next)(void)) {
    float *x = guard_take(span(rows, cols, ld), place);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) x[i * ld + j] = next();
    return x;
}

int gaps_intact(const float *x, int64_t rows, int64_t cols, int64_t ld) {
    for (int64_t i = 0; i + 1 < rows; i++)
        if (!painted(x + i * ld + cols, x + (i + 1) * ld)) return 0;
    return 1;
}

float *guard_copy(const float *x, int64_t n, int place) {
    float *y = guard_take(n, place);
    memcpy(y, x, (size_t)n * sizeof(float));
    return y;
}
