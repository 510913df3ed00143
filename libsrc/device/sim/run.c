/* device/sim/run.c - executes a planned function: surfaces in, operations, surfaces out. */
#include "device/sim/interpreter_internal.h"

#include <math.h>
#include <string.h>

#include "runtime/fpmode.h"

float *mil_data(const mil_run *r, const mil_value *v) {
    const mil_value *base = v->base != NULL ? v->base : v;
    return (base->kind == MIL_CONST ? base->data : r->mil->buffers + base->place) + v->shift;
}

/* -------------------------------------------------------------------------------------- loops */

void mil_each(mil_run *r, int64_t count, anepy_loop_fn fn, void *context) {
    anepy_pool_run(r->gemm.pool, (int32_t)count, fn, context);
}

typedef struct {
    mil_span_fn fn;
    void *context;
    int64_t n;
} group_job;

static void run_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const group_job *job = context;
    int64_t first = (int64_t)index * MIL_PIECE, left = job->n - first;
    job->fn(job->context, first, left < MIL_PIECE ? left : MIL_PIECE);
}

void mil_each_piece(mil_run *r, int64_t n, mil_span_fn fn, void *context) {
    group_job job = {fn, context, n};
    mil_each(r, (n + MIL_PIECE - 1) / MIL_PIECE, run_piece, &job);
}

/* ------------------------------------------------------------------------------------ rounding */

#define ROUND_N 512
#define LARGEST_SAFE 0x77ff /* 32752 */
#define INFINITE 0x7c00
#define INFINITE_NUMBER 65536.0f
#define SMALLEST_NORMAL 0x0400

/* Written without branches, for the vectoriser. */
static uint64_t flush_subnormals(uint16_t *h, int64_t n) {
    uint16_t count = 0; /* at most ROUND_N */
    for (int64_t i = 0; i < n; i++) {
        uint16_t magnitude = h[i] & 0x7fff;
        uint16_t subnormal = magnitude < SMALLEST_NORMAL;
        count = (uint16_t)(count + (subnormal & (magnitude != 0)));
        h[i] = subnormal ? h[i] & 0x8000 : h[i];
    }
    return count;
}

static uint64_t count_large(const uint16_t *h, int64_t n) {
    uint16_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        uint16_t magnitude = h[i] & 0x7fff;
        count = (uint16_t)(count + ((magnitude > LARGEST_SAFE) & (magnitude <= INFINITE)));
    }
    return count;
}

float mil_infinity(const anepy_mil *mil) {
    return mil->numerics->away ? INFINITE_NUMBER : INFINITY;
}

void mil_from_half(const anepy_mil *mil, float *dst, const uint16_t *src, int64_t n) {
    if (mil->numerics->away) mil->kernels->fixed->from_half(dst, src, n);
    else mil->kernels->from_half(dst, src, n);
}

void mil_to_half(const anepy_mil *mil, uint16_t *dst, const float *src, int64_t n) {
    if (mil->numerics->away) mil->kernels->fixed->to_half(dst, src, n);
    else mil->kernels->to_half(dst, src, n);
}

void mil_round(mil_run *r, float *p, int64_t n) {
    const anepy_mil *mil = r->mil;
    int flush = mil->numerics->flush && mil_rule_on(mil, ANEPY_RULE_SUBNORMAL);
    int count = !mil->numerics->away && mil_rule_on(mil, ANEPY_RULE_SATURATION);
    uint64_t flushed = 0, saturated = 0;
    uint16_t h[ROUND_N];
    if (mil->numerics->away) saturated = (uint64_t)mil->kernels->fixed->round(p, n);
    for (int64_t i = 0; (flush || !mil->numerics->away) && i < n; i += ROUND_N) {
        int64_t m = n - i < ROUND_N ? n - i : ROUND_N;
        mil_to_half(mil, h, p + i, m);
        if (flush) flushed += flush_subnormals(h, m);
        if (count) saturated += count_large(h, m);
        mil_from_half(mil, p + i, h, m);
    }
    if (flushed > 0) atomic_fetch_add_explicit(&r->flushed, flushed, memory_order_relaxed);
    if (saturated > 0) atomic_fetch_add_explicit(&r->saturated, saturated, memory_order_relaxed);
}

typedef struct {
    mil_run *run;
    float *p;
} round_job;

static void round_piece(void *context, int64_t first, int64_t n) {
    const round_job *job = context;
    mil_round(job->run, job->p + first, n);
}

void mil_round_all(mil_run *r, float *p, int64_t n) {
    round_job job = {r, p};
    mil_each_piece(r, n, round_piece, &job);
}

/* ------------------------------------------------------------------------------------ surfaces */

#define SURFACE_FLOOR (48 << 10)

static int32_t check_surfaces(anepy_mil *mil, mil_value *const *values, int32_t n,
                              const uint64_t *nbytes, const char *what) {
    for (int32_t i = 0; i < n; i++) {
        const mil_value *v = values[i];
        uint64_t wanted = (uint64_t)v->n * mil_type_nbytes(v->shape.type);
        if (nbytes[i] < wanted)
            ANEPY_TRY(mil_rule(mil, ANEPY_RULE_SURFACE_SIZE, v->at, 1,
                               "the surface of %s '%s' has %llu bytes, the tensor %llu", what,
                               v->name, (unsigned long long)nbytes[i], (unsigned long long)wanted));
        if (nbytes[i] < SURFACE_FLOOR)
            ANEPY_TRY(mil_rule(mil, ANEPY_RULE_SURFACE_FLOOR, v->at, 1,
                               "the surface of %s '%s' has %llu bytes, below 48 KiB", what, v->name,
                               (unsigned long long)nbytes[i]));
        if (nbytes[i] != nbytes[0])
            ANEPY_TRY(mil_rule(mil, ANEPY_RULE_SURFACE_EQUAL, v->at, 1,
                               "the surfaces of %s '%s' and '%s' have %llu and %llu bytes", what,
                               v->name, values[0]->name, (unsigned long long)nbytes[i],
                               (unsigned long long)nbytes[0]));
    }
    return ANEPY_OK;
}

typedef struct {
    mil_run *run;
    float *data;
    const void *in;
    void *out;
    anepy_mil_type type;
    int64_t present; /* elements that fit the surface; others read as zero and are not written */
} surface_job;

static void read_piece(void *context, int64_t first, int64_t n) {
    const surface_job *job = context;
    float *p = job->data + first;
    int64_t m = job->present - first < n ? job->present - first : n;
    if (m < 0) m = 0;
    for (int64_t i = m; i < n; i++) p[i] = 0.0f;
    switch (job->type) {
    case ANEPY_MIL_F16: {
        const uint16_t *in = (const uint16_t *)job->in + first;
        uint64_t flushed = 0;
        const anepy_mil *mil = job->run->mil;
        if (!mil->numerics->flush || !mil_rule_on(mil, ANEPY_RULE_SUBNORMAL)) {
            mil_from_half(mil, p, in, m);
            break;
        }
        for (int64_t i = 0; i < m; i += ROUND_N) {
            uint16_t h[ROUND_N];
            int64_t some = m - i < ROUND_N ? m - i : ROUND_N;
            memcpy(h, in + i, (size_t)some * sizeof *h);
            flushed += flush_subnormals(h, some);
            mil_from_half(mil, p + i, h, some);
        }
        if (flushed > 0) atomic_fetch_add(&job->run->flushed, flushed);
        break;
    }
    case ANEPY_MIL_F32:
        memcpy(p, (const float *)job->in + first, (size_t)m * sizeof *p);
        mil_round(job->run, p, m);
        break;
    case ANEPY_MIL_I8:
        for (int64_t i = 0; i < m; i++) p[i] = (float)((const int8_t *)job->in)[first + i];
        break;
    default:
        for (int64_t i = 0; i < m; i++) p[i] = (float)((const uint8_t *)job->in)[first + i];
        break;
    }
}

static void write_piece(void *context, int64_t first, int64_t n) {
    const surface_job *job = context;
    const float *p = job->data + first;
    int64_t m = job->present - first < n ? job->present - first : n;
    switch (job->type) {
    case ANEPY_MIL_F16:
        if (m > 0) mil_to_half(job->run->mil, (uint16_t *)job->out + first, p, m);
        break;
    case ANEPY_MIL_F32:
        for (int64_t i = 0; i < m; i++)
            ((float *)job->out)[first + i] =
                fabsf(p[i]) >= INFINITE_NUMBER ? copysignf(INFINITY, p[i]) : p[i];
        break;
    case ANEPY_MIL_I8:
        for (int64_t i = 0; i < m; i++) ((int8_t *)job->out)[first + i] = (int8_t)p[i];
        break;
    default:
        for (int64_t i = 0; i < m; i++) ((uint8_t *)job->out)[first + i] = (uint8_t)p[i];
        break;
    }
}

static surface_job surface_of(mil_run *r, const mil_value *v, uint64_t nbytes) {
    uint64_t present = nbytes / mil_type_nbytes(v->shape.type);
    return (surface_job){.run = r,
                         .data = mil_data(r, v),
                         .type = v->shape.type,
                         .present = present < (uint64_t)v->n ? (int64_t)present : v->n};
}

/* --------------------------------------------------------------------------------- the function */

/* Reports what happened to the numbers of the operation that just ran. */
static int32_t report_numbers(mil_run *r, mil_span at, const char *name) {
    uint64_t saturated = atomic_exchange(&r->saturated, 0);
    uint64_t flushed = atomic_exchange(&r->flushed, 0), cropped = atomic_exchange(&r->cropped, 0);
    if (saturated > 0)
        ANEPY_TRY(mil_rule(r->mil, ANEPY_RULE_SATURATION, at, saturated,
                           "%llu elements of '%s' are %s", (unsigned long long)saturated, name,
                           r->mil->numerics->away ? "infinite" : "beyond 32752"));
    if (flushed > 0)
        ANEPY_TRY(mil_rule(r->mil, ANEPY_RULE_SUBNORMAL, at, flushed,
                           "%llu elements of '%s' below 2^-14 become zero",
                           (unsigned long long)flushed, name));
    if (cropped > 0)
        ANEPY_TRY(mil_rule(r->mil, ANEPY_RULE_LAST_AXIS_SLICE, at, cropped,
                           "%llu elements of '%s' beyond 4094 become infinite",
                           (unsigned long long)cropped, name));
    return ANEPY_OK;
}

static void note_largest(mil_run *r, const char *name) {
    uint32_t bits = atomic_exchange(&r->largest, 0);
    float largest;
    if (bits == 0) return;
    memcpy(&largest, &bits, sizeof largest);
    mil_note_sums(r->function->label != NULL ? r->function->label : r->function->name, name,
                  largest);
}

/* Poisons a value again once no later operation reads it. */
static void guard_ended(const mil_run *r, const mil_value *v, int32_t time) {
    const mil_value *base = v->base != NULL ? v->base : v;
    if (base->kind == MIL_CONST || base->last != time) return;
    MIL_GUARD(mil_data(r, base), (uint64_t)base->n * sizeof(float));
}

static void guard_after(const mil_run *r, const mil_op *op, int32_t time) {
    for (int32_t i = 0; i < MIL_PARAMS; i++)
        if (op->arg[i] != NULL) guard_ended(r, op->arg[i], time);
    for (int32_t i = 0; i < op->list_n; i++) guard_ended(r, op->list[i], time);
    for (int32_t i = 0; i < op->out_n; i++) guard_ended(r, op->out[i], time);
}

static void unguard_outputs(const mil_run *r, const mil_op *op) {
    for (int32_t i = 0; i < op->out_n; i++)
        MIL_UNGUARD(mil_data(r, op->out[i]), (uint64_t)op->out[i]->n * sizeof(float));
}

static int32_t run_function(mil_run *r, const void *const *inputs, const uint64_t *input_nbytes,
                            void *const *outputs, const uint64_t *output_nbytes) {
    const mil_function *f = r->function;
    ANEPY_TRY(check_surfaces(r->mil, f->sorted_inputs, f->input_n, input_nbytes, "input"));
    ANEPY_TRY(check_surfaces(r->mil, f->sorted_outputs, f->output_n, output_nbytes, "output"));
    for (int32_t i = 0; i < f->input_n; i++) {
        const mil_value *v = f->sorted_inputs[i];
        surface_job job = surface_of(r, v, input_nbytes[i]);
        job.in = inputs[i];
        MIL_UNGUARD(job.data, (uint64_t)v->n * sizeof(float));
        mil_each_piece(r, v->n, read_piece, &job);
        ANEPY_TRY(report_numbers(r, v->at, v->name));
    }
    for (int32_t t = 0; t < f->op_n; t++) {
        const mil_op *op = f->ops[t];
        if (!op->skip) {
            unguard_outputs(r, op);
            op->type->run(r, op);
        }
        guard_after(r, op, t);
        note_largest(r, op->out[0]->name);
        ANEPY_TRY(report_numbers(r, op->at, op->out[0]->name));
    }
    for (int32_t i = 0; i < f->output_n; i++) {
        const mil_value *v = f->sorted_outputs[i];
        surface_job job = surface_of(r, v, output_nbytes[i]);
        job.out = outputs[i];
        mil_each_piece(r, v->n, write_piece, &job);
    }
    return ANEPY_OK;
}

int32_t anepy_mil_run(anepy_mil *mil, int32_t function, const void *const *inputs,
                      const uint64_t *input_nbytes, void *const *outputs,
                      const uint64_t *output_nbytes, const anepy_gemm *gemm,
                      anepy_mil_position *where) {
    if (function < 0 || function >= mil->function_n)
        return anepy_fail(ANEPY_E_ARGUMENT, "function %d of %d", function, mil->function_n);
    mil_run r = {
        .mil = mil, .function = &mil->functions[function], .gemm = *gemm, .scratch = mil->scratch};
    r.gemm.panels = mil->panels;
    r.gemm.blas = NULL; /* the own kernels: the same sums on every machine */
    atomic_init(&r.saturated, 0);
    atomic_init(&r.flushed, 0);
    atomic_init(&r.cropped, 0);
    atomic_init(&r.largest, 0);
    mil->where = (anepy_mil_position){0, 0};
    uint64_t fpmode = anepy_fpmode_enter();
    MIL_GUARD(mil->buffers, (uint64_t)mil->buffer_n * sizeof(float));
    int32_t status = run_function(&r, inputs, input_nbytes, outputs, output_nbytes);
    anepy_fpmode_leave(fpmode);
    if (where != NULL) *where = mil->where;
    return status;
}
