/* device/sim/plan.c - places all intermediate values of a function in one buffer; a value that is
 * not needed any more gives its place to others. */
#include "device/sim/interpreter_internal.h"

#include <string.h>

typedef struct {
    int64_t at, n;
} gap;

typedef struct {
    gap *gaps; /* ascending, never adjacent */
    int32_t n, cap;
    int64_t end; /* everything from here on is free */
    int64_t most;
} space;

static int64_t room(const mil_value *v) { return anepy_round_up(v->n, 64) + MIL_SLACK; }

/* The smallest gap that is large enough, else new space at the end. */
static void take(space *s, mil_value *v) {
    int64_t n = room(v);
    int32_t best = -1;
    for (int32_t i = 0; i < s->n; i++)
        if (s->gaps[i].n >= n && (best < 0 || s->gaps[i].n < s->gaps[best].n)) best = i;
    if (best < 0) {
        v->place = s->end;
        s->end += n;
        if (s->end > s->most) s->most = s->end;
        return;
    }
    v->place = s->gaps[best].at;
    s->gaps[best].at += n;
    s->gaps[best].n -= n;
    if (s->gaps[best].n > 0) return;
    s->n--;
    memmove(s->gaps + best, s->gaps + best + 1, (size_t)(s->n - best) * sizeof *s->gaps);
}

static void give_back(space *s, const mil_value *v) {
    gap freed = {v->place, room(v)};
    int32_t i = s->n;
    while (i > 0 && s->gaps[i - 1].at > freed.at) i--;
    int joins_before = i > 0 && s->gaps[i - 1].at + s->gaps[i - 1].n == freed.at;
    int joins_after = i < s->n && freed.at + freed.n == s->gaps[i].at;
    if (joins_before) {
        s->gaps[i - 1].n += freed.n + (joins_after ? s->gaps[i].n : 0);
        if (joins_after) {
            s->n--;
            memmove(s->gaps + i, s->gaps + i + 1, (size_t)(s->n - i) * sizeof *s->gaps);
        }
    } else if (joins_after) {
        s->gaps[i].at = freed.at;
        s->gaps[i].n += freed.n;
    } else {
        memmove(s->gaps + i + 1, s->gaps + i, (size_t)(s->n - i) * sizeof *s->gaps);
        s->gaps[i] = freed;
        s->n++;
    }
    if (s->n > 0 && s->gaps[s->n - 1].at + s->gaps[s->n - 1].n == s->end)
        s->end = s->gaps[--s->n].at;
}

static mil_value *base_of(mil_value *v) { return v->base != NULL ? v->base : v; }

/* Calls fn for every value an operation reads; a value may come several times. */
typedef void (*value_fn)(void *context, mil_value *base, int32_t time);

static void each_argument(const mil_op *op, int32_t time, value_fn fn, void *context) {
    for (int32_t i = 0; i < MIL_PARAMS; i++)
        if (op->arg[i] != NULL && !mil_is_const(base_of(op->arg[i])))
            fn(context, base_of(op->arg[i]), time);
    for (int32_t i = 0; i < op->list_n; i++)
        if (!mil_is_const(base_of(op->list[i]))) fn(context, base_of(op->list[i]), time);
}

static void mark_use(void *context, mil_value *base, int32_t time) {
    (void)context;
    base->last = time;
}

static void free_if_last(void *context, mil_value *base, int32_t time) {
    space *s = context;
    if (base->last != time || base->given_back) return;
    base->given_back = 1;
    give_back(s, base);
}

int32_t mil_plan(anepy_mil *mil, mil_function *f) {
    space s = {.cap = f->op_n + f->input_n + 2};
    mil_span nowhere = {"", 0, 0, 0};
    /* There are never more gaps than values. */
    for (int32_t t = 0; t < f->op_n; t++) s.cap += f->ops[t]->out_n;
    s.gaps = mil_alloc(mil, (uint64_t)s.cap * sizeof *s.gaps);
    if (s.gaps == NULL) return mil_no_memory(mil, nowhere);
    double work = (double)f->work;
    for (int32_t t = 0; t < f->op_n; t++) {
        for (int32_t i = 0; i < f->ops[t]->out_n; i++) {
            mil_value *v = f->ops[t]->out[i];
            /* A result lives at least until its own operation, even if nothing reads it. */
            if (!mil_is_const(v) && v->base == NULL) v->last = t;
        }
        each_argument(f->ops[t], t, mark_use, NULL);
    }
    for (int32_t i = 0; i < f->output_n; i++) base_of(f->outputs[i])->last = f->op_n;
    for (int32_t i = 0; i < f->input_n; i++) take(&s, f->inputs[i]);
    for (int32_t t = 0; t < f->op_n; t++) {
        const mil_op *op = f->ops[t];
        for (int32_t i = 0; i < op->out_n; i++) {
            mil_value *v = op->out[i];
            if (mil_is_const(v) || v->base != NULL) continue;
            take(&s, v);
            work += (double)v->n;
        }
        each_argument(op, t, free_if_last, &s);
        for (int32_t i = 0; i < op->out_n; i++)
            if (!mil_is_const(op->out[i]) && op->out[i]->base == NULL)
                free_if_last(&s, op->out[i], t);
        if (op->scratch_n > f->scratch_n) f->scratch_n = op->scratch_n;
        if (op->columns > f->columns) f->columns = op->columns;
    }
    if (work > (double)mil->options.work)
        return mil_error(mil, nowhere, "function %s does %.3g multiply-adds, more than a run may",
                         f->name, work);
    f->work = (uint64_t)work;
    f->buffer_n = s.most;
    return ANEPY_OK;
}
