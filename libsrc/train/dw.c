/* train/dw.c - weight gradients: dW (+)= dY . X^T of each layer, and those of biases, in the
 * background. */
#include "train/dw.h"

#include <stdatomic.h>
#include <string.h>

#include "runtime/memory.h"
#include "train/adapter.h"
#include "train/given.h"

static int caches_raw(const anepy_engine *e) {
    return anepy_on(e, ANEPY_FP16_CACHE) && e->dtype == ANEPY_F16 && !anepy_on(e, ANEPY_METAL_DW);
}

/* Whether the device has rounded this factor to bf16, and fp16_cache lets the product read that. */
static int device_rounded(const anepy_engine *e, const anepy_operand *o) {
    return anepy_on(e, ANEPY_FP16_CACHE) && o->source->dtype == ANEPY_BF16 &&
           !anepy_on(e, ANEPY_METAL_DW);
}

/* Whether the product's task rounds this factor to bf16, once, before it multiplies. */
static int task_rounds(const anepy_engine *e, const anepy_operand *o) {
    return anepy_on(e, ANEPY_FP16_CACHE) && e->dtype == ANEPY_BF16 && !device_rounded(e, o) &&
           !anepy_on(e, ANEPY_METAL_DW) && !o->exact;
}

int64_t anepy_capture_n(const anepy_engine *e, const anepy_operand *o) {
    int64_t n = (int64_t)o->channels * e->room->width;
    if (n == 0 || device_rounded(e, o)) return 0;
    if (task_rounds(e, o)) return n / 2;
    if (o->source->device == NULL) return 0;
    if (anepy_on(e, ANEPY_FP16_CACHE) && o->source->dtype == ANEPY_F32) return 0;
    return caches_raw(e) ? n + n / 2 : n;
}

const uint16_t *anepy_capture_raw(const anepy_engine *e, const anepy_operand *o) {
    if (o->capture == NULL || o->source->device == NULL || !caches_raw(e)) return NULL;
    return (const uint16_t *)(const void *)(o->capture + (int64_t)o->channels * e->room->width);
}

static int32_t read_raw(anepy_engine *e, anepy_operand *o) {
    const anepy_device_ops *ops = e->room->device->ops;
    anepy_surface *s = o->source;
    int64_t n = (int64_t)o->channels * s->width;
    ANEPY_TRY(ops->lock(s, 0));
    e->room->device->moved += anepy_surface_nbytes(s, o->channels);
    memcpy(o->capture + n, (const uint16_t *)s->data + (int64_t)o->channel * s->width,
           (size_t)n * sizeof(uint16_t));
    return ops->unlock(s, 0);
}

/* Where a factor is that the host can read without a copy. */
static const float *in_place(const anepy_operand *o) {
    return (const float *)o->source->data + (int64_t)o->channel * o->source->width;
}

/* Where the product finds a factor: *out float32 rows, *rounded bf16 ones.
 *
 * A host buffer is read where it is, and so is, with fp16_cache, a surface of float32 that the host
 * can see. Other factors are copied to a capture buffer, which without prealloc is made now and
 * freed when the products are done. With fp16_cache they are copied as they are and the product's
 * task converts them; otherwise the calling thread converts. With bf16 products and fp16_cache the
 * task also rounds a factor that the device has not rounded. */
static int32_t fetch(anepy_engine *e, anepy_operand *o, const float **out,
                     const uint16_t **rounded) {
    anepy_surface *s = o->source;
    int64_t n = anepy_capture_n(e, o);
    if (n > 0 && o->capture == NULL) {
        uint64_t nbytes = (uint64_t)n * sizeof(float);
        o->capture = anepy_heap_alloc(nbytes);
        if (o->capture == NULL)
            return anepy_fail(ANEPY_E_MEMORY, "no memory for a capture buffer of %llu bytes",
                              (unsigned long long)nbytes);
    }
    if (device_rounded(e, o)) {
        *rounded = (const uint16_t *)s->data + (int64_t)o->channel * s->width;
        return ANEPY_OK;
    }
    if (task_rounds(e, o)) *rounded = (const uint16_t *)(const void *)o->capture;
    if (task_rounds(e, o) || n == 0) {
        *out = in_place(o);
        return ANEPY_OK;
    }
    *out = o->capture;
    return caches_raw(e) ? read_raw(e, o)
                         : anepy_surface_read(s, o->channel, o->channels, o->capture);
}

static int32_t conversions(const anepy_engine *e, const anepy_operand *o) {
    if (o->channels == 0) return 0;
    int converts = task_rounds(e, o) || anepy_capture_raw(e, o) != NULL;
    return converts ? anepy_pieces(o->channels, ANEPY_PIECE_ROWS) : 0;
}

static void convert(const anepy_engine *e, const anepy_operand *o, int32_t piece) {
    int64_t first = (int64_t)piece * ANEPY_PIECE_ROWS * e->room->width;
    int32_t rows = anepy_min_i32(ANEPY_PIECE_ROWS, o->channels - piece * ANEPY_PIECE_ROWS);
    if (task_rounds(e, o)) {
        uint16_t *out = (uint16_t *)(void *)o->capture;
        for (int64_t at = first; at < first + (int64_t)rows * e->room->width; at += e->room->width)
            e->room->gemm.bf16->to_bf16(out + at, in_place(o) + at, e->run.columns);
        return;
    }
    e->kernels->from_half(o->capture + first, anepy_capture_raw(e, o) + first,
                          (int64_t)rows * e->room->width);
}

/* The gradient of a bias is that of its output, summed over the tokens. It is never rounded. */
static void sum_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_dw *dw = context;
    const anepy_engine *e = dw->engine;
    const anepy_dw_rows *b = dw->biases;
    for (; index >= anepy_pieces(b->rows, ANEPY_PIECE_ROWS); b++)
        index -= anepy_pieces(b->rows, ANEPY_PIECE_ROWS);
    float *gradient = anepy_gradient(e, b->tensor);
    int32_t end = anepy_min_i32(b->rows, (index + 1) * ANEPY_PIECE_ROWS);
    for (int32_t r = index * ANEPY_PIECE_ROWS; r < end; r++) {
        const float *dy = dw->dy_rows + (int64_t)(b->row + r) * e->room->width;
        float sum = e->kernels->sum(dy, anepy_reduction(e));
        gradient[r] = anepy_adds(e) ? gradient[r] + sum : sum;
    }
}

static void multiply(anepy_dw *dw, int32_t index, int32_t worker) {
    anepy_dw_product *p = dw->products;
    for (; index >= p->pieces; p++) index -= p->pieces;
    anepy_gemm_piece(&p->job, index, worker);
}

#define OPERANDS 4 /* of a layer's products with one input */

static void list_operands(anepy_dw *dw, anepy_operand *out[OPERANDS]) {
    anepy_operand *all[OPERANDS] = {&dw->dy, &dw->x, &dw->adapter.forward, &dw->adapter.backward};
    memcpy(out, all, sizeof all);
}

static int32_t all_conversions(anepy_dw *dw) {
    anepy_operand *operands[OPERANDS];
    int32_t n = 0;
    list_operands(dw, operands);
    for (int32_t i = 0; i < OPERANDS; i++) n += conversions(dw->engine, operands[i]);
    return n;
}

static void convert_piece(anepy_dw *dw, int32_t index) {
    anepy_operand *operands[OPERANDS];
    int32_t i = 0;
    list_operands(dw, operands);
    for (; index >= conversions(dw->engine, operands[i]); i++)
        index -= conversions(dw->engine, operands[i]);
    convert(dw->engine, operands[i], index);
}

/* Indices are taken in order, so whoever waits here waits for conversions that are being done. */
static void dw_piece(void *context, int32_t index, int32_t worker) {
    anepy_dw *dw = context;
    if (index < dw->conversions) {
        convert_piece(dw, index);
        atomic_fetch_add_explicit(&dw->converted, 1, memory_order_release);
        return;
    }
    while (atomic_load_explicit(&dw->converted, memory_order_acquire) < dw->conversions)
        anepy_cpu_pause();
    index -= dw->conversions;
    int32_t adapter = anepy_adapter_pieces(dw);
    if (index < dw->sums) sum_rows(dw, index, worker);
    else if (index < dw->sums + adapter) anepy_adapter_piece(dw, index - dw->sums, worker);
    else multiply(dw, index - dw->sums - adapter, worker);
}

/* On the GPU the products of a layer are one group. */
static int32_t start_on_gpu(anepy_engine *e, int32_t layer, int32_t which) {
    const anepy_layer *l = &e->room->layers[layer];
    int32_t later = 0, first = (layer * DW_N + which) * ANEPY_DW_RUNS;
    for (int32_t w = which + 1; w < DW_N; w++) later += l->dw[w].product_n;
    if (l->dw[which].on_device) return ANEPY_OK;
    for (int32_t i = 0; i < l->dw[which].product_n; i++) {
        int last = later == 0 && i == l->dw[which].product_n - 1;
        ANEPY_TRY(anepy_gpu.multiply(e->room->metal, first + i,
                                     &l->dw[which].products[i].job.product,
                                     /* mutate: dw-last-of-layer */ last));
    }
    return ANEPY_OK;
}

static int32_t start(anepy_engine *e, int32_t layer, int32_t which) {
    anepy_dw *dw = &e->room->layers[layer].dw[which];
    int32_t pieces = anepy_adapter_pieces(dw);
    if (dw->dy.channels == 0) return ANEPY_OK;
    e->run.dw_started++;
    dw->engine = e;
    dw->sums = 0;
    int32_t products = dw->on_device ? 0 : dw->product_n;
    for (int32_t i = 0; i < products; i++)
        e->run.stats.dw_flops += anepy_product_flops(&dw->products[i].job.product);
    for (int32_t i = 0; i < dw->bias_n; i++)
        dw->sums += anepy_pieces(dw->biases[i].rows, ANEPY_PIECE_ROWS);
    if (e->room->metal != NULL) {
        anepy_pool_run(e->pool, dw->sums, sum_rows, dw);
        return start_on_gpu(e, layer, which);
    }
    dw->conversions = all_conversions(dw);
    atomic_store(&dw->converted, 0);
    for (int32_t i = 0; i < products; i++) pieces += dw->products[i].pieces;
    anepy_pool_submit(e->pool, &dw->loop, dw->conversions + dw->sums + pieces, dw_piece, dw,
                      !anepy_on(e, ANEPY_CONCURRENT_DW));
    return ANEPY_OK;
}

int32_t anepy_dw_ready(anepy_engine *e, int32_t layer, int32_t which) {
    anepy_dw *dw = &e->room->layers[layer].dw[which];
    const float *dy = NULL, *x = NULL;
    const uint16_t *dy16 = NULL, *x16 = NULL;
    if (dw->dy.channels > 0) ANEPY_TRY(fetch(e, &dw->dy, &dy, &dy16));
    if (dw->x.channels > 0) ANEPY_TRY(fetch(e, &dw->x, &x, &x16));
    dw->dy_rows = dy;
    if (dw->adapter.part_n > 0) {
        anepy_dw_adapter *adapter = &dw->adapter;
        const uint16_t *none;
        adapter->dy = (anepy_factor){dy, dy16};
        adapter->x = (anepy_factor){x, x16};
        ANEPY_TRY(fetch(e, &adapter->forward, &adapter->forward_rows, &none));
        ANEPY_TRY(fetch(e, &adapter->backward, &adapter->backward_rows, &none));
    }
    for (int32_t i = 0; i < (dw->on_device ? 0 : dw->product_n); i++) {
        anepy_dw_product *p = &dw->products[i];
        int64_t first = (int64_t)p->of.row * e->room->width;
        p->job = (anepy_gemm_job){&e->room->gemm,
                                  {.c = anepy_gradient(e, p->of.tensor),
                                   .ldc = dw->x.channels,
                                   .a = dy != NULL ? dy + first : NULL,
                                   .a_row = e->room->width,
                                   .a_step = 1,
                                   .b = x,
                                   .a16 = dy16 != NULL ? dy16 + first : NULL,
                                   .b16 = x16,
                                   .ldb = e->room->width,
                                   .b_transposed = 1,
                                   .m = p->of.rows,
                                   .n = dw->x.channels,
                                   .k = anepy_reduction(e),
                                   .accumulate = anepy_adds(e),
                                   .squares = e->squares.taking ? p->squares : NULL}};
    }
    return anepy_scaled(e) ? ANEPY_OK : start(e, layer, which);
}

int32_t anepy_dw_start_all(anepy_engine *e) {
    if (!anepy_scaled(e)) return ANEPY_OK;
    for (int32_t l = e->model->config.n_layers - 1; l >= 0; l--)
        for (int32_t i = 0; i < DW_N; i++) ANEPY_TRY(start(e, l, i));
    return ANEPY_OK;
}

void anepy_dw_wait_layer(anepy_engine *e, int32_t layer) {
    if (e->room->metal != NULL) return;
    for (int32_t i = 0; i < DW_N; i++)
        anepy_pool_wait_for(e->pool, &e->room->layers[layer].dw[i].loop);
}

int anepy_dw_layer_done(anepy_engine *e, int32_t layer) {
    if (e->room->metal != NULL) return 0; /* known when all are waited for */
    for (int32_t i = 0; i < DW_N; i++)
        if (!anepy_pool_finished(e->pool, &e->room->layers[layer].dw[i].loop)) return 0;
    return 1;
}

static void free_captures(anepy_engine *e, int32_t layer) {
    if (anepy_keeps_captures(e)) return;
    for (int32_t i = 0; i < DW_N; i++) {
        anepy_operand *operands[OPERANDS];
        list_operands(&e->room->layers[layer].dw[i], operands);
        for (int32_t o = 0; o < OPERANDS; o++) {
            anepy_heap_free(operands[o]->capture);
            operands[o]->capture = NULL;
        }
    }
}

int32_t anepy_dw_release(anepy_engine *e, int32_t layer) {
    if (!anepy_dw_at_once(e)) return ANEPY_OK;
    anepy_dw_wait_layer(e, layer);
    if (e->room->metal != NULL) ANEPY_TRY(anepy_gpu.wait(e->room->metal, &e->run.stats.dw_ms));
    free_captures(e, layer);
    return ANEPY_OK;
}

int32_t anepy_dw_wait(anepy_engine *e) {
    int32_t status = anepy_given_end(e, 0);
    anepy_pool_wait(e->pool);
    if (/* mutate: dw-wait-for-gpu */ e->room->metal != NULL)
        status = anepy_gpu.wait(e->room->metal, &e->run.stats.dw_ms);
    for (int32_t l = 0; l < e->model->config.n_layers; l++) free_captures(e, l);
    return status;
}

int anepy_keeps_captures(const anepy_engine *e) {
    return anepy_on(e, ANEPY_PREALLOC) ||
           /* mutate: dw-keeps-captures */ anepy_on(e, ANEPY_METAL_DW);
}

/* Memory of a surface that is read where it is, without a capture buffer. */
static int32_t share_surface(anepy_engine *e, const anepy_operand *o) {
    const anepy_surface *s = o->source;
    if (s->device == NULL || o->capture != NULL || o->channels == 0) return ANEPY_OK;
    return anepy_gpu.share(e->room->metal, s->data,
                           (uint64_t)s->channels * (uint64_t)s->width * sizeof(float));
}

int32_t anepy_dw_open_gpu(anepy_engine *e) {
    int32_t layers = e->model->config.n_layers;
    ANEPY_TRY(anepy_gpu.open(&e->room->metal, layers * DW_N * ANEPY_DW_RUNS));
    ANEPY_TRY(anepy_gpu.share(e->room->metal, anepy_gradients(e),
                              (uint64_t)e->model->gradient_n * sizeof(float)));
    ANEPY_TRY(anepy_gpu.share(e->room->metal, e->room->host, e->room->host_nbytes));
    if (e->room->captures != NULL)
        ANEPY_TRY(anepy_gpu.share(e->room->metal, e->room->captures, e->room->captures_nbytes));
    for (int32_t l = 0; l < layers; l++) {
        for (int32_t i = 0; i < DW_N; i++) {
            ANEPY_TRY(share_surface(e, &e->room->layers[l].dw[i].dy));
            ANEPY_TRY(share_surface(e, &e->room->layers[l].dw[i].x));
        }
    }
    return ANEPY_OK;
}
