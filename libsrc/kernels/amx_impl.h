/* kernels/amx_impl.h - products of bf16 pairs by the matrix unit of x86 processors (AMX_BF16).
 *
 * A tile register holds 16 rows of 16 units, and one instruction multiplies two of them into a
 * third of 16 rows by 16 float32 sums. The panels of B lie as it wants them. Subnormals count as
 * zero.
 *
 * Eight registers: four sums of 32 rows by 32 columns, two tiles of A, two of B, so that a tile is
 * multiplied twice for each time it is loaded. */
#define AMX_TARGET __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl")))
#define AMX_INLINE AMX_TARGET static inline __attribute__((always_inline))
#define SIDE 16 /* rows of a tile, and its units */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes;

/* Sets the shapes: sums and tiles of A have `upper` and `lower` rows, or all `upper` if lower is 0;
 * reductions have `units` steps. */
AMX_INLINE void shape_tiles(int32_t upper, int32_t lower, int32_t units) {
    enum { A_UPPER = 4, A_LOWER, B_LEFT, B_RIGHT };
    tile_shapes s = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        int below = lower > 0 && (i == 2 || i == 3 || i == A_LOWER),
            of_b = i == B_LEFT || i == B_RIGHT;
        int wide = i == A_UPPER || i == A_LOWER ? units : SIDE;
        s.rows[i] = (uint8_t)(of_b ? units : below ? lower : upper);
        s.row_bytes[i] = (uint16_t)(wide * 4);
    }
    _tile_loadconfig(&s);
}

/* What one call multiplies: `steps` tiles of the reduction. */
typedef struct {
    float *c;
    int64_t ldc;
    const uint32_t *a;
    int64_t a_row;
    const uint32_t *b;
    int64_t ldb;
    int32_t steps, accumulate;
} tile_product;

/* The four sums begin as what lies at these places, or as zero. */
AMX_INLINE void begin_sums(float *const at[4], int64_t bytes, int32_t accumulate) {
    if (accumulate) {
        _tile_loadd(0, at[0], bytes);
        _tile_loadd(1, at[1], bytes);
        _tile_loadd(2, at[2], bytes);
        _tile_loadd(3, at[3], bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
}

AMX_INLINE void store_sums(float *const at[4], int64_t bytes) {
    _tile_stored(0, at[0], bytes);
    _tile_stored(1, at[1], bytes);
    _tile_stored(2, at[2], bytes);
    _tile_stored(3, at[3], bytes);
}

/* 17 to 32 rows by 32 columns from column j on. */
AMX_INLINE void multiply_two(const tile_product *p, int32_t j) {
    const int64_t a_bytes = p->a_row * 4, b_bytes = p->ldb * 4;
    const uint32_t *a = p->a, *b = p->b + j;
    float *c = p->c + j, *below = c + SIDE * p->ldc;
    float *const at[4] = {c, c + SIDE, below, below + SIDE};
    begin_sums(at, p->ldc * 4, p->accumulate);
    for (int32_t n = p->steps; n > 0; n--, a += SIDE, b += SIDE * p->ldb) {
        _tile_loadd(6, b, b_bytes);
        _tile_loadd(4, a, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + SIDE, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + SIDE * p->a_row, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    store_sums(at, p->ldc * 4);
}

/* Up to 16 rows by 64 columns. */
AMX_INLINE void multiply_one(const tile_product *p) {
    const int64_t a_bytes = p->a_row * 4, b_bytes = p->ldb * 4;
    const uint32_t *a = p->a, *b = p->b;
    float *const at[4] = {p->c, p->c + SIDE, p->c + 2 * SIDE, p->c + 3 * SIDE};
    begin_sums(at, p->ldc * 4, p->accumulate);
    for (int32_t n = p->steps; n > 0; n--, a += SIDE, b += SIDE * p->ldb) {
        _tile_loadd(4, a, a_bytes);
        _tile_loadd(6, b, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + SIDE, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, b + 2 * SIDE, b_bytes);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, b + 3 * SIDE, b_bytes);
        _tile_dpbf16ps(3, 4, 7);
    }
    store_sums(at, p->ldc * 4);
}

/* All rows with tiles of one number of units; shapes change with the last rows only. */
AMX_INLINE void multiply_rows_of(tile_product p, int32_t rows, int32_t units) {
    int32_t shaped = 0;
    for (int32_t left = rows, n; left > 0; left -= n, p.c += n * p.ldc, p.a += n * p.a_row) {
        n = left < 2 * SIDE ? left : 2 * SIDE;
        int32_t upper = n < SIDE ? n : SIDE;
        if (n != shaped) shape_tiles(upper, n - upper, units);
        shaped = n;
        if (n > SIDE) {
            multiply_two(&p, 0);
            multiply_two(&p, 2 * SIDE);
        } else {
            multiply_one(&p);
        }
    }
}

AMX_TARGET static void dot_panel__amxbf16(float *c, int64_t ldc, const uint32_t *a, int64_t a_row,
                                          const uint32_t *b, int64_t ldb, int32_t units,
                                          int32_t rows, int32_t accumulate) {
    int32_t whole = units / SIDE * SIDE;
    tile_product p = {c, ldc, a, a_row, b, ldb, whole / SIDE, accumulate};
    if (whole > 0) multiply_rows_of(p, rows, SIDE);
    if (/* mutate: amx-last-units */ whole < units) {
        p.a += whole;
        p.b += whole * ldb;
        p.steps = 1;
        p.accumulate = accumulate || whole > 0;
        multiply_rows_of(p, rows, units - whole);
    }
    _tile_release();
}

/* Only the first unit of each row of A is not zero, so that every sum gets one a . b a round. */
AMX_TARGET static float dot_chains__amxbf16(uint32_t a, uint32_t b, int64_t rounds) {
    enum { TILE = SIDE * SIDE };
    uint32_t left[TILE] = {0}, right[TILE];
    float sums[4 * TILE], mean = 0.0f;
    float *const at[4] = {sums, sums + TILE, sums + 2 * TILE, sums + 3 * TILE};
    for (int i = 0; i < SIDE; i++) left[i * SIDE] = a;
    for (int i = 0; i < TILE; i++) right[i] = b;
    for (int i = 0; i < 4 * TILE; i++) sums[i] = (float)(i / TILE);
    shape_tiles(SIDE, SIDE, SIDE);
    begin_sums(at, SIDE * 4, 1);
    _tile_loadd(4, left, SIDE * 4);
    _tile_loadd(6, right, SIDE * 4);
    for (int64_t r = 0; r < rounds; r++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 6);
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 4, 6);
    }
    store_sums(at, SIDE * 4);
    _tile_release();
    for (int i = 0; i < 4 * TILE; i++) mean += sums[i];
    return mean / (4 * TILE);
}

/* Squares of 16 by 16 units in registers, what is left one by one. */
SIMD_TARGET static void SIMD_FN(turn)(uint32_t *dst, int64_t dst_ld, const uint32_t *src,
                                      int64_t ld, int32_t rows, int32_t units) {
    int32_t full_rows = rows / VL * VL, full = units / VL * VL;
    for (int32_t i = 0; i < full_rows; i += VL)
        for (int32_t p = 0; p < full; p += VL)
            v_transpose((float *)(void *)(dst + i * dst_ld + p), dst_ld,
                        (const float *)(const void *)(src + p * ld + i), ld);
    for (int32_t i = 0; i < rows; i++)
        for (int32_t p = i < full_rows ? full : 0; p < units; p++)
            dst[i * dst_ld + p] = src[p * ld + i];
}

#define MATRIX_KERNELS                                                                             \
    .dot_panel = dot_panel__amxbf16, .turn = SIMD_FN(turn), .dot_chains = dot_chains__amxbf16,     \
    .dot_operations = 4 * SIDE * SIDE * SIDE * 4
