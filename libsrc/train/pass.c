/* train/pass.c - one pass over the sequences that run side by side: what happens in which order,
 * and which phase it counts for. */
#include "train/pass.h"

#include "train/dw.h"
#include "train/embed.h"
#include "train/given.h"
#include "train/loss.h"
#include "train/norm.h"
#include "train/offload.h"
#include "train/ready.h"
#include "train/scaling.h"
#include "train/squares.h"
#include "train/wiring.h"

static int32_t final_norm(anepy_engine *e, double *mark) {
    anepy_node *node = e->room->tail[ANEPY_FINAL_RMSNORM];
    if (e->room->tail[ANEPY_HEAD_FWD] != NULL) return ANEPY_OK; /* with the logits */
    if (node == NULL) {
        anepy_final_norm(e);
        anepy_count(mark, &e->run.stats.norm_ms);
        return ANEPY_OK;
    }
    ANEPY_TRY(anepy_evaluate(e, node, mark));
    if (node->output != NULL) /* else bound to xnorm */
        ANEPY_TRY(anepy_surface_read(node->output, 0, e->model->config.dim, e->room->xnorm));
    anepy_count(mark, &e->run.stats.io_ms);
    return ANEPY_OK;
}

/* As anepy_norm_backward; node: the program that computes the gradient through the norm, or NULL.
 */
static int32_t norm_backward(anepy_engine *e, anepy_node *node, float *dx, const float *residual,
                             const float *dy, const float *x, int32_t layer, int32_t role,
                             double *mark) {
    const float *through = NULL;
    if (node != NULL) {
        ANEPY_TRY(anepy_evaluate(e, node, mark));
        ANEPY_TRY(anepy_read_output(e, node, RMSNORM_BWD_DX, 1, &through));
        anepy_count(mark, &e->run.stats.io_ms);
    }
    anepy_norm_backward(e, dx, residual, dy, x, through, layer, role);
    e->run.reached = dx;
    anepy_count(mark, &e->run.stats.norm_ms);
    return ANEPY_OK;
}

/* Tells the device which columns belong to one document. Those behind the last token do to its. */
static void place_documents(anepy_engine *e) {
    const anepy_run *run = &e->run;
    int32_t *documents = e->room->documents;
    e->room->device->documents = run->starts != NULL ? documents : NULL;
    for (int32_t s = 0; s < run->beside && run->starts != NULL; s++) {
        const uint8_t *starts = run->starts + (int64_t)s * run->tokens;
        for (int32_t t = 0, first = 0; t < run->padded; t++) {
            if (t < run->tokens && starts[t]) first = t;
            documents[s * run->padded + t] = first;
        }
    }
}

/* What layer_forward does, in one program. */
static int32_t fused_forward(anepy_engine *e, int32_t l, float *next, double *mark) {
    anepy_step_stats *stats = &e->run.stats;
    anepy_layer *layer = &e->room->layers[l];
    anepy_node *node = layer->nodes[ANEPY_LAYER_FWD];
    const float *out, *ffn_out;
    ANEPY_TRY(anepy_evaluate(e, node, mark));
    ANEPY_TRY(anepy_read_output(e, node, LAYER_FWD_OUT, 0, &out));
    if (next != NULL) ANEPY_TRY(anepy_read_output(e, node, LAYER_FWD_FFN_OUT, 1, &ffn_out));
    anepy_count(mark, &stats->io_ms);
    anepy_residual_add(e, layer->x2.data, layer->x.data, out);
    if (next != NULL) anepy_residual_add(e, next, layer->x2.data, ffn_out);
    anepy_count(mark, &stats->elementwise_ms);
    return ANEPY_OK;
}

/* From the input of a layer to `next`, the input of what comes after it, or to what its backward
 * pass needs: next NULL. */
static int32_t layer_forward(anepy_engine *e, int32_t l, float *next, double *mark) {
    anepy_step_stats *stats = &e->run.stats;
    anepy_layer *layer = &e->room->layers[l];
    const float *out;
    e->room->held = l;
    e->room->device->again = 0;
    if (layer->nodes[ANEPY_LAYER_FWD] != NULL) return fused_forward(e, l, next, mark);
    ANEPY_TRY(anepy_evaluate(e, layer->nodes[ANEPY_SDPA_FWD], mark));
    ANEPY_TRY(anepy_read_output(e, layer->nodes[ANEPY_SDPA_FWD], SDPA_FWD_OUT, 0, &out));
    anepy_count(mark, &stats->io_ms);
    anepy_residual_add(e, layer->x2.data, layer->x.data, out);
    anepy_count(mark, &stats->elementwise_ms);
    e->room->device->again = next == NULL; /* nobody reads its out */
    ANEPY_TRY(anepy_evaluate(e, layer->nodes[ANEPY_FFN_FWD], mark));
    if (next == NULL) return ANEPY_OK;
    ANEPY_TRY(anepy_read_output(e, layer->nodes[ANEPY_FFN_FWD], FFN_FWD_OUT, 0, &out));
    anepy_count(mark, &stats->io_ms);
    anepy_residual_add(e, next, layer->x2.data, out);
    anepy_count(mark, &stats->elementwise_ms);
    return ANEPY_OK;
}

int32_t anepy_forward(anepy_engine *e) {
    anepy_step_stats *stats = &e->run.stats;
    int32_t layers = e->model->config.n_layers;
    double mark = anepy_now_ms();
    place_documents(e);
    anepy_embed(e);
    anepy_count(&mark, &stats->elementwise_ms);
    for (int32_t l = 0; l < layers; l++) {
        float *next = l + 1 < layers ? e->room->layers[l + 1].x.data : e->room->x_final.data;
        ANEPY_TRY(layer_forward(e, l, next, &mark));
    }
    ANEPY_TRY(final_norm(e, &mark));
    e->run.window = (anepy_window){0};
    if (!anepy_logits_whole(e)) return ANEPY_OK; /* by who needs them, some columns at a time */
    anepy_logits_next(e);
    if (e->room->tail[ANEPY_CLASSIFIER_FWD] != NULL || e->room->tail[ANEPY_HEAD_FWD] != NULL)
        return anepy_offload_logits(e, &mark);
    anepy_classifier(e);
    anepy_count(&mark, &stats->classifier_ms);
    return ANEPY_OK;
}

/* The loss and, with gradient, that of xnorm, a window of columns after the other. */
static void loss_by_windows(anepy_engine *e, int gradient, double *loss, double *mark) {
    anepy_step_stats *stats = &e->run.stats;
    while (anepy_logits_next(e)) {
        if (!anepy_loss_any(e)) continue;
        anepy_classifier(e);
        anepy_count(mark, &stats->classifier_ms);
        anepy_loss(e, gradient, loss);
        anepy_count(mark, &stats->softmax_ms);
        if (gradient) anepy_classifier_backward(e);
        anepy_count(mark, &stats->classifier_ms);
    }
}

int32_t anepy_pass_loss(anepy_engine *e, int gradient, double *loss) {
    double mark = anepy_now_ms();
    *loss = 0.0;
    if (e->room->tail[ANEPY_SOFTMAX] != NULL)
        return anepy_offload_softmax(e, gradient, loss, &mark);
    if (!anepy_logits_whole(e)) {
        loss_by_windows(e, gradient, loss, &mark);
        return ANEPY_OK;
    }
    anepy_loss(e, gradient, loss);
    anepy_count(&mark, &e->run.stats.softmax_ms);
    return ANEPY_OK;
}

void anepy_pass_logits(anepy_engine *e, float *out) {
    if (anepy_logits_whole(e)) {
        anepy_logits_copy(e, out);
        return;
    }
    while (anepy_logits_next(e)) {
        anepy_classifier(e);
        anepy_logits_copy(e, out);
    }
}

/* From the gradients of q and k to those of q_raw and k_raw, where qkv_bwd takes them from. */
static int32_t qk_norm_backward(anepy_engine *e, int32_t l, double *mark) {
    static const struct {
        int32_t role, dy, x, dx;
    } NORMS[] = {{ANEPY_Q_NORM, SDPA_BWD2_DQ, SDPA_FWD_Q_RAW, QKV_BWD_DQ},
                 {ANEPY_K_NORM, SDPA_BWD2_DK, SDPA_FWD_K_RAW, QKV_BWD_DK}};
    anepy_node **nodes = e->room->layers[l].nodes;
    for (int32_t i = 0; i < 2; i++) {
        const anepy_link *link = &nodes[ANEPY_QKV_BWD]->links[NORMS[i].dx];
        float *dx = (float *)link->source->data + (int64_t)link->channel * e->room->width;
        const float *dy, *x;
        ANEPY_TRY(anepy_read_output(e, nodes[ANEPY_SDPA_BWD2], NORMS[i].dy, 0, &dy));
        ANEPY_TRY(anepy_read_output(e, nodes[ANEPY_SDPA_FWD], NORMS[i].x, 1, &x));
        anepy_count(mark, &e->run.stats.io_ms);
        anepy_heads_backward(e, dx, dy, x, l, NORMS[i].role);
        anepy_count(mark, &e->run.stats.norm_ms);
    }
    return ANEPY_OK;
}

/* In one program: of q_norm and k_norm only their own gradients are left. */
static int32_t fused_qk_norm(anepy_engine *e, int32_t l, double *mark) {
    static const struct {
        int32_t role, dy, x;
    } NORMS[] = {{ANEPY_Q_NORM, LAYER_BWD_DQ_NORMED, LAYER_FWD_Q_RAW},
                 {ANEPY_K_NORM, LAYER_BWD_DK_NORMED, LAYER_FWD_K_RAW}};
    anepy_node **nodes = e->room->layers[l].nodes;
    int32_t first = nodes[ANEPY_LAYER_BWD]->program.input_n;
    for (int32_t i = 0; i < 2; i++) {
        const float *dy, *x;
        ANEPY_TRY(anepy_read_output(e, nodes[ANEPY_LAYER_BWD], first + NORMS[i].dy, 0, &dy));
        ANEPY_TRY(anepy_read_output(e, nodes[ANEPY_LAYER_FWD], NORMS[i].x, 1, &x));
        anepy_count(mark, &e->run.stats.io_ms);
        anepy_heads_backward(e, e->room->dqk.data, dy, x, l, NORMS[i].role);
        anepy_count(mark, &e->run.stats.norm_ms);
    }
    return ANEPY_OK;
}

/* What goes through a norm in the program of the whole layer, from its output `dy` on. */
static int32_t fused_norm(anepy_engine *e, int32_t l, int32_t dy, float *dx, const float *residual,
                          const float *x, int32_t role, double *mark) {
    anepy_node *node = e->room->layers[l].nodes[ANEPY_LAYER_BWD];
    int32_t first = node->program.input_n + dy;
    const float *dxnorm, *through;
    ANEPY_TRY(anepy_read_output(e, node, first, 0, &dxnorm));
    ANEPY_TRY(anepy_read_output(e, node, first + 1, 1, &through));
    anepy_count(mark, &e->run.stats.io_ms);
    anepy_norm_backward(e, dx, residual, dxnorm, x, through, l, role);
    e->run.reached = dx;
    anepy_count(mark, &e->run.stats.norm_ms);
    return ANEPY_OK;
}

/* What layer_backward does, in one program; it computes all, whatever is trainable. */
static int32_t fused_backward(anepy_engine *e, int32_t l, float *dx, double *mark) {
    anepy_layer *layer = &e->room->layers[l];
    ANEPY_TRY(anepy_evaluate(e, layer->nodes[ANEPY_LAYER_BWD], mark));
    ANEPY_TRY(anepy_given_compute(e, layer->nodes[ANEPY_LAYER_DW], mark));
    ANEPY_TRY(anepy_dw_ready(e, l, DW_W2));
    ANEPY_TRY(anepy_dw_ready(e, l, DW_W13));
    anepy_count(mark, &e->run.stats.io_ms);
    ANEPY_TRY(fused_norm(e, l, LAYER_BWD_DXNORM2, layer->dx2.data, layer->dy.data, layer->x2.data,
                         ANEPY_FFN_NORM, mark));
    if (!anepy_model_trains(e->model, l, ANEPY_WO)) return ANEPY_OK;
    ANEPY_TRY(anepy_dw_ready(e, l, DW_WO));
    if (e->model->config.qk_norm) ANEPY_TRY(fused_qk_norm(e, l, mark));
    ANEPY_TRY(anepy_dw_ready(e, l, DW_QKV));
    anepy_count(mark, &e->run.stats.io_ms);
    return fused_norm(e, l, LAYER_BWD_DXNORM, dx, layer->dx2.data, layer->x.data,
                      ANEPY_ATTENTION_NORM, mark);
}

/* One layer: from the gradient of its output (layer->dy) to that of its input (dx), or of x2 if
 * nothing before that is trainable. With recompute its activations are made again first, in the
 * place of those of the layer above. The products of a layer are queued as soon as both factors are
 * there, for adapters after the program that computes one of theirs, and are waited for at the end
 * of the step. With scaled losses gradients of weights wait until all others are known to be
 * finite. */
static int32_t layer_backward(anepy_engine *e, int32_t l, float *dx, double *mark) {
    anepy_step_stats *stats = &e->run.stats;
    anepy_layer *layer = &e->room->layers[l];
    anepy_node **nodes = layer->nodes;
    const float *out;
    if (anepy_shares_backward(e) && l + 1 < e->model->config.n_layers)
        ANEPY_TRY(anepy_dw_release(e, l + 1));
    anepy_count(mark, &stats->dw_wait_ms);
    if (/* mutate: recompute-held */ e->recompute && e->room->held != l)
        ANEPY_TRY(layer_forward(e, l, NULL, mark));
    if (nodes[ANEPY_LAYER_BWD] != NULL) return fused_backward(e, l, dx, mark);
    if (e->adapter == NULL) ANEPY_TRY(anepy_dw_ready(e, l, DW_W2));
    anepy_count(mark, &stats->io_ms);
    ANEPY_TRY(anepy_evaluate(e, nodes[ANEPY_FFN_BWD], mark));
    if (e->adapter != NULL) ANEPY_TRY(anepy_dw_ready(e, l, DW_W2));
    ANEPY_TRY(anepy_dw_ready(e, l, DW_W13));
    ANEPY_TRY(anepy_read_output(e, nodes[ANEPY_FFN_BWD], FFN_BWD_DX, 0, &out));
    anepy_count(mark, &stats->io_ms);
    ANEPY_TRY(norm_backward(e, nodes[ANEPY_RMSNORM_BWD_FFN], layer->dx2.data, layer->dy.data, out,
                            layer->x2.data, l, ANEPY_FFN_NORM, mark));
    if (!anepy_model_trains(e->model, l, ANEPY_WO))
        return anepy_given_compute(e, nodes[ANEPY_LAYER_DW], mark);
    if (e->adapter == NULL) ANEPY_TRY(anepy_dw_ready(e, l, DW_WO));
    anepy_count(mark, &stats->io_ms);
    ANEPY_TRY(anepy_evaluate(e, nodes[ANEPY_SDPA_BWD1], mark));
    if (e->adapter != NULL) ANEPY_TRY(anepy_dw_ready(e, l, DW_WO));
    ANEPY_TRY(anepy_evaluate(e, nodes[ANEPY_SDPA_BWD2], mark));
    if (e->model->config.qk_norm) ANEPY_TRY(qk_norm_backward(e, l, mark));
    ANEPY_TRY(anepy_evaluate(e, nodes[ANEPY_QKV_BWD], mark));
    ANEPY_TRY(anepy_given_compute(e, nodes[ANEPY_LAYER_DW], mark));
    ANEPY_TRY(anepy_dw_ready(e, l, DW_QKV));
    ANEPY_TRY(anepy_read_output(e, nodes[ANEPY_QKV_BWD], QKV_BWD_DX, 0, &out));
    anepy_count(mark, &stats->io_ms);
    return norm_backward(e, nodes[ANEPY_RMSNORM_BWD], dx, layer->dx2.data, out, layer->x.data, l,
                         ANEPY_ATTENTION_NORM, mark);
}

/* Gradients of what comes after the layers. */
static void add_last(anepy_engine *e, double *mark) {
    anepy_norm_accumulate(e, e->model->config.n_layers);
    anepy_count(mark, &e->run.stats.norm_ms);
    anepy_classifier_dw(e);
    anepy_embed_clear(e);
    anepy_ready_last(e);
    anepy_count(mark, &e->run.stats.classifier_ms);
}

/* What waited to know that the step is not skipped. */
static int32_t add_all(anepy_engine *e, double *mark) {
    ANEPY_TRY(anepy_dw_start_all(e));
    for (int32_t l = 0; l < e->model->config.n_layers; l++) anepy_norm_accumulate(e, l);
    anepy_count(mark, &e->run.stats.norm_ms);
    add_last(e, mark);
    return ANEPY_OK;
}

/* The final norm, whose program has computed the gradient through it. */
static int32_t head_backward(anepy_engine *e, float *top, double *mark) {
    anepy_node *node = e->room->tail[ANEPY_HEAD_BWD];
    const float *dxnorm, *through;
    ANEPY_TRY(anepy_read_output(e, node, HEAD_BWD_DXNORM, 0, &dxnorm));
    ANEPY_TRY(anepy_read_output(e, node, HEAD_BWD_THROUGH, 1, &through));
    anepy_count(mark, &e->run.stats.io_ms);
    anepy_norm_backward(e, top, NULL, dxnorm, e->room->x_final.data, through, 0, ANEPY_FINAL_NORM);
    e->run.reached = top;
    anepy_count(mark, &e->run.stats.norm_ms);
    return ANEPY_OK;
}

int32_t anepy_backward(anepy_engine *e) {
    anepy_step_stats *stats = &e->run.stats;
    int32_t layers = e->model->config.n_layers;
    double mark = anepy_now_ms();
    float *top = e->room->layers[layers - 1].dy.data;
    anepy_squares_begin(e);
    anepy_given_begin(e);
    if (e->room->tail[ANEPY_HEAD_BWD] != NULL) {
        ANEPY_TRY(anepy_evaluate(e, e->room->tail[ANEPY_HEAD_BWD], &mark));
    } else if (e->room->tail[ANEPY_CLASSIFIER_BWD] != NULL) {
        ANEPY_TRY(anepy_offload_classifier_backward(e, &mark));
    } else if (anepy_logits_whole(e)) {
        anepy_classifier_backward(e);
        anepy_count(&mark, &stats->classifier_ms);
    }
    anepy_node *dw = e->room->tail[ANEPY_CLASSIFIER_DW];
    for (int32_t part = 0; dw != NULL && part < dw->program.parts; part++)
        ANEPY_TRY(anepy_given_compute(e, dw + part, &mark));
    if (e->room->tail[ANEPY_HEAD_BWD] != NULL) ANEPY_TRY(head_backward(e, top, &mark));
    else
        ANEPY_TRY(norm_backward(e, e->room->tail[ANEPY_RMSNORM_BWD_FINAL], top, NULL,
                                e->room->dxnorm, e->room->x_final.data, 0, ANEPY_FINAL_NORM,
                                &mark));
    if (!anepy_scaled(e)) add_last(e, &mark);
    for (int32_t l = layers - 1; l >= 0 && anepy_model_trains(e->model, l, ANEPY_W2); l--) {
        ANEPY_TRY(
            layer_backward(e, l, l > 0 ? e->room->layers[l - 1].dy.data : e->room->dx.data, &mark));
        if (anepy_scaled(e)) continue;
        anepy_norm_accumulate(e, l);
        anepy_count(&mark, &stats->norm_ms);
        anepy_ready_layers(e, l);
    }
    anepy_given_wait(e);
    anepy_count(&mark, &stats->dw_wait_ms);
    if (anepy_scaled(e) && !anepy_gradients_finite(e)) {
        stats->skipped = 1;
        return anepy_given_end(e, 1);
    }
    ANEPY_TRY(anepy_given_end(e, 0));
    if (!anepy_scaled(e) && !anepy_input_gradient_finite(e)) e->scaling.damaged = 1;
    anepy_count(&mark, &stats->elementwise_ms);
    if (anepy_scaled(e)) ANEPY_TRY(add_all(e, &mark));
    for (int32_t l = layers - 1; l >= 0; l--) {
        anepy_dw_wait_layer(e, l);
        anepy_ready_layers(e, l);
    }
    ANEPY_TRY(anepy_dw_wait(e));
    anepy_count(&mark, &stats->dw_wait_ms);
    stats->dw_ms += anepy_pool_take_busy_ms(e->pool);
    anepy_embed_backward(e);
    anepy_squares_end(e);
    anepy_count(&mark, &stats->elementwise_ms);
    return ANEPY_OK;
}
