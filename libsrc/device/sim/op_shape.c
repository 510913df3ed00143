/* device/sim/op_shape.c - operations that only move elements: views where memory order allows,
 * else copies through a list of strides. */
#include "device/sim/interpreter_internal.h"

#include <math.h>
#include <string.h>

/* ------------------------------------------------------------------------------- strided copies */

/* a[]: 0 the number of dimensions, 1 the first source element, then (extent, source stride) pairs
 * from the innermost output dimension outwards. */
enum { COPY_PAIRS = 2, COPY_SHIFTED = 23 }; /* at most 10 pairs */
#define TRANSPOSE_ROWS 32 /* squares of this side, of source and result, fit the cache */

static void copy_dim(mil_op *op, int64_t extent, int64_t stride) {
    int64_t *n = &op->a[0], *pair = op->a + COPY_PAIRS + 2 * *n;
    if (extent == 1) return;
    if (*n > 0 && stride == pair[-1] * pair[-2]) {
        pair[-2] *= extent;
        return;
    }
    pair[0] = extent;
    pair[1] = stride;
    (*n)++;
}

typedef struct {
    mil_run *run;
    const mil_op *op;
    float *out;
    const float *in;
    int64_t across; /* dimension whose source stride is 1, blocked against the innermost; or 0 */
    int64_t blocks; /* along both */
} copy_job;

static int64_t source_of(const mil_op *op, int64_t row, int32_t first) {
    int64_t at = 0;
    for (int64_t i = first; i < op->a[0]; i++) {
        const int64_t *pair = op->a + COPY_PAIRS + 2 * i;
        at += row % pair[0] * pair[1];
        row /= pair[0];
    }
    return at;
}

static void copy_piece(void *context, int64_t first, int64_t n) {
    const copy_job *job = context;
    const mil_op *op = job->op;
    int64_t inner = op->a[0] > 0 ? op->a[COPY_PAIRS] : 1;
    int64_t stride = op->a[0] > 0 ? op->a[COPY_PAIRS + 1] : 1;
    for (int64_t at = first, m; at < first + n; at += m) {
        int64_t column = at % inner;
        const float *src = job->in + source_of(op, at / inner, 1) + column * stride;
        float *dst = job->out + at;
        m = inner - column < first + n - at ? inner - column : first + n - at;
        if (stride == 1) memcpy(dst, src, (size_t)m * sizeof *dst);
        else
            for (int64_t i = 0; i < m; i++) dst[i] = src[i * stride];
    }
}

/* Transposes TRANSPOSE_ROWS rows of one matrix; index counts strips over all matrices. */
static void transpose_strip(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const copy_job *job = context;
    const int64_t *pairs = job->op->a + COPY_PAIRS;
    int64_t columns = pairs[0], column_stride = pairs[1], rows = pairs[2 * job->across];
    int64_t strip = index % job->blocks * TRANSPOSE_ROWS, row_step = 1, in = 0, out = 0;
    int64_t rest = index / job->blocks, step = columns;
    for (int64_t i = 1; i < job->op->a[0]; i++) {
        if (i == job->across) {
            row_step = step;
        } else {
            int64_t position = rest % pairs[2 * i];
            rest /= pairs[2 * i];
            in += position * pairs[2 * i + 1];
            out += position * step;
        }
        step *= pairs[2 * i];
    }
    int64_t end = strip + TRANSPOSE_ROWS < rows ? strip + TRANSPOSE_ROWS : rows;
    for (int64_t block = 0; block < columns; block += TRANSPOSE_ROWS) {
        int64_t last = block + TRANSPOSE_ROWS < columns ? block + TRANSPOSE_ROWS : columns;
        for (int64_t row = strip; row < end; row++) {
            const float *src = job->in + in + row;
            float *dst = job->out + out + row * row_step;
            for (int64_t c = block; c < last; c++) dst[c] = src[c * column_stride];
        }
    }
}

static void run_copy(mil_run *r, const mil_op *op) {
    copy_job job = {r, op, mil_data(r, op->out[0]), mil_data(r, op->arg[0]) + op->a[1], 0, 0};
    const int64_t *pairs = op->a + COPY_PAIRS;
    if (op->a[0] > 1 && pairs[1] > 1 && pairs[0] > 4)
        for (int64_t i = 1; i < op->a[0]; i++)
            if (pairs[2 * i + 1] == 1 && pairs[2 * i] > 4) job.across = i;
    if (job.across == 0) {
        mil_each_piece(r, op->out[0]->n, copy_piece, &job);
        return;
    }
    int64_t rows = pairs[2 * job.across];
    job.blocks = (rows + TRANSPOSE_ROWS - 1) / TRANSPOSE_ROWS;
    mil_each(r, op->out[0]->n / pairs[0] / rows * job.blocks, transpose_strip, &job);
}

/* ---------------------------------------------------------------------------- reshapes, transpose
 */

static int32_t check_reshape(mil_build *b, mil_op *op) {
    const mil_value *x = op->arg[0], *shape = op->arg[1];
    mil_shape out = {.type = x->shape.type, .rank = (int32_t)shape->n};
    int32_t guess = -1;
    int64_t known = 1;
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_float(b, op, 0));
    if (shape->n > MIL_RANK)
        return mil_error(b->mil, op->arg_at[1], "a tensor has at most %d dimensions", MIL_RANK);
    for (int32_t i = 0; i < out.rank; i++) {
        int64_t extent = out.dims[i] = mil_int_at(shape, i);
        if (extent == -1 && guess < 0) {
            guess = i;
            continue;
        }
        if (extent < 1 || extent > x->n / known)
            return mil_error(b->mil, op->arg_at[1], "extent %lld cannot be part of %lld elements",
                             (long long)extent, (long long)x->n);
        known *= extent;
    }
    if (guess >= 0) {
        out.dims[guess] = x->n / known;
        known *= out.dims[guess];
    }
    if (known != x->n)
        return mil_error(b->mil, op->arg_at[1], "the shape has %lld elements, x has %lld",
                         (long long)known, (long long)x->n);
    mil_make_view(op, 0, op->arg[0], 0);
    return mil_declare(b, op, 0, &out);
}

static int32_t check_expand_dims(mil_build *b, mil_op *op) {
    const mil_shape *x = &op->arg[0]->shape;
    mil_shape out = {.type = x->type, .rank = x->rank};
    int32_t axis, next = 0;
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_float(b, op, 0));
    if (op->arg[1]->n > MIL_RANK - x->rank)
        return mil_error(b->mil, op->arg_at[1], "a tensor has at most %d dimensions", MIL_RANK);
    out.rank += (int32_t)op->arg[1]->n;
    for (int64_t i = 0; i < op->arg[1]->n; i++) {
        ANEPY_TRY(mil_want_axis(b, op, 1, mil_int_at(op->arg[1], i), out.rank, &axis));
        if (out.dims[axis] != 0) return mil_error(b->mil, op->arg_at[1], "an axis is given twice");
        out.dims[axis] = 1;
    }
    for (int32_t i = 0; i < out.rank; i++)
        if (out.dims[i] == 0) out.dims[i] = x->dims[next++];
    mil_make_view(op, 0, op->arg[0], 0);
    return mil_declare(b, op, 0, &out);
}

static int32_t check_squeeze(mil_build *b, mil_op *op) {
    const mil_shape *x = &op->arg[0]->shape;
    mil_shape out = {.type = x->type};
    int32_t axis, drop[MIL_RANK] = {0};
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_float(b, op, 0));
    for (int32_t i = 0; i < x->rank; i++) drop[i] = op->arg[1] == NULL && x->dims[i] == 1;
    for (int64_t i = 0; op->arg[1] != NULL && i < op->arg[1]->n; i++) {
        ANEPY_TRY(mil_want_axis(b, op, 1, mil_int_at(op->arg[1], i), x->rank, &axis));
        if (x->dims[axis] != 1)
            return mil_error(b->mil, op->arg_at[1], "axis %d has extent %lld, not 1", axis,
                             (long long)x->dims[axis]);
        drop[axis] = 1;
    }
    for (int32_t i = 0; i < x->rank; i++)
        if (!drop[i]) out.dims[out.rank++] = x->dims[i];
    mil_make_view(op, 0, op->arg[0], 0);
    return mil_declare(b, op, 0, &out);
}

static int32_t check_transpose(mil_build *b, mil_op *op) {
    const mil_shape *x = &op->arg[0]->shape;
    mil_shape out = {.type = x->type, .rank = x->rank};
    int64_t strides[MIL_RANK], stride = 1;
    int32_t axis, seen = 0;
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_float(b, op, 0));
    ANEPY_TRY(mil_want_list(b, op, 1, x->rank));
    if (x->rank > 4)
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_RANK, op->at, 1,
                           "transpose takes at most 4 dimensions, not %d", x->rank));
    for (int32_t i = x->rank - 1; i >= 0; i--) {
        strides[i] = stride;
        stride *= x->dims[i];
    }
    for (int32_t i = x->rank - 1; i >= 0; i--) {
        ANEPY_TRY(mil_want_axis(b, op, 1, mil_int_at(op->arg[1], i), x->rank, &axis));
        if (seen & 1 << axis)
            return mil_error(b->mil, op->arg_at[1], "axis %d occurs twice in perm", axis);
        seen |= 1 << axis;
        out.dims[i] = x->dims[axis];
        copy_dim(op, x->dims[axis], strides[axis]);
    }
    if (op->a[0] == 0 || (op->a[0] == 1 && op->a[COPY_PAIRS + 1] == 1))
        mil_make_view(op, 0, op->arg[0], 0);
    return mil_declare(b, op, 0, &out);
}

static int32_t check_tile(mil_build *b, mil_op *op) {
    const mil_shape *x = &op->arg[0]->shape;
    mil_shape out = *x;
    int64_t stride = 1, total = op->arg[0]->n;
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_float(b, op, 0));
    ANEPY_TRY(mil_want_list(b, op, 1, x->rank));
    for (int32_t i = x->rank - 1; i >= 0; i--) {
        int64_t times = mil_int_at(op->arg[1], i);
        if (times < 1 || times > MIL_MAX_EXTENT / total)
            return mil_error(b->mil, op->arg_at[1], "%lld repetitions of %lld elements",
                             (long long)times, (long long)total);
        total *= times;
        out.dims[i] *= times;
        copy_dim(op, x->dims[i], stride);
        copy_dim(op, times, 0);
        stride *= x->dims[i];
    }
    return mil_declare(b, op, 0, &out);
}

/* -------------------------------------------------------------------------------------- slices */

typedef struct {
    int64_t begin[MIL_RANK], step[MIL_RANK], count[MIL_RANK];
} box;

typedef struct {
    mil_run *run;
    float *p;
} crop_job;

/* M1 and M2 take slices along the last axis in fixed point: numbers beyond 4094 become infinite. */
static void crop_piece(void *context, int64_t first, int64_t n) {
    const crop_job *job = context;
    uint64_t wrong = 0;
    for (int64_t i = first; i < first + n; i++) {
        if (!(fabsf(job->p[i]) > 4094.0f)) continue;
        job->p[i] = copysignf(mil_infinity(job->run->mil), job->p[i]);
        wrong++;
    }
    if (wrong > 0) atomic_fetch_add(&job->run->cropped, wrong);
}

static void run_slice(mil_run *r, const mil_op *op) {
    run_copy(r, op);
    if (op->f[0] == 0.0f) return;
    crop_job job = {r, mil_data(r, op->out[0])};
    mil_each_piece(r, op->out[0]->n, crop_piece, &job);
}

/* Makes result `index` of op that box of its first argument. */
static int32_t take_box(mil_build *b, mil_op *op, int32_t index, const box *part,
                        const mil_shape *out) {
    mil_value *x = op->arg[0];
    int64_t stride = 1, first = 0;
    int32_t rank = x->shape.rank, last = rank - 1, chip = (int32_t)b->mil->options.chip;
    for (int32_t i = last; i >= 0; i--) {
        copy_dim(op, part->count[i], part->step[i] * stride);
        first += part->begin[i] * stride;
        stride *= x->shape.dims[i];
    }
    op->a[1] = first;
    int shifted = last >= 0 && part->begin[last] > 0;
    op->a[COPY_SHIFTED] = shifted;
    if (shifted && chip <= ANEPY_CHIP_M3) {
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_LAST_AXIS_SLICE, op->at, 1,
                           "M%d: the slice begins at %lld of the last axis; slice channels instead",
                           chip + 1, (long long)part->begin[last]));
        op->f[0] = chip <= ANEPY_CHIP_M2 && mil_rule_on(b->mil, ANEPY_RULE_LAST_AXIS_SLICE);
    }
    int whole = op->a[0] == 0 || (op->a[0] == 1 && op->a[COPY_PAIRS + 1] == 1);
    if (whole && op->f[0] == 0.0f) mil_make_view(op, index, x, first);
    return mil_declare(b, op, index, out);
}

static int32_t check_slice_by_size(mil_build *b, mil_op *op) {
    const mil_shape *x = &op->arg[0]->shape;
    mil_shape out = {.type = x->type, .rank = x->rank};
    box part;
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_float(b, op, 0));
    ANEPY_TRY(mil_want_list(b, op, 1, x->rank));
    ANEPY_TRY(mil_want_list(b, op, 2, x->rank));
    for (int32_t i = 0; i < x->rank; i++) {
        int64_t extent = x->dims[i], begin = mil_int_at(op->arg[1], i);
        int64_t size = mil_int_at(op->arg[2], i);
        if (begin < 0 || begin >= extent)
            return mil_error(b->mil, op->arg_at[1], "begin %lld is outside dimension %d of %lld",
                             (long long)begin, i, (long long)extent);
        if (size == -1) size = extent - begin;
        if (size < 1 || size > extent - begin)
            return mil_error(b->mil, op->arg_at[2],
                             "size %lld from %lld on is outside dimension %d of %lld",
                             (long long)size, (long long)begin, i, (long long)extent);
        part.begin[i] = begin;
        part.step[i] = 1;
        part.count[i] = out.dims[i] = size;
    }
    return take_box(b, op, 0, &part, &out);
}

/* One axis of slice_by_index: begin, end and stride as in Python; masks say that an end is open. */
static int32_t index_range(mil_build *b, const mil_op *op, int32_t i, int64_t extent, box *part) {
    int64_t step = op->arg[3] != NULL ? mil_int_at(op->arg[3], i) : 1;
    int64_t begin = mil_int_at(op->arg[1], i), end = mil_int_at(op->arg[2], i);
    int from_start = op->arg[4] != NULL && mil_int_at(op->arg[4], i);
    int to_end = op->arg[5] != NULL && mil_int_at(op->arg[5], i);
    int squeeze = op->arg[6] != NULL && mil_int_at(op->arg[6], i);
    if (step < 1 || step > MIL_MAX_EXTENT)
        return mil_error(b->mil, op->arg_at[3], "stride %lld: only positive strides are supported",
                         (long long)step);
    if (begin < 0) begin += extent;
    if (end < 0) end += extent;
    if (from_start) begin = 0;
    if (squeeze) end = begin + 1;
    else if (to_end || end > extent) end = extent;
    if (begin < 0 || begin >= extent || end <= begin || end > extent)
        return mil_error(b->mil, op->arg_at[1], "[%lld, %lld) is no part of dimension %d of %lld",
                         (long long)begin, (long long)end, i, (long long)extent);
    part->begin[i] = begin;
    part->step[i] = step;
    part->count[i] = squeeze ? 1 : (end - begin + step - 1) / step;
    return ANEPY_OK;
}

static int32_t check_slice_by_index(mil_build *b, mil_op *op) {
    const mil_shape *x = &op->arg[0]->shape;
    mil_shape out = {.type = x->type};
    box part;
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_float(b, op, 0));
    for (int32_t slot = 1; slot < 7; slot++) ANEPY_TRY(mil_want_list(b, op, slot, x->rank));
    for (int32_t i = 0; i < x->rank; i++) {
        ANEPY_TRY(index_range(b, op, i, x->dims[i], &part));
        if (op->arg[6] == NULL || !mil_int_at(op->arg[6], i)) out.dims[out.rank++] = part.count[i];
    }
    return take_box(b, op, 0, &part, &out);
}

/* Every result but the last gets an operation of its own, so that each is one box. */
static int32_t check_split(mil_build *b, mil_op *op) {
    const mil_shape *x = &op->arg[0]->shape;
    const mil_value *sizes = op->arg[3];
    int64_t parts = mil_int_or(op, 2, sizes != NULL ? sizes->n : 0), at = 0;
    int32_t axis;
    ANEPY_TRY(mil_want_float(b, op, 0));
    ANEPY_TRY(mil_want_axis(b, op, 1, mil_int_at(op->arg[1], 0), x->rank, &axis));
    if (parts < 1 || parts != op->out_n || (sizes != NULL && sizes->n != parts))
        return mil_error(b->mil, op->at, "split makes %lld parts, declared are %d results",
                         (long long)parts, op->out_n);
    if (sizes == NULL && x->dims[axis] % parts != 0)
        return mil_error(b->mil, op->arg_at[2], "%lld parts of dimension %d with %lld elements",
                         (long long)parts, axis, (long long)x->dims[axis]);
    mil_value **outs = op->out;
    for (int32_t k = 0; k < parts; k++) {
        mil_op *one = op;
        int64_t size = sizes != NULL ? mil_int_at(sizes, k) : x->dims[axis] / parts;
        if (size < 1 || size > x->dims[axis] - at || (k == parts - 1 && size != x->dims[axis] - at))
            return mil_error(b->mil, op->arg_at[sizes != NULL ? 3 : 2],
                             "part %d of %lld elements does not fit dimension %d of %lld", k,
                             (long long)size, axis, (long long)x->dims[axis]);
        if (k < parts - 1) {
            one = mil_alloc(b->mil, sizeof *one);
            if (one == NULL) return mil_no_memory(b->mil, op->at);
            *one = *op;
        }
        one->out = outs + k;
        one->out_n = 1;
        box part;
        mil_shape out = *x;
        for (int32_t i = 0; i < x->rank; i++) {
            part.begin[i] = 0;
            part.step[i] = 1;
            part.count[i] = x->dims[i];
        }
        part.begin[axis] = at;
        out.dims[axis] = part.count[axis] = size;
        ANEPY_TRY(take_box(b, one, 0, &part, &out));
        if (one != op) ANEPY_TRY(mil_add_op(b, one));
        outs[k]->maker = one;
        at += size;
    }
    return ANEPY_OK;
}

/* -------------------------------------------------------------------------------------- concat */

typedef struct {
    float *out;
    const float *in;
    int64_t chunk, row, shift; /* of the input; of the output; where the chunk goes in its row */
} concat_job;

static void concat_piece(void *context, int64_t first, int64_t n) {
    const concat_job *job = context;
    for (int64_t at = first, m; at < first + n; at += m) {
        int64_t column = at % job->chunk;
        m = job->chunk - column < first + n - at ? job->chunk - column : first + n - at;
        memcpy(job->out + at / job->chunk * job->row + job->shift + column, job->in + at,
               (size_t)m * sizeof(float));
    }
}

static void run_concat(mil_run *r, const mil_op *op) {
    concat_job job = {.out = mil_data(r, op->out[0]), .row = op->a[1]};
    for (int32_t i = 0; i < op->list_n; i++) {
        job.in = mil_data(r, op->list[i]);
        job.chunk = op->list[i]->n / op->a[0];
        mil_each_piece(r, op->list[i]->n, concat_piece, &job);
        job.shift += job.chunk;
    }
}

static int shifted_last_slice(const mil_value *v) {
    return v->maker != NULL && v->maker->type->run == run_slice && v->maker->a[COPY_SHIFTED];
}

static int32_t check_concat(mil_build *b, mil_op *op) {
    mil_shape out = op->list[0]->shape;
    int32_t axis, shifted = 0;
    ANEPY_TRY(mil_want_outputs(b, op, 1));
    ANEPY_TRY(mil_want_axis(b, op, 0, mil_int_at(op->arg[0], 0), out.rank, &axis));
    if (mil_int_or(op, 1, 0))
        return mil_error(b->mil, op->arg_at[1], "concat with interleave=true is not supported");
    out.dims[axis] = 0;
    for (int32_t i = 0; i < op->list_n; i++) {
        const mil_shape *s = &op->list[i]->shape;
        op->arg[2] = op->list[i];
        ANEPY_TRY(mil_want_float(b, op, 2));
        int fits = s->rank == out.rank && s->type == out.type;
        for (int32_t d = 0; d < out.rank && fits; d++)
            fits = d == axis || s->dims[d] == out.dims[d];
        if (!fits) {
            char first[128], other[128];
            return mil_error(b->mil, op->arg_at[2], "value %d is %s, which does not continue %s", i,
                             mil_shape_text(s, other, sizeof other),
                             mil_shape_text(&op->list[0]->shape, first, sizeof first));
        }
        if (s->dims[axis] > MIL_MAX_EXTENT - out.dims[axis])
            return mil_error(b->mil, op->arg_at[2], "the result is too large");
        out.dims[axis] += s->dims[axis];
        shifted += shifted_last_slice(op->list[i]);
    }
    if (shifted > 1 && b->mil->options.chip == ANEPY_CHIP_M1)
        ANEPY_TRY(mil_rule(b->mil, ANEPY_RULE_LAST_AXIS_CONCAT, op->at, 1,
                           "M1 picks wrong elements from %d slices of the last axis", shifted));
    op->a[0] = mil_product(out.dims, 0, axis);
    op->a[1] = mil_elements(&out) / op->a[0];
    return mil_declare(b, op, 0, &out);
}

/* --------------------------------------------------------------------------------------- table */

#define X {"x", MIL_TENSOR, 0}

const mil_op_type MIL_SHAPES[] = {
    {"reshape", {X, {"shape", MIL_INT_LIST, 0}}, check_reshape, NULL, 0},
    {"expand_dims", {X, {"axes", MIL_INT_LIST, 0}}, check_expand_dims, NULL, 0},
    {"squeeze", {X, {"axes", MIL_INT_LIST, 1}}, check_squeeze, NULL, 0},
    {"transpose", {X, {"perm", MIL_INT_LIST, 0}}, check_transpose, run_copy, 0},
    {"tile", {X, {"reps", MIL_INT_LIST, 0}}, check_tile, run_copy, 0},
    {"slice_by_size",
     {X, {"begin", MIL_INT_LIST, 0}, {"size", MIL_INT_LIST, 0}},
     check_slice_by_size,
     run_slice,
     0},
    {"slice_by_index",
     {X,
      {"begin", MIL_INT_LIST, 0},
      {"end", MIL_INT_LIST, 0},
      {"stride", MIL_INT_LIST, 1},
      {"begin_mask", MIL_BOOL_LIST, 1},
      {"end_mask", MIL_BOOL_LIST, 1},
      {"squeeze_mask", MIL_BOOL_LIST, 1}},
     check_slice_by_index,
     run_slice,
     0},
    {"split",
     {X, {"axis", MIL_INT, 0}, {"num_splits", MIL_INT, 1}, {"split_sizes", MIL_INT_LIST, 1}},
     check_split,
     run_slice,
     0},
    {"concat",
     {{"axis", MIL_INT, 0}, {"interleave", MIL_BOOL, 1}, {"values", MIL_TENSORS, 0}},
     check_concat,
     run_concat,
     0},
    {NULL, {{NULL, 0, 0}}, NULL, NULL, 0},
};
