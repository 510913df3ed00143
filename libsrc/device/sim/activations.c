/* device/sim/activations.c - activations as the Neural Engine computes them: tables of 33 numbers
 * of fp16 with straight lines between them (docs/neural-engine.md#activations).
 *
 * Symmetry, and the exponent of the argument, keep the range of a table small. Doubles hold every
 * step exactly, so that the bits do not depend on the compiler; where the hardware rounds between
 * two steps, to_half does. */
#include "device/sim/activations.h"

#include <math.h>
#include <string.h>

#include "runtime/half.h"

#define LAST (MIL_TABLE_POINTS - 1)
#define PI 3.14159265358979323846
#define LOG2_E 1.4423828125f /* both as numbers of fp16 */
#define LN_2 0.693359375
#define INFINITE 65536.0

/* How far beyond its table a curve reaches its limit is inferred from errors there. */
#define AT_ONCE 0x1p-100f
static const anepy_curve CURVES[MIL_TABLE_N] = {
    [MIL_TABLE_SIGMOID] = {.middle = 16, .scale = 2.0f, .end = 8.0f, .tail = 1.934f},
    [MIL_TABLE_TANH] = {.scale = 8.0f, .end = 4.0f, .tail = AT_ONCE, .odd = 1},
    [MIL_TABLE_ERF] = {.scale = 16.0f, .end = 2.0f, .tail = 0.38f, .odd = 1},
    [MIL_TABLE_SILU] = {.middle = 16, .scale = 2.0f, .end = 8.0f, .tail = 2.2f, .linear = 1},
    [MIL_TABLE_GELU] = {.middle = 16, .scale = 4.0f, .end = 4.0f, .tail = AT_ONCE, .linear = 1},
};

/* Fitted by least squares; published are the middle number, the one behind it, and the largest
 * errors. The one before follows by symmetry. */
static const float SILU[MIL_TABLE_POINTS] = {
    -0.00263786316f, -0.00408554077f, -0.0062828064f, -0.0096206665f, -0.0146331787f,
    -0.0220947266f,  -0.0330505371f,  -0.0488891602f, -0.0712890625f, -0.101806641f,
    -0.141601562f,   -0.189453125f,   -0.239257812f,  -0.27734375f,   -0.273681641f,
    -0.203613281f,   -0.00170993805f, 0.296386719f,   0.726074219f,   1.22265625f,
    1.76074219f,     2.31054688f,     2.859375f,      3.3984375f,     3.9296875f,
    4.44921875f,     4.96875f,        5.4765625f,     5.984375f,      6.4921875f,
    6.9921875f,      7.49609375f,     7.99609375f};
static const float GELU[MIL_TABLE_POINTS] = {-0.000115633011f,
                                             -0.000310182571f,
                                             -0.000768184662f,
                                             -0.00178623199f,
                                             -0.00388908386f,
                                             -0.00793457031f,
                                             -0.0151367188f,
                                             -0.0269927979f,
                                             -0.044921875f,
                                             -0.0696411133f,
                                             -0.100036621f,
                                             -0.132446289f,
                                             -0.159912109f,
                                             -0.172363281f,
                                             -0.156860352f,
                                             -0.106445312f,
                                             -0.000761032104f,
                                             0.143554688f,
                                             0.343017578f,
                                             0.577636719f,
                                             0.840332031f,
                                             1.1171875f,
                                             1.40039062f,
                                             1.68066406f,
                                             1.95507812f,
                                             2.22265625f,
                                             2.484375f,
                                             2.7421875f,
                                             2.99609375f,
                                             3.24804688f,
                                             3.5f,
                                             3.75f,
                                             4.0f};

static double power(int exponent) { /* of two, for normal doubles */
    uint64_t bits = (uint64_t)(exponent + 1023) << 52;
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* |x| = fraction * 2^exponent with fraction in [0.5, 1); of a positive number of fp16. */
static double split(double x, int *exponent) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    *exponent = (int)(bits >> 52 & 0x7ff) - 1022;
    bits = (bits & ((UINT64_C(1) << 52) - 1)) | UINT64_C(1022) << 52;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Rounds to a number of fp16, halves away from zero, without a limit above. */
static double to_half(double x) {
    uint64_t bits, half = UINT64_C(1) << 41;
    if (fabs(x) < 0x1p-14) {
        double size = (double)(int)(fabs(x) * 0x1p24 + 0.5) * 0x1p-24;
        return x < 0.0 ? -size : size;
    }
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + half) & ~(2 * half - 1);
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* On the lines, `at` points from the first, 0 <= at <= 32. */
static double between(const float *table, double at) {
    int i = at >= LAST ? LAST - 1 : (int)at;
    return (double)table[i] + (at - i) * ((double)table[i + 1] - (double)table[i]);
}

/* Of a quarter of the period. */
static double sine(const float *t, double x) {
    double at = fmod(fabs(x) * (64.0 / PI), 128.0), turn = at > 64.0 ? at - 64.0 : at;
    double y = between(t, turn > LAST ? 64.0 - turn : turn);
    return (x < 0.0) == (at > 64.0) ? y : -y;
}

static double log_2(const float *t, double x) {
    int exponent;
    if (!(x > 0.0)) return -INFINITE;
    double fraction = split(x, &exponent);
    return to_half(to_half(between(t, 64.0 * (fraction - 0.5))) + exponent);
}

/* A root: tables take the fraction in [0.5, 2) that leaves an even exponent. */
static double root(const float *t, double x, int inverse) {
    int exponent;
    if (!(x > 0.0)) return inverse ? INFINITE : 0.0;
    double fraction = split(x, &exponent);
    int odd_one = exponent & 1, half = (exponent - odd_one) / 2;
    double y = between(t, 16.0 * ((odd_one ? 2.0 * fraction : fraction) - 0.5));
    return y * power(inverse ? -half : half);
}

static double inverse(const float *t, double x) {
    int exponent;
    if (x == 0.0) return INFINITE;
    double fraction = split(fabs(x), &exponent);
    double y = between(t, 64.0 * (fraction - 0.5)) * power(-exponent);
    return x < 0.0 ? -y : y;
}

void mil_tables_make(float *tables) {
    for (int i = 0; i <= LAST; i++) {
        double samples[MIL_TABLE_N] = {
            [MIL_TABLE_SIGMOID] = 1.0 / (1.0 + exp(8.0 - 0.5 * i)),
            [MIL_TABLE_TANH] = tanh(0.125 * i),
            [MIL_TABLE_ERF] = erf(0.0625 * i),
            [MIL_TABLE_SIN] = sin(PI / 64.0 * i),
            [MIL_TABLE_EXP] = exp2(i / 32.0),
            [MIL_TABLE_EXP2] = exp2(i / 32.0),
            [MIL_TABLE_LOG] = log2(0.5 + i / 64.0),
            [MIL_TABLE_SQRT] = sqrt(0.5 + i / 16.0),
            [MIL_TABLE_RSQRT] = 1.0 / sqrt(0.5 + i / 16.0),
            [MIL_TABLE_INVERSE] = 1.0 / (0.5 + i / 64.0),
            [MIL_TABLE_SILU] = (double)SILU[i],
            [MIL_TABLE_GELU] = (double)GELU[i],
        };
        for (int k = 0; k < MIL_TABLE_N; k++)
            tables[k * MIL_TABLE_POINTS + i] = anepy_from_half(anepy_to_half((float)samples[k]));
    }
}

#define EACH(expression)                                                                           \
    for (int64_t i = 0; i < n; i++) {                                                              \
        double v = (double)x[i];                                                                   \
        y[i] = (float)(expression);                                                                \
    }                                                                                              \
    break

void mil_table_run(const anepy_fixed_kernels *kernels, const float *tables, mil_table which,
                   float *y, const float *x, int64_t n) {
    const float *t = tables + which * MIL_TABLE_POINTS;
    switch (which) {
    case MIL_TABLE_SIN: EACH(sine(t, v));
    case MIL_TABLE_EXP: kernels->exp(y, x, t, LOG2_E, n); break;
    case MIL_TABLE_EXP2: kernels->exp(y, x, t, 1.0f, n); break;
    case MIL_TABLE_LOG: EACH(log_2(t, v) * LN_2);
    case MIL_TABLE_SQRT: EACH(root(t, v, 0));
    case MIL_TABLE_RSQRT: EACH(root(t, v, 1));
    case MIL_TABLE_INVERSE: EACH(inverse(t, v));
    default: kernels->curve(y, x, t, CURVES + which, n); break;
    }
}

void mil_table_softmax(const anepy_fixed_kernels *kernels, const float *tables, float *row,
                       int64_t n) {
    kernels->softmax(row, tables + MIL_TABLE_EXP * MIL_TABLE_POINTS, LOG2_E, n);
}
