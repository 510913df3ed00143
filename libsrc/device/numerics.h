/* device/numerics.h - the arithmetics that reports ascribe to the Neural Engine, by name.
 *
 * docs/neural-engine.md#numerics says who measured which rule on which chip, and how far to trust
 * it. One of them is chosen by "numerics=NAME" behind the colon of a device. */
#ifndef ANEPY_DEVICE_NUMERICS_H
#define ANEPY_DEVICE_NUMERICS_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    const char *name;
    uint8_t fixed;  /* sums of products are fixed point, infinite from 32768 on; else fp32 */
    uint8_t away;   /* halves are rounded away from zero, and codes of infinity and NaN are numbers;
                       else to even, IEEE */
    uint8_t flush;  /* subnormal numbers become zero */
    uint8_t tables; /* activations are tables of 33 points; else exact */
} anepy_numerics;

/* 0: the default, the best supported on every chip; NULL beyond the last. */
const anepy_numerics *anepy_numerics_at(int32_t index);
int32_t anepy_numerics_find(const char *name, size_t n); /* -1: unknown */

#endif
