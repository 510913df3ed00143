/* train/moments.h - the optimizer's moments, stored as float32 or, in half the memory, as bf16.
 *
 * bf16 has steps of 0.4 to 0.8 %, and an update with beta2 = 0.999 changes a moment by less:
 * rounded to nearest it would stay what it once was. So it is rounded to either neighbour at
 * random, in the mean to the right number. Chance is a hash of the element, the update and the
 * moment: equal runs have equal bits, on any number of threads and after a resume. An update
 * computes with the moments before they are rounded. */
#ifndef ANEPY_TRAIN_MOMENTS_H
#define ANEPY_TRAIN_MOMENTS_H

#include "runtime/half.h"
#include "train/engine.h"

enum { ANEPY_FIRST_MOMENT, ANEPY_SECOND_MOMENT };

/* What chance depends on beside the element. */
static inline uint32_t anepy_moment_key(const anepy_engine *e, int which) {
    return anepy_mixed((uint32_t)e->updates * 2u + (uint32_t)which);
}

static inline float anepy_moment(const anepy_engine *e, const void *moments, int64_t at) {
    return e->bf16_moments ? anepy_from_bf16(((const uint16_t *)moments)[at])
                           : ((const float *)moments)[at];
}

static inline void anepy_moment_set(const anepy_engine *e, void *moments, int64_t at, float value,
                                    uint32_t key) {
    if (e->bf16_moments)
        ((uint16_t *)moments)[at] = anepy_to_bf16_randomly(value, anepy_mixed((uint32_t)at ^ key));
    else ((float *)moments)[at] = value;
}

#endif
