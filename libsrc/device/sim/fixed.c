/* device/sim/fixed.c - sums of products as the Neural Engine makes them: fixed point with 16
 * fractional bits (docs/neural-engine.md#numerics).
 *
 * The order of a sum matters only where a partial sum may leave the range. Bounds of all partial
 * sums, from the largest factors of each step, say where: nearly everywhere they are small, and
 * fast kernels add in any order; elsewhere every step is checked. The bits are the same on each
 * way. */
#include <math.h>
#include <string.h>

#include "device/sim/interpreter_internal.h"

#define COLS ANEPY_COLUMNS
#define ROWS ANEPY_FIXED_ROWS
#define PIECE 48    /* rows that a thread takes at once */
#define PANELS 4    /* panels of B that are packed at once */
#define LIMIT 32768 /* a sum that reaches it is infinite */
#define STEP 0x1p-16f
#define INFINITE 65536.0f
#define LARGE 0x1p100f

typedef struct {
    mil_run *run;
    const mil_matmul *s;
    float *panels;             /* of B: [panel][k][64] */
    float *largest, *smallest; /* [panel][k]: |b| of each step; the smallest that is not 0 */
    int64_t column;            /* of the first panel */
} fixed_job;

/* Rows of A, for a part of the reduction. */
typedef struct {
    float *a, *least, *largest; /* prepared; the largest |a| of each step */
    int32_t k;                  /* of a row, and its steps */
} factor;

typedef struct {
    int32_t sum[ROWS * COLS];
    int8_t stuck[ROWS * COLS];
    int checked;
} sums;

static float larger(float a, float b) { return a > b ? a : b; } /* without NaN */

int64_t mil_fixed_scratch_n(int64_t n, int64_t k) {
    int64_t panels = (n + COLS - 1) / COLS;
    return (panels < PANELS ? panels : PANELS) * anepy_round_up(k, 16) * (COLS + 2) + MIL_SLACK;
}

static int64_t panel_k(const fixed_job *job) { return anepy_round_up(job->s->k, 16); }

static void pack_panel(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const fixed_job *job = context;
    const mil_matmul *s = job->s;
    int64_t first = job->column + (int64_t)index * COLS;
    int64_t columns = s->n - first < COLS ? s->n - first : COLS;
    float *panel = job->panels + index * panel_k(job) * COLS;
    float *largest = job->largest + index * panel_k(job);
    float *smallest = job->smallest + index * panel_k(job);
    if (s->b_transposed)
        job->run->mil->kernels->transpose_panel(panel, s->b + first * s->ldb, s->ldb,
                                                (int32_t)columns, (int32_t)s->k);
    for (int64_t p = 0; p < s->k; p++) {
        float *row = panel + p * COLS;
        if (!s->b_transposed) {
            memcpy(row, s->b + p * s->ldb + first, (size_t)columns * sizeof *row);
            memset(row + columns, 0, (size_t)(COLS - columns) * sizeof *row);
        }
        float most[16] = {0}, least[16];
        for (int32_t i = 0; i < 16; i++) least[i] = LARGE;
        for (int32_t j = 0; j < COLS; j += 16)
            for (int32_t i = 0; i < 16; i++) {
                float size = fabsf(row[j + i]), other = size > 0.0f ? size : LARGE;
                most[i] = larger(most[i], size);
                least[i] = least[i] < other ? least[i] : other;
            }
        for (int32_t i = 8; i > 0; i /= 2) {
            for (int32_t j = 0; j < i; j++) {
                most[j] = larger(most[j], most[j + i]);
                least[j] = least[j] < least[j + i] ? least[j] : least[j + i];
            }
        }
        largest[p] = most[0];
        smallest[p] = least[0];
    }
}

static const float *gather(float *out, const float *in, int64_t step, int32_t n) {
    for (int32_t i = 0; i < n; i++) out[i] = in[i * step];
    return out;
}

/* Rows [first, first + 4) of A, zeros beyond the last, steps [p, p + k). */
static factor take_rows(const fixed_job *job, float *room, int64_t first, int64_t p, int32_t k) {
    const mil_matmul *s = job->s;
    factor f = {.a = room, .least = room + ROWS * k, .largest = room + 2 * ROWS * k, .k = k};
    int64_t rows = s->m - first < ROWS ? s->m - first : ROWS;
    const float *a = s->a + first * s->a_row + p * s->a_step;
    const anepy_fixed_kernels *kernels = job->run->mil->kernels->fixed;
    memset(f.largest, 0, (size_t)k * sizeof *f.largest);
    for (int64_t i = 0; i < ROWS; i++) {
        float *row = f.a + i * k, *least = f.least + i * k;
        const float *from = a + i * s->a_row;
        if (i >= rows) {
            memset(row, 0, (size_t)k * sizeof *row);
            memset(least, 0, (size_t)k * sizeof *least);
            continue;
        }
        if (s->a_step != 1) from = gather(f.least + ROWS * k + k, from, s->a_step, k);
        kernels->prepare(row, least, f.largest, from, k);
    }
    return f;
}

/* Calls the fast kernel for steps [from, to) of a part. */
static void add_steps(const anepy_fixed_kernels *kernels, sums *t, const factor *f,
                      const float *panel, const float *smallest, const float *largest, int32_t from,
                      int32_t to) {
    if (from < to)
        kernels->tile(t->sum, f->a + from, f->least + from, f->k, panel + (int64_t)from * COLS,
                      smallest + from, largest + from, to - from);
}

/* Adds a part of the reduction, in stretches whose sums the fast kernel has room for. They grow by
 * a block of steps, or step by step where a whole block may be too much. */
static void add_part(const anepy_fixed_kernels *kernels, sums *t, const factor *f,
                     const float *panel, const float *largest, const float *smallest,
                     const float *bounds) {
    int32_t from = 0;
    float bound = 0.0f;
    for (int32_t p = 0, next; p < f->k; p = next) {
        float block = bounds[p / ANEPY_FIXED_STEPS] + STEP * ANEPY_FIXED_STEPS;
        int whole = p % ANEPY_FIXED_STEPS == 0 && block < ANEPY_FIXED_MOST;
        float more = whole ? block : f->largest[p] * largest[p] + STEP;
        next = whole ? anepy_min_i32(p + ANEPY_FIXED_STEPS, f->k) : p + 1;
        if (bound + more < ANEPY_FIXED_MOST) {
            bound += more;
            continue;
        }
        add_steps(kernels, t, f, panel, smallest, largest, from, p);
        from = p;
        bound = more;
        if (more < ANEPY_FIXED_MOST) continue;
        kernels->steps(t->sum, NULL, f->a + p, f->least + p, f->k, panel + (int64_t)p * COLS, 1);
        from = next;
        bound = 0.0f;
    }
    add_steps(kernels, t, f, panel, smallest, largest, from, f->k);
}

/* Sums begin with the bias, which is rounded as products are. */
static void begin_sums(const mil_matmul *s, sums *t, int64_t first, int64_t column) {
    memset(t, 0, sizeof *t);
    if (s->bias == NULL) return;
    for (int64_t i = 0; i < ROWS && first + i < s->m; i++) {
        for (int64_t j = 0; j < COLS && column + j < s->n; j++) {
            double bias = (double)s->bias[s->bias_by_column ? column + j : first + i];
            double start = floor(fabs(bias) * 0x1p16 + 0.5);
            int beyond = start >= 0x1p31;
            t->stuck[i * COLS + j] = (int8_t)(beyond ? bias > 0.0 ? 1 : -1 : 0);
            t->sum[i * COLS + j] = beyond ? 0 : (int32_t)(bias > 0.0 ? start : -start);
            t->checked |= beyond;
        }
    }
}

/* Most that a partial sum of a tile can be, from the bounds of its parts and the bias. */
static float bound_of(const mil_matmul *s, const sums *t, const float *bounds, int64_t n) {
    float bound = 0.0f, bias = 0.0f;
    for (int64_t i = 0; i < n; i++) bound += bounds[i] + STEP * ANEPY_FIXED_STEPS;
    for (int32_t i = 0; s->bias != NULL && i < ROWS * COLS; i++)
        bias = larger(bias, fabsf((float)t->sum[i]) * STEP);
    return bound + bias;
}

/* Notes the largest of n results; bits of positive floats are in their order. */
static void note(mil_run *r, const float *c, int32_t n) {
    float most = 0.0f;
    for (int32_t j = 0; j < n; j++) most = larger(most, fabsf(c[j]));
    uint32_t bits, before = atomic_load(&r->largest);
    memcpy(&bits, &most, sizeof bits);
    while (bits > before && !atomic_compare_exchange_weak(&r->largest, &before, bits)) continue;
}

static uint64_t finish_rows(const fixed_job *job, const sums *t, int64_t first, int64_t column) {
    const mil_matmul *s = job->s;
    int32_t columns = (int32_t)(s->n - column < COLS ? s->n - column : COLS);
    uint64_t infinite = 0;
    for (int64_t i = 0; i < ROWS && first + i < s->m; i++) {
        float *c = s->c + (first + i) * s->ldc + column;
        job->run->mil->kernels->fixed->finish(c, t->sum + i * COLS, columns);
        for (int32_t j = 0; j < columns && t->checked; j++) {
            int8_t stuck = t->stuck[i * COLS + j];
            if (stuck != 0) c[j] = stuck > 0 ? INFINITE : -INFINITE;
            infinite += stuck != 0;
        }
        if (mil_watched()) note(job->run, c, columns);
    }
    return infinite;
}

/* Four rows of C, all packed columns. The reduction is taken in parts that fit the worker's room;
 * with more than one, bounds are computed before. */
static uint64_t multiply_tile(const fixed_job *job, float *room, int64_t room_n, int64_t first,
                              int32_t panels, float *top) {
    const mil_matmul *s = job->s;
    const anepy_fixed_kernels *kernels = job->run->mil->kernels->fixed;
    int64_t depth = room_n / (2 * ROWS + 2) / 16 * 16, k = panel_k(job);
    int32_t parts = (int32_t)((s->k + depth - 1) / depth);
    uint64_t infinite = 0;
    float *bounds = room + (2 * ROWS + 1) * depth; /* before, a row on its way */
    sums tile[PANELS];
    float most[PANELS] = {0};
    for (int32_t j = 0; j < panels; j++) begin_sums(s, tile + j, first, job->column + j * COLS);
    /* The first pass bounds, the second adds; of one part both at once. */
    for (int pass = parts > 1 ? 0 : 1; pass < 2; pass++) {
        for (int64_t p = 0; p < s->k; p += depth) {
            int32_t n = (int32_t)(s->k - p < depth ? s->k - p : depth);
            factor f = take_rows(job, room, first, p, n);
            for (int32_t j = 0; j < panels; j++) {
                const float *panel = job->panels + (j * k + p) * COLS;
                const float *largest = job->largest + j * k + p;
                kernels->bounds(bounds, f.largest, largest, n);
                if (pass == 0 || parts == 1)
                    most[j] += bound_of(s, tile + j, bounds, (n + 15) / 16);
                if (pass == 0) continue;
                tile[j].checked |= !(most[j] < (float)LIMIT - 1.0f);
                if (tile[j].checked)
                    kernels->steps(tile[j].sum, tile[j].stuck, f.a, f.least, n, panel, n);
                else
                    add_part(kernels, tile + j, &f, panel, largest, job->smallest + j * k + p,
                             bounds);
            }
        }
    }
    for (int32_t j = 0; j < panels; j++) {
        infinite += finish_rows(job, tile + j, first, job->column + j * COLS);
        if (most[j] > *top) *top = most[j];
    }
    return infinite;
}

static void multiply_rows(void *context, int32_t index, int32_t worker) {
    const fixed_job *job = context;
    const mil_matmul *s = job->s;
    const anepy_gemm *gemm = &job->run->gemm;
    int64_t first = (int64_t)index * PIECE, left = (s->n - job->column + COLS - 1) / COLS;
    int64_t end = first + PIECE < s->m ? first + PIECE : s->m;
    uint64_t infinite = 0;
    float top = 0.0f;
    for (int64_t i = first; i < end; i += ROWS)
        infinite += multiply_tile(job, gemm->scratch + worker * gemm->scratch_n, gemm->scratch_n, i,
                                  (int32_t)(left < PANELS ? left : PANELS), &top);
    if (infinite > 0)
        atomic_fetch_add_explicit(&job->run->saturated, infinite, memory_order_relaxed);
}

void mil_fixed_multiply(mil_run *r, const mil_matmul *s, float *scratch) {
    int64_t panels = (s->n + COLS - 1) / COLS, most = panels < PANELS ? panels : PANELS;
    fixed_job job = {.run = r, .s = s, .panels = scratch};
    job.largest = scratch + most * panel_k(&job) * COLS;
    job.smallest = job.largest + most * panel_k(&job);
    for (; job.column < s->n; job.column += PANELS * COLS) {
        int64_t left = (s->n - job.column + COLS - 1) / COLS;
        mil_each(r, left < PANELS ? left : PANELS, pack_panel, &job);
        mil_each(r, (s->m + PIECE - 1) / PIECE, multiply_rows, &job);
    }
}
