/* train/create.c - making, restoring, describing and freeing an engine. */
#include "train/create.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/blas.h"
#include "runtime/memory.h"
#include "train/compile.h"
#include "train/muon.h"
#include "train/ready.h"
#include "train/room.h"
#include "train/scaling.h"
#include "train/update.h"

#define DEFAULT_SCALE 4096.0 /* dlogits of 1/256 become 16: mid-range of fp16 */

/* -------------------------------------------------------------------------------------- options */

static const struct {
    const char *name;
    anepy_dtype dtype;
} PRECISIONS[] = {{"bf16", ANEPY_BF16}, {"fp32", ANEPY_F32}, {"fp16", ANEPY_F16}};
#define PRECISION_N ((int32_t)(sizeof PRECISIONS / sizeof PRECISIONS[0]))

/* "auto": the first the device has on this machine; fp32 beside a system library for products,
 * whose matrix units are no faster in bf16 and out of reach of the own kernels. */
static int32_t choose_precision(anepy_engine *e, const char *name) {
    int automatic = name == NULL || strcmp(name, "auto") == 0;
    for (int32_t i = 0; i < PRECISION_N; i++) {
        anepy_dtype dtype = PRECISIONS[i].dtype;
        if (automatic && dtype == ANEPY_BF16 && e->blas != NULL) continue;
        int known = e->type->precisions >> dtype & 1;
        int32_t status =
            known && e->type->has_precision != NULL ? e->type->has_precision(dtype) : ANEPY_OK;
        if (automatic ? known && status == ANEPY_OK : strcmp(name, PRECISIONS[i].name) == 0) {
            e->dtype = dtype;
            if (known) return status;
            return anepy_fail(ANEPY_E_UNSUPPORTED,
                              "precision %s is not available on device %s; use --precision auto",
                              name, e->type->name);
        }
    }
    return anepy_fail(ANEPY_E_NAME, "unknown precision '%s': use one of auto, fp32, bf16, fp16",
                      name != NULL ? name : "auto");
}

static const char *precision_name(anepy_dtype dtype) {
    for (int32_t i = 0; i < PRECISION_N; i++)
        if (PRECISIONS[i].dtype == dtype) return PRECISIONS[i].name;
    return "";
}

/* The device's type, and a copy of its details: a later room opens the device once more. */
static int32_t choose_device(anepy_engine *e, const char *name) {
    const char *detail;
    e->type = anepy_device_find(name, &detail);
    if (e->type == NULL) return ANEPY_E_NAME;
    ANEPY_TRY(e->type->probe());
    if (detail == NULL) return ANEPY_OK;
    size_t nbytes = strlen(detail) + 1;
    e->detail = malloc(nbytes);
    if (e->detail == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for the engine");
    memcpy(e->detail, detail, nbytes);
    return ANEPY_OK;
}

static int32_t check(const anepy_model *model, const anepy_engine_options *o) {
    if (o->struct_size < sizeof *o)
        return anepy_fail(ANEPY_E_ARGUMENT, "engine options have %u bytes, expected %zu",
                          o->struct_size, sizeof *o);
    if (!(o->loss_scale >= 0.0 && o->loss_scale <= ANEPY_LOSS_SCALE_LIMIT))
        return anepy_fail(ANEPY_E_ARGUMENT, "loss scale %g, expected 0 (default) to 2^40",
                          o->loss_scale);
    const anepy_optimizer *optimizer;
    ANEPY_TRY(anepy_optimizer_find(&optimizer, o->optimizer));
    int second = 0;
    for (int32_t i = 0; i < model->tensor_n; i++)
        second |= anepy_tensor_has(&model->tensors[i], ANEPY_TENSOR_TRAINABLE) &&
                  anepy_optimizer_keeps(optimizer, &model->tensors[i]) > 1;
    if (o->params == NULL || o->grads == NULL || o->adam_m == NULL || (o->adam_v == NULL && second))
        return anepy_fail(ANEPY_E_ARGUMENT, "an arena is missing");
    if ((o->adapter != NULL) != (model->adapter.rank > 0))
        return anepy_fail(ANEPY_E_ARGUMENT, model->adapter.rank > 0
                                                ? "the arena of adapters is missing"
                                                : "an arena of adapters, the model has none");
    if (o->seq_len < 0 || o->seq_len > model->config.seq_len)
        return anepy_fail(ANEPY_E_ARGUMENT, "sequence length %d, the model allows 1 to %d",
                          o->seq_len, model->config.seq_len);
    return ANEPY_OK;
}

/* ------------------------------------------------------------------------------------ the engine
 */

static void lay_out(anepy_engine *e, anepy_carver *c) {
    const anepy_config *config = &e->model->config;
    e->norm_gradients = anepy_carve(c, (2 * (int64_t)config->n_layers + 1) * config->dim);
    e->head_gradients = anepy_carve(c, anepy_head_gradients_n(e->model));
    int64_t pieces = e->model->gradient_n / ANEPY_PIECE_ELEMENTS + 1;
    e->squares.sums = (double *)(void *)anepy_carve(c, 2 * pieces);
    e->squares.rows = (double *)(void *)anepy_carve(c, 2 * (int64_t)config->vocab_size);
}

static int32_t allocate(anepy_engine *e) {
    anepy_carver measure = {NULL, 0};
    lay_out(e, &measure);
    e->memory_nbytes = (uint64_t)measure.used * sizeof(float);
    e->memory = anepy_map(e->memory_nbytes);
    if (e->memory == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for the engine");
    anepy_carver place = {e->memory, 0};
    lay_out(e, &place);
    return ANEPY_OK;
}

static int32_t build(anepy_engine *e, const anepy_engine_options *o) {
    ANEPY_TRY(anepy_optimizer_find(&e->optimizer, o->optimizer));
    ANEPY_TRY(choose_device(e, o->device));
    ANEPY_TRY(anepy_switches_parse(o->variant, e->type, e->model, &e->switches));
    ANEPY_TRY(anepy_blas_get(&e->blas));
    ANEPY_TRY(choose_precision(e, o->precision));
    e->scaling.loss_scale = !anepy_scaled(e)      ? 1.0
                            : o->loss_scale > 0.0 ? o->loss_scale
                                                  : DEFAULT_SCALE;
    e->kernels = anepy_kernels_get();
    if (e->kernels == NULL) return ANEPY_E_NAME;
    ANEPY_TRY(anepy_pool_create(&e->pool, o->threads));
    ANEPY_TRY(allocate(e));
    ANEPY_TRY(anepy_optimizer_open(e));
    return anepy_room_make(e, (int32_t)anepy_round_up(e->seq_len, ANEPY_COLUMNS),
                           !(o->flags & ANEPY_ENGINE_DEFER));
}

int32_t anepy_engine_create(anepy_engine **out, const anepy_model *model,
                            const anepy_engine_options *o) {
    ANEPY_TRY(check(model, o));
    anepy_engine *e = calloc(1, sizeof *e);
    if (e == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for the engine");
    e->model = model;
    e->params = o->params;
    e->grads = o->grads;
    e->adam_m = o->adam_m;
    e->adam_v = o->adam_v;
    e->adapter = o->adapter;
    anepy_ready_all(e);
    e->bf16_moments = (o->flags & ANEPY_ENGINE_BF16_MOMENTS) != 0;
    e->recompute = (o->flags & ANEPY_ENGINE_RECOMPUTE) != 0;
    e->seq_len = o->seq_len > 0 ? o->seq_len : model->config.seq_len;
    int32_t status = build(e, o);
    if (status != ANEPY_OK) {
        anepy_engine_free(e);
        return status;
    }
    *out = e;
    return ANEPY_OK;
}

void anepy_engine_free(anepy_engine *e) {
    if (e == NULL) return;
    anepy_pool_free(e->pool);
    anepy_room_free(e->room);
    anepy_muon_close(e);
    anepy_unmap(e->memory, e->memory_nbytes);
    free(e->detail);
    free(e);
}

int32_t anepy_engine_get_info(const anepy_engine *e, anepy_engine_info *out) {
    uint32_t size = out->struct_size;
    memset(out, 0, sizeof *out);
    out->struct_size = size;
    out->switches = e->switches;
    strncpy(out->device, e->type->name, sizeof out->device - 1);
    strncpy(out->precision, precision_name(e->dtype), sizeof out->precision - 1);
    strncpy(out->isa, e->kernels->isa, sizeof out->isa - 1);
    out->threads = anepy_pool_threads(e->pool);
    out->seq_len = e->seq_len;
    out->accumulated = e->accumulated;
    out->counted = e->scaling.unit > 0.0 ? e->counted : 0;
    out->unit = e->scaling.unit;
    out->updates = e->updates;
    out->loss_scale = e->scaling.loss_scale;
    out->clean_steps = e->scaling.clean_steps;
    out->compiles = e->room->device->compiles;
    out->compile_budget = e->room->device->compile_budget;
    out->stale = e->room->stale;
    out->memory = e->memory_nbytes + anepy_muon_nbytes(e) + e->room->host_nbytes +
                  e->room->captures_nbytes + e->room->device->nbytes +
                  anepy_compile_nbytes(e->room);
    return ANEPY_OK;
}

void anepy_restore(anepy_engine *e, const anepy_engine_info *info) {
    anepy_scale_forget(e);
    e->accumulated = info->accumulated;
    int steps_only = info->accumulated > 0 && info->counted == 0;
    e->counted = steps_only || info->accumulated == 0 ? info->accumulated : info->counted;
    e->scaling.unit = steps_only ? 0.0 : info->unit;
    e->updates = info->updates;
    e->squares.known = 0;
    if (anepy_scaled(e)) {
        e->scaling.loss_scale = info->loss_scale;
        e->scaling.clean_steps = info->clean_steps;
    }
    anepy_recompile(e, 1);
}
