/* device/sim/activations.h - activations as tables of 33 points. */
#ifndef ANEPY_DEVICE_SIM_ACTIVATIONS_H
#define ANEPY_DEVICE_SIM_ACTIVATIONS_H

#include <stdint.h>

#include "kernels/kernels.h"

typedef enum {
    MIL_TABLE_SIGMOID,
    MIL_TABLE_TANH,
    MIL_TABLE_ERF,
    MIL_TABLE_SIN,
    MIL_TABLE_EXP,
    MIL_TABLE_EXP2,
    MIL_TABLE_LOG,
    MIL_TABLE_SQRT,
    MIL_TABLE_RSQRT,
    MIL_TABLE_INVERSE,
    MIL_TABLE_SILU,
    MIL_TABLE_GELU,
    MIL_TABLE_N
} mil_table;

#define MIL_TABLE_POINTS ANEPY_CURVE_POINTS

/* Computes the numbers of all tables, [MIL_TABLE_N][33]. */
void mil_tables_make(float *tables);
/* y[i] = f(x[i]) for numbers of fp16, not yet rounded to one. y may be x. */
void mil_table_run(const anepy_fixed_kernels *kernels, const float *tables, mil_table which,
                   float *y, const float *x, int64_t n);
void mil_table_softmax(const anepy_fixed_kernels *kernels, const float *tables, float *row,
                       int64_t n);

#endif
