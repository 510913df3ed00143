/* train/offload.c - classifier and soft-max on the device: what is left for the host.
 *
 * Classifier programs come in parts of the vocabulary. The soft-max program works on groups of
 * tokens (programs.h says why, and how the host joins them). */
#include "train/offload.h"

#include <math.h>
#include <string.h>

#include "train/loss.h"
#include "train/wiring.h"

#define COLS ANEPY_COLUMNS

/* The final norm and the classifier in one: xnorm only where the host goes on with it. */
static int32_t head_forward(anepy_engine *e, anepy_node *node, double *mark) {
    const anepy_program_tensor *logits = &node->program.tensors[HEAD_FWD_LOGITS];
    ANEPY_TRY(anepy_evaluate(e, node, mark));
    if (e->room->tail[ANEPY_CLASSIFIER_DW] == NULL)
        ANEPY_TRY(anepy_surface_read(node->output, 0, e->model->config.dim, e->room->xnorm));
    ANEPY_TRY(anepy_surface_read(node->output, logits->channel, logits->channels, e->room->logits));
    anepy_count(mark, &e->run.stats.io_ms);
    return ANEPY_OK;
}

int32_t anepy_offload_logits(anepy_engine *e, double *mark) {
    if (e->room->tail[ANEPY_HEAD_FWD] != NULL)
        return head_forward(e, e->room->tail[ANEPY_HEAD_FWD], mark);
    anepy_node *part = e->room->tail[ANEPY_CLASSIFIER_FWD];
    const anepy_node *end = part + part->program.parts;
    for (; part < end; part++) {
        ANEPY_TRY(anepy_evaluate(e, part, mark));
        if (part->output == NULL) continue; /* bound to the logits */
        ANEPY_TRY(anepy_surface_read(part->output, 0, part->program.output_channels,
                                     e->room->logits +
                                         (int64_t)part->program.first_row * e->room->width));
        anepy_count(mark, &e->run.stats.io_ms);
    }
    return ANEPY_OK;
}

int32_t anepy_offload_classifier_backward(anepy_engine *e, double *mark) {
    anepy_node *part = e->room->tail[ANEPY_CLASSIFIER_BWD];
    int64_t n = (int64_t)e->model->config.dim * e->room->width;
    const anepy_node *end = part + part->program.parts;
    for (; part < end; part++) {
        const float *dx;
        ANEPY_TRY(anepy_evaluate(e, part, mark));
        ANEPY_TRY(anepy_read_output(e, part, CLASSIFIER_BWD_DX, 0, &dx));
        if (part->program.part == 0) memcpy(e->room->dxnorm, dx, (size_t)n * sizeof(float));
        else e->kernels->add(e->room->dxnorm, e->room->dxnorm, dx, n);
        anepy_count(mark, &e->run.stats.io_ms);
    }
    return ANEPY_OK;
}

/* ------------------------------------------------------------------------------------ soft-max */

/* A group of tokens, v = group + i * groups, in a panel of columns. */
typedef struct {
    anepy_engine *e;
    int32_t groups;
} join_task;

typedef struct {
    int32_t group, column;
} place;

static place locate(const join_task *t, int32_t index) {
    return (place){index % t->groups, index / t->groups * COLS};
}

/* 64 probabilities of a token as float32. The surface is locked. */
static void probabilities(const anepy_engine *e, int32_t token, int32_t column, float *out) {
    const anepy_surface *s = e->room->tail[ANEPY_SOFTMAX]->output;
    int64_t at = (int64_t)token * e->room->width + column;
    if (s->dtype == ANEPY_F16) e->kernels->from_half(out, (const uint16_t *)s->data + at, COLS);
    else memcpy(out, (const float *)s->data + at, COLS * sizeof(float));
}

/* lse of a group, from its most likely token. */
static void group_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const join_task *t = context;
    anepy_engine *e = t->e;
    place p = locate(t, index);
    float row[COLS], top[COLS];
    int32_t best[COLS];
    for (int32_t v = p.group; v < e->model->config.vocab_size; v += t->groups) {
        probabilities(e, v, p.column, row);
        for (int32_t s = 0; s < COLS; s++) {
            if (v != p.group && !(row[s] > top[s])) continue;
            top[s] = row[s];
            best[s] = v;
        }
    }
    for (int32_t s = 0; s < COLS; s++)
        e->room->group_lse[(int64_t)p.group * e->room->width + p.column + s] =
            e->room->logits[(int64_t)best[s] * e->room->width + p.column + s] - logf(top[s]);
}

/* dlogits = p * exp(group lse - lse) * scale; anepy_loss_targets does the rest. */
static void gradient_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const join_task *t = context;
    anepy_engine *e = t->e;
    place p = locate(t, index);
    float row[COLS], factor[COLS];
    for (int32_t s = 0; s < COLS; s++)
        factor[s] = e->room->group_lse[(int64_t)p.group * e->room->width + p.column + s];
    e->kernels->softmax_gradient(factor, e->room->lse + p.column, (float)anepy_target_scale(e),
                                 COLS, 1);
    for (int32_t v = p.group; v < e->model->config.vocab_size; v += t->groups) {
        float *out = e->room->logits + (int64_t)v * e->room->width + p.column;
        probabilities(e, v, p.column, row);
        for (int32_t s = 0; s < COLS; s++) out[s] = row[s] * factor[s];
    }
}

static void join(anepy_engine *e, int gradient, double *loss) {
    join_task task = {e, anepy_softmax_groups(e->model)};
    int32_t pieces = task.groups * (e->run.columns / COLS);
    anepy_pool_run(e->pool, pieces, group_piece, &task);
    anepy_touch(e, e->model->config.vocab_size, gradient ? 2 : 1);
    anepy_loss_join(e, e->room->group_lse, NULL, task.groups, loss);
    if (gradient) {
        anepy_pool_run(e->pool, pieces, gradient_piece, &task);
        anepy_loss_targets(e);
    }
}

/* Logits that are already in surfaces of the device are not written there again. */
static int32_t transfer_logits(anepy_engine *e, anepy_node *node) {
    anepy_node *part = e->room->tail[ANEPY_CLASSIFIER_FWD];
    if (part == NULL || part->output == NULL) return anepy_transfer_inputs(e, node);
    const anepy_node *end = part + part->program.parts;
    for (; part < end; part++)
        ANEPY_TRY(anepy_surface_copy(node->input, part->program.first_row, part->output, 0,
                                     part->program.output_channels));
    return ANEPY_OK;
}

int32_t anepy_offload_softmax(anepy_engine *e, int gradient, double *loss, double *mark) {
    anepy_node *node = e->room->tail[ANEPY_SOFTMAX];
    const anepy_device_ops *ops = e->room->device->ops;
    ANEPY_TRY(transfer_logits(e, node));
    anepy_count(mark, &e->run.stats.io_ms);
    ANEPY_TRY(anepy_compute(e, node));
    anepy_count(mark, &e->run.stats.device_ms);
    ANEPY_TRY(ops->lock(node->output, 0));
    join(e, gradient, loss);
    ANEPY_TRY(ops->unlock(node->output, 0));
    anepy_count(mark, &e->run.stats.softmax_ms);
    return ANEPY_OK;
}
