/* kernels/fixed_impl.h - arithmetic of the Neural Engine for vectors: anepy_fixed_kernels.
 *
 * Part of vector_impl.h. Loops over elements are plain C, which compilers make vectors of under
 * SIMD_TARGET; everything here is exact, so that all sets give the same bits. */

#define FIXED_ZERO 192.0f /* 1.5 * 2^7: floats around it are multiples of 2^-16 */
#define FIXED_BITS 0x43400000
#define FIXED_LIST 128 /* steps that are sorted at once */
#define FIXED_PIECE 128
#define FIXED_CODES 0x47800000 /* 65536, the first number beyond fp16 */

/* The exponent of the smallest |b| is -16 less that of a; a subnormal b counts as 2^-14. */
SIMD_TARGET static void SIMD_FN(fixed_prepare)(float *restrict a, float *restrict least,
                                               float *restrict largest, const float *restrict x,
                                               int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float size = fabsf(x[i]);
        largest[i] = size > largest[i] ? size : largest[i];
        uint32_t bits = anepy_float_bits(x[i]), exponent = bits >> 23 & 0xff;
        exponent = exponent < 113 ? 113 : exponent;
        uint32_t bound = exponent >= /* mutate: fixed-least */ 125 ? 0 : (238 - exponent) << 23;
        bound = (bits << 1) != 0 ? bound : 0;
        least[i] = anepy_bits_float(bound);
        a[i] = anepy_bits_float(bits + /* mutate: fixed-halves */ ((bits << 1) != 0));
    }
}

SIMD_TARGET static void SIMD_FN(fixed_bounds)(float *bounds, const float *a, const float *b,
                                              int32_t n) {
    for (int32_t p = 0; p < n; p += ANEPY_FIXED_STEPS) {
        vf sum = v_set(0.0f);
        for (int32_t i = p; i < p + ANEPY_FIXED_STEPS && i < n; i += VL)
            sum = v_add(sum, v_abs(v_mul(load_left(a + i, n - i), load_left(b + i, n - i))));
        bounds[p / ANEPY_FIXED_STEPS] = v_sum(sum);
    }
}

#ifndef V_LIST /* no instruction does it */
/* Lists first + i for the bits i that are set; room for VL is needed. Returns how many. */
V_INLINE int32_t v_list(int32_t *list, int32_t first, uint32_t bits) {
    int32_t n = 0;
    ANEPY_UNROLL
    for (int32_t i = 0; i < VL; i++) {
        list[n] = first + i;
        n += bits >> i & 1;
    }
    return n;
}
#endif

/* Some steps of rows of A times all columns; masks leave out products that do not count. */
V_INLINE void fixed_rows(int32_t *c, const float *a, const float *least, int64_t lda,
                         const float *b, const int32_t *steps, int32_t n, const int masked) {
    for (int column = 0; column < COLS && n > 0; column += TILE_VECTORS * VL) {
        vf acc[ANEPY_FIXED_ROWS][TILE_VECTORS];
        ANEPY_UNROLL
        for (int i = 0; i < ANEPY_FIXED_ROWS; i++) {
            ANEPY_UNROLL
            for (int j = 0; j < TILE_VECTORS; j++) acc[i][j] = v_set(FIXED_ZERO);
        }
        for (int32_t s = 0; s < n; s++) {
            vf col[TILE_VECTORS];
            int64_t p = steps[s];
            ANEPY_UNROLL
            for (int j = 0; j < TILE_VECTORS; j++) col[j] = v_load(b + p * COLS + column + j * VL);
            ANEPY_UNROLL
            for (int i = 0; i < ANEPY_FIXED_ROWS; i++) {
                vf x = v_set(a[i * lda + p]), from = v_set(masked ? least[i * lda + p] : 0.0f);
                ANEPY_UNROLL
                for (int j = 0; j < TILE_VECTORS; j++)
                    acc[i][j] = masked ? v_fma_from(x, col[j], acc[i][j], v_abs(col[j]), from)
                                       : v_fma(x, col[j], acc[i][j]);
            }
        }
        ANEPY_UNROLL
        for (int i = 0; i < ANEPY_FIXED_ROWS; i++) {
            ANEPY_UNROLL
            for (int j = 0; j < TILE_VECTORS; j++)
                v_add_bits(c + i * COLS + column + j * VL, acc[i][j], FIXED_BITS);
        }
    }
}

/* Which of the steps [p, p + VL) have a product in any row that is left out and would not be
 * rounded to zero anyway, as bits. */
V_INLINE uint32_t fixed_left_out(const float *a, const float *least, int64_t lda,
                                 const float *smallest, const float *largest, int32_t p) {
    vf small = v_load(smallest + p), large = v_load(largest + p);
    uint32_t bits = 0;
    ANEPY_UNROLL
    for (int i = 0; i < ANEPY_FIXED_ROWS; i++) {
        vf most = v_abs(v_mul(v_load(a + i * lda + p), large));
        bits |= v_below_bits(small, v_load(least + i * lda + p)) &
                v_below_bits(v_set(0x1.fffffcp-18f), most);
    }
    return bits;
}

/* Masks cost as much as products, so steps that need none are taken by themselves. Sums are exact:
 * their order does not matter. */
SIMD_TARGET static void SIMD_FN(fixed_tile)(int32_t *c, const float *a, const float *least,
                                            int64_t lda, const float *b, const float *smallest,
                                            const float *largest, int32_t k) {
    int32_t plain[FIXED_LIST + VL], masked[FIXED_LIST + VL];
    for (int32_t p = 0, end; p < k; p = end) {
        int32_t plain_n = 0, masked_n = 0;
        end = k - p < FIXED_LIST ? k : p + FIXED_LIST;
        for (; p < end; p += VL) {
            uint32_t all = end - p < VL ? (1u << (end - p)) - 1 : ~0u >> (32 - VL);
            uint32_t bits = all & fixed_left_out(a, least, lda, smallest, largest, p);
            masked_n += v_list(masked + masked_n, p, bits);
            plain_n += v_list(plain + plain_n, p, all & ~bits);
        }
        fixed_rows(c, a, least, lda, b, plain, plain_n, 0);
        fixed_rows(c, a, least, lda, b, masked, masked_n, 1);
    }
}

/* a without its last bit, times b, as a multiple of 2^-16. */
ANEPY_INLINE double fixed_product(float a, float least, float b) {
    double size = fabs((double)anepy_bits_float(anepy_float_bits(a) & ~1u) * (double)b) * 0x1p16;
    double whole = floor(size + 0.5);
    whole = fabsf(b) >= least ? whole : 0.0;
    return (a < 0.0f) == (b < 0.0f) ? whole : -whole;
}

SIMD_TARGET static void SIMD_FN(fixed_steps)(int32_t *c, int8_t *stuck, const float *a,
                                             const float *least, int64_t lda, const float *b,
                                             int32_t k) {
    for (int i = 0; i < ANEPY_FIXED_ROWS; i++, c += COLS) {
        for (int32_t p = 0; p < k; p++) {
            float x = a[i * lda + p], from = least[i * lda + p];
            const float *row = b + (int64_t)p * COLS;
            for (int j = 0; j < COLS && stuck == NULL; j++)
                c[j] += (int32_t)fixed_product(x, from, row[j]);
            for (int j = 0; j < COLS && stuck != NULL; j++) {
                double sum = (double)c[j] + fixed_product(x, from, row[j]);
                int beyond = fabs(sum) >= /* mutate: fixed-limit */ 0x1p31 && stuck[j] == 0;
                if (beyond) stuck[j] = sum > 0.0 ? 1 : -1;
                c[j] = stuck[j] != 0 ? 0 : (int32_t)sum;
            }
        }
        if (stuck != NULL) stuck += COLS;
    }
}

/* Bits of a number of at least 2^-14, rounded to 11 bits. */
ANEPY_INLINE uint32_t fixed_round_bits(uint32_t bits) { return (bits + 0x1000) & ~0x1fffu; }

SIMD_TARGET static void SIMD_FN(fixed_finish)(float *y, const int32_t *x, int32_t n) {
    for (int32_t i = 0; i < n; i++) {
        uint32_t size = x[i] < 0 ? (uint32_t)-x[i] : (uint32_t)x[i];
        /* Bits that a float has no room for do not matter to rounding away from zero. */
        size = size < 1u << 24 ? size : size & ~0xffu;
        float value =
            anepy_bits_float(fixed_round_bits(anepy_float_bits((float)(int32_t)size))) * 0x1p-16f;
        y[i] = x[i] < 0 ? -value : value;
    }
}

/* A piece of fixed_round, of the bits of the numbers. */
SIMD_TARGET static uint32_t SIMD_FN(fixed_round_piece)(uint32_t *restrict out,
                                                       const uint32_t *restrict in) {
    uint32_t beyond = 0;
    for (int i = 0; i < FIXED_PIECE; i++) {
        uint32_t bits = in[i], size = bits & 0x7fffffff, large = fixed_round_bits(size);
        /* Below 2^-14 numbers are multiples of 2^-24, the last bit of floats around 0.75. */
        float small = anepy_bits_float(size + (size != 0)) + 0.75f;
        uint32_t rounded = anepy_float_bits(small - 0.75f);
        beyond += large >= FIXED_CODES ? 1u : 0u;
        large = large > FIXED_CODES ? FIXED_CODES : large;
        out[i] = (size < 0x38800000 ? rounded : large) | (bits & 0x80000000);
    }
    return beyond;
}

SIMD_TARGET static int64_t SIMD_FN(fixed_round)(float *p, int64_t n) {
    uint32_t in[FIXED_PIECE], out[FIXED_PIECE];
    int64_t beyond = 0;
    for (int64_t i = 0; i < n; i += FIXED_PIECE) {
        size_t m = (size_t)(n - i < FIXED_PIECE ? n - i : FIXED_PIECE);
        if (m < FIXED_PIECE) memset(in, 0, sizeof in);
        memcpy(in, p + i, m * sizeof *p);
        beyond += SIMD_FN(fixed_round_piece)(out, in);
        memcpy(p + i, out, m * sizeof *p);
    }
    return beyond;
}

SIMD_TARGET static void SIMD_FN(fixed_from_half)(float *dst, const uint16_t *src, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t half = src[i], size = half & 0x7fff;
        float small = (float)(int32_t)size * 0x1p-24f;
        uint32_t bits = size < 0x400 ? anepy_float_bits(small) : (size << 13) + (112u << 23);
        dst[i] = anepy_bits_float(bits | (half & 0x8000) << 16);
    }
}

SIMD_TARGET static void SIMD_FN(fixed_to_half)(uint16_t *dst, const float *src, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = anepy_float_bits(src[i]), size = bits & 0x7fffffff;
        uint32_t small =
            (uint32_t)(int32_t)(anepy_bits_float(size < 0x38800000 ? size : 0) * 0x1p24f);
        uint32_t half = size < 0x38800000 ? small : (size - (112u << 23)) >> 13;
        dst[i] = (uint16_t)(half | (bits >> 16 & 0x8000));
    }
}

#include "kernels/curves_impl.h"

static const anepy_fixed_kernels SIMD_FN(fixed_set) = {
    .prepare = SIMD_FN(fixed_prepare),
    .bounds = SIMD_FN(fixed_bounds),
    .tile = SIMD_FN(fixed_tile),
    .steps = SIMD_FN(fixed_steps),
    .finish = SIMD_FN(fixed_finish),
    .round = SIMD_FN(fixed_round),
    .from_half = SIMD_FN(fixed_from_half),
    .to_half = SIMD_FN(fixed_to_half),
    .curve = SIMD_FN(curve_lines),
    .exp = SIMD_FN(curve_exp),
    .softmax = SIMD_FN(curve_softmax),
};
