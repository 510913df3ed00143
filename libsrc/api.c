/* api.c - the exported surface of the engine: validate, take the handle, call inward, give back the
 * caller's floating-point mode. Creating and freeing are in train/create.c. */
#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "kernels/blas.h"
#include "runtime/fpmode.h"
#include "runtime/machine.h"
#include "runtime/memory.h"
#include "train/create.h"
#include "train/embed.h"
#include "train/ready.h"
#include "train/scaling.h"
#include "train/step.h"
#include "train/update.h"

#ifndef ANEPY_BUILD_ID
#define ANEPY_BUILD_ID "unknown"
#endif

/* The layout that Python declares for ctypes: no padding the compiler could choose differently. */
_Static_assert(sizeof(anepy_config) == 104, "config");
_Static_assert(sizeof(anepy_tensor) == 128, "tensor");
_Static_assert(sizeof(anepy_engine_info) == 160, "engine info");
_Static_assert(sizeof(anepy_step_stats) == 208, "step stats");
_Static_assert(sizeof(anepy_update_options) == 104, "update options");
_Static_assert(sizeof(anepy_update_stats) == 32, "update stats");
_Static_assert(sizeof(anepy_flops) == 56, "flops");

int32_t anepy_abi_version(void) { return ANEPY_ABI_VERSION; }

const char *anepy_build_id(void) { return ANEPY_BUILD_ID; }

int32_t anepy_struct_size(int32_t index) {
    static const int32_t sizes[] = {
        [ANEPY_STRUCT_CONFIG] = sizeof(anepy_config),
        [ANEPY_STRUCT_TENSOR] = sizeof(anepy_tensor),
        [ANEPY_STRUCT_ENGINE_OPTIONS] = sizeof(anepy_engine_options),
        [ANEPY_STRUCT_ENGINE_INFO] = sizeof(anepy_engine_info),
        [ANEPY_STRUCT_STEP_STATS] = sizeof(anepy_step_stats),
        [ANEPY_STRUCT_UPDATE_OPTIONS] = sizeof(anepy_update_options),
        [ANEPY_STRUCT_UPDATE_STATS] = sizeof(anepy_update_stats),
        [ANEPY_STRUCT_LIBRARY_INFO] = sizeof(anepy_library_info),
        [ANEPY_STRUCT_DEVICE_INFO] = sizeof(anepy_device_info),
        [ANEPY_STRUCT_PROGRAM_OPTIONS] = sizeof(anepy_program_options),
        [ANEPY_STRUCT_PROGRAM_INFO] = sizeof(anepy_program_info),
        [ANEPY_STRUCT_PROGRAM_PORT] = sizeof(anepy_program_port),
        [ANEPY_STRUCT_SIM_OPTIONS] = sizeof(anepy_sim_options),
        [ANEPY_STRUCT_SIM_TENSOR] = sizeof(anepy_sim_tensor),
        [ANEPY_STRUCT_SIM_REPORT] = sizeof(anepy_sim_report),
        [ANEPY_STRUCT_PEAKS] = sizeof(anepy_peaks),
        [ANEPY_STRUCT_BENCH_OPTIONS] = sizeof(anepy_bench_options),
        [ANEPY_STRUCT_BENCH_RESULT] = sizeof(anepy_bench_result),
        [ANEPY_STRUCT_FLOPS] = sizeof(anepy_flops),
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

static int32_t check_ids(const anepy_engine *e, const char *what, const int32_t *ids, int32_t n,
                         int32_t lowest) {
    int32_t vocab = e->model->config.vocab_size;
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < lowest || ids[i] >= vocab)
            return anepy_fail(ANEPY_E_TOKEN, "%s[%d] is %d, the vocabulary has 0 to %d", what, i,
                              ids[i], vocab - 1);
    return ANEPY_OK;
}

static int32_t check_shape(const anepy_engine *e, int32_t sequences, int32_t tokens) {
    if (tokens < 1 || tokens > e->seq_len)
        return anepy_fail(ANEPY_E_ARGUMENT, "a sequence of %d tokens, this engine takes 1 to %d",
                          tokens, e->seq_len);
    if (sequences < 1 || sequences > INT32_MAX / tokens)
        return anepy_fail(ANEPY_E_ARGUMENT, "%d sequences in one call, expected 1 to %d", sequences,
                          INT32_MAX / tokens);
    return ANEPY_OK;
}

/* Targets may be anything below 0. */
static int32_t check_batch(const anepy_engine *e, const anepy_batch *b) {
    ANEPY_TRY(check_shape(e, b->sequences, b->tokens));
    int32_t n = b->sequences * b->tokens;
    ANEPY_TRY(check_ids(e, "tokens", b->ids, n, 0));
    return b->targets != NULL ? check_ids(e, "targets", b->targets, n, INT32_MIN) : ANEPY_OK;
}

/* ----------------------------------------------------------------------------------- the calls */

int32_t anepy_engine_step(anepy_engine *e, anepy_step_stats *out, const int32_t *tokens,
                          const int32_t *targets, int32_t n) {
    return anepy_engine_step_batch(e, out, tokens, targets, NULL, 1, n);
}

int32_t anepy_engine_step_batch(anepy_engine *e, anepy_step_stats *out, const int32_t *tokens,
                                const int32_t *targets, const uint8_t *starts, int32_t count,
                                int32_t n) {
    anepy_batch batch = {tokens, targets, starts, count, n};
    ANEPY_TRY(enter(e));
    int32_t status = check_batch(e, &batch);
    if (status == ANEPY_OK) status = anepy_step(e, &batch);
    if (status == ANEPY_OK) {
        uint32_t size = out->struct_size;
        *out = e->run.stats;
        out->struct_size = size;
    }
    return leave(e, status);
}

int32_t anepy_engine_reserve(anepy_engine *e, int32_t count, int32_t n) {
    ANEPY_TRY(enter(e));
    int32_t status = check_shape(e, count, n);
    if (status == ANEPY_OK) status = anepy_step_reserve(e, count, n);
    return leave(e, status);
}

int32_t anepy_engine_evaluate(anepy_engine *e, double *loss, const int32_t *tokens,
                              const int32_t *targets, int32_t n) {
    return anepy_engine_evaluate_batch(e, loss, NULL, tokens, targets, NULL, 1, n);
}

int32_t anepy_engine_evaluate_batch(anepy_engine *e, double *loss, double *losses,
                                    const int32_t *tokens, const int32_t *targets,
                                    const uint8_t *starts, int32_t count, int32_t n) {
    anepy_batch batch = {tokens, targets, starts, count, n};
    ANEPY_TRY(enter(e));
    int32_t status = check_batch(e, &batch);
    if (status == ANEPY_OK) status = anepy_step_evaluate(e, loss, losses, &batch);
    return leave(e, status);
}

int32_t anepy_engine_logits(anepy_engine *e, float *logits, const int32_t *tokens, int32_t n) {
    return anepy_engine_logits_batch(e, logits, tokens, NULL, 1, n);
}

int32_t anepy_engine_logits_batch(anepy_engine *e, float *logits, const int32_t *tokens,
                                  const uint8_t *starts, int32_t count, int32_t n) {
    anepy_batch batch = {tokens, NULL, starts, count, n};
    ANEPY_TRY(enter(e));
    int32_t status = check_batch(e, &batch);
    if (status == ANEPY_OK) status = anepy_step_logits(e, logits, &batch);
    return leave(e, status);
}

static int32_t check_update(const anepy_engine *e, const anepy_update_options *o) {
    if (o->struct_size < sizeof *o)
        return anepy_fail(ANEPY_E_ARGUMENT, "update options have %u bytes, expected %zu",
                          o->struct_size, sizeof *o);
    if (e->counted == 0)
        return anepy_fail(ANEPY_E_STATE, "no step since the last update: nothing to apply");
    if (!(o->lr >= 0.0 && o->lr <= 1e30)) /* it becomes a float, divided by 1 - beta1^t */
        return anepy_fail(ANEPY_E_ARGUMENT, "lr is %g, expected 0 to 1e30", o->lr);
    if (!(o->beta1 >= 0.0 && o->beta1 < 1.0) || !(o->beta2 >= 0.0 && o->beta2 < 1.0))
        return anepy_fail(ANEPY_E_ARGUMENT, "beta1 %g, beta2 %g: both must be in [0, 1)", o->beta1,
                          o->beta2);
    if (!(o->momentum >= 0.0 && o->momentum < 1.0) ||
        !(o->matrix_lr >= 0.0 && o->matrix_lr <= 1e30))
        return anepy_fail(ANEPY_E_ARGUMENT,
                          "momentum %g must be in [0, 1), matrix_lr %g from 0 to 1e30", o->momentum,
                          o->matrix_lr);
    /* An eps that flushes to zero in fp32 would make 0 / 0 of weights without a gradient. */
    if (!(o->eps >= (double)FLT_MIN && isfinite(o->eps)) ||
        !(o->weight_decay >= 0.0 && isfinite(o->weight_decay)) || !(o->grad_clip >= 0.0))
        return anepy_fail(ANEPY_E_ARGUMENT,
                          "eps %g must be at least 1.2e-38, weight_decay %g and grad_clip %g not "
                          "below 0, eps and weight_decay finite",
                          o->eps, o->weight_decay, o->grad_clip);
    if (o->part_n != 0 && (o->part_n < 0 || o->part_first < 0 || o->part_stride < o->part_n))
        return anepy_fail(ANEPY_E_ARGUMENT, "part of %lld elements from %lld on, every %lld",
                          (long long)o->part_n, (long long)o->part_first,
                          (long long)o->part_stride);
    if (o->part_n != 0 && e->muon != NULL)
        return anepy_fail(ANEPY_E_UNSUPPORTED,
                          "muon needs whole matrices: it cannot update a part of them");
    return ANEPY_OK;
}

int32_t anepy_engine_update(anepy_engine *e, anepy_update_stats *out,
                            const anepy_update_options *options) {
    ANEPY_TRY(enter(e));
    int32_t status = check_update(e, options);
    if (status == ANEPY_OK) status = anepy_update(e, out, options);
    return leave(e, status);
}

static int32_t check_reduce(const anepy_engine *e, int64_t counted, double scale) {
    if (e->counted == 0 && !e->scaling.skipped && (counted < 0 || scale == 0.0))
        return anepy_fail(ANEPY_E_STATE, "no step since the last update: nothing to reduce");
    if (e->counted > 0 && e->scaling.unit == 0.0)
        return anepy_fail(ANEPY_E_STATE, "gradients of steps whose targets were not told: a step "
                                         "or restore with `counted` and `unit` comes first");
    if (counted > 0 && counted < e->counted)
        return anepy_fail(ANEPY_E_ARGUMENT, "counted is %lld, of this engine alone it is %lld",
                          (long long)counted, (long long)e->counted);
    if (!(scale >= 1e-30 && scale <= 1e30) ||
        (anepy_scaled(e) && scale * e->scaling.unit > ANEPY_LOSS_SCALE_LIMIT))
        return anepy_fail(ANEPY_E_ARGUMENT, "the scale of gradients is %g, that of this engine %g",
                          scale, anepy_target_scale(e));
    return ANEPY_OK;
}

int32_t anepy_engine_reduce(anepy_engine *e, int64_t counted, double scale, uint32_t flags) {
    ANEPY_TRY(enter(e));
    int none = e->counted == 0 && !e->scaling.skipped;
    if (!none && counted < 0) counted = e->counted;
    if (!none && scale == 0.0 && e->scaling.unit > 0.0) scale = anepy_target_scale(e);
    int32_t status = check_reduce(e, counted, scale);
    if (status == ANEPY_OK) anepy_scale_join(e, counted, scale, (flags & ANEPY_REDUCED) != 0);
    return leave(e, status);
}

int32_t anepy_engine_hold_embedding(anepy_engine *e, int32_t on) {
    ANEPY_TRY(enter(e));
    e->hold_embedding = on != 0;
    return leave(e, ANEPY_OK);
}

int32_t anepy_engine_holds(anepy_engine *e, int32_t count, int32_t n) {
    ANEPY_TRY(enter(e));
    int32_t status = check_shape(e, count, n);
    return leave(e, status == ANEPY_OK ? anepy_step_holds(e, count, n) : status);
}

int32_t anepy_engine_held_embedding(anepy_engine *e, float *rows) {
    ANEPY_TRY(enter(e));
    if (rows != NULL) anepy_embed_held(e, rows);
    return leave(e, anepy_running_tokens(e));
}

int32_t anepy_engine_discard(anepy_engine *e) {
    ANEPY_TRY(enter(e));
    anepy_scale_discard(e);
    return leave(e, ANEPY_OK);
}

int32_t anepy_engine_ready(const anepy_engine *e, int64_t *steps) {
    return anepy_ready_get(e, steps);
}

int32_t anepy_engine_restore(anepy_engine *e, const anepy_engine_info *info) {
    if (info->struct_size < sizeof *info)
        return anepy_fail(ANEPY_E_ARGUMENT, "engine info has %u bytes, expected %zu",
                          info->struct_size, sizeof *info);
    if (info->accumulated < 0 || info->counted < 0 || info->updates < 0 || info->clean_steps < 0 ||
        !(info->loss_scale > 0.0 && info->loss_scale <= ANEPY_LOSS_SCALE_LIMIT) ||
        !(info->unit >= 0.0 && isfinite(info->unit)) ||
        (info->accumulated > 0 && info->counted > 0 && info->unit == 0.0))
        return anepy_fail(ANEPY_E_ARGUMENT,
                          "%lld accumulated steps, %lld counted targets in units of %g, %lld "
                          "updates, loss scale %g: not a state an engine can be in",
                          (long long)info->accumulated, (long long)info->counted, info->unit,
                          (long long)info->updates, info->loss_scale);
    ANEPY_TRY(enter(e));
    anepy_restore(e, info);
    return leave(e, ANEPY_OK);
}
