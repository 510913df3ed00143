/* train/engine.c - making and freeing an engine: threads, host memory, device, wiring. */
#include "train/engine.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/blas.h"
#include "runtime/memory.h"
#include "train/update.h"

#define ALIGN 16             /* floats: one cache line */
#define DEFAULT_SCALE 4096.0 /* dlogits of 1/256 become 16: mid-range of fp16 */

/* Hands out host memory. The first pass (base NULL) only measures. */
typedef struct {
    float *base;
    int64_t used;
} carver;

static float *carve(carver *c, int64_t n) {
    float *at = c->base != NULL ? c->base + c->used : NULL;
    c->used += anepy_round_up(n, ALIGN);
    return at;
}

static anepy_surface carve_surface(carver *c, int32_t channels, int32_t width) {
    return (anepy_surface){NULL, ANEPY_F32, channels, width, carve(c, (int64_t)channels * width)};
}

static void carve_operand(const anepy_engine *e, carver *c, anepy_operand *o) {
    int64_t n = anepy_capture_n(e, o);
    if (n > 0) o->capture = carve(c, n);
}

static void lay_out(anepy_engine *e, carver *c) {
    const anepy_config *config = &e->model->config;
    int32_t dim = config->dim, width = e->width;
    int64_t vocab = config->vocab_size, update_pieces;
    for (int32_t l = 0; l < config->n_layers; l++) {
        e->layers[l].x = carve_surface(c, dim, width);
        e->layers[l].x2 = carve_surface(c, dim, width);
        e->layers[l].dy = carve_surface(c, dim, width);
        e->layers[l].dx2 = carve_surface(c, dim, width);
    }
    e->x_final = carve_surface(c, dim, width);
    e->dx = carve_surface(c, dim, width);
    for (int i = 0; i < 2; i++)
        e->staging[i] = carve(c, (int64_t)anepy_max_i32(dim, config->hidden_dim) * width);
    e->xnorm = carve(c, (int64_t)dim * width);
    e->dxnorm = carve(c, (int64_t)dim * width);
    e->logits = carve(c, vocab * width);
    if (e->gemm.bf16 != NULL) {
        e->dlogits = (uint16_t *)(void *)carve(c, ANEPY_CHUNK_ROWS / 2 * width);
        e->xnorm_panels = carve(c, anepy_round_up(dim, ANEPY_COLUMNS) * (width / 2));
    }
    e->host_xnorm = (anepy_surface){NULL, ANEPY_F32, dim, width, e->xnorm};
    e->host_dxnorm = (anepy_surface){NULL, ANEPY_F32, dim, width, e->dxnorm};
    e->host_logits = (anepy_surface){NULL, ANEPY_F32, config->vocab_size, width, e->logits};
    if (anepy_on(e, ANEPY_OFFLOAD_SOFTMAX))
        e->group_lse = carve(c, (int64_t)anepy_softmax_groups(e->model) * width);
    e->norm_gradients = carve(c, (2 * (int64_t)config->n_layers + 1) * dim);
    e->rstd = carve(c, width);
    e->coef = carve(c, width);
    e->lse = carve(c, width);
    e->zeros = carve(c, width);
    e->partial = carve(c, 2 * (int64_t)anepy_chunks(e) * width);
    update_pieces = e->model->arena_n / ANEPY_UPDATE_PIECE + 1;
    e->sums = (double *)(void *)carve(c, 2 * update_pieces);
    e->row_squares = (double *)(void *)carve(c, 2 * vocab);
    e->gemm.panels = carve(c, anepy_gemm_panels_n(anepy_max_i32(width, dim)));
    e->gemm.scratch_n = anepy_round_up(anepy_gemm_scratch_n(width), ALIGN);
    e->gemm.scratch = carve(c, e->gemm.scratch_n * anepy_pool_threads(e->pool));
}

static int32_t allocate_host(anepy_engine *e) {
    carver measure = {NULL, 0};
    lay_out(e, &measure);
    e->host_nbytes = (uint64_t)measure.used * sizeof(float);
    e->host = anepy_map(e->host_nbytes);
    if (e->host == NULL)
        return anepy_fail(ANEPY_E_MEMORY, "no memory for %llu bytes of activations",
                          (unsigned long long)e->host_nbytes);
    carver place = {e->host, 0};
    lay_out(e, &place);
    return ANEPY_OK;
}

/* What products leave beside their gradients; with prealloc also the capture buffers, for the
 * operands that will need one. */
static int32_t allocate_captures(anepy_engine *e) {
    for (int pass = 0; pass < 2; pass++) {
        carver c = {e->captures, 0};
        for (int32_t l = 0; l < e->model->config.n_layers; l++) {
            for (int32_t i = 0; i < DW_N; i++) {
                anepy_dw *dw = &e->layers[l].dw[i];
                anepy_product shape = {.m = dw->dy.channels, .n = dw->x.channels};
                dw->squares = (double *)(void *)carve(&c, 2 * anepy_gemm_pieces(&shape));
                if (!anepy_keeps_captures(e)) continue;
                carve_operand(e, &c, &dw->dy);
                carve_operand(e, &c, &dw->x);
            }
        }
        if (pass > 0) break;
        e->captures_nbytes = (uint64_t)c.used * sizeof(float);
        e->captures = anepy_map(e->captures_nbytes);
        if (e->captures == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for capture buffers");
    }
    return ANEPY_OK;
}

static const struct {
    const char *name;
    anepy_dtype dtype;
} PRECISIONS[] = {{"bf16", ANEPY_BF16}, {"fp32", ANEPY_F32}, {"fp16", ANEPY_F16}};
#define PRECISION_N ((int32_t)(sizeof PRECISIONS / sizeof PRECISIONS[0]))

/* "auto": the first the device has on this machine; fp32 beside a system library, whose matrix
 * units are no faster in bf16 and out of reach of the own kernels (cpu-performance.md 1.7). */
static int32_t choose_precision(anepy_engine *e, const char *name, const anepy_device_type *type) {
    int automatic = name == NULL || strcmp(name, "auto") == 0;
    for (int32_t i = 0; i < PRECISION_N; i++) {
        anepy_dtype dtype = PRECISIONS[i].dtype;
        if (automatic && dtype == ANEPY_BF16 && e->gemm.blas != NULL) continue;
        int known = type->precisions >> dtype & 1;
        int32_t status =
            known && type->has_precision != NULL ? type->has_precision(dtype) : ANEPY_OK;
        if (automatic ? known && status == ANEPY_OK : strcmp(name, PRECISIONS[i].name) == 0) {
            e->dtype = dtype;
            if (known) return status;
            return anepy_fail(ANEPY_E_UNSUPPORTED,
                              "precision %s is not available on device %s; use --precision auto",
                              name, type->name);
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

/* All that has the width of the surfaces. compile: now, not when first needed. */
static int32_t make_room(anepy_engine *e, const anepy_device_type *type, const char *detail,
                         int compile) {
    e->layers = calloc((size_t)e->model->config.n_layers, sizeof *e->layers);
    if (e->layers == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for the layers");
    ANEPY_TRY(allocate_host(e));
    anepy_device_options options = {.model = e->model,
                                    .gemm = &e->gemm,
                                    .width = e->width,
                                    .seq_len = e->seq_len,
                                    .dtype = e->dtype,
                                    .detail = detail};
    ANEPY_TRY(type->open(&e->device, &options));
    ANEPY_TRY(anepy_wire(e));
    ANEPY_TRY(anepy_compile_open(e));
    if (compile) ANEPY_TRY(anepy_compile(e));
    ANEPY_TRY(allocate_captures(e));
    return anepy_on(e, ANEPY_METAL_DW) ? anepy_dw_open_gpu(e) : ANEPY_OK;
}

static void free_room(anepy_engine *e) {
    anepy_compile_close(e);
    if (e->metal != NULL) anepy_gpu.close(e->metal);
    if (e->device != NULL) e->device->ops->close(e->device);
    anepy_unmap(e->host, e->host_nbytes);
    anepy_unmap(e->captures, e->captures_nbytes);
    free(e->nodes);
    free(e->layers);
}

/* Nothing in there outlives a step, so it is made anew; what there was goes when that is done. */
int32_t anepy_engine_widen(anepy_engine *e, int32_t columns) {
    if (columns <= e->width) return ANEPY_OK;
    const size_t own = offsetof(anepy_engine, model), n = sizeof *e - own;
    anepy_engine was;
    char sentence[512];
    memcpy((char *)&was + own, (const char *)e + own, n); /* others may look at `busy` */
    e->width = columns;
    e->layers = NULL;
    e->nodes = NULL;
    memset(e->tail, 0, sizeof e->tail);
    e->host = e->captures = NULL;
    e->device = NULL;
    e->metal = NULL;
    e->compiler = NULL;
    int32_t status = make_room(e, was.device->type, NULL, 1);
    if (status == ANEPY_OK) {
        free_room(&was);
        e->knows_squares = 0;
        return ANEPY_OK;
    }
    anepy_last_error(sentence, sizeof sentence);
    free_room(e);
    memcpy((char *)e + own, (const char *)&was + own, n);
    return anepy_fail(status, "%d sequences of %d tokens at once: %s; use fewer per step",
                      e->beside, e->n, sentence);
}

static int32_t build(anepy_engine *e, const anepy_engine_options *o) {
    const char *detail;
    const anepy_device_type *type = anepy_device_find(o->device, &detail);
    if (type == NULL) return ANEPY_E_NAME;
    ANEPY_TRY(type->probe());
    ANEPY_TRY(anepy_switches_parse(o->variant, type, &e->switches));
    ANEPY_TRY(anepy_blas_get(&e->gemm.blas));
    ANEPY_TRY(choose_precision(e, o->precision, type));
    e->loss_scale = !anepy_scaled(e) ? 1.0 : o->loss_scale > 0.0 ? o->loss_scale : DEFAULT_SCALE;
    e->gemm.kernels = anepy_kernels_get();
    if (e->gemm.kernels == NULL) return ANEPY_E_NAME;
    if (e->dtype == ANEPY_BF16) e->gemm.bf16 = e->gemm.kernels->bf16;
    ANEPY_TRY(anepy_pool_create(&e->pool, o->threads));
    e->gemm.pool = e->pool;
    return make_room(e, type, detail, !(o->flags & ANEPY_ENGINE_DEFER));
}

int32_t anepy_engine_create(anepy_engine **out, const anepy_model *model,
                            const anepy_engine_options *o) {
    if (o->struct_size < sizeof *o)
        return anepy_fail(ANEPY_E_ARGUMENT, "engine options have %u bytes, expected %zu",
                          o->struct_size, sizeof *o);
    if (!(o->loss_scale >= 0.0 && o->loss_scale <= 0x1p40))
        return anepy_fail(ANEPY_E_ARGUMENT, "loss scale %g, expected 0 (default) to 2^40",
                          o->loss_scale);
    if (o->params == NULL || o->grads == NULL || o->adam_m == NULL || o->adam_v == NULL)
        return anepy_fail(ANEPY_E_ARGUMENT, "an arena is missing");
    int32_t seq_len = o->seq_len > 0 ? o->seq_len : model->config.seq_len;
    if (o->seq_len < 0 || seq_len > model->config.seq_len)
        return anepy_fail(ANEPY_E_ARGUMENT, "sequence length %d, the model allows 1 to %d",
                          o->seq_len, model->config.seq_len);
    anepy_engine *e = calloc(1, sizeof *e);
    if (e == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for the engine");
    e->model = model;
    e->params = o->params;
    e->grads = o->grads;
    e->adam_m = o->adam_m;
    e->adam_v = o->adam_v;
    e->seq_len = seq_len;
    e->longest = e->width = (int32_t)anepy_round_up(seq_len, ANEPY_COLUMNS);
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
    free_room(e);
    free(e);
}

int32_t anepy_engine_get_info(const anepy_engine *e, anepy_engine_info *out) {
    uint32_t size = out->struct_size;
    memset(out, 0, sizeof *out);
    out->struct_size = size;
    out->switches = e->switches;
    strncpy(out->device, e->device->type->name, sizeof out->device - 1);
    strncpy(out->precision, precision_name(e->dtype), sizeof out->precision - 1);
    strncpy(out->isa, e->gemm.kernels->isa, sizeof out->isa - 1);
    out->threads = anepy_pool_threads(e->pool);
    out->seq_len = e->seq_len;
    out->accumulated = e->accumulated;
    out->updates = e->updates;
    out->loss_scale = e->loss_scale;
    out->clean_steps = e->clean_steps;
    out->compiles = e->device->compiles;
    out->compile_budget = e->device->compile_budget;
    out->stale = e->stale;
    out->memory = e->host_nbytes + e->captures_nbytes + e->device->nbytes + anepy_compile_nbytes(e);
    return ANEPY_OK;
}

void anepy_engine_run(anepy_engine *e, int32_t count, anepy_loop_fn fn) {
    anepy_pool_run(e->pool, count, fn, e);
}
