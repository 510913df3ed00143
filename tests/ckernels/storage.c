/* storage.c - weights that are stored as bf16 or Q8: packing, the kernels of every instruction set,
 * and products, which must have the very bits of products with the widened weights. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "anepy.h"
#include "check.h"
#include "groups.h"
#include "guard.h"
#include "kernels/blas.h"
#include "kernels/weights.h"
#include "runtime/half.h"

#define COLS ANEPY_COLUMNS
#define HALVES ((int64_t)(sizeof(anepy_q8) / sizeof(uint16_t))) /* of a block */

static const anepy_dtype SMALL[] = {ANEPY_BF16, ANEPY_Q8};
static const char *const NAMES[] = {"f32", "f16", "bf16", "q8"};

/* ------------------------------------------------------------------------------------- packing */

static float random_weight(void) { return random_float(-1.0f, 1.0f); }

static void check_blocks(float size) {
    float x[ANEPY_Q8_N], back[ANEPY_Q8_N], most = 0.0f;
    anepy_q8 block;
    for (int i = 0; i < ANEPY_Q8_N; i++) {
        x[i] = random_weight() * size;
        most = fmaxf(most, fabsf(x[i]));
    }
    CHECK(anepy_pack(&block, x, ANEPY_STORED_Q8, ANEPY_Q8_N) == ANEPY_OK &&
              anepy_unpack(back, &block, ANEPY_STORED_Q8, ANEPY_Q8_N) == ANEPY_OK,
          "a block of %g fails", (double)size);
    /* Half a step, and the rounding of the scale to binary16. */
    float allowed = most / 127.0f * 0.5f + most * 0x1p-11f + 127.0f * 0x1p-25f;
    int near = 1, largest = 0;
    for (int i = 0; i < ANEPY_Q8_N; i++) {
        near &= fabsf(x[i] - back[i]) <= allowed;
        largest |= abs(block.value[i]) == 127;
    }
    CHECK(near && (largest || most == 0.0f), "a block of %g comes back wrong", (double)size);
}

static void check_rounding(void) {
    float x[ANEPY_Q8_N] = {127.0f, 0.5f, -0.5f, 1.5f, -2.5f, 0.49999997f, -127.0f, 3.0f};
    const int8_t expected[8] = {127, 1, -1, 2, -3, 0, -127, 3};
    anepy_q8 block, none;
    int right = anepy_pack(&block, x, ANEPY_STORED_Q8, ANEPY_Q8_N) == ANEPY_OK;
    for (int i = 0; i < 8; i++) right &= block.value[i] == expected[i];
    CHECK(right && anepy_from_half(block.scale) == 1.0f, "halves are not rounded away from zero");
    memset(x, 0, sizeof x);
    memset(&none, 0, sizeof none);
    anepy_pack(&block, x, ANEPY_STORED_Q8, ANEPY_Q8_N);
    CHECK(memcmp(&block, &none, sizeof block) == 0, "zeros are no zeros");
    const uint32_t ties[3][2] = {{0x3f808000, 0x3f80}, {0x3f818000, 0x3f82}, {0x3f808001, 0x3f81}};
    for (int i = 0; i < 3; i++) {
        float tie = from_bits(ties[i][0]);
        uint16_t half = 0;
        anepy_pack(&half, &tie, ANEPY_STORED_BF16, 1);
        CHECK(half == ties[i][1], "bf16 of %08x is %04x", ties[i][0], half);
    }
}

static void check_unfit(void) {
    const float values[] = {NAN, INFINITY, -INFINITY, FLT_MAX};
    float x[ANEPY_Q8_N] = {1.0f};
    char room[4 * ANEPY_Q8_N];
    for (int i = 0; i < 4; i++) {
        x[7] = values[i];
        CHECK(anepy_pack(room, x, ANEPY_STORED_Q8, ANEPY_Q8_N) == ANEPY_E_ARGUMENT &&
                  anepy_pack(room, x, ANEPY_STORED_BF16, ANEPY_Q8_N) == ANEPY_E_ARGUMENT,
              "%g is stored", (double)values[i]);
        int32_t status = anepy_pack(room, x, ANEPY_STORED_F32, ANEPY_Q8_N);
        CHECK((status == ANEPY_OK) == (values[i] == FLT_MAX), "%g as float32", (double)values[i]);
    }
    CHECK(anepy_pack(room, x, ANEPY_STORED_Q8, 31) == ANEPY_E_ARGUMENT &&
              anepy_pack(room, x, ANEPY_F16, 32) == ANEPY_E_ARGUMENT &&
              anepy_unpack(x, room, 7, 32) == ANEPY_E_ARGUMENT &&
              anepy_unpack(x, room, ANEPY_STORED_Q8, -32) == ANEPY_E_ARGUMENT,
          "half a block, or no storage, is taken");
}

/* ------------------------------------------------------------------------------------- kernels */

/* Whole numbers with scales that are powers of two: every sum is exact. */
static anepy_q8 *whole_blocks(int64_t n, int place) {
    uint16_t *memory = guard_halves(n * HALVES, place);
    for (int64_t i = 0; i < n; i++) {
        anepy_q8 block = {.scale = anepy_to_half(ldexpf(1.0f, random_below(5) - 2))};
        for (int j = 0; j < ANEPY_Q8_N; j++) block.value[j] = (int8_t)(random_below(255) - 127);
        memcpy(memory + i * HALVES, &block, sizeof block);
    }
    return (anepy_q8 *)(void *)memory;
}

static float number_at(const anepy_q8 *row, int64_t i) {
    const anepy_q8 *block = row + i / ANEPY_Q8_N;
    return anepy_from_half(block->scale) * (float)block->value[i % ANEPY_Q8_N];
}

static void check_gemv(const anepy_kernels *set, int32_t rows, int32_t blocks, int place) {
    int32_t k = blocks * ANEPY_Q8_N;
    anepy_q8 *w = whole_blocks((int64_t)rows * blocks, place);
    float *x = guard_matrix(1, k, k, place, random_whole), *y = guard_take(rows, place);
    KERNEL(set, gemv_q8)(y, w, x, rows, k);
    int right = 1;
    for (int32_t i = 0; i < rows; i++) {
        float sum = 0.0f;
        for (int32_t p = 0; p < k; p++) sum += number_at(w + (int64_t)i * blocks, p) * x[p];
        right &= y[i] == sum;
    }
    CHECK(right && guard_intact(), "gemv_q8 %s: %s for %d x %d, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", rows, k, place);
    guard_reset();
}

static void check_gemv_bf16(const anepy_kernels *set, int32_t rows, int32_t k, int place) {
    uint16_t *w = guard_halves((int64_t)rows * k, place);
    for (int64_t i = 0; i < (int64_t)rows * k; i++)
        w[i] = (uint16_t)(to_bits(random_whole()) >> 16);
    float *x = guard_matrix(1, k, k, place, random_whole), *y = guard_take(rows, place);
    KERNEL(set, gemv_bf16)(y, w, x, rows, k);
    int right = 1;
    for (int32_t i = 0; i < rows; i++) {
        float sum = 0.0f;
        for (int32_t p = 0; p < k; p++) sum += anepy_from_bf16(w[(int64_t)i * k + p]) * x[p];
        right &= y[i] == sum;
    }
    CHECK(right && guard_intact(), "gemv_bf16 %s: %s for %d x %d, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", rows, k, place);
    guard_reset();
}

/* Parts of a row that begin and end anywhere in a block. */
static void check_widen(const anepy_kernels *set, int64_t first, int64_t n, int place) {
    anepy_q8 *row = whole_blocks((first + n + ANEPY_Q8_N - 1) / ANEPY_Q8_N, place);
    float *y = guard_take(n, place);
    KERNEL(set, from_q8)(y, row, first, n);
    int right = 1;
    for (int64_t i = 0; i < n; i++) right &= y[i] == number_at(row, first + i);
    CHECK(right && guard_intact(), "from_q8 %s: %s for %lld from %lld, place %d", set->isa,
          right ? "wrote elsewhere" : "wrong", (long long)n, (long long)first, place);
    guard_reset();
}

static void check_kernels(const anepy_kernels *set) {
    for (int place = 0; place < GUARD_PLACES; place++) {
        for (int32_t blocks = 1; blocks <= 9; blocks++) check_gemv(set, 3, blocks, place);
        for (int32_t i = 0; i < SIZE_N; i++) check_gemv_bf16(set, 2, SIZES[i], place);
        for (int64_t first = 0; first < 40; first += 1 + 6 * (brief != 0))
            for (int64_t n = 0; n < 100; n += 7 + 12 * (brief != 0))
                check_widen(set, first, n, place);
    }
}

/* ------------------------------------------------------------------------------------- products */

/* A matrix as it is stored, and widened. */
typedef struct {
    anepy_storage stored, plain;
    void *memory;
    float *wide;
} matrix;

static matrix make_matrix(anepy_dtype dtype, int32_t rows, int32_t cols) {
    int64_t n = (int64_t)rows * cols;
    matrix m = {.memory = malloc((size_t)n * 4), .wide = malloc((size_t)n * 4)};
    if (m.memory == NULL || m.wide == NULL) abort();
    for (int64_t i = 0; i < n; i++) m.wide[i] = random_weight();
    CHECK(anepy_pack(m.memory, m.wide, dtype, n) == ANEPY_OK, "packing fails");
    CHECK(anepy_unpack(m.wide, m.memory, dtype, n) == ANEPY_OK, "unpacking fails");
    m.stored = (anepy_storage){m.memory, dtype, rows, cols};
    m.plain = (anepy_storage){m.wide, ANEPY_F32, rows, cols};
    return m;
}

static float *reals(int64_t n) {
    float *x = malloc((size_t)n * sizeof *x);
    if (x == NULL) abort();
    for (int64_t i = 0; i < n; i++) x[i] = random_weight();
    return x;
}

/* Stands in for a system's library, one element after the other. */
static void plain_sgemm(int transpose_a, int transpose_b, int m, int n, int k, const float *a,
                        int lda, const float *b, int ldb, float beta, float *c, int ldc) {
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            float sum = 0.0f;
            for (int64_t p = 0; p < k; p++)
                sum += (transpose_a ? a[p * lda + i] : a[i * lda + p]) *
                       (transpose_b ? b[j * ldb + p] : b[p * ldb + j]);
            c[i * ldc + j] = beta != 0.0f ? c[i * ldc + j] + sum : sum;
        }
    }
}

static const anepy_blas PLAIN = {"plain", plain_sgemm};

static void check_product(anepy_gemm *gemm, const matrix *w, int transposed, int accumulate) {
    anepy_product s = {.ldb = 2 * COLS, .ldc = 2 * COLS, .n = 2 * COLS, .accumulate = accumulate};
    anepy_weights_factor(&s, w->plain, transposed);
    int64_t n = (int64_t)s.m * s.ldc;
    float *b = reals((int64_t)s.k * s.ldb), *expected = reals(n), *found = malloc((size_t)n * 4);
    if (found == NULL) abort();
    memcpy(found, expected, (size_t)n * 4);
    s.b = b;
    s.c = expected;
    anepy_gemm_run(gemm, &s);
    s.c = found;
    anepy_weights_factor(&s, w->stored, transposed);
    anepy_gemm_run(gemm, &s);
    CHECK(memcmp(found, expected, (size_t)n * 4) == 0,
          "%s, %s%s: %s [%d, %d], transposed %d, accumulate %d", gemm->kernels->isa,
          gemm->bf16 != NULL ? "bf16" : "fp32", gemm->blas != NULL ? " by the library" : "",
          NAMES[w->stored.dtype], w->stored.rows, w->stored.cols, transposed, accumulate);
    free(b);
    free(expected);
    free(found);
}

static void check_products(const anepy_kernels *set, anepy_pool *pool) {
    static const int32_t SHAPES[][2] = {{7, 32},    {48, 64},   {50, 96}, {100, 160},
                                        {65, 2112}, {2100, 64}, {33, 75}, {2, 1}};
    anepy_gemm gemm = {.kernels = set, .pool = pool, .scratch_n = anepy_gemm_scratch_n(1)};
    gemm.panels = malloc((size_t)anepy_gemm_panels_n(2 * COLS) * 4);
    gemm.scratch = malloc((size_t)gemm.scratch_n * 4 * (size_t)anepy_pool_threads(pool));
    if (gemm.panels == NULL || gemm.scratch == NULL) abort();
    for (size_t i = 0; i < sizeof SHAPES / sizeof SHAPES[0]; i++) {
        for (int d = 0; d < 2; d++) {
            if (SMALL[d] == ANEPY_Q8 && SHAPES[i][1] % ANEPY_Q8_N != 0) continue;
            matrix w = make_matrix(SMALL[d], SHAPES[i][0], SHAPES[i][1]);
            for (int form = 0; form < 4; form++) {
                gemm.bf16 = NULL;
                gemm.blas = NULL;
                check_product(&gemm, &w, form & 1, form >> 1);
                gemm.blas = &PLAIN;
                if (!brief) check_product(&gemm, &w, form & 1, form >> 1);
                gemm.blas = NULL;
                gemm.bf16 = set->bf16;
                if (set->bf16 != NULL) check_product(&gemm, &w, form & 1, form >> 1);
            }
            free(w.memory);
            free(w.wide);
        }
    }
    free(gemm.panels);
    free(gemm.scratch);
}

/* As binary16, which programs for the Neural Engine hold. */
static void check_halves(const anepy_kernels *set) {
    for (int d = 0; d < 2; d++) {
        matrix w = make_matrix(SMALL[d], 70, 96);
        uint16_t *found = malloc(70 * 96 * 2), *expected = malloc(70 * 96 * 2);
        if (found == NULL || expected == NULL) abort();
        for (int transposed = 0; transposed < 2; transposed++) {
            anepy_weights_to_half(set, found, w.stored, transposed);
            anepy_weights_to_half(set, expected, w.plain, transposed);
            CHECK(memcmp(found, expected, 70 * 96 * 2) == 0, "%s: %s as binary16", set->isa,
                  NAMES[SMALL[d]]);
        }
        free(found);
        free(expected);
        free(w.memory);
        free(w.wide);
    }
}

/* ------------------------------------------------------------------------------- the tensor table
 */

static void check_table(void) {
    anepy_config config = {.struct_size = sizeof config,
                           .dim = 64,
                           .hidden_dim = 72, /* w2 has rows that are no whole blocks */
                           .n_layers = 1,
                           .n_heads = 2,
                           .n_kv_heads = 1,
                           .vocab_size = 33,
                           .seq_len = 8,
                           .tied = 1};
    anepy_model *model = NULL;
    anepy_tensor t = {.struct_size = sizeof t};
    if (anepy_model_create(&model, &config) != ANEPY_OK) abort();
    CHECK(anepy_model_params_nbytes(model) == 4 * anepy_model_arena_n(model), "float32 has gaps");
    for (int32_t i = 0; i < anepy_model_tensor_n(model); i++)
        CHECK(anepy_model_store(model, i, ANEPY_STORED_Q8) == ANEPY_OK, "tensor %d", i);
    int64_t byte = 0, trained = 0;
    for (int32_t i = 0; i < anepy_model_tensor_n(model); i++) {
        anepy_model_tensor(model, i, &t);
        int32_t expected = !(t.flags & ANEPY_TENSOR_MATRIX) ? ANEPY_STORED_F32
                           : t.cols % 32 != 0               ? ANEPY_STORED_BF16
                                                            : ANEPY_STORED_Q8;
        CHECK(t.storage == expected && t.byte == byte, "%s is stored as %d at %lld", t.name,
              t.storage, (long long)t.byte);
        CHECK((t.gradient >= 0) == (expected == ANEPY_STORED_F32), "%s is trained", t.name);
        int64_t n = t.rows * t.cols;
        trained += t.gradient >= 0 ? n : 0;
        byte += expected == ANEPY_STORED_Q8
                    ? (n / 32 * 34 + 3) / 4 * 4
                    : (n * (expected == ANEPY_STORED_F32 ? 4 : 2) + 3) / 4 * 4;
    }
    CHECK(byte == anepy_model_params_nbytes(model) && trained == anepy_model_gradient_n(model),
          "the sizes of the arenas");
    CHECK(anepy_model_store(model, 0, ANEPY_F16) == ANEPY_E_ARGUMENT &&
              anepy_model_store(model, -1, ANEPY_STORED_Q8) == ANEPY_E_ARGUMENT &&
              anepy_model_store(model, 99, ANEPY_STORED_Q8) == ANEPY_E_ARGUMENT,
          "no storage, or no tensor, is taken");
    CHECK(anepy_model_adapt(model, 2, 1.0, ANEPY_TARGET_WQ) == ANEPY_OK &&
              anepy_model_store(model, 0, ANEPY_STORED_BF16) == ANEPY_E_STATE,
          "weights move beside an adapter");
    anepy_model_free(model);
}

void checks_storage(void) {
    const anepy_kernels *set;
    anepy_pool *pool = NULL;
    random_seed(0x5702);
    if (anepy_pool_create(&pool, 2) != ANEPY_OK) abort();
    for (int e = -12; e <= 12; e += 3) check_blocks(ldexpf(1.0f, e));
    check_blocks(0.0f);
    check_rounding();
    check_unfit();
    check_table();
    for (int32_t i = 0; (set = anepy_kernels_at(i)) != NULL; i++) {
        check_kernels(set);
        check_products(set, pool);
        check_halves(set);
    }
    anepy_pool_free(pool);
}
