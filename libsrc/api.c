/* api.c - the exported surface of the engine: validate, take the handle, call inward, give back the
 * caller's floating-point mode. Create and free live with their types. */
#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "kernels/blas.h"
#include "runtime/clock.h"
#include "runtime/fpmode.h"
#include "runtime/machine.h"
#include "runtime/memory.h"
#include "train/update.h"

/* Of sequences that run beside each other. Reading the weights is then a small part of a product:
 * sequences of 256 columns gain a few percent, those of 512 nothing. Twice as many columns are one
 * percent faster, with twice the memory (15M to 110M parameters, fp32 and bf16). */
#define GROUP_COLUMNS 512

#ifndef ANEPY_BUILD_ID
#define ANEPY_BUILD_ID "unknown"
#endif

/* The layout Python mirrors in _abi.py: no padding the compiler could choose differently. */
_Static_assert(sizeof(anepy_config) == 40, "config");
_Static_assert(sizeof(anepy_tensor) == 104, "tensor");
_Static_assert(sizeof(anepy_engine_info) == 144, "engine info");
_Static_assert(sizeof(anepy_step_stats) == 128, "step stats");
_Static_assert(sizeof(anepy_update_options) == 56, "update options");
_Static_assert(sizeof(anepy_update_stats) == 32, "update stats");

int32_t anepy_abi_version(void) { return ANEPY_ABI_VERSION; }

const char *anepy_build_id(void) { return ANEPY_BUILD_ID; }

int32_t anepy_struct_size(int32_t index) {
    static const int32_t sizes[] = {
        sizeof(anepy_config),          sizeof(anepy_tensor),        sizeof(anepy_engine_options),
        sizeof(anepy_engine_info),     sizeof(anepy_step_stats),    sizeof(anepy_update_options),
        sizeof(anepy_update_stats),    sizeof(anepy_library_info),  sizeof(anepy_device_info),
        sizeof(anepy_program_options), sizeof(anepy_program_info),  sizeof(anepy_program_port),
        sizeof(anepy_sim_options),     sizeof(anepy_sim_tensor),    sizeof(anepy_sim_report),
        sizeof(anepy_peaks),           sizeof(anepy_bench_options), sizeof(anepy_bench_result),
    };
    return index >= 0 && index < (int32_t)(sizeof sizes / sizeof sizes[0]) ? sizes[index] : -1;
}

int32_t anepy_memory_alloc(void **out, uint64_t nbytes) {
    *out = anepy_map(nbytes);
    return *out != NULL ? ANEPY_OK
                        : anepy_fail(ANEPY_E_MEMORY, "the system gave no %llu bytes",
                                     (unsigned long long)nbytes);
}

void anepy_memory_free(void *memory, uint64_t nbytes) { anepy_unmap(memory, nbytes); }

int32_t anepy_library_get_info(anepy_library_info *out) {
    uint32_t size = out->struct_size;
    const anepy_kernels *kernels = anepy_kernels_get(), *set;
    const anepy_blas *blas;
    if (kernels == NULL) return ANEPY_E_NAME;
    ANEPY_TRY(anepy_blas_get(&blas));
    memset(out, 0, sizeof *out);
    out->struct_size = size;
    strncpy(out->isa, kernels->isa, sizeof out->isa - 1);
    for (int32_t i = 0; (set = anepy_kernels_at(i)) != NULL; i++) {
        size_t used = strlen(out->isa_all);
        if (i > 0) strncat(out->isa_all, " ", sizeof out->isa_all - used - 1);
        strncat(out->isa_all, set->isa, sizeof out->isa_all - used - 2);
    }
#if defined(__clang__)
    strncpy(out->compiler, "clang " __clang_version__, sizeof out->compiler - 1);
#else
    strncpy(out->compiler, "gcc " __VERSION__, sizeof out->compiler - 1);
#endif
    strncpy(out->gemm, blas != NULL ? blas->name : kernels->gemm_name, sizeof out->gemm - 1);
    out->threads = anepy_machine_threads();
    out->cores = anepy_machine_cores();
    return ANEPY_OK;
}

/* ------------------------------------------------------------------------------------ entering */

static int32_t enter(anepy_engine *e) {
    if (atomic_exchange(&e->busy, 1))
        return anepy_fail(ANEPY_E_BUSY, "this engine is running in another thread");
    e->caller_fpmode = anepy_fpmode_enter();
    return ANEPY_OK;
}

static int32_t leave(anepy_engine *e, int32_t status) {
    anepy_fpmode_leave(e->caller_fpmode);
    atomic_store(&e->busy, 0);
    return status;
}

static int32_t check_ids(const anepy_engine *e, const char *what, const int32_t *ids, int32_t n) {
    int32_t vocab = e->model->config.vocab_size;
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= vocab)
            return anepy_fail(ANEPY_E_TOKEN, "%s[%d] is %d, the vocabulary has 0 to %d", what, i,
                              ids[i], vocab - 1);
    return ANEPY_OK;
}

/* How many of the sequences that are left run next, beside each other: as many as the device takes
 * in groups of one size. */
static void set_beside(anepy_engine *e) {
    int32_t left = e->sequences - e->added;
    int32_t most = anepy_can(e, ANEPY_BATCHES) ? anepy_max_i32(1, GROUP_COLUMNS / e->stride) : 1;
    int32_t groups = (left - 1) / most + 1;
    e->beside = (left - 1) / groups + 1;
    e->columns = e->beside * e->stride;
}

/* `count` sequences of n tokens are what comes; targets may be NULL. */
static int32_t set_sequences(anepy_engine *e, const int32_t *tokens, const int32_t *targets,
                             int32_t count, int32_t n) {
    if (n < 1 || n > e->seq_len)
        return anepy_fail(ANEPY_E_ARGUMENT, "a sequence of %d tokens, this engine takes 1 to %d", n,
                          e->seq_len);
    if (count < 1 || count > INT32_MAX / n)
        return anepy_fail(ANEPY_E_ARGUMENT, "%d sequences in one step, expected 1 to %d", count,
                          INT32_MAX / n);
    ANEPY_TRY(check_ids(e, "tokens", tokens, count * n));
    if (targets != NULL) ANEPY_TRY(check_ids(e, "targets", targets, count * n));
    e->tokens = tokens;
    e->targets = targets;
    e->sequences = count;
    e->added = 0;
    e->n = n;
    e->stride = anepy_can(e, ANEPY_BINDS) ? (int32_t)anepy_round_up(n, ANEPY_COLUMNS) : e->width;
    set_beside(e);
    ANEPY_TRY(anepy_engine_widen(e, e->columns));
    e->dw_started = 0;
    memset(&e->stats, 0, sizeof e->stats);
    return e->stale ? anepy_compile(e) : ANEPY_OK;
}

static int32_t forward(anepy_engine *e, const int32_t *tokens, const int32_t *targets, int32_t n) {
    ANEPY_TRY(set_sequences(e, tokens, targets, 1, n));
    return anepy_forward(e);
}

/* ----------------------------------------------------------------------------------- the calls */

/* After a failure nothing may still write, and what was accumulated before may be incomplete. The
 * first sentence is the one that counts. */
static int32_t abandon(anepy_engine *e, int32_t status) {
    char sentence[512];
    anepy_last_error(sentence, sizeof sentence);
    anepy_dw_wait(e);
    if ((e->dw_started > 0 || e->added > 0) && e->accumulated > 0) e->damaged = 1;
    e->added = 0;
    return anepy_fail(status, "%s", sentence);
}

/* Forward and backward of the next sequences of the step. */
static int32_t add_group(anepy_engine *e, double *mark) {
    anepy_step_stats *stats = &e->stats;
    double loss;
    stats->skipped = 0;
    ANEPY_TRY(anepy_forward(e));
    ANEPY_TRY(anepy_step_loss(e, 1, &loss));
    anepy_count(mark, &stats->forward_ms);
    int finite = isfinite(loss) || !anepy_scaled(e);
    if (finite) ANEPY_TRY(anepy_backward(e));
    stats->skipped |= !finite;
    if (stats->skipped) ANEPY_TRY(anepy_dw_wait(e));
    stats->loss += stats->skipped && isfinite(loss) && e->added > 0 ? 0.0 : loss;
    anepy_count(mark, &stats->backward_ms);
    return ANEPY_OK;
}

/* All sequences of a step, or none. What overflows first is skipped; later ones are tried again at
 * lower scales, since what the others have added cannot be taken back. */
static int32_t add_sequences(anepy_engine *e, double *mark) {
    anepy_step_stats *stats = &e->stats;
    while (e->added < e->sequences) {
        set_beside(e);
        ANEPY_TRY(add_group(e, mark));
        stats->loss_scale = e->loss_scale;
        if (!stats->skipped) {
            e->tokens += anepy_running_tokens(e);
            e->targets += anepy_running_tokens(e);
            e->added += e->beside;
        } else if (e->added == 0) {
            break;
        } else if (isfinite(stats->loss) && e->loss_scale > 1.0) {
            anepy_scale_step(e, 1);
        } else {
            if (e->accumulated > 0) e->damaged = 1;
            break;
        }
    }
    stats->loss /= anepy_max_i32(1, e->added);
    return ANEPY_OK;
}

static int32_t step(anepy_engine *e, const int32_t *tokens, const int32_t *targets, int32_t count,
                    int32_t n) {
    double start = anepy_now_ms(), mark = start;
    int64_t heap = anepy_heap_operations();
    anepy_step_stats *stats = &e->stats;
    ANEPY_TRY(set_sequences(e, tokens, targets, count, n));
    int32_t status = add_sequences(e, &mark);
    if (status != ANEPY_OK) return abandon(e, status);
    e->added = 0;
    if (!stats->skipped) e->accumulated++;
    if (anepy_scaled(e)) anepy_scale_step(e, (int)stats->skipped);
    stats->flops = count * anepy_step_flops(e->model, n);
    stats->allocations = anepy_heap_operations() - heap;
    anepy_count(&mark, &stats->backward_ms);
    stats->step_ms = mark - start;
    return ANEPY_OK;
}

int32_t anepy_engine_step(anepy_engine *e, anepy_step_stats *out, const int32_t *tokens,
                          const int32_t *targets, int32_t n) {
    return anepy_engine_step_batch(e, out, tokens, targets, 1, n);
}

int32_t anepy_engine_step_batch(anepy_engine *e, anepy_step_stats *out, const int32_t *tokens,
                                const int32_t *targets, int32_t count, int32_t n) {
    ANEPY_TRY(enter(e));
    int32_t status = step(e, tokens, targets, count, n);
    if (status == ANEPY_OK) {
        uint32_t size = out->struct_size;
        *out = e->stats;
        out->struct_size = size;
    }
    return leave(e, status);
}

int32_t anepy_engine_evaluate(anepy_engine *e, double *loss, const int32_t *tokens,
                              const int32_t *targets, int32_t n) {
    ANEPY_TRY(enter(e));
    int32_t status = anepy_compile_settle(e);
    if (status == ANEPY_OK) status = forward(e, tokens, targets, n);
    if (status == ANEPY_OK) status = anepy_step_loss(e, 0, loss);
    return leave(e, status);
}

int32_t anepy_engine_logits(anepy_engine *e, float *logits, const int32_t *tokens, int32_t n) {
    ANEPY_TRY(enter(e));
    int32_t status = anepy_compile_settle(e);
    if (status == ANEPY_OK) status = forward(e, tokens, NULL, n);
    if (status == ANEPY_OK) anepy_logits_copy(e, logits);
    return leave(e, status);
}

static int32_t check_update(const anepy_engine *e, const anepy_update_options *o) {
    if (o->struct_size < sizeof *o)
        return anepy_fail(ANEPY_E_ARGUMENT, "update options have %u bytes, expected %zu",
                          o->struct_size, sizeof *o);
    if (e->accumulated == 0)
        return anepy_fail(ANEPY_E_STATE, "no step since the last update: nothing to apply");
    if (!(o->lr >= 0.0 && o->lr <= 1e30)) /* it becomes a float, divided by 1 - beta1^t */
        return anepy_fail(ANEPY_E_ARGUMENT, "lr is %g, expected 0 to 1e30", o->lr);
    if (!(o->beta1 >= 0.0 && o->beta1 < 1.0) || !(o->beta2 >= 0.0 && o->beta2 < 1.0))
        return anepy_fail(ANEPY_E_ARGUMENT, "beta1 %g, beta2 %g: both must be in [0, 1)", o->beta1,
                          o->beta2);
    /* An eps that flushes to zero in fp32 would make 0 / 0 of weights without a gradient. */
    if (!(o->eps >= (double)FLT_MIN && isfinite(o->eps)) ||
        !(o->weight_decay >= 0.0 && isfinite(o->weight_decay)) || !(o->grad_clip >= 0.0))
        return anepy_fail(ANEPY_E_ARGUMENT,
                          "eps %g must be at least 1.2e-38, weight_decay %g and grad_clip %g not "
                          "below 0, eps and weight_decay finite",
                          o->eps, o->weight_decay, o->grad_clip);
    return ANEPY_OK;
}

int32_t anepy_engine_update(anepy_engine *e, anepy_update_stats *out,
                            const anepy_update_options *options) {
    ANEPY_TRY(enter(e));
    int32_t status = check_update(e, options);
    if (status == ANEPY_OK) status = anepy_update(e, out, options);
    return leave(e, status);
}

int32_t anepy_engine_restore(anepy_engine *e, const anepy_engine_info *info) {
    if (info->struct_size < sizeof *info)
        return anepy_fail(ANEPY_E_ARGUMENT, "engine info has %u bytes, expected %zu",
                          info->struct_size, sizeof *info);
    if (info->accumulated < 0 || info->updates < 0 || info->clean_steps < 0 ||
        !(info->loss_scale > 0.0 && info->loss_scale <= 0x1p40))
        return anepy_fail(ANEPY_E_ARGUMENT,
                          "%lld accumulated steps, %lld updates, loss scale %g: not a state an "
                          "engine can be in",
                          (long long)info->accumulated, (long long)info->updates, info->loss_scale);
    ANEPY_TRY(enter(e));
    e->accumulated = info->accumulated;
    e->updates = info->updates;
    e->damaged = 0;
    e->knows_squares = 0;
    if (anepy_scaled(e)) {
        e->loss_scale = info->loss_scale;
        e->clean_steps = info->clean_steps;
    }
    anepy_recompile(e, 1);
    return leave(e, ANEPY_OK);
}
