/* train/muon.c - Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), with the formulas of
 * PyTorch's torch.optim.Muon: for a matrix p [rows, cols] with gradient g
 *
 *     m = momentum * m + g;  u = g + momentum * m  (Nesterov)
 *     x = u / (|u| + 1e-7), then five times
 *         s = x x^T;  x = a x + (b s + c s s) x     a, b, c = 3.4445, -4.775, 2.0315
 *     p = p * (1 - lr * weight_decay) - lr * sqrt(max(1, rows / cols)) * x
 *
 * The Newton-Schulz steps bring all singular values of x near 1. They are computed in float32, of
 * the transposed matrix where it has more rows than columns, one matrix after the other, with the
 * products of the step engine: the same bits on any number of threads. */
#include "train/muon.h"

#include <math.h>
#include <stdlib.h>

#include "runtime/memory.h"
#include "train/moments.h"
#include "train/room.h"

#define STEPS 5
#define A 3.4445f
#define B (-4.775f)
#define C 2.0315f
#define EPS 1e-7

struct anepy_muon {
    anepy_gemm gemm;
    float *x, *next;      /* [small, large], rows padded with zeros to multiples of 64 */
    float *square, *more; /* [small, small]: s, and s s */
    double *squares;      /* [small]: sums of squares of the rows of x */
    float *memory;
    uint64_t nbytes;
};

/* One matrix. small and large are the extents of x; ld and square_ld the distances of its rows and
 * of those of square. */
typedef struct {
    anepy_engine *e;
    const anepy_muon_rates *rates;
    float *p, *g;
    int64_t first; /* of its elements in the arena of moments */
    float rate;    /* lr * sqrt(max(1, rows / cols)) */
    float shrink;
    int32_t cols, small, large, ld, square_ld;
    int transposed;
} matrix;

static matrix matrix_of(anepy_engine *e, const anepy_tensor *t) {
    int32_t rows = (int32_t)t->rows, cols = (int32_t)t->cols;
    int32_t small = anepy_min_i32(rows, cols), large = anepy_max_i32(rows, cols);
    return (matrix){.e = e,
                    .p = anepy_values(e, t),
                    .g = anepy_gradient(e, t),
                    .first = t->gradient,
                    .cols = cols,
                    .small = small,
                    .large = large,
                    .ld = (int32_t)anepy_round_up(large, ANEPY_COLUMNS),
                    .square_ld = (int32_t)anepy_round_up(small, ANEPY_COLUMNS),
                    .transposed = rows > cols};
}

static void each_row(matrix *t, anepy_loop_fn fn) {
    anepy_pool_run(t->e->pool, anepy_pieces(t->small, ANEPY_PIECE_ROWS), fn, t);
}

/* Element [row, column] of x in the matrix. */
static int64_t place(const matrix *t, int32_t row, int32_t column) {
    return t->transposed ? (int64_t)column * t->cols + row : (int64_t)row * t->cols + column;
}

static int32_t rows_end(const matrix *t, int32_t index) {
    return anepy_min_i32(t->small, (index + 1) * ANEPY_PIECE_ROWS);
}

static void take_momentum(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const matrix *t = context;
    struct anepy_muon *muon = t->e->muon;
    float scale = t->rates->grad_scale, momentum = t->rates->momentum;
    uint32_t key = anepy_moment_key(t->e, ANEPY_FIRST_MOMENT);
    for (int32_t row = index * ANEPY_PIECE_ROWS; row < rows_end(t, index); row++) {
        float *x = muon->x + (int64_t)row * t->ld;
        for (int32_t j = 0; j < t->large; j++) {
            int64_t at = place(t, row, j);
            float g = t->g[at] * scale;
            float m = momentum * anepy_moment(t->e, t->e->adam_m, t->first + at) + g;
            anepy_moment_set(t->e, t->e->adam_m, t->first + at, m, key);
            x[j] = g + momentum * m;
        }
        for (int32_t j = t->large; j < t->ld; j++) x[j] = 0.0f;
        muon->squares[row] = t->e->kernels->sum_squares(x, t->ld);
    }
}

static void normalize(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const matrix *t = context;
    int32_t first = index * ANEPY_PIECE_ROWS;
    t->e->kernels->scale(t->e->muon->x + (int64_t)first * t->ld, t->shrink,
                         (int64_t)(rows_end(t, index) - first) * t->ld);
}

/* square = b square + c more. */
static void polynomial(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const matrix *t = context;
    struct anepy_muon *muon = t->e->muon;
    int64_t at = (int64_t)index * ANEPY_PIECE_ROWS * t->square_ld,
            end = (int64_t)rows_end(t, index) * t->square_ld;
    for (; at < end; at++) muon->square[at] = B * muon->square[at] + C * muon->more[at];
}

/* next += a x. */
static void add_x(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const matrix *t = context;
    struct anepy_muon *muon = t->e->muon;
    int64_t at = (int64_t)index * ANEPY_PIECE_ROWS * t->ld,
            end = (int64_t)rows_end(t, index) * t->ld;
    for (; at < end; at++) muon->next[at] += A * muon->x[at];
}

static void newton_schulz(matrix *t) {
    struct anepy_muon *muon = t->e->muon;
    anepy_product gram = {.c = muon->square,
                          .ldc = t->square_ld,
                          .a = muon->x,
                          .a_row = t->ld,
                          .a_step = 1,
                          .b = muon->x,
                          .ldb = t->ld,
                          .b_transposed = 1,
                          .m = t->small,
                          .n = t->small,
                          .k = t->large};
    anepy_product twice = gram, on_x = gram; /* square is symmetric */
    twice.c = muon->more;
    twice.a = twice.b = muon->square;
    twice.a_row = twice.ldb = t->square_ld;
    twice.k = t->small;
    on_x.c = muon->next;
    on_x.ldc = t->ld;
    on_x.a = muon->square;
    on_x.a_row = t->square_ld;
    on_x.b_transposed = 0;
    on_x.n = t->ld;
    on_x.k = t->small;
    anepy_gemm_run(&muon->gemm, &gram);
    anepy_gemm_run(&muon->gemm, &twice);
    each_row(t, polynomial);
    anepy_gemm_run(&muon->gemm, &on_x);
    each_row(t, add_x);
    float *x = muon->x;
    muon->x = muon->next;
    muon->next = x;
}

static void step_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const matrix *t = context;
    for (int32_t row = index * ANEPY_PIECE_ROWS; row < rows_end(t, index); row++) {
        const float *x = t->e->muon->x + (int64_t)row * t->ld;
        for (int32_t j = 0; j < t->large; j++) {
            int64_t at = place(t, row, j);
            t->p[at] = t->p[at] * t->rates->decay - t->rate * x[j];
            if (t->rates->clear) t->g[at] = 0.0f;
        }
    }
}

void anepy_muon_update(anepy_engine *e, const anepy_muon_rates *rates) {
    for (int32_t i = 0; i < e->model->tensor_n; i++) {
        const anepy_tensor *tensor = &e->model->tensors[i];
        if (!anepy_muon_takes(tensor)) continue;
        matrix t = matrix_of(e, tensor);
        double sum = 0.0, ratio = (double)tensor->rows / (double)tensor->cols;
        t.rates = rates;
        t.rate = (float)(rates->lr * sqrt(fmax(1.0, ratio)));
        each_row(&t, take_momentum);
        for (int32_t row = 0; row < t.small; row++) sum += e->muon->squares[row];
        t.shrink = (float)(1.0 / (sqrt(sum) + EPS));
        each_row(&t, normalize);
        for (int32_t step = 0; step < STEPS; step++) newton_schulz(&t);
        each_row(&t, step_rows);
    }
}

static void lay_out(anepy_engine *e, anepy_carver *c) {
    struct anepy_muon *muon = e->muon;
    int64_t x_n = 0, square_n = 0, small = 0, ld = 0;
    for (int32_t i = 0; i < e->model->tensor_n; i++) {
        if (!anepy_muon_takes(&e->model->tensors[i])) continue;
        matrix t = matrix_of(e, &e->model->tensors[i]);
        x_n = anepy_max_i64(x_n, (int64_t)t.small * t.ld);
        square_n = anepy_max_i64(square_n, (int64_t)t.small * t.square_ld);
        small = anepy_max_i64(small, t.small);
        ld = anepy_max_i64(ld, t.ld);
    }
    muon->x = anepy_carve(c, x_n);
    muon->next = anepy_carve(c, x_n);
    muon->square = anepy_carve(c, square_n);
    muon->more = anepy_carve(c, square_n);
    muon->squares = (double *)(void *)anepy_carve(c, 2 * small);
    muon->gemm = (anepy_gemm){.kernels = e->kernels, .blas = e->blas, .pool = e->pool};
    muon->gemm.panels = anepy_carve(c, anepy_gemm_panels_n((int32_t)ld));
    muon->gemm.scratch_n = anepy_round_up(anepy_gemm_scratch_n((int32_t)ld), 16);
    muon->gemm.scratch = anepy_carve(c, muon->gemm.scratch_n * anepy_pool_threads(e->pool));
}

int32_t anepy_muon_open(anepy_engine *e) {
    anepy_carver measure = {NULL, 0};
    e->muon = calloc(1, sizeof *e->muon);
    if (e->muon == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for the optimizer");
    lay_out(e, &measure);
    e->muon->nbytes = (uint64_t)measure.used * sizeof(float);
    e->muon->memory = anepy_map(e->muon->nbytes);
    if (e->muon->memory == NULL)
        return anepy_fail(ANEPY_E_MEMORY, "no memory for %llu bytes of the optimizer",
                          (unsigned long long)e->muon->nbytes);
    anepy_carver place = {e->muon->memory, 0};
    lay_out(e, &place);
    return ANEPY_OK;
}

void anepy_muon_close(anepy_engine *e) {
    if (e->muon == NULL) return;
    anepy_unmap(e->muon->memory, e->muon->nbytes);
    free(e->muon);
}

uint64_t anepy_muon_nbytes(const anepy_engine *e) { return e->muon != NULL ? e->muon->nbytes : 0; }
