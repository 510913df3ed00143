/* train/step.c - the policy of a step: which sequences run side by side, what is tried again at a
 * lower loss scale, and what a failure leaves behind. */
#include "train/step.h"

#include <math.h>
#include <string.h>

#include "runtime/memory.h"
#include "train/compile.h"
#include "train/dw.h"
#include "train/pass.h"
#include "train/ready.h"
#include "train/room.h"
#include "train/scaling.h"

/* Columns of the sequences that run side by side. Reading the weights is then a small part of a
 * product: sequences of 256 columns gain a few percent, those of 512 nothing. Twice as many columns
 * are one percent faster, with twice the memory (15M to 110M parameters, fp32 and bf16). */
#define GROUP_COLUMNS 512

/* How many of the sequences that are left run next, side by side: as many as may, in groups of one
 * size. */
static void set_group(anepy_engine *e) {
    anepy_run *run = &e->run;
    int32_t left = run->sequences - run->added;
    int32_t groups = (left - 1) / run->most + 1;
    run->beside = (left - 1) / groups + 1;
    run->columns = run->beside * run->padded;
}

/* Goes on with the sequences after those that are done. */
static void advance(anepy_engine *e) {
    anepy_run *run = &e->run;
    run->ids += anepy_running_tokens(e);
    if (run->targets != NULL) run->targets += anepy_running_tokens(e);
    if (run->starts != NULL) run->starts += anepy_running_tokens(e);
    if (run->losses != NULL) run->losses += anepy_running_tokens(e);
    run->added += run->beside;
}

/* Sets up the run, in so many columns. */
static void set_run(anepy_engine *e, int32_t sequences, int32_t tokens, int32_t columns) {
    int32_t padded =
        anepy_can(e, ANEPY_BINDS) ? (int32_t)anepy_round_up(tokens, ANEPY_COLUMNS) : e->room->width;
    int32_t most = anepy_can(e, ANEPY_BATCHES) ? anepy_max_i32(1, columns / padded) : 1;
    e->run = (anepy_run){.sequences = sequences, .most = most, .tokens = tokens, .padded = padded};
    set_group(e);
}

/* What the run computes; its programs. */
static int32_t begin(anepy_engine *e, const anepy_batch *batch) {
    anepy_run *run = &e->run;
    int32_t n = run->sequences * run->tokens;
    run->ids = batch->ids;
    run->targets = batch->targets;
    run->starts = batch->starts;
    run->counted = run->targets != NULL ? anepy_counted(run->targets, n) : 0;
    if (run->starts != NULL && !anepy_can(e, ANEPY_PACKS))
        return anepy_fail(ANEPY_E_UNSUPPORTED,
                          "device %s cannot keep documents of a sequence apart: use device cpu, or "
                          "no starts",
                          e->type->name);
    if (run->targets != NULL && run->counted == 0)
        return anepy_fail(ANEPY_E_ARGUMENT, "no target is counted: all %d are below 0", n);
    ANEPY_TRY(anepy_room_widen(e));
    return e->room->stale ? anepy_compile(e) : ANEPY_OK;
}

int32_t anepy_step_reserve(anepy_engine *e, int32_t sequences, int32_t tokens) {
    set_run(e, sequences, tokens, GROUP_COLUMNS);
    return anepy_room_widen(e);
}

int32_t anepy_step_holds(anepy_engine *e, int32_t sequences, int32_t tokens) {
    set_run(e, sequences, tokens, GROUP_COLUMNS);
    for (; !anepy_last_group(e); set_group(e))
        e->run.added += e->run.beside;
    return anepy_running_tokens(e);
}

/* After a failure nothing may still write, and what was accumulated before may be incomplete. The
 * error that the caller sees is the one that led here. */
static int32_t abandon(anepy_engine *e, int32_t status) {
    char sentence[512];
    anepy_last_error(sentence, sizeof sentence);
    anepy_dw_wait(e);
    if (/* mutate: step-damaged */ (e->run.dw_started > 0 || e->run.added > 0) && e->counted > 0)
        e->scaling.damaged = 1;
    e->run.added = 0;
    anepy_ready_all(e);
    return anepy_fail(status, "%s", sentence);
}

/* Forward and backward of the next group. */
static int32_t add_group(anepy_engine *e, double *mark) {
    anepy_step_stats *stats = &e->run.stats;
    double loss;
    stats->skipped = 0;
    ANEPY_TRY(anepy_forward(e));
    ANEPY_TRY(anepy_pass_loss(e, 1, &loss));
    anepy_count(mark, &stats->forward_ms);
    int finite = isfinite(loss) || !anepy_scaled(e);
    if (finite) ANEPY_TRY(anepy_backward(e));
    stats->skipped |= !finite;
    if (stats->skipped) ANEPY_TRY(anepy_dw_wait(e));
    if (!(stats->skipped && isfinite(loss) && e->run.added > 0)) {
        stats->loss += loss;
        e->run.summed += anepy_counted(e->run.targets, anepy_running_tokens(e));
    }
    anepy_count(mark, &stats->backward_ms);
    return ANEPY_OK;
}

/* All sequences of a step, or none. If the first group overflows, the step is skipped. A later one
 * is tried again at lower scales, since what the groups before it have added cannot be taken back.
 */
static int32_t add_sequences(anepy_engine *e, double *mark) {
    anepy_run *run = &e->run;
    anepy_step_stats *stats = &run->stats;
    while (run->added < run->sequences) {
        set_group(e);
        ANEPY_TRY(add_group(e, mark));
        stats->loss_scale = e->scaling.loss_scale;
        if (!stats->skipped) {
            advance(e);
        } else if (run->added == 0) {
            break;
        } else if (isfinite(stats->loss) && e->scaling.loss_scale > 1.0) {
            anepy_scale_step(e, 1);
        } else {
            if (e->counted > 0) e->scaling.damaged = 1;
            break;
        }
    }
    stats->loss /= run->summed; /* not a number if an overflow left none */
    return ANEPY_OK;
}

int32_t anepy_step(anepy_engine *e, const anepy_batch *batch) {
    double start = anepy_now_ms(), mark = start;
    int64_t heap = anepy_heap_operations();
    anepy_step_stats *stats = &e->run.stats;
    set_run(e, batch->sequences, batch->tokens, GROUP_COLUMNS);
    ANEPY_TRY(begin(e, batch));
    uint64_t moved = e->room->device->moved;
    anepy_scale_begin(e);
    anepy_ready_begin(e);
    int32_t status = add_sequences(e, &mark);
    if (status != ANEPY_OK) return abandon(e, status);
    e->run.added = 0;
    if (!stats->skipped) {
        e->accumulated++;
        e->counted += e->run.counted;
    }
    if (anepy_scaled(e)) anepy_scale_step(e, (int)stats->skipped);
    anepy_ready_all(e);
    stats->tokens = e->run.counted;
    anepy_flops flops = {.struct_size = sizeof flops};
    ANEPY_TRY(anepy_step_flops(e->model, &flops, batch->sequences, batch->tokens));
    stats->flops = flops.total;
    stats->allocations = anepy_heap_operations() - heap;
    stats->io_nbytes = (int64_t)(e->room->device->moved - moved);
    anepy_count(&mark, &stats->backward_ms);
    stats->step_ms = mark - start;
    return ANEPY_OK;
}

/* In the room that there is, with the weights as they are now, even while others compile. */
static int32_t begin_forward(anepy_engine *e, const anepy_batch *batch) {
    ANEPY_TRY(anepy_compile_settle(e));
    set_run(e, batch->sequences, batch->tokens, anepy_min_i32(GROUP_COLUMNS, e->room->width));
    return begin(e, batch);
}

int32_t anepy_step_evaluate(anepy_engine *e, double *loss, double *losses,
                            const anepy_batch *batch) {
    double sum = 0.0, part;
    ANEPY_TRY(begin_forward(e, batch));
    e->run.losses = losses;
    for (; e->run.added < batch->sequences; advance(e)) {
        set_group(e);
        ANEPY_TRY(anepy_forward(e));
        ANEPY_TRY(anepy_pass_loss(e, 0, &part));
        sum += part;
    }
    *loss = sum / e->run.counted;
    return ANEPY_OK;
}

int32_t anepy_step_logits(anepy_engine *e, float *logits, const anepy_batch *batch) {
    ANEPY_TRY(begin_forward(e, batch));
    for (; e->run.added < batch->sequences; advance(e)) {
        int64_t token = (int64_t)e->run.added * batch->tokens;
        set_group(e);
        ANEPY_TRY(anepy_forward(e));
        anepy_pass_logits(e, logits + token * e->model->config.vocab_size);
    }
    return ANEPY_OK;
}
