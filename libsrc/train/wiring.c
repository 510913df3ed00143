/* train/wiring.c - which surface every tensor of every program lives in, and how inputs get there.
 *
 * FLOW says where each input comes from. Where the device binds tensors anywhere, an input is bound
 * to its source and an output straight into its reader, so a step moves nothing; elsewhere each
 * program has one packed input and one packed output surface and inputs are copied. */
#include <stdlib.h>

#include "train/engine.h"

typedef enum { FROM_X, FROM_X2, FROM_DY, FROM_DX2, FROM_PROGRAM } origin;

static const struct {
    anepy_program_id reader;
    int32_t input;
    origin from;
    anepy_program_id writer; /* FROM_PROGRAM */
    int32_t output;
    int32_t saved; /* from the forward pass: what skip_dead_reads is about */
} FLOW[] = {
    {ANEPY_SDPA_FWD, SDPA_FWD_X, FROM_X, 0, 0, 0},
    {ANEPY_FFN_FWD, FFN_FWD_X, FROM_X2, 0, 0, 0},
    {ANEPY_FFN_BWD, FFN_BWD_DY, FROM_DY, 0, 0, 0},
    {ANEPY_FFN_BWD, FFN_BWD_H1, FROM_PROGRAM, ANEPY_FFN_FWD, FFN_FWD_H1, 1},
    {ANEPY_FFN_BWD, FFN_BWD_H3, FROM_PROGRAM, ANEPY_FFN_FWD, FFN_FWD_H3, 1},
    {ANEPY_SDPA_BWD1, SDPA_BWD1_Q, FROM_PROGRAM, ANEPY_SDPA_FWD, SDPA_FWD_Q, 1},
    {ANEPY_SDPA_BWD1, SDPA_BWD1_K, FROM_PROGRAM, ANEPY_SDPA_FWD, SDPA_FWD_K, 1},
    {ANEPY_SDPA_BWD1, SDPA_BWD1_V, FROM_PROGRAM, ANEPY_SDPA_FWD, SDPA_FWD_V, 1},
    {ANEPY_SDPA_BWD1, SDPA_BWD1_DY, FROM_DX2, 0, 0, 0},
    {ANEPY_SDPA_BWD2, SDPA_BWD2_P, FROM_PROGRAM, ANEPY_SDPA_BWD1, SDPA_BWD1_P, 0},
    {ANEPY_SDPA_BWD2, SDPA_BWD2_DP, FROM_PROGRAM, ANEPY_SDPA_BWD1, SDPA_BWD1_DP, 0},
    {ANEPY_SDPA_BWD2, SDPA_BWD2_Q, FROM_PROGRAM, ANEPY_SDPA_FWD, SDPA_FWD_Q, 1},
    {ANEPY_SDPA_BWD2, SDPA_BWD2_K, FROM_PROGRAM, ANEPY_SDPA_FWD, SDPA_FWD_K, 1},
    {ANEPY_QKV_BWD, QKV_BWD_DQ, FROM_PROGRAM, ANEPY_SDPA_BWD2, SDPA_BWD2_DQ, 0},
    {ANEPY_QKV_BWD, QKV_BWD_DK, FROM_PROGRAM, ANEPY_SDPA_BWD2, SDPA_BWD2_DK, 0},
    {ANEPY_QKV_BWD, QKV_BWD_DV, FROM_PROGRAM, ANEPY_SDPA_BWD1, SDPA_BWD1_DV, 0},
};
#define FLOW_N (sizeof FLOW / sizeof FLOW[0])

static int binds(const anepy_engine *e) { return anepy_can(e, ANEPY_BINDS); }

/* Where an output lives: dq, dk, dv beside each other in their reader's input, so that dX and dW of
 * wq, wk, wv are one product each; scores in one surface for all layers; the rest packed. */
static void place_output(anepy_engine *e, anepy_layer *layer, anepy_program_id id, int32_t tensor,
                         anepy_surface **surface, int32_t *channel) {
    const anepy_program *qkv = &e->programs[ANEPY_QKV_BWD], *bwd1 = &e->programs[ANEPY_SDPA_BWD1];
    *surface = layer->outputs[id];
    *channel = e->programs[id].tensors[tensor].channel;
    if (!binds(e)) return;
    if (id == ANEPY_SDPA_BWD2 || (id == ANEPY_SDPA_BWD1 && tensor == SDPA_BWD1_DV)) {
        int32_t input = id == ANEPY_SDPA_BWD1    ? QKV_BWD_DV
                        : tensor == SDPA_BWD2_DQ ? QKV_BWD_DQ
                                                 : QKV_BWD_DK;
        *surface = layer->inputs[ANEPY_QKV_BWD];
        *channel = qkv->tensors[input].channel;
    } else if (id == ANEPY_SDPA_BWD1) {
        *surface = e->scores;
        *channel = tensor == SDPA_BWD1_P ? 0 : bwd1->tensors[SDPA_BWD1_P].channels;
    }
}

static int32_t packed_input(anepy_engine *e, anepy_layer *layer, anepy_program_id id) {
    if (layer->inputs[id] != NULL) return ANEPY_OK;
    return e->device->ops->surface_create(e->device, e->programs[id].input_channels,
                                          &layer->inputs[id]);
}

static int32_t create_outputs(anepy_engine *e, anepy_layer *layer) {
    ANEPY_TRY(packed_input(e, layer, ANEPY_QKV_BWD));
    for (anepy_program_id id = 0; id < ANEPY_LAYER_PROGRAM_N; id++) {
        int elsewhere = binds(e) && (id == ANEPY_SDPA_BWD1 || id == ANEPY_SDPA_BWD2);
        if (!elsewhere)
            ANEPY_TRY(e->device->ops->surface_create(e->device, e->programs[id].output_channels,
                                                     &layer->outputs[id]));
    }
    return ANEPY_OK;
}

static anepy_surface *host_source(anepy_layer *layer, origin from) {
    switch (from) {
    case FROM_X: return &layer->x;
    case FROM_X2: return &layer->x2;
    case FROM_DY: return &layer->dy;
    default: return &layer->dx2;
    }
}

static int32_t link_inputs(anepy_engine *e, anepy_layer *layer) {
    for (size_t i = 0; i < FLOW_N; i++) {
        anepy_link *link = &layer->links[FLOW[i].reader][FLOW[i].input];
        if (FLOW[i].from == FROM_PROGRAM) {
            place_output(e, layer, FLOW[i].writer, FLOW[i].output, &link->source, &link->channel);
            int bounce = FLOW[i].saved && !anepy_on(e, ANEPY_SKIP_DEAD_READS);
            link->how = bounce ? BOUNCE : binds(e) ? BOUND : COPY;
        } else {
            link->source = host_source(layer, FLOW[i].from);
            link->how = binds(e) ? BOUND : WRITE;
        }
        if (link->how != BOUND) ANEPY_TRY(packed_input(e, layer, FLOW[i].reader));
    }
    return ANEPY_OK;
}

/* The tensors whose product is a weight gradient. */
static void wire_dw(anepy_engine *e, anepy_layer *layer, int32_t l) {
    const anepy_program *p = e->programs;
    const anepy_model *m = e->model;
    int32_t dim = m->config.dim, hidden = m->config.hidden_dim;
    anepy_operand host_dy = {&layer->dy, 0, dim, NULL}, host_dx2 = {&layer->dx2, 0, dim, NULL};
    anepy_surface *attention = layer->outputs[ANEPY_SDPA_FWD], *ffn = layer->outputs[ANEPY_FFN_FWD];
    const anepy_program_tensor *sdpa_fwd = p[ANEPY_SDPA_FWD].tensors;
    const anepy_program_tensor *ffn_fwd = p[ANEPY_FFN_FWD].tensors;
    layer->dw[DW_W2] = (anepy_dw){.dy = host_dy,
                                  .x = {ffn, ffn_fwd[FFN_FWD_GATE].channel, hidden, NULL},
                                  .gradient = anepy_model_layer(m, l, ANEPY_W2)};
    layer->dw[DW_W13] =
        (anepy_dw){.dy = {layer->outputs[ANEPY_FFN_BWD],
                          p[ANEPY_FFN_BWD].tensors[FFN_BWD_DH1].channel, 2 * hidden, NULL},
                   .x = {ffn, ffn_fwd[FFN_FWD_XNORM].channel, dim, NULL},
                   .gradient = anepy_model_layer(m, l, ANEPY_W1)};
    layer->dw[DW_WO] = (anepy_dw){.dy = host_dx2,
                                  .x = {attention, sdpa_fwd[SDPA_FWD_ATTN].channel, dim, NULL},
                                  .gradient = anepy_model_layer(m, l, ANEPY_WO)};
    layer->dw[DW_QKV] =
        (anepy_dw){.dy = {layer->inputs[ANEPY_QKV_BWD], 0, dim + 2 * m->kv_dim, NULL},
                   .x = {attention, sdpa_fwd[SDPA_FWD_XNORM].channel, dim, NULL},
                   .gradient = anepy_model_layer(m, l, ANEPY_WQ)};
}

int32_t anepy_wire(anepy_engine *e) {
    for (anepy_program_id id = 0; id < ANEPY_LAYER_PROGRAM_N; id++)
        anepy_program_describe(&e->programs[id], id, e->model, e->width);
    if (binds(e))
        ANEPY_TRY(e->device->ops->surface_create(
            e->device, 2 * e->programs[ANEPY_SDPA_BWD1].tensors[SDPA_BWD1_P].channels, &e->scores));
    for (int32_t l = 0; l < e->model->config.n_layers; l++) {
        ANEPY_TRY(create_outputs(e, &e->layers[l]));
        ANEPY_TRY(link_inputs(e, &e->layers[l]));
        wire_dw(e, &e->layers[l], l);
    }
    return ANEPY_OK;
}

static int32_t bind_kernel(anepy_engine *e, anepy_layer *layer, anepy_program_id id) {
    const anepy_program *p = &e->programs[id];
    for (int32_t t = 0; t < p->input_n + p->output_n; t++) {
        anepy_surface *surface = layer->inputs[id];
        int32_t channel = p->tensors[t].channel;
        if (t >= p->input_n) {
            place_output(e, layer, id, t, &surface, &channel);
        } else if (layer->links[id][t].how == BOUND) {
            surface = layer->links[id][t].source;
            channel = layer->links[id][t].channel;
        }
        ANEPY_TRY(e->device->ops->bind(layer->kernels[id], t, surface, channel));
    }
    return ANEPY_OK;
}

/* The new set is complete before the old one goes; programs without weights stay. */
int32_t anepy_compile(anepy_engine *e) {
    int32_t most = e->model->config.n_layers * ANEPY_LAYER_PROGRAM_N, n = 0, status;
    anepy_instance *instances = calloc((size_t)most, sizeof *instances);
    anepy_kernel **kernels = calloc((size_t)most, sizeof *kernels);
    if (instances == NULL || kernels == NULL) {
        status = anepy_fail(ANEPY_E_MEMORY, "no memory for the program list");
        goto done;
    }
    for (int32_t l = 0; l < e->model->config.n_layers; l++)
        for (anepy_program_id id = 0; id < ANEPY_LAYER_PROGRAM_N; id++)
            if (e->layers[l].kernels[id] == NULL || e->programs[id].weight_n > 0)
                instances[n++] = (anepy_instance){&e->programs[id], l};
    status = e->device->ops->compile(e->device, instances, n, e->params, kernels);
    for (int32_t i = 0; i < n && status == ANEPY_OK; i++) {
        anepy_program_id id = instances[i].program->id;
        anepy_layer *layer = &e->layers[instances[i].layer];
        if (layer->kernels[id] != NULL) e->device->ops->release(layer->kernels[id]);
        layer->kernels[id] = kernels[i];
        status = bind_kernel(e, layer, id);
    }
    if (status == ANEPY_OK) e->stale = 0;
done:
    free(instances);
    free(kernels);
    return status;
}

void anepy_recompile(anepy_engine *e) {
    if (anepy_can(e, ANEPY_LIVE_WEIGHTS)) return;
    e->stale = 1; /* whatever happens now, the old programs are not to be used */
    (void)anepy_compile(e);
}

/* -------------------------------------------------------------------------------- in each step */

static int32_t transfer(anepy_engine *e, const anepy_link *link, anepy_surface *to, int32_t channel,
                        int32_t count) {
    switch (link->how) {
    case WRITE: return anepy_surface_write(to, channel, count, link->source->data);
    case COPY: return anepy_surface_copy(to, channel, link->source, link->channel, count);
    case BOUNCE:
        ANEPY_TRY(anepy_surface_read(link->source, link->channel, count, e->staging));
        return anepy_surface_write(to, channel, count, e->staging);
    default: return ANEPY_OK;
    }
}

int32_t anepy_transfer_inputs(anepy_engine *e, int32_t layer, anepy_program_id id) {
    const anepy_program *p = &e->programs[id];
    anepy_layer *y = &e->layers[layer];
    for (int32_t t = 0; t < p->input_n; t++)
        ANEPY_TRY(transfer(e, &y->links[id][t], y->inputs[id], p->tensors[t].channel,
                           p->tensors[t].channels));
    return ANEPY_OK;
}

int32_t anepy_read_output(anepy_engine *e, int32_t layer, anepy_program_id id, int32_t tensor,
                          const float **out) {
    anepy_surface *surface;
    int32_t channel;
    place_output(e, &e->layers[layer], id, tensor, &surface, &channel);
    if (binds(e) && surface->dtype == ANEPY_F32) {
        *out = (const float *)surface->data + (int64_t)channel * e->width;
        return ANEPY_OK;
    }
    *out = e->staging;
    return anepy_surface_read(surface, channel, e->programs[id].tensors[tensor].channels,
                              e->staging);
}
