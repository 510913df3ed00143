/* kernels/curves_impl.h - activations as the Neural Engine computes them: tables of 33 numbers of
 * fp16 with straight lines between them (docs/neural-engine.md#activations).
 *
 * Part of scalar.c and of fixed_impl.h: short loops of plain C without branches, which compilers
 * make vectors of under SIMD_TARGET. What is rounded before the end is said; all sets give the same
 * bits. */

#define CURVE_LAST (ANEPY_CURVE_POINTS - 1)
#define CURVE_INFINITE 65536.0f
#define CURVE_PIECE 128
#define BELOW_16 15.9921875f
#define CURVE_LANES 16 /* sums of a soft-max side by side, on every set */

/* x * factor as numbers of fp16, halves away from zero, without a limit above. What the product
 * loses to rounding settles halves. */
SIMD_TARGET static void SIMD_FN(curve_halves)(float *restrict y, const float *restrict x,
                                              float factor, int32_t n) {
    for (int32_t i = 0; i < n; i++) {
        float product = x[i] * factor, rest = fmaf(x[i], factor, -product);
        uint32_t bits = anepy_float_bits(product), differ = (anepy_float_bits(rest) ^ bits) >> 31;
        uint32_t size = (bits & 0x7fffffff) - (differ & (rest != 0.0f));
        float least = anepy_bits_float(size < 0x38800000 ? size : 0x38800000) * 0x1p24f;
        int32_t whole = (int32_t)least;
        float small = (float)(whole + (least - (float)whole >= 0.5f)) * 0x1p-24f;
        uint32_t large = (size + 0x1000) & ~0x1fffu, is_large = 0u - (size >= 0x38800000);
        uint32_t rounded = (anepy_float_bits(small) & ~is_large) | (large & is_large);
        y[i] = anepy_bits_float(rounded | (bits & 0x80000000));
    }
}

/* 2^x of numbers of fp16. Each loop has one condition, so that it becomes no branch. */
SIMD_TARGET static void SIMD_FN(curve_powers)(float *restrict y, const float *restrict x,
                                              const float *restrict table, int32_t n) {
    for (int32_t i = 0; i < n; i++) y[i] = x[i] < -26.0f ? -26.0f : x[i];
    for (int32_t i = 0; i < n; i++) y[i] = y[i] > BELOW_16 ? BELOW_16 : y[i];
    for (int32_t i = 0; i < n; i++) {
        int32_t whole = (int32_t)y[i];
        whole -= y[i] < (float)whole ? 1 : 0;
        float at = (float)CURVE_LAST * (y[i] - (float)whole);
        int32_t p = (int32_t)at;
        float line = fmaf(at - (float)p, table[p + 1] - table[p], table[p]);
        y[i] = line * anepy_bits_float((uint32_t)(whole + 127) << 23);
    }
    for (int32_t i = 0; i < n; i++) y[i] = x[i] < -26.0f ? 0.0f : y[i];
    for (int32_t i = 0; i < n; i++) y[i] = x[i] >= 16.0f ? CURVE_INFINITE : y[i];
}

SIMD_TARGET static void SIMD_FN(curve_exp)(float *y, const float *x, const float *table,
                                           float factor, int64_t n) {
    float in[CURVE_PIECE], out[CURVE_PIECE];
    for (int64_t i = 0; i < n; i += CURVE_PIECE) {
        int32_t m = (int32_t)(n - i < CURVE_PIECE ? n - i : CURVE_PIECE);
        SIMD_FN(curve_halves)(in, x + i, factor, m);
        SIMD_FN(curve_powers)(out, in, table, m);
        memcpy(y + i, out, (size_t)m * sizeof *y);
    }
}

SIMD_TARGET static void SIMD_FN(curve_softmax)(float *row, const float *table, float factor,
                                               int64_t n) {
    float largest[CURVE_LANES];
    double sum[CURVE_LANES] = {0};
    int64_t whole = n / CURVE_LANES * CURVE_LANES;
    for (int64_t j = 0; j < CURVE_LANES; j++) largest[j] = row[0];
    for (int64_t i = 0; i < whole; i += CURVE_LANES)
        for (int64_t j = 0; j < CURVE_LANES; j++)
            largest[j] = row[i + j] > largest[j] ? row[i + j] : largest[j];
    for (int64_t i = whole; i < n; i++) largest[0] = row[i] > largest[0] ? row[i] : largest[0];
    for (int64_t j = 1; j < CURVE_LANES; j++)
        largest[0] = largest[j] > largest[0] ? largest[j] : largest[0];
    for (int64_t i = 0; i < n; i++) row[i] -= largest[0];
    SIMD_FN(curve_exp)(row, row, table, factor, n);
    for (int64_t i = 0; i < whole; i += CURVE_LANES)
        for (int64_t j = 0; j < CURVE_LANES; j++) sum[j] += (double)row[i + j];
    for (int64_t i = whole; i < n; i++) sum[i - whole] += (double)row[i];
    for (int64_t j = 1; j < CURVE_LANES; j++) sum[0] += sum[j];
    for (int64_t i = 0; i < n; i++) row[i] = (float)((double)row[i] / sum[0]);
}

/* The table at |x| or x, and how far x is on its way from there to the limit: from 0 to 1. */
SIMD_TARGET static void SIMD_FN(curve_on_lines)(float *restrict line, float *restrict beyond,
                                                const float *restrict x, const float *table,
                                                const anepy_curve *c, int32_t n) {
    float scale = c->scale, end = c->end, tail = c->tail, least = (float)-c->middle;
    int32_t middle = c->middle, last = CURVE_LAST - 1 - middle;
    uint32_t sign = c->odd ? 0x7fffffff : 0xffffffff;
    for (int32_t i = 0; i < n; i++) {
        float at = anepy_bits_float(anepy_float_bits(x[i]) & sign) * scale,
              low = at < least ? least : at;
        float in = low > (float)(last + 1) ? (float)(last + 1) : low;
        int32_t p = (int32_t)in;
        p -= in < (float)p ? 1 : 0;
        p = p < last ? p : last;
        float from = table[p + middle], to = table[p + middle + 1];
        line[i] = fmaf(in - (float)p, to - from, from);
        float way = (fabsf(x[i]) - end) / tail, some = way < 0.0f ? 0.0f : way;
        beyond[i] = some > 1.0f ? 1.0f : some;
    }
}

SIMD_TARGET static void SIMD_FN(curve_lines)(float *y, const float *x, const float *table,
                                             const anepy_curve *c, int64_t n) {
    float line[CURVE_PIECE], beyond[CURVE_PIECE];
    for (int64_t i = 0; i < n; i += CURVE_PIECE) {
        int32_t m = (int32_t)(n - i < CURVE_PIECE ? n - i : CURVE_PIECE);
        SIMD_FN(curve_on_lines)(line, beyond, x + i, table, c, m);
        for (int32_t j = 0; j < m; j++) {
            float v = x[i + j], high = c->linear ? v : 1.0f;
            float limit = c->odd || v > 0.0f ? high : 0.0f;
            float way = c->linear && v > c->end ? 1.0f : beyond[j];
            float found = way < 1.0f ? fmaf(way, limit - line[j], line[j]) : limit;
            y[i + j] = c->odd && v < 0.0f ? -found : found;
        }
    }
}
