/* train/room.c - making and freeing what has the width of the surfaces. */
#include "train/room.h"

#include <stdlib.h>

#include "runtime/memory.h"
#include "train/compile.h"
#include "train/dw.h"
#include "train/given.h"
#include "train/loss.h"
#include "train/wiring.h"

static anepy_surface carve_surface(anepy_carver *c, int32_t channels, int32_t width) {
    return (anepy_surface){NULL, ANEPY_F32, channels, width,
                           anepy_carve(c, (int64_t)channels * width)};
}

static void lay_out_host(const anepy_engine *e, anepy_room *room, anepy_carver *c) {
    const anepy_config *config = &e->model->config;
    int32_t dim = config->dim, width = room->width;
    int32_t most = anepy_max_i32(anepy_max_i32(dim, e->model->q_dim), config->hidden_dim);
    for (int32_t l = 0; l < config->n_layers; l++) {
        anepy_layer *layer = &room->layers[l];
        /* A layer writes the dy of the one below it while products still read its own. */
        int own = !anepy_shares_backward(e) || !anepy_dw_at_once(e);
        layer->x = carve_surface(c, dim, width);
        layer->x2 = l < 1 || !e->recompute ? carve_surface(c, dim, width) : layer[-1].x2;
        layer->dy = l < 2 || own ? carve_surface(c, dim, width) : layer[-2].dy;
        layer->dx2 = l < 1 || own ? carve_surface(c, dim, width) : layer[-1].dx2;
    }
    room->x_final = carve_surface(c, dim, width);
    room->dx = carve_surface(c, dim, width);
    for (int i = 0; i < 2; i++) room->staging[i] = anepy_carve(c, (int64_t)most * width);
    room->host_next = carve_surface(c, dim, width);
    room->host_xnorm = carve_surface(c, dim, width);
    room->host_dxnorm = carve_surface(c, dim, width);
    room->logits_width = anepy_logits_width(e, width);
    room->host_logits = carve_surface(c, config->vocab_size, room->logits_width);
    room->xnorm = room->host_xnorm.data;
    room->dxnorm = room->host_dxnorm.data;
    room->logits = room->host_logits.data;
    if (room->gemm.bf16 != NULL) {
        room->dlogits = (uint16_t *)(void *)anepy_carve(c, ANEPY_CHUNK_ROWS / 2 * width);
        room->xnorm_panels = anepy_carve(c, anepy_round_up(dim, ANEPY_COLUMNS) * (width / 2));
    }
    if (anepy_on(e, ANEPY_OFFLOAD_SOFTMAX))
        room->group_lse = anepy_carve(c, (int64_t)anepy_softmax_groups(e->model) * width);
    room->rstd = anepy_carve(c, width);
    room->coef = anepy_carve(c, width);
    room->lse = anepy_carve(c, width);
    room->zeros = anepy_carve(c, width);
    room->documents = (int32_t *)(void *)anepy_carve(c, width);
    if (config->qk_norm) {
        room->head_partial = anepy_carve(c, e->model->q_dim);
        if (!anepy_can(e, ANEPY_BINDS))
            room->dqk = carve_surface(c, e->model->q_dim + e->model->kv_dim, width);
    }
    room->partial = anepy_carve(c, 2 * (int64_t)anepy_loss_chunks(e) * width);
    room->gemm.panels = anepy_carve(c, anepy_gemm_panels_n(anepy_max_i32(width, dim)));
    room->gemm.scratch_n = anepy_round_up(anepy_gemm_scratch_n(width), 16);
    room->gemm.scratch = anepy_carve(c, room->gemm.scratch_n * anepy_pool_threads(e->pool));
}

static int32_t allocate_host(const anepy_engine *e, anepy_room *room) {
    anepy_carver measure = {NULL, 0};
    lay_out_host(e, room, &measure);
    room->host_nbytes = (uint64_t)measure.used * sizeof(float);
    room->host = anepy_map(room->host_nbytes);
    if (room->host == NULL)
        return anepy_fail(ANEPY_E_MEMORY, "no memory for %llu bytes of activations",
                          (unsigned long long)room->host_nbytes);
    anepy_carver place = {room->host, 0};
    lay_out_host(e, room, &place);
    return ANEPY_OK;
}

static void carve_capture(const anepy_engine *e, anepy_carver *c, anepy_operand *o) {
    int64_t n = anepy_capture_n(e, o);
    if (n > 0) o->capture = anepy_carve(c, n);
}

/* The sums of squares that products leave; with prealloc also capture buffers for the operands that
 * need one, where layers share the memory of their backward pass in the same for each. */
static void lay_out_captures(const anepy_engine *e, anepy_room *room, anepy_carver *c) {
    int32_t layers = e->model->config.n_layers;
    int shared = anepy_shares_backward(e) && anepy_dw_at_once(e);
    for (int32_t l = 0; l < layers; l++)
        for (int32_t i = 0; i < DW_N; i++)
            for (int32_t p = 0; p < room->layers[l].dw[i].product_n; p++) {
                anepy_dw_product *product = &room->layers[l].dw[i].products[p];
                product->squares = (double *)(void *)anepy_carve(c, 2 * (int64_t)product->pieces);
            }
    if (!anepy_keeps_captures(e)) return;
    int64_t first = c->used, end = first;
    for (int32_t l = 0; l < layers; l++) {
        if (shared) c->used = first;
        for (int32_t i = 0; i < DW_N; i++) {
            anepy_dw *dw = &room->layers[l].dw[i];
            carve_capture(e, c, &dw->dy);
            carve_capture(e, c, &dw->x);
            carve_capture(e, c, &dw->adapter.forward);
            carve_capture(e, c, &dw->adapter.backward);
        }
        end = anepy_max_i64(end, c->used);
    }
    c->used = end;
}

static int32_t allocate_captures(const anepy_engine *e, anepy_room *room) {
    anepy_carver measure = {NULL, 0};
    lay_out_captures(e, room, &measure);
    room->captures_nbytes = (uint64_t)measure.used * sizeof(float);
    if (measure.used == 0) return ANEPY_OK;
    room->captures = anepy_map(room->captures_nbytes);
    if (room->captures == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for capture buffers");
    anepy_carver place = {room->captures, 0};
    lay_out_captures(e, room, &place);
    return ANEPY_OK;
}

/* Fills e->room, which has a width and nothing else. */
static int32_t build(anepy_engine *e, int compile) {
    anepy_room *room = e->room;
    room->gemm = (anepy_gemm){.kernels = e->kernels,
                              .bf16 = e->dtype == ANEPY_BF16 ? e->kernels->bf16 : NULL,
                              .blas = e->blas,
                              .pool = e->pool};
    room->layers = calloc((size_t)e->model->config.n_layers, sizeof *room->layers);
    if (room->layers == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for the layers");
    ANEPY_TRY(allocate_host(e, room));
    anepy_device_options options = {.model = e->model,
                                    .gemm = &room->gemm,
                                    .width = room->width,
                                    .seq_len = e->seq_len,
                                    .dtype = e->dtype,
                                    .adapter = e->adapter,
                                    .detail = e->detail};
    ANEPY_TRY(e->type->open(&room->device, &options));
    ANEPY_TRY(anepy_wire(e));
    anepy_given_wire(e);
    ANEPY_TRY(anepy_compile_open(e));
    if (compile) ANEPY_TRY(anepy_compile(e));
    ANEPY_TRY(allocate_captures(e, room));
    int on_gpu = anepy_on(e, ANEPY_METAL_DW) && e->adapter == NULL; /* whose products are thin */
    return on_gpu ? anepy_dw_open_gpu(e) : ANEPY_OK;
}

int32_t anepy_room_make(anepy_engine *e, int32_t width, int compile) {
    anepy_room *before = e->room, *room = calloc(1, sizeof *room);
    char sentence[512];
    if (room == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for the surfaces");
    room->width = width;
    e->room = room;
    int32_t status = build(e, compile);
    if (status == ANEPY_OK) {
        anepy_room_free(before);
        e->squares.known = 0; /* those of products lie in the room */
        return ANEPY_OK;
    }
    anepy_last_error(sentence, sizeof sentence);
    anepy_room_free(room);
    e->room = before;
    return anepy_fail(status, "%s", sentence);
}

int32_t anepy_room_widen(anepy_engine *e) {
    if (e->run.columns <= e->room->width) return ANEPY_OK;
    int32_t status = anepy_room_make(e, e->run.columns, 1);
    char sentence[512];
    if (status == ANEPY_OK) return ANEPY_OK;
    anepy_last_error(sentence, sizeof sentence);
    return anepy_fail(status, "%d sequences of %d tokens at once: %s; use fewer per step",
                      e->run.beside, e->run.tokens, sentence);
}

void anepy_room_free(anepy_room *room) {
    if (room == NULL) return;
    anepy_compile_close(room);
    if (room->metal != NULL) anepy_gpu.close(room->metal);
    if (room->device != NULL) room->device->ops->close(room->device);
    anepy_unmap(room->host, room->host_nbytes);
    anepy_unmap(room->captures, room->captures_nbytes);
    free(room->nodes);
    free(room->layers);
    free(room);
}
