/* model/model.c - validates dimensions before anything is allocated; builds the tensor table. */
#include "model/model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define ROPE_THETA 10000.0 /* what Llama 2 and llama2.c use */
#define VECTOR 0           /* as a row count: a norm weight, not a matrix of one row */

static int32_t check(const char *name, int32_t value, int32_t largest) {
    if (value >= 1 && value <= largest) return ANEPY_OK;
    return anepy_fail(ANEPY_E_ARGUMENT, "%s is %d, expected 1 to %d", name, value, largest);
}

static int32_t validate(const anepy_config *c) {
    if (c->struct_size < sizeof *c)
        return anepy_fail(ANEPY_E_ARGUMENT, "config has %u bytes, expected %zu", c->struct_size,
                          sizeof *c);
    /* Large enough for every Llama; sizes of tensors are computed in 64 bits. */
    ANEPY_TRY(check("dim", c->dim, 32768));
    ANEPY_TRY(check("hidden_dim", c->hidden_dim, 65536));
    ANEPY_TRY(check("n_layers", c->n_layers, 1024));
    ANEPY_TRY(check("n_heads", c->n_heads, 1024));
    ANEPY_TRY(check("n_kv_heads", c->n_kv_heads, 1024));
    ANEPY_TRY(check("vocab_size", c->vocab_size, 1 << 22));
    ANEPY_TRY(check("seq_len", c->seq_len, 1 << 20));
    if (c->dim % c->n_heads != 0)
        return anepy_fail(ANEPY_E_ARGUMENT, "dim %d is not a multiple of n_heads %d", c->dim,
                          c->n_heads);
    if (c->dim / c->n_heads % 2 != 0)
        return anepy_fail(ANEPY_E_ARGUMENT, "head size %d is odd: RoPE rotates pairs of channels",
                          c->dim / c->n_heads);
    if (c->n_heads % c->n_kv_heads != 0)
        return anepy_fail(ANEPY_E_ARGUMENT, "n_heads %d is not a multiple of n_kv_heads %d",
                          c->n_heads, c->n_kv_heads);
    if ((int64_t)c->n_heads * c->seq_len >
        1 << 28) /* rows of all heads' scores, counted in int32 */
        return anepy_fail(ANEPY_E_ARGUMENT, "n_heads %d times seq_len %d is more than 2^28",
                          c->n_heads, c->seq_len);
    if (c->tied != 0 && c->tied != 1)
        return anepy_fail(ANEPY_E_ARGUMENT, "tied is %d, expected 0 or 1", c->tied);
    return ANEPY_OK;
}

static void append(anepy_model *model, int32_t layer, const char *name, int64_t rows,
                   int64_t cols) {
    anepy_tensor *t = &model->tensors[model->tensor_n++];
    t->struct_size = sizeof *t;
    if (layer >= 0) snprintf(t->name, sizeof t->name, "layers.%d.%s.weight", layer, name);
    else snprintf(t->name, sizeof t->name, "%s.weight", name);
    t->offset = model->arena_n;
    t->is_matrix = rows != VECTOR;
    t->rows = t->is_matrix ? rows : 1;
    t->cols = cols;
    model->arena_n += /* mutate: arena-size */ t->rows * cols;
}

int32_t anepy_model_create(anepy_model **out, const anepy_config *config) {
    ANEPY_TRY(validate(config));
    size_t tensors = (size_t)config->n_layers * ANEPY_LAYER_TENSORS + 3;
    anepy_model *m = calloc(1, sizeof *m + tensors * sizeof m->tensors[0]);
    if (m == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for the tensor table");
    m->config = *config;
    m->head_dim = config->dim / config->n_heads;
    m->kv_dim = m->head_dim * config->n_kv_heads;
    int64_t dim = config->dim, hidden = config->hidden_dim, kv = m->kv_dim;
    append(m, -1, "tok_embeddings", config->vocab_size, dim);
    for (int32_t layer = 0; layer < config->n_layers; layer++) {
        append(m, layer, "attention_norm", VECTOR, dim);
        append(m, layer, "attention.wq", dim, dim);
        append(m, layer, "attention.wk", kv, dim);
        append(m, layer, "attention.wv", kv, dim);
        append(m, layer, "attention.wo", dim, dim);
        append(m, layer, "ffn_norm", VECTOR, dim);
        append(m, layer, "feed_forward.w1", hidden, dim);
        append(m, layer, "feed_forward.w3", hidden, dim);
        append(m, layer, "feed_forward.w2", dim, hidden);
    }
    append(m, -1, "norm", VECTOR, dim);
    if (!config->tied) append(m, -1, "output", config->vocab_size, dim);
    *out = m;
    return ANEPY_OK;
}

void anepy_model_free(anepy_model *model) { free(model); }

int32_t anepy_model_tensor_n(const anepy_model *model) { return model->tensor_n; }

int32_t anepy_model_tensor(const anepy_model *model, int32_t index, anepy_tensor *out) {
    if (index < 0 || index >= model->tensor_n)
        return anepy_fail(ANEPY_E_ARGUMENT, "tensor %d of %d", index, model->tensor_n);
    *out = model->tensors[index];
    return ANEPY_OK;
}

int64_t anepy_model_arena_n(const anepy_model *model) { return model->arena_n; }

int64_t anepy_model_embedding(const anepy_model *model) { return model->tensors[0].offset; }

int64_t anepy_model_layer(const anepy_model *model, int32_t layer, int32_t tensor) {
    return model->tensors[1 + layer * ANEPY_LAYER_TENSORS + tensor].offset;
}

int64_t anepy_model_final_norm(const anepy_model *model) {
    return model->tensors[1 + model->config.n_layers * ANEPY_LAYER_TENSORS].offset;
}

int64_t anepy_model_classifier(const anepy_model *model) {
    return model->tensors[model->config.tied ? 0 : model->tensor_n - 1].offset;
}

/* RoPE turns pair i by position * theta^(-2i/head_dim) (Su et al. 2021, arXiv 2104.09864). */
double anepy_rope_frequency(const anepy_model *model, int32_t pair) {
    return pow(ROPE_THETA, -2.0 * (double)pair / model->head_dim);
}

int32_t anepy_step_flops(const anepy_model *model, anepy_flops *out, int32_t sequences,
                         int32_t tokens) {
    const anepy_config *c = &model->config;
    if (out->struct_size < sizeof *out)
        return anepy_fail(ANEPY_E_ARGUMENT, "flops have %u bytes, expected %zu", out->struct_size,
                          sizeof *out);
    double n = (double)sequences * tokens, dim = c->dim, hidden = c->hidden_dim;
    double heads = (double)c->n_heads * model->head_dim;
    double products = 2 * dim * heads + 2 * dim * model->kv_dim + 3 * dim * hidden;
    out->forward = out->backward_dx = out->backward_dw = 2 * c->n_layers * products * n;
    out->attention = 2.0 * 5 * c->n_layers * heads * tokens * n;
    out->classifier = 3.0 * 2 * c->vocab_size * dim * n;
    out->total =
        out->forward + out->backward_dx + out->backward_dw + out->attention + out->classifier;
    return ANEPY_OK;
}
