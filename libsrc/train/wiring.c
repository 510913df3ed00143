/* train/wiring.c - which programs run, which surface each of their tensors lives in, and how inputs
 * get there.
 *
 * FLOW says where each input comes from. Where the device binds tensors anywhere, an input is bound
 * to its source and an output straight into its reader, so a step moves nothing; elsewhere each
 * program has one packed input and one packed output surface and inputs are copied.
 *
 * With recompute the programs of all layers have the surfaces of those of the first, beside
 * adapters those of the backward pass. */
#include "train/wiring.h"

#include <stdlib.h>
#include <string.h>

/* Whether the final norm and the classifier are one program, with the vocabulary in one part. */
static int fuses_head(const anepy_engine *e) {
    anepy_program p;
    anepy_program_describe(&p, ANEPY_CLASSIFIER_FWD, e->model, ANEPY_COLUMNS);
    return anepy_on(e, ANEPY_FUSED_LAYER) && anepy_on(e, ANEPY_OFFLOAD_RMSNORM) &&
           anepy_on(e, ANEPY_OFFLOAD_CLASSIFIER) && p.parts == 1;
}

static int runs(const anepy_engine *e, anepy_program_id id) {
    const anepy_tensor *classifier = anepy_model_find(e->model, 0, ANEPY_CLASSIFIER);
    int fused = anepy_on(e, ANEPY_FUSED_LAYER), norms = anepy_on(e, ANEPY_OFFLOAD_RMSNORM);
    int dw = anepy_on(e, ANEPY_OFFLOAD_DW) && e->adapter == NULL; /* whose products are thin */
    switch (id) {
    case ANEPY_RMSNORM_BWD:
    case ANEPY_RMSNORM_BWD_FFN: return norms && !fused;
    case ANEPY_LAYER_FWD:
    case ANEPY_LAYER_BWD: return fused;
    case ANEPY_LAYER_DW: return dw;
    case ANEPY_RMSNORM_BWD_FINAL:
    case ANEPY_FINAL_RMSNORM: return norms && !fuses_head(e);
    case ANEPY_CLASSIFIER_FWD:
    case ANEPY_CLASSIFIER_BWD: return anepy_on(e, ANEPY_OFFLOAD_CLASSIFIER) && !fuses_head(e);
    case ANEPY_SOFTMAX: return anepy_on(e, ANEPY_OFFLOAD_SOFTMAX);
    case ANEPY_HEAD_FWD:
    case ANEPY_HEAD_BWD: return fuses_head(e);
    case ANEPY_CLASSIFIER_DW:
        return dw && anepy_on(e, ANEPY_OFFLOAD_CLASSIFIER) && anepy_gradient(e, classifier) != NULL;
    default: return !fused;
    }
}

typedef enum {
    FROM_PROGRAM,
    FROM_X,
    FROM_X2,
    FROM_DY,
    FROM_DX2,
    FROM_X_FINAL,
    FROM_XNORM,
    FROM_DXNORM,
    FROM_LOGITS, /* of the tokens of the program's part; after the loss: their gradients */
} origin;

#define OUT(index) (ANEPY_PROGRAM_TENSORS + (index)) /* counted from the first output on */

/* Where an input may come from several programs, from the one that runs. */
static const struct {
    anepy_program_id reader;
    int32_t input;
    origin from;
    anepy_program_id writer; /* FROM_PROGRAM */
    int32_t output;          /* or an input, whose surface then has it */
    int32_t saved; /* from the forward pass: without skip_dead_reads, read back on the way */
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
    {ANEPY_SDPA_BWD2, SDPA_BWD2_V, FROM_PROGRAM, ANEPY_SDPA_FWD, SDPA_FWD_V, 0},
    {ANEPY_SDPA_BWD2, SDPA_BWD2_ATTN, FROM_PROGRAM, ANEPY_SDPA_FWD, SDPA_FWD_ATTN, 0},
    {ANEPY_SDPA_BWD2, SDPA_BWD2_LSE, FROM_PROGRAM, ANEPY_SDPA_FWD, SDPA_FWD_LSE, 0},
    {ANEPY_QKV_BWD, QKV_BWD_DQ, FROM_PROGRAM, ANEPY_SDPA_BWD2, SDPA_BWD2_DQ, 0},
    {ANEPY_QKV_BWD, QKV_BWD_DK, FROM_PROGRAM, ANEPY_SDPA_BWD2, SDPA_BWD2_DK, 0},
    {ANEPY_QKV_BWD, QKV_BWD_DV, FROM_PROGRAM, ANEPY_SDPA_BWD1, SDPA_BWD1_DV, 0},
    {ANEPY_RMSNORM_BWD, RMSNORM_BWD_DY, FROM_PROGRAM, ANEPY_QKV_BWD, QKV_BWD_DX, 0},
    {ANEPY_RMSNORM_BWD, RMSNORM_BWD_X, FROM_X, 0, 0, 0},
    {ANEPY_RMSNORM_BWD_FFN, RMSNORM_BWD_DY, FROM_PROGRAM, ANEPY_FFN_BWD, FFN_BWD_DX, 0},
    {ANEPY_RMSNORM_BWD_FFN, RMSNORM_BWD_X, FROM_X2, 0, 0, 0},
    {ANEPY_RMSNORM_BWD_FINAL, RMSNORM_BWD_DY, FROM_DXNORM, 0, 0, 0},
    {ANEPY_RMSNORM_BWD_FINAL, RMSNORM_BWD_X, FROM_X_FINAL, 0, 0, 0},
    {ANEPY_FINAL_RMSNORM, FINAL_RMSNORM_X, FROM_X_FINAL, 0, 0, 0},
    {ANEPY_CLASSIFIER_FWD, CLASSIFIER_FWD_X, FROM_XNORM, 0, 0, 0},
    {ANEPY_CLASSIFIER_BWD, CLASSIFIER_BWD_DLOGITS, FROM_LOGITS, 0, 0, 0},
    {ANEPY_SOFTMAX, SOFTMAX_LOGITS, FROM_LOGITS, 0, 0, 0},
    {ANEPY_LAYER_FWD, LAYER_FWD_X, FROM_X, 0, 0, 0},
    {ANEPY_LAYER_BWD, LAYER_BWD_DY, FROM_DY, 0, 0, 0},
    {ANEPY_LAYER_BWD, LAYER_BWD_X, FROM_PROGRAM, ANEPY_LAYER_FWD, LAYER_FWD_X, 0},
    {ANEPY_LAYER_BWD, LAYER_BWD_X2, FROM_PROGRAM, ANEPY_LAYER_FWD, LAYER_FWD_X2, 0},
    {ANEPY_LAYER_BWD, LAYER_BWD_H1, FROM_PROGRAM, ANEPY_LAYER_FWD, LAYER_FWD_H1, 0},
    {ANEPY_LAYER_BWD, LAYER_BWD_H3, FROM_PROGRAM, ANEPY_LAYER_FWD, LAYER_FWD_H3, 0},
    {ANEPY_LAYER_BWD, LAYER_BWD_Q, FROM_PROGRAM, ANEPY_LAYER_FWD, LAYER_FWD_Q, 0},
    {ANEPY_LAYER_BWD, LAYER_BWD_K, FROM_PROGRAM, ANEPY_LAYER_FWD, LAYER_FWD_K, 0},
    {ANEPY_LAYER_BWD, LAYER_BWD_V, FROM_PROGRAM, ANEPY_LAYER_FWD, LAYER_FWD_V, 0},
    {ANEPY_LAYER_BWD, LAYER_BWD_INPUT_N, FROM_PROGRAM, ANEPY_LAYER_FWD, LAYER_FWD_Q_RAW, 0},
    {ANEPY_LAYER_BWD, LAYER_BWD_INPUT_N + 1, FROM_PROGRAM, ANEPY_LAYER_FWD, LAYER_FWD_K_RAW, 0},
    {ANEPY_LAYER_DW, LAYER_DW_DQ, FROM_PROGRAM, ANEPY_QKV_BWD, QKV_BWD_DQ, 0},
    {ANEPY_LAYER_DW, LAYER_DW_DQ, FROM_PROGRAM, ANEPY_LAYER_BWD, OUT(LAYER_BWD_DQ), 0},
    {ANEPY_LAYER_DW, LAYER_DW_DK, FROM_PROGRAM, ANEPY_QKV_BWD, QKV_BWD_DK, 0},
    {ANEPY_LAYER_DW, LAYER_DW_DK, FROM_PROGRAM, ANEPY_LAYER_BWD, OUT(LAYER_BWD_DK), 0},
    {ANEPY_LAYER_DW, LAYER_DW_DV, FROM_PROGRAM, ANEPY_QKV_BWD, QKV_BWD_DV, 0},
    {ANEPY_LAYER_DW, LAYER_DW_DV, FROM_PROGRAM, ANEPY_LAYER_BWD, OUT(LAYER_BWD_DV), 0},
    {ANEPY_LAYER_DW, LAYER_DW_XNORM, FROM_PROGRAM, ANEPY_SDPA_FWD, SDPA_FWD_XNORM, 0},
    {ANEPY_LAYER_DW, LAYER_DW_XNORM, FROM_PROGRAM, ANEPY_LAYER_FWD, LAYER_FWD_XNORM, 0},
    {ANEPY_LAYER_DW, LAYER_DW_DX2, FROM_PROGRAM, ANEPY_SDPA_BWD1, SDPA_BWD1_DY, 0},
    {ANEPY_LAYER_DW, LAYER_DW_DX2, FROM_PROGRAM, ANEPY_LAYER_BWD, OUT(LAYER_BWD_DX2), 0},
    {ANEPY_LAYER_DW, LAYER_DW_ATTN, FROM_PROGRAM, ANEPY_SDPA_FWD, SDPA_FWD_ATTN, 0},
    {ANEPY_LAYER_DW, LAYER_DW_ATTN, FROM_PROGRAM, ANEPY_LAYER_FWD, LAYER_FWD_ATTN, 0},
    {ANEPY_LAYER_DW, LAYER_DW_DH1, FROM_PROGRAM, ANEPY_FFN_BWD, FFN_BWD_DH1, 0},
    {ANEPY_LAYER_DW, LAYER_DW_DH1, FROM_PROGRAM, ANEPY_LAYER_BWD, OUT(LAYER_BWD_DH1), 0},
    {ANEPY_LAYER_DW, LAYER_DW_DH3, FROM_PROGRAM, ANEPY_FFN_BWD, FFN_BWD_DH3, 0},
    {ANEPY_LAYER_DW, LAYER_DW_DH3, FROM_PROGRAM, ANEPY_LAYER_BWD, OUT(LAYER_BWD_DH3), 0},
    {ANEPY_LAYER_DW, LAYER_DW_XNORM2, FROM_PROGRAM, ANEPY_FFN_FWD, FFN_FWD_XNORM, 0},
    {ANEPY_LAYER_DW, LAYER_DW_XNORM2, FROM_PROGRAM, ANEPY_LAYER_FWD, LAYER_FWD_XNORM2, 0},
    {ANEPY_LAYER_DW, LAYER_DW_DY, FROM_PROGRAM, ANEPY_FFN_BWD, FFN_BWD_DY, 0},
    {ANEPY_LAYER_DW, LAYER_DW_DY, FROM_PROGRAM, ANEPY_LAYER_BWD, LAYER_BWD_DY, 0},
    {ANEPY_LAYER_DW, LAYER_DW_GATE, FROM_PROGRAM, ANEPY_FFN_FWD, FFN_FWD_GATE, 0},
    {ANEPY_LAYER_DW, LAYER_DW_GATE, FROM_PROGRAM, ANEPY_LAYER_FWD, LAYER_FWD_GATE, 0},
    {ANEPY_HEAD_FWD, HEAD_FWD_X, FROM_X_FINAL, 0, 0, 0},
    {ANEPY_HEAD_BWD, HEAD_BWD_DLOGITS, FROM_LOGITS, 0, 0, 0},
    {ANEPY_HEAD_BWD, HEAD_BWD_X, FROM_PROGRAM, ANEPY_HEAD_FWD, HEAD_FWD_X, 0},
    {ANEPY_SOFTMAX, SOFTMAX_LOGITS, FROM_PROGRAM, ANEPY_HEAD_FWD, HEAD_FWD_LOGITS, 0},
    {ANEPY_CLASSIFIER_DW, CLASSIFIER_DW_DLOGITS, FROM_PROGRAM, ANEPY_CLASSIFIER_BWD,
     CLASSIFIER_BWD_DLOGITS, 0},
    {ANEPY_CLASSIFIER_DW, CLASSIFIER_DW_DLOGITS, FROM_PROGRAM, ANEPY_HEAD_BWD, HEAD_BWD_DLOGITS, 0},
    {ANEPY_CLASSIFIER_DW, CLASSIFIER_DW_XNORM, FROM_PROGRAM, ANEPY_CLASSIFIER_FWD, CLASSIFIER_FWD_X,
     0},
    {ANEPY_CLASSIFIER_DW, CLASSIFIER_DW_XNORM, FROM_PROGRAM, ANEPY_HEAD_FWD, HEAD_FWD_XNORM, 0},
};
#define FLOW_N (sizeof FLOW / sizeof FLOW[0])

static int binds(const anepy_engine *e) { return anepy_can(e, ANEPY_BINDS); }

static anepy_place place_of(const anepy_engine *e, const anepy_program *p, int32_t tensor) {
    return binds(e) ? p->tensors[tensor].place : ANEPY_PLACE_OWN;
}

/* Whether this output lies in a surface of the program itself. */
static int lies_here(const anepy_engine *e, const anepy_program *p, int32_t tensor) {
    return place_of(e, p, tensor) == ANEPY_PLACE_OWN;
}

/* Whether this output lies apart from the packed ones, rounded to what products take. */
static int lies_apart(const anepy_engine *e, const anepy_program_tensor *t) {
    return binds(e) && e->dtype != ANEPY_F32 && t->factor;
}

static int32_t input_named(const anepy_program *p, const char *name) {
    int32_t t = 0;
    while (strcmp(p->tensors[t].name, name) != 0) t++;
    return t;
}

/* Where an output lies, or an input in the surface that the program reads it from. */
static void place_output(anepy_engine *e, const anepy_node *node, int32_t tensor,
                         anepy_surface **surface, int32_t *channel) {
    const anepy_program *p = &node->program;
    const anepy_node *reader = e->room->layers[node->layer].nodes[ANEPY_QKV_BWD];
    int rounded = lies_apart(e, &p->tensors[tensor]);
    if (tensor < p->input_n) {
        int elsewhere = node->links[tensor].how == BOUND;
        *surface = elsewhere ? node->links[tensor].source : node->input;
        *channel = elsewhere ? node->links[tensor].channel : p->tensors[tensor].channel;
        return;
    }
    *channel = 0;
    switch (place_of(e, p, tensor)) {
    case ANEPY_PLACE_NONE: *surface = NULL; return;
    case ANEPY_PLACE_NEXT: *surface = &e->room->host_next; return;
    case ANEPY_PLACE_XNORM: *surface = &e->room->host_xnorm; return;
    case ANEPY_PLACE_LOGITS:
        *surface = &e->room->host_logits;
        *channel = p->first_row;
        return;
    case ANEPY_PLACE_QKV_BWD:
        *surface = reader->input;
        *channel =
            reader->program.tensors[input_named(&reader->program, p->tensors[tensor].name)].channel;
        return;
    case ANEPY_PLACE_OWN: break;
    }
    *surface = rounded ? node->factors : node->output;
    for (int32_t t = p->input_n; t < anepy_min_i32(tensor, p->input_n + p->output_n); t++)
        if (lies_here(e, p, t) && lies_apart(e, &p->tensors[t]) == rounded)
            *channel += p->tensors[t].channels;
    if (tensor >= ANEPY_HOST_TENSOR) *channel += p->tensors[tensor].channel;
}

/* Whose surfaces the node has. */
static anepy_node *owner_of(anepy_engine *e, anepy_node *node) {
    anepy_program_id id = node->program.id;
    int backward = id >= ANEPY_FFN_BWD && id != ANEPY_LAYER_FWD;
    int shares = e->recompute || (anepy_shares_backward(e) && backward);
    /* Weight gradients are read while the layer below is computed. */
    return shares && id < ANEPY_LAYER_DW ? e->room->layers[0].nodes[id] : node;
}

static int32_t packed_input(anepy_engine *e, anepy_node *node, int32_t channels) {
    anepy_node *owner = owner_of(e, node);
    if (owner->input == NULL)
        ANEPY_TRY(
            e->room->device->ops->surface_create(e->room->device, channels, 0, 0, &owner->input));
    node->input = owner->input;
    return ANEPY_OK;
}

/* One surface for all outputs, or one for factors of products and one for the others. */
static int32_t packed_outputs(anepy_engine *e, anepy_node *node) {
    const anepy_device_ops *ops = e->room->device->ops;
    const anepy_program *p = &node->program;
    const anepy_node *owner = owner_of(e, node);
    if (owner != node) {
        node->output = owner->output;
        node->factors = owner->factors;
        return ANEPY_OK;
    }
    int32_t host = binds(e) ? p->host_channels : 0, rounded = 0, others = host;
    for (int32_t t = p->input_n; t < p->input_n + p->output_n; t++) {
        if (!lies_here(e, p, t)) continue;
        if (lies_apart(e, &p->tensors[t])) rounded += p->tensors[t].channels;
        else others += p->tensors[t].channels;
    }
    if (others + rounded == host) return ANEPY_OK; /* host tensors alone are inputs, or apart */
    int32_t width = p->output_width != p->width ? p->output_width : 0;
    if (others > 0)
        ANEPY_TRY(ops->surface_create(e->room->device, others, width, 0, &node->output));
    if (rounded == 0) return ANEPY_OK;
    return ops->surface_create(e->room->device, rounded, 0, 1, &node->factors);
}

static int32_t create_surfaces(anepy_engine *e) {
    for (int32_t i = 0; i < e->room->node_n; i++) {
        anepy_node *node = &e->room->nodes[i];
        const anepy_program *p = &node->program;
        if (p->id == ANEPY_QKV_BWD) ANEPY_TRY(packed_input(e, node, p->input_channels));
        ANEPY_TRY(packed_outputs(e, node));
    }
    return ANEPY_OK;
}

static anepy_surface *host_source(anepy_engine *e, anepy_layer *layer, origin from) {
    switch (from) {
    case FROM_X: return &layer->x;
    case FROM_X2: return &layer->x2;
    case FROM_DY: return &layer->dy;
    case FROM_DX2: return &layer->dx2;
    case FROM_X_FINAL: return &e->room->x_final;
    case FROM_XNORM: return &e->room->host_xnorm;
    case FROM_DXNORM: return &e->room->host_dxnorm;
    default: return &e->room->host_logits;
    }
}

/* Whether the host changes this input on its way: the gradients of q and k go through their norms.
 * Where tensors are bound it does so in place. */
static int through_norm(const anepy_engine *e, size_t row) {
    return e->model->config.qk_norm && !binds(e) && FLOW[row].reader == ANEPY_QKV_BWD &&
           FLOW[row].writer == ANEPY_SDPA_BWD2;
}

/* The node that writes an input; NULL: it does not run, another one does. */
static const anepy_node *writer_of(const anepy_engine *e, const anepy_node *node, size_t row) {
    anepy_program_id id = FLOW[row].writer;
    const anepy_node *first = e->room->tail[id];
    if (id < ANEPY_LAYER_PROGRAM_N) return e->room->layers[node->layer].nodes[id];
    return first != NULL ? first + node->program.part : NULL;
}

/* Whether a row of FLOW says where an input of this node comes from. */
static int applies(const anepy_engine *e, const anepy_node *node, size_t row) {
    int32_t end = FLOW[row].input < ANEPY_HOST_TENSOR ? node->program.input_n
                  : binds(e)                          ? ANEPY_PROGRAM_TENSORS
                                                      : 0;
    if (FLOW[row].reader != node->program.id || FLOW[row].input >= end) return 0;
    if (FLOW[row].from == FROM_PROGRAM) return writer_of(e, node, row) != NULL;
    return node->program.id != ANEPY_SOFTMAX || e->room->tail[ANEPY_HEAD_FWD] == NULL;
}

/* Whether a program reads the surfaces of others as they are: none of the first programs does, so
 * that each of them has one input. */
static int reads_others(const anepy_engine *e, anepy_program_id id) {
    return id == ANEPY_LAYER_BWD || id == ANEPY_LAYER_DW || id == ANEPY_HEAD_BWD ||
           id == ANEPY_CLASSIFIER_DW ||
           (id == ANEPY_SOFTMAX && e->room->tail[ANEPY_HEAD_FWD] != NULL);
}

/* What comes from the host is packed, all else stays where it is. */
static int32_t link_in_place(anepy_engine *e, anepy_node *node) {
    anepy_program *p = &node->program;
    const anepy_surface *surfaces[ANEPY_PROGRAM_SURFACES];
    int32_t own = 0, at = 0, n = 0;
    for (size_t i = 0; i < FLOW_N; i++)
        if (applies(e, node, i) && FLOW[i].from != FROM_PROGRAM)
            own += p->tensors[FLOW[i].input].channels;
    if (own > 0) ANEPY_TRY(packed_input(e, node, own));
    anepy_program_place(p, -1, 0, 0, 0);
    for (size_t i = 0; i < FLOW_N; i++) {
        if (!applies(e, node, i)) continue;
        int32_t tensor = FLOW[i].input, channel = at, s = 0;
        anepy_link *link = &node->links[tensor];
        const anepy_surface *surface = node->input;
        if (FLOW[i].from == FROM_PROGRAM) {
            const anepy_node *writer = writer_of(e, node, i);
            int32_t output = FLOW[i].output;
            if (output >= OUT(0)) output += writer->program.input_n - OUT(0);
            place_output(e, writer, output, &link->source, &link->channel);
            link->how = BOUND;
            surface = link->source;
            channel = link->channel;
        } else {
            *link = (anepy_link){WRITE, host_source(e, &e->room->layers[node->layer], FLOW[i].from),
                                 FLOW[i].from == FROM_LOGITS ? p->first_row : 0};
            at += p->tensors[tensor].channels;
        }
        while (s < n && surfaces[s] != surface) s++;
        if (s == n) surfaces[n++] = surface;
        anepy_program_place(p, tensor, s, surface->channels, channel);
    }
    return ANEPY_OK;
}

static int32_t link_inputs(anepy_engine *e, anepy_node *node) {
    anepy_layer *layer = &e->room->layers[node->layer];
    if (reads_others(e, node->program.id)) return link_in_place(e, node);
    for (size_t i = 0; i < FLOW_N; i++) {
        if (!applies(e, node, i)) continue;
        anepy_link *link = &node->links[FLOW[i].input];
        if (through_norm(e, i)) {
            int32_t channel = node->program.tensors[FLOW[i].input].channel;
            *link = (anepy_link){WRITE, &e->room->dqk, channel};
        } else if (FLOW[i].from == FROM_PROGRAM) {
            place_output(e, layer->nodes[FLOW[i].writer], FLOW[i].output, &link->source,
                         &link->channel);
            int bounce = FLOW[i].saved && !anepy_on(e, ANEPY_SKIP_DEAD_READS);
            link->how = bounce ? BOUNCE : binds(e) ? BOUND : COPY;
        } else {
            link->source = host_source(e, layer, FLOW[i].from);
            link->channel = FLOW[i].from == FROM_LOGITS ? node->program.first_row : 0;
            link->how = binds(e) ? BOUND : WRITE;
        }
        if (link->how != BOUND) ANEPY_TRY(packed_input(e, node, node->program.input_channels));
    }
    return ANEPY_OK;
}

/* Adds the rows of a tensor, if it is trainable, to those right before them or as new ones. */
static void append(anepy_dw_rows *list, int32_t *n, const anepy_tensor *tensor, int32_t row,
                   int32_t rows) {
    anepy_dw_rows *last = *n > 0 ? &list[*n - 1] : NULL;
    if (tensor == NULL || !anepy_tensor_has(tensor, ANEPY_TENSOR_TRAINABLE)) return;
    if (last != NULL && last->row + last->rows == row) last->rows += rows;
    else list[(*n)++] = (anepy_dw_rows){tensor, row, rows};
}

/* Adds the adapter of a projection whose rows in dy begin there. */
static void append_adapter(anepy_dw_adapter *adapter, const anepy_projection *p, int32_t row) {
    int32_t n = adapter->part_n;
    if (p->b == NULL) return;
    if (n == 0) adapter->a = p->a;
    adapter->parts[n].b = p->b;
    adapter->parts[n].row = row;
    adapter->parts[n].low_row = n * (int32_t)p->a->rows;
    adapter->part_n++;
}

/* The gradients whose factors begin at these channels; how many they have is the projections'
 * matter, and which of them are trainable. */
static anepy_dw dw_of(const anepy_engine *e, int32_t layer, int32_t which, anepy_operand dy,
                      anepy_operand x) {
    anepy_dw dw = {.dy = dy, .x = x};
    anepy_dw_rows weights[ANEPY_DW_RUNS];
    int32_t row = 0;
    for (int32_t i = 0; i < anepy_siblings[which].count; i++) {
        anepy_projection p =
            anepy_model_projection(e->model, layer, anepy_siblings[which].role + i);
        append(weights, &dw.product_n, p.weight, row, p.out);
        append(dw.biases, &dw.bias_n, p.bias, row, p.out);
        append_adapter(&dw.adapter, &p, row);
        row += p.out;
        if (dw.product_n + dw.adapter.part_n > 0) dw.x.channels = p.in;
        if (dw.product_n + dw.bias_n + dw.adapter.part_n > 0) dw.dy.channels += p.out;
        else dw.dy.channel += p.out;
    }
    int32_t skipped = dw.dy.channel - dy.channel;
    for (int32_t i = 0; i < dw.product_n; i++) {
        anepy_product shape = {.m = weights[i].rows, .n = dw.x.channels};
        weights[i].row -= /* mutate: frozen-rows */ skipped;
        dw.products[i] = (anepy_dw_product){.of = weights[i], .pieces = anepy_gemm_pieces(&shape)};
    }
    for (int32_t i = 0; i < dw.bias_n; i++) dw.biases[i].row -= skipped;
    for (int32_t i = 0; i < dw.adapter.part_n; i++) dw.adapter.parts[i].row -= skipped;
    dw.dy.exact = dw.x.exact = dw.product_n == 0;
    return dw;
}

static anepy_operand output_of(anepy_engine *e, const anepy_node *node, int32_t tensor) {
    anepy_operand o = {0};
    place_output(e, node, tensor, &o.source, &o.channel);
    return o;
}

/* What the forward and the backward program of adapters compute for their gradients. */
static void wire_adapter(anepy_engine *e, anepy_layer *layer, int32_t which,
                         anepy_program_id forward, anepy_program_id backward) {
    const anepy_node *nodes[2] = {layer->nodes[forward], layer->nodes[backward]};
    anepy_dw_adapter *adapter = &layer->dw[which].adapter;
    anepy_operand *operands[2] = {&adapter->forward, &adapter->backward};
    for (int32_t i = 0; i < 2 && adapter->part_n > 0; i++) {
        int32_t tensor = nodes[i]->program.low[which];
        *operands[i] = output_of(e, nodes[i], tensor);
        operands[i]->channels = nodes[i]->program.tensors[tensor].channels;
        operands[i]->exact = 1;
    }
}

/* Products that a program computes are not the host's, and neither are their factors. */
static void leave_to_device(anepy_layer *layer) {
    if (layer->nodes[ANEPY_LAYER_DW] == NULL) return;
    for (int32_t i = 0; i < DW_N; i++) {
        anepy_dw *dw = &layer->dw[i];
        dw->on_device = dw->product_n > 0;
        dw->x.channels = 0;
        if (dw->bias_n == 0) dw->dy.channels = 0;
    }
}

static void wire_dw(anepy_engine *e, anepy_layer *layer, int32_t l) {
    int fused = layer->nodes[ANEPY_LAYER_FWD] != NULL;
    anepy_program_id attention = fused ? ANEPY_LAYER_FWD : ANEPY_SDPA_FWD;
    anepy_program_id feed = fused ? ANEPY_LAYER_FWD : ANEPY_FFN_FWD;
    anepy_program_id back = ANEPY_LAYER_BWD;
    const anepy_node *sdpa_fwd = layer->nodes[attention], *ffn_fwd = layer->nodes[feed];
    const anepy_node *ffn_bwd = layer->nodes[fused ? back : ANEPY_FFN_BWD];
    const anepy_node *qkv_bwd = layer->nodes[fused ? back : ANEPY_QKV_BWD];
    int32_t first = ffn_bwd->program.input_n; /* of the outputs */
    anepy_operand dqkv = {.source = qkv_bwd->input};
    if (fused) dqkv = output_of(e, qkv_bwd, first + LAYER_BWD_DQ);
    layer->dw[DW_W2] = dw_of(e, l, DW_W2, (anepy_operand){.source = &layer->dy},
                             output_of(e, ffn_fwd, fused ? LAYER_FWD_GATE : FFN_FWD_GATE));
    layer->dw[DW_W13] =
        dw_of(e, l, DW_W13, output_of(e, ffn_bwd, fused ? first + LAYER_BWD_DH1 : FFN_BWD_DH1),
              output_of(e, ffn_fwd, fused ? LAYER_FWD_XNORM2 : FFN_FWD_XNORM));
    layer->dw[DW_WO] = dw_of(e, l, DW_WO, (anepy_operand){.source = &layer->dx2},
                             output_of(e, sdpa_fwd, fused ? LAYER_FWD_ATTN : SDPA_FWD_ATTN));
    layer->dw[DW_QKV] =
        dw_of(e, l, DW_QKV, dqkv, output_of(e, sdpa_fwd, fused ? LAYER_FWD_XNORM : SDPA_FWD_XNORM));
    wire_adapter(e, layer, DW_W2, feed, fused ? back : ANEPY_FFN_BWD);
    wire_adapter(e, layer, DW_W13, feed, fused ? back : ANEPY_FFN_BWD);
    wire_adapter(e, layer, DW_WO, attention, fused ? back : ANEPY_SDPA_BWD1);
    wire_adapter(e, layer, DW_QKV, attention, fused ? back : ANEPY_QKV_BWD);
    leave_to_device(layer);
}

/* Programs are described for one sequence. */
static int32_t described_width(const anepy_engine *e) {
    return (int32_t)anepy_round_up(e->seq_len, ANEPY_COLUMNS);
}

/* Adds a node, or counts it while there is no memory for them yet. */
static void add_node(anepy_engine *e, anepy_program_id id, int32_t layer, int32_t part) {
    anepy_node *node = e->room->nodes != NULL ? &e->room->nodes[e->room->node_n] : NULL;
    e->room->node_n++;
    if (node == NULL) return;
    anepy_program_describe_part(&node->program, id, e->model, described_width(e), part);
    node->program.live = node->program.weight_n > 0 && anepy_on(e, ANEPY_DYNAMIC_WEIGHTS);
    node->layer = layer;
    if (id < ANEPY_LAYER_PROGRAM_N) e->room->layers[layer].nodes[id] = node;
    else if (part == 0) e->room->tail[id] = node;
}

static void add_nodes(anepy_engine *e) {
    anepy_program program;
    e->room->node_n = 0;
    for (int32_t l = 0; l < e->model->config.n_layers; l++)
        for (anepy_program_id id = 0; id < ANEPY_LAYER_PROGRAM_N; id++)
            if (runs(e, id)) add_node(e, id, l, 0);
    for (anepy_program_id id = ANEPY_LAYER_PROGRAM_N; id < ANEPY_PROGRAM_N; id++) {
        anepy_program_describe(&program, id, e->model, described_width(e));
        for (int32_t part = 0; runs(e, id) && part < program.parts; part++)
            add_node(e, id, 0, part);
    }
}

int32_t anepy_wire(anepy_engine *e) {
    add_nodes(e);
    e->room->nodes = calloc((size_t)e->room->node_n, sizeof *e->room->nodes);
    if (e->room->nodes == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for the programs");
    add_nodes(e);
    ANEPY_TRY(create_surfaces(e));
    for (int32_t i = 0; i < e->room->node_n; i++) ANEPY_TRY(link_inputs(e, &e->room->nodes[i]));
    for (int32_t l = 0; l < e->model->config.n_layers; l++) wire_dw(e, &e->room->layers[l], l);
    return ANEPY_OK;
}

static int32_t bind_tensor(anepy_engine *e, anepy_node *node, int32_t tensor, int input) {
    const anepy_link *link = &node->links[tensor];
    anepy_surface *surface = node->input;
    int32_t channel = node->program.tensors[tensor].channel;
    if (!input) {
        place_output(e, node, tensor, &surface, &channel);
    } else if (link->how == BOUND) {
        surface = link->source;
        channel = link->channel;
    }
    if (surface == NULL) return ANEPY_OK;
    return e->room->device->ops->bind(node->executable, tensor, surface, channel);
}

int32_t anepy_bind(anepy_engine *e, anepy_node *node) {
    const anepy_program *p = &node->program;
    for (int32_t t = 0; t < p->input_n + p->output_n; t++)
        ANEPY_TRY(bind_tensor(e, node, t, t < p->input_n));
    for (int32_t t = ANEPY_HOST_TENSOR; binds(e) && t < ANEPY_HOST_TENSOR + p->host_n; t++)
        ANEPY_TRY(bind_tensor(e, node, t, node->links[t].source != NULL));
    return ANEPY_OK;
}

/* -------------------------------------------------------------------------------- in each step */

static int32_t transfer(anepy_engine *e, const anepy_link *link, anepy_surface *to, int32_t channel,
                        int32_t count) {
    int64_t row = (int64_t)link->channel * e->room->width;
    switch (link->how) {
    case WRITE:
        return anepy_surface_write(to, channel, count, (const float *)link->source->data + row);
    case COPY: return anepy_surface_copy(to, channel, link->source, link->channel, count);
    case BOUNCE:
        ANEPY_TRY(anepy_surface_read(link->source, link->channel, count, e->room->staging[0]));
        return anepy_surface_write(to, channel, count, e->room->staging[0]);
    default: return ANEPY_OK;
    }
}

int32_t anepy_transfer_inputs(anepy_engine *e, anepy_node *node) {
    const anepy_program *p = &node->program;
    for (int32_t t = 0; t < p->input_n; t++)
        ANEPY_TRY(transfer(e, &node->links[t], node->input, p->tensors[t].channel,
                           p->tensors[t].channels));
    return ANEPY_OK;
}

int32_t anepy_compute(anepy_engine *e, anepy_node *node) {
    const anepy_program *p = &node->program;
    anepy_step_stats *stats = &e->run.stats;
    stats->dispatches++;
    stats->device_flops += anepy_program_flops(p, e->model) * e->run.beside;
    stats->device_nbytes += anepy_program_elements(p, e->model, e->run.beside) *
                            anepy_dtype_nbytes(e->dtype == ANEPY_F16 ? ANEPY_F16 : ANEPY_F32);
    return e->room->device->ops->evaluate(node->executable, e->run.tokens, e->run.beside);
}

int32_t anepy_evaluate(anepy_engine *e, anepy_node *node, double *mark) {
    ANEPY_TRY(anepy_transfer_inputs(e, node));
    anepy_count(mark, &e->run.stats.io_ms);
    ANEPY_TRY(anepy_compute(e, node));
    anepy_count(mark, &e->run.stats.device_ms);
    return ANEPY_OK;
}

int32_t anepy_read_output(anepy_engine *e, anepy_node *node, int32_t tensor, int32_t which,
                          const float **out) {
    anepy_surface *surface;
    int32_t channel;
    place_output(e, node, tensor, &surface, &channel);
    if (binds(e) && surface->dtype == ANEPY_F32) {
        *out = (const float *)surface->data + (int64_t)channel * e->room->width;
        return ANEPY_OK;
    }
    *out = e->room->staging[which];
    return anepy_surface_read(surface, channel, node->program.tensors[tensor].channels,
                              e->room->staging[which]);
}
