/* kernels_fixed.c - the arithmetic of the Neural Engine: every vector set against plain C, bit for
 * bit, in sums of all sizes, at the limit of a sum, and at halves. */
#include <math.h>
#include <string.h>

#include "check.h"
#include "groups.h"
#include "runtime/fpmode.h"
#include "runtime/half.h"

#define K 61 /* full vectors and a rest */
#define COLS ANEPY_COLUMNS
#define ROWS ANEPY_FIXED_ROWS
#define TILE (ROWS * COLS)
#define HALVES 65536

/* A number of fp16 with an exponent in [low, high), a quarter of them zero. */
static float draw(int low, int high) {
    float size = ldexpf(1.0f + (float)(random_bits() % 1024) / 1024.0f,
                        low + (int)(random_bits() % (uint32_t)(high - low)));
    if (random_bits() % 4 == 0) size = 0.0f;
    size = anepy_from_half(anepy_to_half(size));
    return random_bits() % 2 ? size : -size;
}

typedef struct {
    float x[ROWS * K], a[ROWS * K + 16], least[ROWS * K + 16], largest[K + 16];
    float b[K * COLS], b_smallest[K + 16], b_largest[K + 16], bounds[K];
    int32_t sums[TILE], steps[TILE], stopped[TILE];
    int8_t stuck[TILE];
    float finished[TILE];
} sums;

static void multiply(sums *s, const anepy_fixed_kernels *set) {
    memset(s->largest, 0, sizeof s->largest);
    memset(s->stuck, 0, sizeof s->stuck);
    for (int i = 0; i < ROWS; i++)
        set->prepare(s->a + i * K, s->least + i * K, s->largest, s->x + i * K, K);
    set->bounds(s->bounds, s->largest, s->b_largest, K);
    float bound = 0.0f;
    for (int i = 0; i * ANEPY_FIXED_STEPS < K; i++) bound += s->bounds[i];
    for (int i = 0; i < TILE; i++) s->sums[i] = s->steps[i] = s->stopped[i] = i << 20;
    if (bound + K * 0x1p-16f < ANEPY_FIXED_MOST)
        set->tile(s->sums, s->a, s->least, K, s->b, s->b_smallest, s->b_largest, K);
    if (bound < 16384.0f) set->steps(s->steps, NULL, s->a, s->least, K, s->b, K);
    set->steps(s->stopped, s->stuck, s->a, s->least, K, s->b, K);
    set->finish(s->finished, s->stopped, TILE);
}

static void check_sums(const anepy_kernels *set, int low, int high) {
    static sums plain, vectors;
    memset(&plain, 0, sizeof plain);
    for (int i = 0; i < ROWS * K; i++) plain.x[i] = draw(low, high);
    for (int p = 0; p < K; p++) {
        plain.b_smallest[p] = 0x1p100f;
        for (int j = 0; j < COLS; j++) {
            float b = plain.b[p * COLS + j] = draw(low, high), size = fabsf(b);
            plain.b_largest[p] = fmaxf(plain.b_largest[p], size);
            if (size > 0.0f) plain.b_smallest[p] = fminf(plain.b_smallest[p], size);
        }
    }
    vectors = plain;
    multiply(&plain, anepy_kernels_scalar()->fixed);
    multiply(&vectors, KERNEL(set, fixed));
    CHECK(memcmp(plain.a, vectors.a, sizeof plain.a) == 0 &&
              memcmp(plain.least, vectors.least, sizeof plain.least) == 0,
          "fixed %s: prepare, exponents from %d", set->isa, low);
    CHECK(memcmp(plain.sums, vectors.sums, sizeof plain.sums) == 0,
          "fixed %s: tile, exponents from %d", set->isa, low);
    CHECK(memcmp(plain.steps, vectors.steps, sizeof plain.steps) == 0,
          "fixed %s: steps, exponents from %d", set->isa, low);
    CHECK(memcmp(plain.stopped, vectors.stopped, sizeof plain.stopped) == 0 &&
              memcmp(plain.stuck, vectors.stuck, sizeof plain.stuck) == 0,
          "fixed %s: steps that stop, exponents from %d", set->isa, low);
    CHECK(memcmp(plain.finished, vectors.finished, sizeof plain.finished) == 0,
          "fixed %s: finish, exponents from %d", set->isa, low);
}

static void check_codes(const anepy_kernels *set) {
    static uint16_t codes[HALVES], back[HALVES];
    static float x[HALVES], y[HALVES];
    const anepy_fixed_kernels *plain = anepy_kernels_scalar()->fixed;
    for (int i = 0; i < HALVES; i++) codes[i] = (uint16_t)i;
    plain->from_half(x, codes, HALVES);
    set->fixed->from_half(y, codes, HALVES);
    set->fixed->to_half(back, y, HALVES);
    CHECK(memcmp(x, y, sizeof x) == 0, "fixed %s: from_half", set->isa);
    CHECK(memcmp(codes, back, sizeof codes) == 0, "fixed %s: to_half", set->isa);
}

/* Each number, and the middle to the next, a little below and above, in parts of all sizes. */
static void check_round(const anepy_kernels *set) {
    static float x[4 * 0x7bff], y[4 * 0x7bff];
    const anepy_fixed_kernels *plain = anepy_kernels_scalar()->fixed;
    int32_t n = 0;
    for (uint32_t h = 0; h < 0x7bff; h++) {
        float low = anepy_from_half((uint16_t)h), high = anepy_from_half((uint16_t)(h + 1));
        float middle = 0.5f * (low + high), sign = h % 2 ? -1.0f : 1.0f;
        x[n++] = sign * low;
        x[n++] = sign * middle;
        x[n++] = sign * (middle - (middle - low) * 0x1p-10f);
        x[n++] = sign * (middle + (middle - low) * 0x1p-10f);
    }
    x[7] = 65520.0f, x[9] = INFINITY, x[11] = -70000.0f, x[13] = 65519.0f;
    memcpy(y, x, sizeof x);
    int64_t beyond = plain->round(x, n), found = 0;
    for (int32_t i = 0, m; i < n; i += m) {
        m = i % 997 + 1 < n - i ? i % 997 + 1 : n - i;
        found += set->fixed->round(y + i, m);
    }
    CHECK(beyond == 3 && found == beyond, "fixed %s: %lld beyond", set->isa, (long long)found);
    CHECK(memcmp(x, y, sizeof x) == 0, "fixed %s: round", set->isa);
}

/* Activations of every code, and soft-maxes of all lengths around those that vectors take at once. */
static void check_curves(const anepy_kernels *set) {
    static const anepy_curve CURVES[] = {
        {.scale = 2.0f, .end = 8.0f, .tail = 1.934f, .middle = 16},
        {.scale = 8.0f, .end = 4.0f, .tail = 0x1p-100f, .odd = 1},
        {.scale = 4.0f, .end = 4.0f, .tail = 2.2f, .middle = 16, .linear = 1},
    };
    static uint16_t codes[HALVES];
    static float x[HALVES], y[HALVES], z[HALVES];
    const anepy_fixed_kernels *plain = anepy_kernels_scalar()->fixed;
    const anepy_fixed_kernels *fixed = KERNEL(set, fixed);
    float table[ANEPY_CURVE_POINTS];
    for (int i = 0; i < ANEPY_CURVE_POINTS; i++)
        table[i] = anepy_from_half(anepy_to_half(exp2f((float)i / 32.0f)));
    for (int i = 0; i < HALVES; i++) codes[i] = (uint16_t)i;
    plain->from_half(x, codes, HALVES);
    for (size_t i = 0; i < sizeof CURVES / sizeof *CURVES; i++) {
        plain->curve(y, x, table, CURVES + i, HALVES);
        fixed->curve(z, x, table, CURVES + i, HALVES);
        CHECK(memcmp(y, z, sizeof y) == 0, "fixed %s: curve %d", set->isa, (int)i);
    }
    plain->exp(y, x, table, 1.4423828125f, HALVES);
    fixed->exp(z, x, table, 1.4423828125f, HALVES);
    CHECK(memcmp(y, z, sizeof y) == 0, "fixed %s: exp", set->isa);
    for (int n = 1; n < 300; n += n < 40 ? 1 : 37) {
        for (int i = 0; i < n; i++) y[i] = z[i] = draw(-8, 6);
        plain->softmax(y, table, 1.4423828125f, n);
        fixed->softmax(z, table, 1.4423828125f, n);
        CHECK(memcmp(y, z, (size_t)n * sizeof *y) == 0, "fixed %s: soft-max of %d", set->isa, n);
    }
}

void checks_fixed(void) {
    static const int EXPONENTS[][2] = {{-24, -14}, {-24, -4}, {-14, -1},
                                       {-10, 2},   {-24, 6},  {0, 16}};
    const anepy_kernels *set;
    uint64_t fpmode = anepy_fpmode_enter();
    for (int32_t i = 0; (set = anepy_kernels_at(i)) != NULL; i++) {
        for (size_t e = 0; e < sizeof EXPONENTS / sizeof *EXPONENTS; e++)
            for (int round = 0; round < 4; round++)
                check_sums(set, EXPONENTS[e][0], EXPONENTS[e][1]);
        check_codes(set);
        check_round(set);
        check_curves(set);
    }
    anepy_fpmode_leave(fpmode);
}
