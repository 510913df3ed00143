/* train/dw.c - weight gradients: dW (+)= dY . X^T of each layer, in the background. */
#include "runtime/memory.h"
#include "train/engine.h"

/* float32 rows of an operand. A host buffer, and with fp16_cache a surface that holds float32 the
 * host can see, is used where it is; otherwise the calling thread reads it back into a capture
 * buffer, which without prealloc is made now and freed when the products are done. */
static int32_t fetch(anepy_engine *e, anepy_operand *o, const float **out) {
    anepy_surface *s = o->source;
    if (s->device == NULL || (anepy_on(e, ANEPY_FP16_CACHE) && s->dtype == ANEPY_F32)) {
        *out = (const float *)s->data + (int64_t)o->channel * s->width;
        return ANEPY_OK;
    }
    if (o->capture == NULL) {
        uint64_t nbytes = (uint64_t)o->channels * (uint64_t)s->width * sizeof(float);
        o->capture = anepy_heap_alloc(nbytes);
        if (o->capture == NULL)
            return anepy_fail(ANEPY_E_MEMORY, "no memory for a capture buffer of %llu bytes",
                              (unsigned long long)nbytes);
    }
    *out = o->capture;
    return anepy_surface_read(s, o->channel, o->channels, o->capture);
}

static void start(anepy_engine *e, anepy_dw *dw) {
    anepy_pool_submit(e->pool, &dw->loop, anepy_gemm_pieces(&dw->job.product), anepy_gemm_piece,
                      &dw->job, !anepy_on(e, ANEPY_CONCURRENT_DW));
}

int32_t anepy_dw_ready(anepy_engine *e, int32_t layer, int32_t which) {
    anepy_dw *dw = &e->layers[layer].dw[which];
    const float *dy = NULL, *x = NULL;
    ANEPY_TRY(fetch(e, &dw->dy, &dy));
    ANEPY_TRY(fetch(e, &dw->x, &x));
    dw->job = (anepy_gemm_job){&e->gemm,
                               {.c = e->grads + dw->gradient,
                                .ldc = dw->x.channels,
                                .a = dy,
                                .a_row = e->width,
                                .a_step = 1,
                                .b = x,
                                .ldb = e->width,
                                .b_transposed = 1,
                                .m = dw->dy.channels,
                                .n = dw->x.channels,
                                .k = e->n,
                                .accumulate = e->accumulated > 0}};
    if (!anepy_scaled(e)) start(e, dw);
    return ANEPY_OK;
}

void anepy_dw_start_all(anepy_engine *e) {
    if (!anepy_scaled(e)) return;
    for (int32_t l = e->model->config.n_layers - 1; l >= 0; l--)
        for (int32_t i = 0; i < DW_N; i++) start(e, &e->layers[l].dw[i]);
}

void anepy_dw_wait(anepy_engine *e) {
    anepy_pool_wait(e->pool);
    if (anepy_on(e, ANEPY_PREALLOC)) return;
    for (int32_t l = 0; l < e->model->config.n_layers; l++) {
        for (int32_t i = 0; i < DW_N; i++) {
            anepy_operand *operands[2] = {&e->layers[l].dw[i].dy, &e->layers[l].dw[i].x};
            for (int32_t o = 0; o < 2; o++) {
                anepy_heap_free(operands[o]->capture);
                operands[o]->capture = NULL;
            }
        }
    }
}
