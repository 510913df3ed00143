/* device/sim/op_product.c - conv, linear, matmul and attention, over the products of multiply.c. */
#include "device/sim/interpreter_internal.h"

#include <math.h>
#include <string.h>

#define IM2COL_N ((int64_t)4 << 20) /* floats of unfolded input at a time */

static int32_t add_work(mil_build *b, const mil_op *op, int64_t m, int64_t n, int64_t k,
                        int64_t batch) {
    double work = (double)m * (double)n * (double)k * (double)batch;
    if (work > (double)b->mil->options.work)
        return mil_error(b->mil, op->at, "this needs %.3g multiply-adds, more than a run may",
                         work);
    b->function->work += (uint64_t)work;
    return ANEPY_OK;
}

static int32_t want_contraction(mil_build *b, const mil_op *op, int64_t k) {
    int64_t most = b->mil->options.chip <= ANEPY_CHIP_M3 ? 16384 : 65536;
    if (k <= most) return ANEPY_OK;
    return mil_rule(b->mil, ANEPY_RULE_EXTENT, op->at, 1,
                    "a reduction over %lld elements, M%d allows %lld", (long long)k,
                    (int)b->mil->options.chip + 1, (long long)most);
}

static void note_product(const mil_build *b, mil_op *op, int64_t m, int64_t n, int64_t k,
                         int32_t b_transposed) {
    int64_t scratch = mil_multiply_scratch_n(b->mil, m, n, k, b_transposed);
    if (scratch > op->scratch_n) op->scratch_n = scratch;
    if (n > op->columns) op->columns = (int32_t)n;
}

/* ---------------------------------------------------------------------------------------- conv */

/* a[]: batch, groups, out channels and in channels per group, then for height and width: in, out,
 * kernel, stride, dilation, padding before. */
enum { BATCH, GROUPS, OUT, IN, SPACE, SPACE_N = 6, IN_X = 0, OUT_X, KERNEL, STRIDE, DILATION, PAD };
enum {
    CONV_WEIGHT = 1,
    CONV_BIAS,
    CONV_STRIDES,
    CONV_PAD_TYPE,
    CONV_PAD,
    CONV_DILATIONS,
    CONV_GROUPS
};

/* Whether neighbouring outputs read neighbouring inputs, so that nothing has to be unfolded. */
static int conv_is_plain(const mil_op *op) {
    for (int32_t d = 0; d < 2; d++) {
        const int64_t *s = op->a + SPACE + d * SPACE_N;
        if (s[KERNEL] != 1 || s[STRIDE] != 1 || s[IN_X] != s[OUT_X]) return 0;
    }
    return 1;
}

static int64_t conv_columns(int64_t k, int64_t positions) {
    int64_t columns = IM2COL_N / k / 64 * 64;
    if (columns < 64) columns = 64;
    return columns < positions ? columns : positions;
}

static int32_t conv_space(mil_build *b, mil_op *op, int32_t axis, int32_t axes, int32_t d) {
    const mil_shape *x = &op->arg[0]->shape, *w = &op->arg[CONV_WEIGHT]->shape;
    int64_t *s = op->a + SPACE + d * SPACE_N, before = 0, after = 0;
    const char *pad_type = mil_string_or(op, CONV_PAD_TYPE, "valid");
    s[IN_X] = x->dims[2 + axis];
    s[KERNEL] = w->dims[2 + axis];
    s[STRIDE] = op->arg[CONV_STRIDES] != NULL ? mil_int_at(op->arg[CONV_STRIDES], axis) : 1;
    s[DILATION] = op->arg[CONV_DILATIONS] != NULL ? mil_int_at(op->arg[CONV_DILATIONS], axis) : 1;
    if (s[STRIDE] < 1 || s[STRIDE] > 65536)
        return mil_error(b->mil, op->arg_at[CONV_STRIDES], "stride %lld", (long long)s[STRIDE]);
    if (s[DILATION] < 1 || s[DILATION] > 65536)
        return mil_error(b->mil, op->arg_at[CONV_DILATIONS], "dilation %lld",
                         (long long)s[DILATION]);
    int64_t reach = (s[KERNEL] - 1) * s[DILATION] + 1;
    if (strcmp(pad_type, "same") == 0) {
        int64_t outs = (s[IN_X] + s[STRIDE] - 1) / s[STRIDE];
        int64_t total = (outs - 1) * s[STRIDE] + reach - s[IN_X];
        if (total < 0) total = 0;
        before = total / 2;
        after = total - before;
    } else if (strcmp(pad_type, "custom") == 0) {
        if (op->arg[CONV_PAD] == NULL)
            return mil_error(b->mil, op->at, "pad_type custom needs the parameter pad");
        ANEPY_TRY(mil_want_list(b, op, CONV_PAD, 2 * axes));
        before = mil_int_at(op->arg[CONV_PAD], 2 * axis);
        after = mil_int_at(op->arg[CONV_PAD], 2 * axis + 1);
        if (before < 0 || after < 0 || before > 65536 || after > 65536)
            return mil_error(b->mil, op->arg_at[CONV_PAD], "padding %lld and %lld",
                             (long long)before, (long long)after);
    } else if (strcmp(pad_type, "valid") != 0) {
        return mil_error(b->mil, op->arg_at[CONV_PAD_TYPE], "pad_type is valid, same or custom");
    }
    if (s[IN_X] + before + after < reach)
        return mil_error(b->mil, op->at, "a kernel reaching over %lld positions does not fit %lld",
                         (long long)reach, (long long)(s[IN_X] + before + after));
    s[PAD] = before;
    s[OUT_X] = (s[IN_X] + before + after - reach) / s[STRIDE] + 1;
    return ANEPY_OK;
}

static int32_t conv_rules(mil_build *b, const mil_op *op) {
    const int64_t *a = op->a;
    int32_t widest = b->mil->options.chip <= ANEPY_CHIP_M3 ? 13 : 15;
    int64_t inputs = a[GROUPS] * a[IN];
    if (a[SPACE + SPACE_N + KERNEL] > widest)
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_KERNEL_WIDTH, op->arg_at[CONV_WEIGHT], 1,
                           "the kernel is %lld wide, M%d allows %d",
                           (long long)a[SPACE + SPACE_N + KERNEL], (int)b->mil->options.chip + 1,
                           widest));
    if (inputs > 16384)
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_CONV_INPUTS, op->at, 1,
                           "%lld input channels, conv takes 16384", (long long)inputs));
    if (a[GROUPS] > 1 && !mil_is_const(op->arg[CONV_WEIGHT]))
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_CONV_RUNTIME_GROUPS, op->arg_at[CONV_WEIGHT], 1,
                           "the weight of a grouped conv must be a constant"));
    return ANEPY_OK;
}

static int32_t check_conv(mil_build *b, mil_op *op) {
    const mil_shape *x = &op->arg[0]->shape, *w = &op->arg[CONV_WEIGHT]->shape;
    int64_t *a = op->a, none[SPACE_N] = {1, 1, 1, 1, 1, 0};
    int32_t axes = x->rank - 2;
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    for (int32_t slot = 0; slot <= CONV_BIAS; slot++) {
        if (op->arg[slot] == NULL) continue;
        ANEPY_TRY(mil_want_float(b, op, slot));
        ANEPY_TRY(mil_want_same_type(b, op, slot, 0));
    }
    if (axes < 1 || axes > 2 || w->rank != x->rank)
        return mil_error(b->mil, op->arg_at[w->rank == x->rank ? 0 : CONV_WEIGHT],
                         "conv takes x and weight of 3 or 4 dimensions, not %d and %d", x->rank,
                         w->rank);
    ANEPY_TRY(mil_want_list(b, op, CONV_STRIDES, axes));
    ANEPY_TRY(mil_want_list(b, op, CONV_DILATIONS, axes));
    memcpy(a + SPACE, none, sizeof none);
    for (int32_t i = 0; i < axes; i++) ANEPY_TRY(conv_space(b, op, i, axes, i + 2 - axes));
    a[BATCH] = x->dims[0];
    a[GROUPS] = mil_int_or(op, CONV_GROUPS, 1);
    a[IN] = w->dims[1];
    if (a[GROUPS] < 1 || a[GROUPS] > x->dims[1] || w->dims[0] % a[GROUPS] != 0)
        return mil_error(b->mil, op->arg_at[CONV_GROUPS], "%lld groups of %lld output channels",
                         (long long)a[GROUPS], (long long)w->dims[0]);
    if (a[GROUPS] * a[IN] != x->dims[1])
        return mil_error(b->mil, op->arg_at[CONV_WEIGHT],
                         "the weight reads %lld x %lld channels, x has %lld", (long long)a[GROUPS],
                         (long long)a[IN], (long long)x->dims[1]);
    a[OUT] = w->dims[0] / a[GROUPS];
    if (op->arg[CONV_BIAS] != NULL && op->arg[CONV_BIAS]->n != w->dims[0])
        return mil_error(b->mil, op->arg_at[CONV_BIAS], "the bias has %lld elements, wanted %lld",
                         (long long)op->arg[CONV_BIAS]->n, (long long)w->dims[0]);
    ANEPY_TRY(conv_rules(b, op));
    mil_shape out = {.type = x->type, .rank = x->rank, .dims = {x->dims[0], w->dims[0]}};
    for (int32_t i = 0; i < axes; i++)
        out.dims[2 + i] = a[SPACE + (i + 2 - axes) * SPACE_N + OUT_X];
    ANEPY_TRY(mil_declare(b, op, 0, &out));
    int64_t k = a[IN] * mil_product(w->dims, 2, w->rank), n = mil_product(out.dims, 2, out.rank);
    if (conv_is_plain(op)) {
        note_product(b, op, a[OUT], n, k, 0);
    } else {
        int64_t columns = conv_columns(k, n);
        note_product(b, op, a[OUT], columns, k, 0);
        op->scratch_n += k * columns;
    }
    return add_work(b, op, w->dims[0], n, k, a[BATCH]);
}

typedef struct {
    const mil_op *op;
    const float *x; /* the group's channels */
    float *out;     /* [k, n] */
    int64_t first, n;
} unfold_job;

/* Unfolds the row of one weight (channel, kernel position), columns first to first + n. */
static void unfold_row(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const unfold_job *job = context;
    const int64_t *h = job->op->a + SPACE, *w = h + SPACE_N;
    int64_t kx = index % w[KERNEL], ky = index / w[KERNEL] % h[KERNEL];
    const float *x = job->x + index / (w[KERNEL] * h[KERNEL]) * h[IN_X] * w[IN_X];
    float *out = job->out + index * job->n;
    for (int64_t j = 0; j < job->n; j++) {
        int64_t oy = (job->first + j) / w[OUT_X], ox = (job->first + j) % w[OUT_X];
        int64_t iy = oy * h[STRIDE] + ky * h[DILATION] - h[PAD];
        int64_t ix = ox * w[STRIDE] + kx * w[DILATION] - w[PAD];
        int inside = iy >= 0 && iy < h[IN_X] && ix >= 0 && ix < w[IN_X];
        out[j] = inside ? x[iy * w[IN_X] + ix] : 0.0f;
    }
}

static void conv_group(mil_run *r, const mil_op *op, float *y, const float *x, const float *w,
                       const float *bias) {
    const int64_t *a = op->a, *h = a + SPACE, *v = h + SPACE_N;
    int64_t k = a[IN] * h[KERNEL] * v[KERNEL], n = h[OUT_X] * v[OUT_X];
    mil_matmul s = {.a = w, .m = a[OUT], .n = n, .k = k, .a_row = k, .a_step = 1, .ldc = n};
    s.bias = bias;
    if (conv_is_plain(op)) {
        s.c = y;
        s.b = x;
        s.ldb = n;
        mil_multiply(r, &s, r->scratch);
        return;
    }
    int64_t columns = conv_columns(k, n);
    for (int64_t first = 0; first < n; first += columns) {
        int64_t count = n - first < columns ? n - first : columns;
        unfold_job job = {op, x, r->scratch, first, count};
        mil_each(r, k, unfold_row, &job);
        s.c = y + first;
        s.b = r->scratch;
        s.ldb = s.n = count;
        mil_multiply(r, &s, r->scratch + k * columns);
    }
}

static void run_conv(mil_run *r, const mil_op *op) {
    const int64_t *a = op->a, *h = a + SPACE, *v = h + SPACE_N;
    int64_t in = h[IN_X] * v[IN_X], n = h[OUT_X] * v[OUT_X];
    int64_t k = a[IN] * h[KERNEL] * v[KERNEL];
    const float *x = mil_data(r, op->arg[0]), *w = mil_data(r, op->arg[CONV_WEIGHT]);
    const float *bias = op->arg[CONV_BIAS] != NULL ? mil_data(r, op->arg[CONV_BIAS]) : NULL;
    float *y = mil_data(r, op->out[0]);
    for (int64_t i = 0; i < a[BATCH] * a[GROUPS]; i++) {
        int64_t first = i % a[GROUPS] * a[OUT];
        conv_group(r, op, y + i * a[OUT] * n, x + i * a[IN] * in, w + first * k,
                   bias != NULL ? bias + first : NULL);
    }
    mil_round_sums(r, y, op->out[0]->n);
}

/* -------------------------------------------------------------------------------------- matmul */

/* a[]: m, n, k, transpose x, transpose y, batches, then per batch dimension (innermost first):
 * extent, stride of x, stride of y. */
enum { M, N, K, TRANSPOSE_X, TRANSPOSE_Y, BATCHES, BATCH_RANK, BATCH_DIMS };

static int32_t matmul_batch(mil_build *b, mil_op *op, mil_shape *out) {
    const mil_shape *x = &op->arg[0]->shape, *y = &op->arg[1]->shape;
    int64_t *a = op->a, step_x = 1, step_y = 1;
    out->rank = x->rank > y->rank ? x->rank : y->rank;
    a[BATCHES] = 1;
    for (int32_t i = out->rank - 3; i >= 0; i--) {
        int32_t ix = i - (out->rank - x->rank), iy = i - (out->rank - y->rank);
        int64_t dx = ix >= 0 ? x->dims[ix] : 1, dy = iy >= 0 ? y->dims[iy] : 1;
        char one[128], two[128];
        if (dx != dy && dx != 1 && dy != 1)
            return mil_error(b->mil, op->at, "the batch dimensions of %s and %s differ",
                             mil_shape_text(x, one, sizeof one),
                             mil_shape_text(y, two, sizeof two));
        if (dx != dy)
            ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_MATMUL_BROADCAST, op->at, 1,
                               "batch dimension %d is %lld in x and %lld in y: may give zeros", i,
                               (long long)dx, (long long)dy));
        int64_t *d = a + BATCH_DIMS + 3 * a[BATCH_RANK]++;
        d[0] = out->dims[i] = dx > dy ? dx : dy;
        d[1] = dx > 1 ? step_x : 0;
        d[2] = dy > 1 ? step_y : 0;
        step_x *= dx;
        step_y *= dy;
        if (d[0] > MIL_MAX_EXTENT / a[BATCHES])
            return mil_error(b->mil, op->at, "the result is too large");
        a[BATCHES] *= d[0];
    }
    return ANEPY_OK;
}

static mil_batch matmul_batch_of(const mil_op *op) {
    const int64_t *a = op->a;
    return (mil_batch){.one = {.m = a[M],
                               .n = a[N],
                               .k = a[K],
                               .ldc = a[N],
                               .a_row = a[TRANSPOSE_X] ? 1 : a[K],
                               .a_step = a[TRANSPOSE_X] ? a[M] : 1,
                               .ldb = a[TRANSPOSE_Y] ? a[K] : a[N],
                               .b_transposed = (int32_t)a[TRANSPOSE_Y]},
                       .count = a[BATCHES],
                       .dims = a + BATCH_DIMS,
                       .dim_n = a[BATCH_RANK]};
}

static int32_t check_matmul(mil_build *b, mil_op *op) {
    const mil_shape *x = &op->arg[0]->shape, *y = &op->arg[1]->shape;
    int64_t *a = op->a;
    mil_shape out = {.type = x->type};
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_float(b, op, 0));
    ANEPY_TRY(mil_want_float(b, op, 1));
    ANEPY_TRY(mil_want_same_type(b, op, 1, 0));
    if (x->rank < 2 || y->rank < 2)
        return mil_error(b->mil, op->arg_at[x->rank < 2 ? 0 : 1],
                         "matmul takes at least 2 dimensions, not %d",
                         x->rank < 2 ? x->rank : y->rank);
    if (x->rank > 4 || y->rank > 4)
        ANEPY_TRY(
            mil_rule(b->mil, ANEPY_RULE_RANK, op->at, 1, "matmul takes at most 4 dimensions"));
    for (int32_t slot = 2; slot < 4; slot++) {
        if (op->arg[slot] == NULL || !op->arg[slot]->literal) continue;
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_INLINE_LITERAL, op->arg_at[slot], 1,
                           "name a constant for matmul's %s", op->type->params[slot].name));
    }
    a[TRANSPOSE_X] = mil_int_or(op, 2, 0);
    a[TRANSPOSE_Y] = mil_int_or(op, 3, 0);
    a[M] = x->dims[x->rank - (a[TRANSPOSE_X] ? 1 : 2)];
    a[K] = x->dims[x->rank - (a[TRANSPOSE_X] ? 2 : 1)];
    a[N] = y->dims[y->rank - (a[TRANSPOSE_Y] ? 2 : 1)];
    int64_t k = y->dims[y->rank - (a[TRANSPOSE_Y] ? 1 : 2)];
    if (k != a[K])
        return mil_error(b->mil, op->at, "matmul reduces %lld elements of x with %lld of y",
                         (long long)a[K], (long long)k);
    ANEPY_TRY(matmul_batch(b, op, &out));
    out.dims[out.rank - 2] = a[M];
    out.dims[out.rank - 1] = a[N];
    ANEPY_TRY(want_contraction(b, op, k));
    if (b->mil->options.chip == ANEPY_CHIP_M1 && k % 32 != 0 && !mil_is_const(op->arg[0]) &&
        !mil_is_const(op->arg[1]))
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_MATMUL_K, op->at, 1,
                           "M1: a runtime matmul over %lld elements, no multiple of 32: zeros",
                           (long long)k));
    ANEPY_TRY(mil_declare(b, op, 0, &out));
    mil_batch batch = matmul_batch_of(op);
    op->scratch_n = mil_multiply_batch_scratch_n(b->mil, &batch);
    op->columns = (int32_t)a[N];
    return add_work(b, op, a[M], a[N], k, a[BATCHES]);
}

static void run_matmul(mil_run *r, const mil_op *op) {
    mil_batch s = matmul_batch_of(op);
    s.one.a = mil_data(r, op->arg[0]);
    s.one.b = mil_data(r, op->arg[1]);
    s.one.c = mil_data(r, op->out[0]);
    mil_multiply_batch(r, &s, r->scratch);
    mil_round_sums(r, s.one.c, op->out[0]->n);
}

/* y = x W^T + bias, W [out, in]. */
static int32_t check_linear(mil_build *b, mil_op *op) {
    const mil_shape *x = &op->arg[0]->shape, *w = &op->arg[1]->shape;
    mil_shape out = *x;
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    for (int32_t slot = 0; slot < 3; slot++) {
        if (op->arg[slot] == NULL) continue;
        ANEPY_TRY(mil_want_float(b, op, slot));
        ANEPY_TRY(mil_want_same_type(b, op, slot, 0));
    }
    if (x->rank < 1 || w->rank != 2 || x->dims[x->rank - 1] != w->dims[1])
        return mil_error(b->mil, op->arg_at[1],
                         "the weight of linear must be [out, in] with the "
                         "last dimension of x as in");
    if (op->arg[2] != NULL && op->arg[2]->n != w->dims[0])
        return mil_error(b->mil, op->arg_at[2], "the bias has %lld elements, wanted %lld",
                         (long long)op->arg[2]->n, (long long)w->dims[0]);
    op->a[M] = op->arg[0]->n / w->dims[1];
    op->a[N] = out.dims[out.rank - 1] = w->dims[0];
    op->a[K] = w->dims[1];
    ANEPY_TRY(want_contraction(b, op, op->a[K]));
    ANEPY_TRY(mil_declare(b, op, 0, &out));
    note_product(b, op, op->a[M], op->a[N], op->a[K], 1);
    return add_work(b, op, op->a[M], op->a[N], op->a[K], 1);
}

static void run_linear(mil_run *r, const mil_op *op) {
    const int64_t *a = op->a;
    float *y = mil_data(r, op->out[0]);
    mil_matmul s = {.c = y,
                    .a = mil_data(r, op->arg[0]),
                    .b = mil_data(r, op->arg[1]),
                    .m = a[M],
                    .n = a[N],
                    .k = a[K],
                    .ldc = a[N],
                    .a_row = a[K],
                    .a_step = 1,
                    .ldb = a[K],
                    .b_transposed = 1,
                    .bias = op->arg[2] != NULL ? mil_data(r, op->arg[2]) : NULL,
                    .bias_by_column = 1};
    mil_multiply(r, &s, r->scratch);
    mil_round_sums(r, y, op->out[0]->n);
}

/* ----------------------------------------------------------------------------------- attention */

/* a[]: queries, keys, width, width of values, batches, masked. */
enum { QUERIES, KEYS, WIDTH, VALUES, SDPA_BATCHES, MASK_STEP, MASKED };

static int32_t check_sdpa(mil_build *b, mil_op *op) {
    const mil_shape *q = &op->arg[0]->shape, *k = &op->arg[1]->shape, *v = &op->arg[2]->shape;
    int64_t *a = op->a;
    mil_shape out = *q;
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    for (int32_t slot = 0; slot < 3; slot++) {
        ANEPY_TRY(mil_want_float(b, op, slot));
        ANEPY_TRY(mil_want_same_type(b, op, slot, 0));
    }
    int fits = q->rank >= 3 && k->rank == q->rank && v->rank == q->rank;
    for (int32_t i = 0; fits && i < q->rank - 2; i++)
        fits = q->dims[i] == k->dims[i] && q->dims[i] == v->dims[i];
    if (!fits || q->dims[q->rank - 1] != k->dims[q->rank - 1] ||
        k->dims[q->rank - 2] != v->dims[q->rank - 2])
        return mil_error(b->mil, op->at,
                         "query [..., L, E], key [..., S, E] and value [..., S, F] "
                         "do not fit each other");
    a[QUERIES] = q->dims[q->rank - 2];
    a[KEYS] = k->dims[q->rank - 2];
    a[WIDTH] = q->dims[q->rank - 1];
    a[VALUES] = out.dims[out.rank - 1] = v->dims[q->rank - 1];
    a[SDPA_BATCHES] = mil_product(q->dims, 0, q->rank - 2);
    if (op->arg[3] != NULL) {
        const mil_shape *mask = &op->arg[3]->shape;
        ANEPY_TRY(mil_want_float(b, op, 3));
        int64_t matrix = a[QUERIES] * a[KEYS];
        if (mask->rank < 2 || mask->dims[mask->rank - 1] != a[KEYS] ||
            mask->dims[mask->rank - 2] != a[QUERIES] ||
            (op->arg[3]->n != matrix && op->arg[3]->n / a[SDPA_BATCHES] != matrix))
            return mil_error(b->mil, op->arg_at[3], "attn_mask must be [..., %lld, %lld]",
                             (long long)a[QUERIES], (long long)a[KEYS]);
        /* With the rule off the mask counts, as MIL defines it. */
        a[MASKED] = !mil_rule_on(b->mil, ANEPY_RULE_SDPA_MASK);
        a[MASK_STEP] = op->arg[3]->n == matrix ? 0 : matrix;
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_SDPA_MASK, op->arg_at[3], 1,
                           "the ANE ignores the mask; write attention as matmul and softmax"));
    }
    if ((a[QUERIES] >= 512 && a[KEYS] >= 512) || a[QUERIES] > 2048 || a[KEYS] > 2048)
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_SDPA_LENGTH, op->at, 1,
                           "wrong results at lengths %lld and %lld", (long long)a[QUERIES],
                           (long long)a[KEYS]));
    ANEPY_TRY(mil_declare(b, op, 0, &out));
    note_product(b, op, a[QUERIES], a[KEYS], a[WIDTH], 1);
    note_product(b, op, a[QUERIES], a[VALUES], a[KEYS], 0);
    op->scratch_n += a[QUERIES] * a[KEYS];
    ANEPY_TRY(add_work(b, op, a[QUERIES], a[VALUES], a[KEYS], a[SDPA_BATCHES]));
    return add_work(b, op, a[QUERIES], a[KEYS], a[WIDTH], a[SDPA_BATCHES]);
}

typedef struct {
    mil_run *run;
    float *scores;
    const float *mask;
    int64_t keys;
    float scale;
} rows_job;

static void attention_row(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const rows_job *job = context;
    float *row = job->scores + index * job->keys;
    for (int64_t i = 0; i < job->keys; i++)
        row[i] =
            row[i] * job->scale + (job->mask != NULL ? job->mask[index * job->keys + i] : 0.0f);
    mil_softmax_row(job->run, row, job->keys);
    if (job->run->mil->numerics->fixed) mil_round(job->run, row, job->keys);
}

static void run_sdpa(mil_run *r, const mil_op *op) {
    const int64_t *a = op->a;
    float *scores = r->scratch, *pad = scores + a[QUERIES] * a[KEYS];
    float *out = mil_data(r, op->out[0]);
    rows_job job = {r, scores, NULL, a[KEYS], 1.0f / sqrtf((float)a[WIDTH])};
    for (int64_t i = 0; i < a[SDPA_BATCHES]; i++) {
        mil_matmul s = {.c = scores,
                        .a = mil_data(r, op->arg[0]) + i * a[QUERIES] * a[WIDTH],
                        .b = mil_data(r, op->arg[1]) + i * a[KEYS] * a[WIDTH],
                        .m = a[QUERIES],
                        .n = a[KEYS],
                        .k = a[WIDTH],
                        .ldc = a[KEYS],
                        .a_row = a[WIDTH],
                        .a_step = 1,
                        .ldb = a[WIDTH],
                        .b_transposed = 1};
        mil_multiply(r, &s, pad);
        if (a[MASKED]) job.mask = mil_data(r, op->arg[3]) + i * a[MASK_STEP];
        mil_each(r, a[QUERIES], attention_row, &job);
        s = (mil_matmul){.c = out + i * a[QUERIES] * a[VALUES],
                         .a = scores,
                         .b = mil_data(r, op->arg[2]) + i * a[KEYS] * a[VALUES],
                         .m = a[QUERIES],
                         .n = a[VALUES],
                         .k = a[KEYS],
                         .ldc = a[VALUES],
                         .a_row = a[KEYS],
                         .a_step = 1,
                         .ldb = a[VALUES]};
        mil_multiply(r, &s, pad);
    }
    mil_round_sums(r, out, op->out[0]->n);
}

/* --------------------------------------------------------------------------------------- table */

#define X {"x", MIL_TENSOR, 0}

const mil_op_type MIL_PRODUCTS[] = {
    {"conv",
     {X,
      {"weight", MIL_TENSOR, 0},
      {"bias", MIL_TENSOR, 1},
      {"strides", MIL_INT_LIST, 1},
      {"pad_type", MIL_STRING, 1},
      {"pad", MIL_INT_LIST, 1},
      {"dilations", MIL_INT_LIST, 1},
      {"groups", MIL_INT, 1}},
     check_conv,
     run_conv,
     0},
    {"matmul",
     {X, {"y", MIL_TENSOR, 0}, {"transpose_x", MIL_BOOL, 1}, {"transpose_y", MIL_BOOL, 1}},
     check_matmul,
     run_matmul,
     0},
    {"linear",
     {X, {"weight", MIL_TENSOR, 0}, {"bias", MIL_TENSOR, 1}},
     check_linear,
     run_linear,
     0},
    {"scaled_dot_product_attention",
     {{"query", MIL_TENSOR, 0},
      {"key", MIL_TENSOR, 0},
      {"value", MIL_TENSOR, 0},
      {"attn_mask", MIL_TENSOR, 1}},
     check_sdpa,
     run_sdpa,
     0},
    {NULL, {{NULL, 0, 0}}, NULL, NULL, 0},
};
