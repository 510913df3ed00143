/* kernels/tile_impl.h - the matrix kernel for every type of factor.
 *
 * The file that includes this defines the names of the functions, the type of a unit, and how units
 * are loaded, broadcast and multiplied. kernels.h has the contract of gemm_tile. */

/* `rows` is a constant at every call, so that accumulators stay in registers. */
V_INLINE void TILE_ROWS(float *c, int64_t ldc, const TILE_UNIT *a, int64_t a_row, int64_t a_step,
                        const TILE_UNIT *b, int64_t ldb, int32_t k, const int rows, int accumulate,
                        anepy_lines next) {
    vf acc[ANEPY_TILE_ROWS][TILE_VECTORS];
    const char *line = next.at;
    ANEPY_UNROLL
    for (int i = 0; i < rows; i++) {
        ANEPY_UNROLL
        for (int j = 0; j < TILE_VECTORS; j++) acc[i][j] = v_set(/* mutate: tile-start */ 0.0f);
    }
    for (; k > 0; k--) {
        TILE_VECTOR col[TILE_VECTORS];
        ANEPY_UNROLL
        for (int j = 0; j < TILE_VECTORS; j++) col[j] = TILE_LOAD(b + j * VL);
        ANEPY_UNROLL
        for (int i = 0; i < rows; i++) {
            TILE_VECTOR x = TILE_SPREAD(a[i * a_row]);
            ANEPY_UNROLL
            for (int j = 0; j < TILE_VECTORS; j++) acc[i][j] = TILE_MULTIPLY(x, col[j], acc[i][j]);
        }
        __builtin_prefetch(line, 0, 2);
        line += next.step;
        a += a_step;
        b += ldb;
    }
    ANEPY_UNROLL
    for (int i = 0; i < rows; i++) {
        ANEPY_UNROLL
        for (int j = 0; j < TILE_VECTORS; j++) {
            float *out = c + i * ldc + j * VL;
            v_store(out, accumulate ? v_add(v_load(out), acc[i][j]) : acc[i][j]);
        }
    }
}

SIMD_TARGET static void TILE_NAME(float *c, int64_t ldc, const TILE_UNIT *a, int64_t a_row,
                                  int64_t a_step, const TILE_UNIT *b, int64_t ldb, int32_t k,
                                  int32_t rows, int32_t accumulate, anepy_lines next) {
    switch (rows) {
    case 6: TILE_ROWS(c, ldc, a, a_row, a_step, b, ldb, k, 6, accumulate, next); break;
    case 5: TILE_ROWS(c, ldc, a, a_row, a_step, b, ldb, k, 5, accumulate, next); break;
    case 4: TILE_ROWS(c, ldc, a, a_row, a_step, b, ldb, k, 4, accumulate, next); break;
    case 3: TILE_ROWS(c, ldc, a, a_row, a_step, b, ldb, k, 3, accumulate, next); break;
    case 2: TILE_ROWS(c, ldc, a, a_row, a_step, b, ldb, k, 2, accumulate, next); break;
    default: TILE_ROWS(c, ldc, a, a_row, a_step, b, ldb, k, 1, accumulate, next); break;
    }
}

#undef TILE_ROWS
#undef TILE_NAME
#undef TILE_UNIT
#undef TILE_VECTOR
#undef TILE_LOAD
#undef TILE_SPREAD
#undef TILE_MULTIPLY
