/* device/sim/op_reduce.c - reductions, softmax, layer_norm.
 *
 * A sum is kept in fp16 after every addition, as the ANE's elementwise units do, in ascending
 * order (docs/neural-engine.md#numerics); what is one operation of the hardware (softmax,
 * layer_norm, reduce_l2_norm, reduce_log_sum_exp) is computed in fp32 and rounded once. */
#include "device/sim/interpreter_internal.h"

#include <math.h>
#include <string.h>

#define LANES 64 /* results computed side by side */

/* a[]: results outside, elements reduced, results inside (contiguous); if the reduced axes are not
 * neighbours also 1 in SCATTERED, then (extent, stride) of the kept and of the reduced axes. */
enum { OUTER, REDUCED, INNER, SCATTERED, KEPT_N, KEPT, FOLD_N = KEPT + 2 * MIL_RANK, FOLD };
enum { SUM, MEAN, MAX, MIN, L1, L2, SUM_SQUARE, LOG_SUM_EXP };

static int32_t check_reduce(mil_build *b, mil_op *op) {
    const mil_shape *x = &op->arg[0]->shape;
    mil_shape out = {.type = x->type};
    int64_t *a = op->a, strides[MIL_RANK], stride = 1;
    int32_t axis, reduce[MIL_RANK], first = -1, last = -1, code = op->type->code;
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_float(b, op, 0));
    for (int32_t i = 0; i < x->rank; i++) reduce[i] = op->arg[1] == NULL;
    for (int64_t i = 0; op->arg[1] != NULL && i < op->arg[1]->n; i++) {
        ANEPY_TRY(mil_want_axis(b, op, 1, mil_int_at(op->arg[1], i), x->rank, &axis));
        if (reduce[axis]) return mil_error(b->mil, op->arg_at[1], "axis %d is given twice", axis);
        reduce[axis] = 1;
    }
    a[REDUCED] = 1;
    for (int32_t i = x->rank - 1; i >= 0; i--) {
        strides[i] = stride;
        stride *= x->dims[i];
        if (!reduce[i]) continue;
        if (last < 0) last = i;
        first = i;
        a[REDUCED] *= x->dims[i];
    }
    if (last < 0) return mil_error(b->mil, op->at, "there is nothing to reduce");
    for (int32_t i = 0; i < x->rank; i++) {
        if (!reduce[i]) out.dims[out.rank++] = x->dims[i];
        else if (mil_int_or(op, 2, 0)) out.dims[out.rank++] = 1;
        a[SCATTERED] |= !reduce[i] && i > first && i < last && x->dims[i] > 1;
    }
    for (int32_t i = 0; i < x->rank; i++) {
        int64_t *pair = reduce[i] ? a + FOLD + 2 * a[FOLD_N] : a + KEPT + 2 * a[KEPT_N];
        if (x->dims[i] == 1 || !a[SCATTERED]) continue;
        a[reduce[i] ? FOLD_N : KEPT_N]++; /* at most 4 reduced and 3 kept */
        pair[0] = x->dims[i];
        pair[1] = strides[i];
    }
    a[OUTER] = mil_product(x->dims, 0, first);
    a[INNER] = mil_product(x->dims, last + 1, x->rank);
    if (a[REDUCED] > 512 && (code == SUM || code == MEAN || code == L1 || code == SUM_SQUARE))
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_REDUCE_LONG, op->at, 1,
                           "%lld elements are summed in fp16; use a matmul or conv with ones",
                           (long long)a[REDUCED]));
    return mil_declare(b, op, 0, &out);
}

/* Offset of element `index` of a list of (extent, stride) axes, the last of which runs fastest. */
static int64_t axes_offset(const int64_t *pairs, int64_t n, int64_t index) {
    int64_t at = 0;
    for (int64_t i = n - 1; i >= 0; i--) {
        at += index % pairs[2 * i] * pairs[2 * i + 1];
        index /= pairs[2 * i];
    }
    return at;
}

typedef struct {
    mil_run *run;
    const mil_op *op;
    const float *x;
    float *y;
    int64_t inside; /* groups of LANES per outer index; 0: lanes are outer indices themselves */
} reduce_job;

/* Adds one element to each lane; sums are rounded to fp16. */
static void accumulate(mil_run *r, int32_t code, float *restrict sum, const float *restrict v,
                       int64_t n) {
    switch (code) {
    case MAX:
        for (int64_t i = 0; i < n; i++) sum[i] = v[i] > sum[i] ? v[i] : sum[i];
        return;
    case MIN:
        for (int64_t i = 0; i < n; i++) sum[i] = v[i] < sum[i] ? v[i] : sum[i];
        return;
    case L2:
        for (int64_t i = 0; i < n; i++) sum[i] += v[i] * v[i];
        return;
    case L1:
        for (int64_t i = 0; i < n; i++) sum[i] += fabsf(v[i]);
        break;
    case SUM_SQUARE: {
        float square[LANES];
        for (int64_t i = 0; i < n; i++) square[i] = v[i] * v[i];
        mil_round(r, square, n);
        for (int64_t i = 0; i < n; i++) sum[i] += square[i];
        break;
    }
    default:
        for (int64_t i = 0; i < n; i++) sum[i] += v[i];
        break;
    }
    mil_round(r, sum, n);
}

/* Results [first, first + n), n <= LANES; element (p, lane) is at x[p(step) + lane(lane_step)]. */
static void reduce_lanes(const reduce_job *job, float *y, const int64_t *start, int64_t n) {
    const mil_op *op = job->op;
    const int64_t *a = op->a;
    int32_t code = op->type->code;
    float sum[LANES] = {0}, v[LANES], largest[LANES];
    int contiguous = !a[SCATTERED] && a[INNER] > 1;
    int passes = code == LOG_SUM_EXP ? 2 : 1;
    for (int pass = 0; pass < passes; pass++) {
        for (int64_t p = 0; p < a[REDUCED]; p++) {
            int64_t at = a[SCATTERED] ? axes_offset(a + FOLD, a[FOLD_N], p) : p * a[INNER];
            if (contiguous) memcpy(v, job->x + start[0] + at, (size_t)n * sizeof *v);
            else
                for (int64_t i = 0; i < n; i++) v[i] = job->x[start[i] + at];
            if (pass == 1) {
                for (int64_t i = 0; i < n; i++) sum[i] += expf(v[i] - largest[i]);
            } else if (p == 0 && (code == MAX || code == MIN || code == LOG_SUM_EXP)) {
                memcpy(sum, v, (size_t)n * sizeof *v);
            } else {
                accumulate(job->run, code == LOG_SUM_EXP ? MAX : code, sum, v, n);
            }
        }
        if (pass + 1 < passes) {
            memcpy(largest, sum, (size_t)n * sizeof *sum);
            memset(sum, 0, sizeof sum);
        }
    }
    float count = (float)a[REDUCED];
    for (int64_t i = 0; i < n; i++) {
        if (code == MEAN) sum[i] /= count;
        if (code == L2) sum[i] = sqrtf(sum[i]);
        if (code == LOG_SUM_EXP) sum[i] = largest[i] + logf(sum[i]);
    }
    memcpy(y, sum, (size_t)n * sizeof *y);
    mil_round(job->run, y, n);
}

static void reduce_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const reduce_job *job = context;
    const int64_t *a = job->op->a;
    int64_t start[LANES], first, n;
    if (job->inside > 0) {
        int64_t outer = index / job->inside, lane = index % job->inside * LANES;
        n = a[INNER] - lane < LANES ? a[INNER] - lane : LANES;
        for (int64_t i = 0; i < n; i++) start[i] = outer * a[REDUCED] * a[INNER] + lane + i;
        first = outer * a[INNER] + lane;
    } else {
        int64_t total = job->op->out[0]->n;
        first = (int64_t)index * LANES;
        n = total - first < LANES ? total - first : LANES;
        for (int64_t i = 0; i < n; i++)
            start[i] = a[SCATTERED] ? axes_offset(a + KEPT, a[KEPT_N], first + i)
                                    : (first + i) * a[REDUCED];
    }
    reduce_lanes(job, job->y + first, start, n);
}

static void run_reduce(mil_run *r, const mil_op *op) {
    const int64_t *a = op->a;
    reduce_job job = {r, op, mil_data(r, op->arg[0]), mil_data(r, op->out[0]), 0};
    int64_t groups = (op->out[0]->n + LANES - 1) / LANES;
    if (!a[SCATTERED] && a[INNER] > 1) {
        job.inside = (a[INNER] + LANES - 1) / LANES;
        groups = a[OUTER] * job.inside;
    }
    mil_each(r, groups, reduce_piece, &job);
}

/* ------------------------------------------------------------------------------------- softmax */

static int32_t check_softmax(mil_build *b, mil_op *op) {
    const mil_shape *x = &op->arg[0]->shape;
    int32_t axis;
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_float(b, op, 0));
    ANEPY_TRY(mil_want_axis(b, op, 1, mil_int_or(op, 1, -1), x->rank, &axis));
    op->a[OUTER] = mil_product(x->dims, 0, axis);
    op->a[REDUCED] = x->dims[axis];
    op->a[INNER] = mil_product(x->dims, axis + 1, x->rank);
    return mil_declare(b, op, 0, x);
}

/* Exponentials in place; on the hardware a table. */
static void exponentials(const mil_run *r, float *x, int64_t n) {
    const anepy_mil *mil = r->mil;
    if (mil->tables != NULL)
        mil_table_run(mil->kernels->fixed, mil->tables, MIL_TABLE_EXP, x, x, n);
    else mil->kernels->exp(x, x, n);
}

void mil_softmax_row(mil_run *r, float *row, int64_t n) {
    const anepy_mil *mil = r->mil;
    if (mil->tables != NULL) mil_table_softmax(mil->kernels->fixed, mil->tables, row, n);
    else mil->kernels->softmax_row(row, (int32_t)n, (int32_t)n, 1.0f);
}

static void softmax_row(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const reduce_job *job = context;
    int64_t n = job->op->a[REDUCED];
    float *y = job->y + index * n;
    memcpy(y, job->x + index * n, (size_t)n * sizeof *y);
    mil_softmax_row(job->run, y, n);
    mil_round(job->run, y, n);
}

/* Soft-max down an axis that is not the last: LANES neighbouring columns at once. */
static void softmax_columns(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const reduce_job *job = context;
    const int64_t *a = job->op->a;
    int64_t lane = index % job->inside * LANES;
    int64_t at = index / job->inside * a[REDUCED] * a[INNER] + lane;
    int64_t n = a[INNER] - lane < LANES ? a[INNER] - lane : LANES;
    const float *x = job->x + at;
    float *y = job->y + at, largest[LANES], sum[LANES] = {0};
    memcpy(largest, x, (size_t)n * sizeof *x);
    for (int64_t p = 1; p < a[REDUCED]; p++)
        for (int64_t i = 0; i < n; i++) {
            float v = x[p * a[INNER] + i];
            largest[i] = v > largest[i] ? v : largest[i];
        }
    for (int64_t p = 0; p < a[REDUCED]; p++) {
        float *row = y + p * a[INNER];
        for (int64_t i = 0; i < n; i++) row[i] = x[p * a[INNER] + i] - largest[i];
        exponentials(job->run, row, n);
        for (int64_t i = 0; i < n; i++) sum[i] += row[i];
    }
    for (int64_t i = 0; i < n; i++) sum[i] = 1.0f / sum[i];
    for (int64_t p = 0; p < a[REDUCED]; p++) {
        float *row = y + p * a[INNER];
        for (int64_t i = 0; i < n; i++) row[i] *= sum[i];
        mil_round(job->run, row, n);
    }
}

static void run_softmax(mil_run *r, const mil_op *op) {
    const int64_t *a = op->a;
    reduce_job job = {r, op, mil_data(r, op->arg[0]), mil_data(r, op->out[0]), 0};
    if (a[INNER] == 1) {
        mil_each(r, a[OUTER], softmax_row, &job);
        return;
    }
    job.inside = (a[INNER] + LANES - 1) / LANES;
    mil_each(r, a[OUTER] * job.inside, softmax_columns, &job);
}

/* ---------------------------------------------------------------------------------- layer_norm */

enum { LN_AXES = 1, LN_GAMMA, LN_BETA, LN_EPSILON };

static int32_t check_layer_norm(mil_build *b, mil_op *op) {
    const mil_shape *x = &op->arg[0]->shape;
    int64_t *a = op->a;
    int32_t axis, first = 0;
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_float(b, op, 0));
    int64_t count = op->arg[LN_AXES] != NULL ? op->arg[LN_AXES]->n : x->rank;
    if (count > x->rank)
        return mil_error(b->mil, op->arg_at[LN_AXES], "more axes than the %d of x", x->rank);
    if (op->arg[LN_AXES] != NULL)
        ANEPY_TRY(mil_want_axis(b, op, LN_AXES, mil_int_at(op->arg[LN_AXES], 0), x->rank, &first));
    for (int32_t i = 0; op->arg[LN_AXES] != NULL && i < count; i++) {
        ANEPY_TRY(mil_want_axis(b, op, LN_AXES, mil_int_at(op->arg[LN_AXES], i), x->rank, &axis));
        if (axis != first + i)
            return mil_error(b->mil, op->arg_at[LN_AXES], "the axes must follow each other");
    }
    int32_t end = first + (int32_t)count;
    a[OUTER] = mil_product(x->dims, 0, first);
    a[REDUCED] = mil_product(x->dims, first, end);
    a[INNER] = mil_product(x->dims, end, x->rank);
    for (int32_t slot = LN_GAMMA; slot <= LN_BETA; slot++) {
        if (op->arg[slot] == NULL) continue;
        ANEPY_TRY(mil_want_float(b, op, slot));
        if (op->arg[slot]->n != a[REDUCED])
            return mil_error(b->mil, op->arg_at[slot], "%s has %lld elements, wanted %lld",
                             op->type->params[slot].name, (long long)op->arg[slot]->n,
                             (long long)a[REDUCED]);
    }
    op->f[0] = (float)mil_float_or(op, LN_EPSILON, 1e-5);
    int64_t d = a[REDUCED];
    int bad =
        b->mil->options.chip <= ANEPY_CHIP_M2 && (d == 1024 || d == 1536 || d == 2560 || d == 4096);
    if (d >= 10240 || bad)
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_LAYER_NORM, op->at, 1,
                           "layer_norm over %lld elements fails on M%d", (long long)d,
                           (int)b->mil->options.chip + 1));
    return mil_declare(b, op, 0, x);
}

static void layer_norm_lane(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const reduce_job *job = context;
    const mil_op *op = job->op;
    const int64_t *a = op->a;
    int64_t at = index / a[INNER] * a[REDUCED] * a[INNER] + index % a[INNER];
    const float *x = job->x + at;
    const float *gamma = op->arg[LN_GAMMA] != NULL ? mil_data(job->run, op->arg[LN_GAMMA]) : NULL;
    const float *beta = op->arg[LN_BETA] != NULL ? mil_data(job->run, op->arg[LN_BETA]) : NULL;
    double mean = 0.0, variance = 0.0;
    for (int64_t p = 0; p < a[REDUCED]; p++) mean += (double)x[p * a[INNER]];
    mean /= (double)a[REDUCED];
    for (int64_t p = 0; p < a[REDUCED]; p++) {
        double d = (double)x[p * a[INNER]] - mean;
        variance += d * d;
    }
    double scale = 1.0 / sqrt(variance / (double)a[REDUCED] + (double)op->f[0]);
    for (int64_t p = 0; p < a[REDUCED]; p++) {
        float v = (float)(((double)x[p * a[INNER]] - mean) * scale);
        if (gamma != NULL) v *= gamma[p];
        if (beta != NULL) v += beta[p];
        job->y[at + p * a[INNER]] = v;
    }
}

static void run_layer_norm(mil_run *r, const mil_op *op) {
    reduce_job job = {r, op, mil_data(r, op->arg[0]), mil_data(r, op->out[0]), 0};
    mil_each(r, op->a[OUTER] * op->a[INNER], layer_norm_lane, &job);
    mil_round_all(r, job.y, op->out[0]->n);
}

/* --------------------------------------------------------------------------------------- table */

#define X {"x", MIL_TENSOR, 0}
#define REDUCE(name, code)                                                                         \
    {name,                                                                                         \
     {X, {"axes", MIL_INT_LIST, 1}, {"keep_dims", MIL_BOOL, 1}},                                   \
     check_reduce,                                                                                 \
     run_reduce,                                                                                   \
     code}

const mil_op_type MIL_REDUCTIONS[] = {
    REDUCE("reduce_sum", SUM),
    REDUCE("reduce_mean", MEAN),
    REDUCE("reduce_max", MAX),
    REDUCE("reduce_min", MIN),
    REDUCE("reduce_l1_norm", L1),
    REDUCE("reduce_l2_norm", L2),
    REDUCE("reduce_sum_square", SUM_SQUARE),
    REDUCE("reduce_log_sum_exp", LOG_SUM_EXP),
    {"softmax", {X, {"axis", MIL_INT, 1}}, check_softmax, run_softmax, 0},
    {"layer_norm",
     {X,
      {"axes", MIL_INT_LIST, 1},
      {"gamma", MIL_TENSOR, 1},
      {"beta", MIL_TENSOR, 1},
      {"epsilon", MIL_FLOAT, 1}},
     check_layer_norm,
     run_layer_norm,
     0},
    {NULL, {{NULL, 0, 0}}, NULL, NULL, 0},
};
