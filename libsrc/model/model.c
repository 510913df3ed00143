/* model/model.c - validates dimensions before anything is allocated; builds the tensor table. */
#include "model/model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NORM_EPS 1e-5 /* defaults: Llama 2 and llama2.c */
#define ROPE_THETA 10000.0
#define MOST_CHANNELS 65536
#define TWO_PI 6.283185307179586

static int32_t check(const char *name, int32_t value, int32_t largest) {
    if (value >= 1 && value <= largest) return ANEPY_OK;
    return anepy_fail(ANEPY_E_ARGUMENT, "%s is %d, expected 1 to %d", name, value, largest);
}

/* The negated form refuses NaN as well. */
static int32_t check_between(const char *name, double value, double least, double most) {
    if (value >= least && value <= most) return ANEPY_OK;
    return anepy_fail(ANEPY_E_ARGUMENT, "%s is %g, expected %g to %g", name, value, least, most);
}

static int32_t check_flag(const char *name, int32_t value) {
    if (value == 0 || value == 1) return ANEPY_OK;
    return anepy_fail(ANEPY_E_ARGUMENT, "%s is %d, expected 0 or 1", name, value);
}

static int32_t check_heads(const anepy_config *c) {
    if (c->head_dim == 0 && c->dim % c->n_heads != 0)
        return anepy_fail(ANEPY_E_ARGUMENT, "dim %d is not a multiple of n_heads %d", c->dim,
                          c->n_heads);
    int32_t head_dim = c->head_dim != 0 ? c->head_dim : c->dim / c->n_heads;
    ANEPY_TRY(check("head_dim", head_dim, 32768));
    if (head_dim % 2 != 0)
        return anepy_fail(ANEPY_E_ARGUMENT, "head_dim %d is odd: RoPE rotates pairs of channels",
                          head_dim);
    if (c->n_heads * head_dim > MOST_CHANNELS)
        return anepy_fail(ANEPY_E_ARGUMENT, "n_heads %d times head_dim %d is more than %d",
                          c->n_heads, head_dim, MOST_CHANNELS);
    if (c->n_heads % c->n_kv_heads != 0)
        return anepy_fail(ANEPY_E_ARGUMENT, "n_heads %d is not a multiple of n_kv_heads %d",
                          c->n_heads, c->n_kv_heads);
    /* Rows of the scores of all heads are counted in 32 bits. */
    if ((int64_t)c->n_heads * c->seq_len > 1 << 28)
        return anepy_fail(ANEPY_E_ARGUMENT, "n_heads %d times seq_len %d is more than 2^28",
                          c->n_heads, c->seq_len);
    return ANEPY_OK;
}

static int32_t check_rope(const anepy_config *c) {
    if (c->rope_theta != 0.0) ANEPY_TRY(check_between("rope_theta", c->rope_theta, 1.0, 1e12));
    if (c->rope_scaling == ANEPY_ROPE_PLAIN) return ANEPY_OK;
    if (c->rope_scaling != ANEPY_ROPE_LINEAR && c->rope_scaling != ANEPY_ROPE_LLAMA3)
        return anepy_fail(ANEPY_E_ARGUMENT, "rope_scaling is %d, expected 0 to 2", c->rope_scaling);
    ANEPY_TRY(check_between("rope_factor", c->rope_factor, 1e-3, 1e6));
    if (c->rope_scaling == ANEPY_ROPE_LINEAR) return ANEPY_OK;
    ANEPY_TRY(check("rope_original_max_position", c->rope_original_max_position, 1 << 24));
    ANEPY_TRY(check_between("rope_low_freq_factor", c->rope_low_freq_factor, 1e-3, 1e6));
    ANEPY_TRY(check_between("rope_high_freq_factor", c->rope_high_freq_factor, 1e-3, 1e6));
    if (c->rope_high_freq_factor <= c->rope_low_freq_factor)
        return anepy_fail(ANEPY_E_ARGUMENT,
                          "rope_high_freq_factor %g is not above rope_low_freq_factor %g",
                          c->rope_high_freq_factor, c->rope_low_freq_factor);
    return ANEPY_OK;
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
    ANEPY_TRY(check_heads(c));
    ANEPY_TRY(check_rope(c));
    /* Models have 1e-6 or 1e-5; within these bounds no form of the norm overflows. */
    if (c->norm_eps != 0.0) ANEPY_TRY(check_between("norm_eps", c->norm_eps, 1e-12, 0.1));
    ANEPY_TRY(check_flag("qkv_bias", c->qkv_bias));
    ANEPY_TRY(check_flag("qk_norm", c->qk_norm));
    return check_flag("tied", c->tied);
}

/* What a count of channels is made of. */
typedef enum { VECTOR, DIM, Q, KV, HEAD, HIDDEN } extent;

/* The tensors of a layer, as Meta's Llama names them. A vector has one row. */
static const struct {
    const char *name;
    extent rows, cols;
} LAYER[ANEPY_LAYER_TENSORS] = {
    [ANEPY_ATTENTION_NORM] = {"attention_norm.weight", VECTOR, DIM},
    [ANEPY_WQ] = {"attention.wq.weight", Q, DIM},
    [ANEPY_WK] = {"attention.wk.weight", KV, DIM},
    [ANEPY_WV] = {"attention.wv.weight", KV, DIM},
    [ANEPY_BQ] = {"attention.wq.bias", VECTOR, Q},
    [ANEPY_BK] = {"attention.wk.bias", VECTOR, KV},
    [ANEPY_BV] = {"attention.wv.bias", VECTOR, KV},
    [ANEPY_Q_NORM] = {"attention.q_norm.weight", VECTOR, HEAD},
    [ANEPY_K_NORM] = {"attention.k_norm.weight", VECTOR, HEAD},
    [ANEPY_WO] = {"attention.wo.weight", DIM, Q},
    [ANEPY_FFN_NORM] = {"ffn_norm.weight", VECTOR, DIM},
    [ANEPY_W1] = {"feed_forward.w1.weight", HIDDEN, DIM},
    [ANEPY_W3] = {"feed_forward.w3.weight", HIDDEN, DIM},
    [ANEPY_W2] = {"feed_forward.w2.weight", DIM, HIDDEN},
};

const struct anepy_siblings anepy_siblings[ANEPY_INTO_N] = {
    [ANEPY_INTO_W2] = {ANEPY_W2, 1},
    [ANEPY_INTO_W13] = {ANEPY_W1, 2},
    [ANEPY_INTO_WO] = {ANEPY_WO, 1},
    [ANEPY_INTO_QKV] = {ANEPY_WQ, 3},
};

static int64_t extent_of(const anepy_model *model, extent e) {
    switch (e) {
    case DIM: return model->config.dim;
    case Q: return model->q_dim;
    case KV: return model->kv_dim;
    case HEAD: return model->head_dim;
    case HIDDEN: return model->config.hidden_dim;
    default: return VECTOR;
    }
}

static void append(anepy_model *model, int32_t layer, int32_t role, const char *name, int64_t rows,
                   int64_t cols) {
    anepy_tensor *t = &model->tensors[model->tensor_n++];
    uint32_t kind = rows != VECTOR ? ANEPY_TENSOR_MATRIX | ANEPY_TENSOR_DECAYS : 0;
    t->struct_size = sizeof *t;
    if (layer >= 0) snprintf(t->name, sizeof t->name, "layers.%d.%s", layer, name);
    else snprintf(t->name, sizeof t->name, "%s", name);
    t->flags = kind | ANEPY_TENSOR_TRAINABLE;
    t->layer = layer;
    t->role = role;
    t->rows = rows != VECTOR ? rows : 1;
    t->cols = cols;
    t->storage = ANEPY_F32;
    t->offset = model->arena_n;
    model->arena_n += /* mutate: arena-size */ anepy_tensor_n(t);
}

/* Where tensors lie in the arena of weights: behind each other, at multiples of 4 bytes. */
static void place_weights(anepy_model *model) {
    model->params_nbytes = 0;
    for (int32_t i = 0; i < model->own_n; i++) {
        anepy_tensor *t = &model->tensors[i];
        t->byte = model->params_nbytes;
        model->params_nbytes +=
            anepy_round_up(anepy_stored_nbytes((anepy_dtype)t->storage, anepy_tensor_n(t)), 4);
    }
}

/* Where a tensor stands in the forward pass: an adapter beside its weight. */
static int32_t place_of(const anepy_model *model, const anepy_tensor *t) {
    int32_t role = t->role & ~ANEPY_LORA;
    return (int32_t)((role != t->role ? anepy_model_find(model, t->layer, role) : t) -
                     model->tensors);
}

/* Where the gradients of trainable tensors are. */
static void place_gradients(anepy_model *model) {
    model->gradient_n = 0;
    model->lowest = model->tensor_n;
    for (int32_t i = 0; i < model->tensor_n; i++) {
        anepy_tensor *t = &model->tensors[i];
        int trainable = anepy_tensor_has(t, ANEPY_TENSOR_TRAINABLE);
        t->gradient = trainable ? model->gradient_n : -1;
        if (!trainable) continue;
        model->gradient_n += anepy_tensor_n(t);
        model->lowest = anepy_min_i32(model->lowest, place_of(model, t));
    }
}

static int has(const anepy_config *config, int32_t role) {
    switch (role) {
    case ANEPY_BQ:
    case ANEPY_BK:
    case ANEPY_BV: return config->qkv_bias;
    case ANEPY_Q_NORM:
    case ANEPY_K_NORM: return config->qk_norm;
    default: return 1;
    }
}

static void append_layer(anepy_model *model, int32_t layer) {
    int32_t first = model->tensor_n;
    for (int32_t role = 0; role < ANEPY_LAYER_TENSORS; role++) {
        int32_t there = has(&model->config, role);
        model->position[role] = there ? model->tensor_n - first : -1;
        if (there)
            append(model, layer, role, LAYER[role].name, extent_of(model, LAYER[role].rows),
                   extent_of(model, LAYER[role].cols));
    }
    model->layer_n = model->tensor_n - first;
}

int32_t anepy_model_create(anepy_model **out, const anepy_config *config) {
    ANEPY_TRY(validate(config));
    /* With room for adapters: two tensors for each projection. */
    size_t tensors = (size_t)config->n_layers * (ANEPY_LAYER_TENSORS + 2 * ANEPY_TARGET_N) + 3;
    anepy_model *m = calloc(1, sizeof *m + tensors * sizeof m->tensors[0]);
    if (m == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for the tensor table");
    m->config = *config;
    m->head_dim = config->head_dim != 0 ? config->head_dim : config->dim / config->n_heads;
    m->q_dim = m->head_dim * config->n_heads;
    m->kv_dim = m->head_dim * config->n_kv_heads;
    m->norm_eps = (float)(config->norm_eps != 0.0 ? config->norm_eps : NORM_EPS);
    m->rope = (anepy_rope){
        .scaling = config->rope_scaling,
        .original_max_position = config->rope_original_max_position,
        .theta = config->rope_theta != 0.0 ? config->rope_theta : ROPE_THETA,
        .factor = config->rope_factor,
        .low_freq_factor = config->rope_low_freq_factor,
        .high_freq_factor = config->rope_high_freq_factor,
    };
    append(m, -1, ANEPY_EMBEDDING, "tok_embeddings.weight", config->vocab_size, config->dim);
    for (int32_t layer = 0; layer < config->n_layers; layer++) append_layer(m, layer);
    append(m, -1, ANEPY_FINAL_NORM, "norm.weight", VECTOR, config->dim);
    if (!config->tied)
        append(m, -1, ANEPY_CLASSIFIER, "output.weight", config->vocab_size, config->dim);
    m->own_n = m->tensor_n;
    place_weights(m);
    place_gradients(m);
    *out = m;
    return ANEPY_OK;
}

void anepy_model_free(anepy_model *model) { free(model); }

int32_t anepy_model_tensor_n(const anepy_model *model) { return model->tensor_n; }

static int32_t check_index(const anepy_model *model, int32_t index) {
    if (index >= 0 && index < model->tensor_n) return ANEPY_OK;
    return anepy_fail(ANEPY_E_ARGUMENT, "tensor %d of %d", index, model->tensor_n);
}

int32_t anepy_model_tensor(const anepy_model *model, int32_t index, anepy_tensor *out) {
    ANEPY_TRY(check_index(model, index));
    *out = model->tensors[index];
    return ANEPY_OK;
}

int64_t anepy_model_arena_n(const anepy_model *model) { return model->arena_n; }

int64_t anepy_model_params_nbytes(const anepy_model *model) { return model->params_nbytes; }

int32_t anepy_model_store(anepy_model *model, int32_t index, int32_t storage) {
    ANEPY_TRY(check_index(model, index));
    anepy_tensor *t = &model->tensors[index];
    if (storage != ANEPY_STORED_F32 && storage != ANEPY_STORED_BF16 && storage != ANEPY_STORED_Q8)
        return anepy_fail(ANEPY_E_ARGUMENT, "storage is %d, expected %d, %d or %d", storage,
                          ANEPY_STORED_F32, ANEPY_STORED_BF16, ANEPY_STORED_Q8);
    if (model->adapter.rank > 0)
        return anepy_fail(ANEPY_E_STATE, "weights are stored before an adapter is added");
    if (!anepy_tensor_has(t, ANEPY_TENSOR_MATRIX)) return ANEPY_OK;
    if (storage == ANEPY_STORED_Q8 && t->cols % ANEPY_Q8_N != 0) storage = ANEPY_STORED_BF16;
    t->storage = storage;
    if (storage != ANEPY_STORED_F32) t->flags &= ~ANEPY_TENSOR_TRAINABLE;
    place_weights(model);
    place_gradients(model);
    return ANEPY_OK;
}

int64_t anepy_model_gradient_n(const anepy_model *model) { return model->gradient_n; }

int32_t anepy_model_freeze(anepy_model *model, int32_t index) {
    ANEPY_TRY(check_index(model, index));
    anepy_tensor *t = &model->tensors[index];
    if (model->adapter.rank > 0)
        return anepy_fail(ANEPY_E_STATE, "beside an adapter every other tensor is frozen already");
    if (model->gradient_n == anepy_tensor_n(t) && anepy_tensor_has(t, ANEPY_TENSOR_TRAINABLE))
        return anepy_fail(ANEPY_E_ARGUMENT, "with %s frozen there is nothing left to train",
                          t->name);
    t->flags &= ~ANEPY_TENSOR_TRAINABLE;
    place_gradients(model);
    return ANEPY_OK;
}

/* ------------------------------------------------------------------------------------ adapters */

/* In the order of ANEPY_TARGET_WQ... */
static const int32_t TARGETS[ANEPY_TARGET_N] = {ANEPY_WQ, ANEPY_WK, ANEPY_WV, ANEPY_WO,
                                                ANEPY_W1, ANEPY_W3, ANEPY_W2};

static void append_adapter(anepy_model *model, int32_t layer, int32_t role, int32_t part) {
    const anepy_tensor *weight = anepy_model_find(model, layer, role);
    anepy_adapter *adapter = &model->adapter;
    anepy_tensor *t = &model->tensors[model->tensor_n++];
    int is_a = part == ANEPY_LORA_A;
    int32_t stem = (int32_t)(strrchr(weight->name, '.') - weight->name);
    *t = (anepy_tensor){.struct_size = sizeof *t,
                        .flags = ANEPY_TENSOR_MATRIX | ANEPY_TENSOR_DECAYS |
                                 ANEPY_TENSOR_TRAINABLE | ANEPY_TENSOR_ADAPTER,
                        .offset = adapter->n,
                        .byte = adapter->n * (int64_t)sizeof(float),
                        .rows = is_a ? adapter->rank : weight->rows,
                        .cols = is_a ? weight->cols : adapter->rank,
                        .layer = layer,
                        .role = role | part};
    snprintf(t->name, sizeof t->name, "%.*s.lora_%c", stem, weight->name, is_a ? 'a' : 'b');
    adapter->n += anepy_tensor_n(t);
    if (layer == 0) adapter->position[!is_a][role] = adapter->layer_n++;
}

/* All A of siblings first, so that one product covers them. */
static void append_adapters(anepy_model *model, int32_t layer, uint32_t targets) {
    for (int32_t into = ANEPY_INTO_N - 1; into >= 0; into--) {
        int32_t end = anepy_siblings[into].role + anepy_siblings[into].count;
        for (int32_t part = ANEPY_LORA_A; part <= ANEPY_LORA_B; part += ANEPY_LORA_A)
            for (int32_t i = 0; i < ANEPY_TARGET_N; i++)
                if (targets >> i & 1 && TARGETS[i] >= anepy_siblings[into].role && TARGETS[i] < end)
                    append_adapter(model, layer, TARGETS[i], part);
    }
}

int32_t anepy_model_adapt(anepy_model *model, int32_t rank, double scale, uint32_t targets) {
    anepy_adapter *adapter = &model->adapter;
    if (adapter->rank > 0) return anepy_fail(ANEPY_E_STATE, "the model has an adapter already");
    ANEPY_TRY(check("rank", rank, ANEPY_ADAPTER_RANK));
    ANEPY_TRY(check_between("scale", fabs(scale), 1e-6, 1e6));
    if (targets == 0 || targets >> ANEPY_TARGET_N != 0)
        return anepy_fail(ANEPY_E_ARGUMENT, "targets are %#x, expected bits of the first %d",
                          targets, ANEPY_TARGET_N);
    for (int32_t i = 0; i < model->own_n; i++) model->tensors[i].flags &= ~ANEPY_TENSOR_TRAINABLE;
    *adapter = (anepy_adapter){.rank = rank, .scale = (float)scale, .first = model->own_n};
    for (int32_t role = 0; role < ANEPY_LAYER_TENSORS; role++)
        adapter->position[0][role] = adapter->position[1][role] = -1;
    for (int32_t layer = 0; layer < model->config.n_layers; layer++)
        append_adapters(model, layer, targets);
    place_gradients(model);
    return ANEPY_OK;
}

int64_t anepy_model_adapter_n(const anepy_model *model) { return model->adapter.n; }

static const anepy_tensor *find_adapter(const anepy_model *model, int32_t layer, int32_t role,
                                        int32_t part) {
    const anepy_adapter *adapter = &model->adapter;
    if (adapter->rank == 0 || role >= ANEPY_LAYER_TENSORS) return NULL;
    int32_t position = adapter->position[part == ANEPY_LORA_B][role];
    return position >= 0 ? &model->tensors[adapter->first + layer * adapter->layer_n + position]
                         : NULL;
}

int32_t anepy_adapter_rows(const anepy_model *model, int32_t into) {
    int32_t rows = 0;
    for (int32_t i = 0; i < anepy_siblings[into].count; i++)
        if (find_adapter(model, 0, anepy_siblings[into].role + i, ANEPY_LORA_A) != NULL)
            rows += model->adapter.rank;
    return rows;
}

/* ------------------------------------------------------------------------------- what is where */

const anepy_tensor *anepy_model_find(const anepy_model *model, int32_t layer, int32_t role) {
    const anepy_config *c = &model->config;
    if (role & ANEPY_LORA) return find_adapter(model, layer, role & ~ANEPY_LORA, role & ANEPY_LORA);
    switch (role) {
    case ANEPY_EMBEDDING: return &model->tensors[0];
    case ANEPY_FINAL_NORM: return &model->tensors[1 + c->n_layers * model->layer_n];
    case ANEPY_CLASSIFIER: return &model->tensors[c->tied ? 0 : model->own_n - 1];
    }
    int32_t position = model->position[role];
    return position >= 0 ? &model->tensors[1 + layer * model->layer_n + position] : NULL;
}

anepy_storage anepy_stored(const anepy_tensor *tensor, const void *arena) {
    return (anepy_storage){(const char *)arena + tensor->byte, (anepy_dtype)tensor->storage,
                           (int32_t)tensor->rows, (int32_t)tensor->cols};
}

int anepy_model_trains(const anepy_model *model, int32_t layer, int32_t role) {
    return &model->tensors[model->lowest] <= anepy_model_find(model, layer, role);
}

static const anepy_tensor *bias_of(const anepy_model *model, int32_t layer, int32_t role) {
    switch (role) {
    case ANEPY_WQ: return anepy_model_find(model, layer, ANEPY_BQ);
    case ANEPY_WK: return anepy_model_find(model, layer, ANEPY_BK);
    case ANEPY_WV: return anepy_model_find(model, layer, ANEPY_BV);
    default: return NULL;
    }
}

anepy_projection anepy_model_projection(const anepy_model *model, int32_t layer, int32_t role) {
    const anepy_tensor *weight = anepy_model_find(model, layer, role);
    return (anepy_projection){.weight = weight,
                              .bias = bias_of(model, layer, role),
                              .in = (int32_t)weight->cols,
                              .out = (int32_t)weight->rows,
                              .a = find_adapter(model, layer, role, ANEPY_LORA_A),
                              .b = find_adapter(model, layer, role, ANEPY_LORA_B)};
}

/* theta^(-2i/head_dim) for pair i (Su et al. 2021, arXiv 2104.09864), and what scaling makes of it.
 */
double anepy_rope_frequency(const anepy_model *model, int32_t pair) {
    const anepy_rope *r = &model->rope;
    double plain = pow(r->theta, -2.0 * (double)pair / model->head_dim);
    if (r->scaling == ANEPY_ROPE_PLAIN) return plain;
    double slow = plain / r->factor;
    if (r->scaling == ANEPY_ROPE_LINEAR) return slow;
    double turns = r->original_max_position * plain / TWO_PI;
    double kept = (turns - r->low_freq_factor) / (r->high_freq_factor - r->low_freq_factor);
    kept = fmin(fmax(kept, 0.0), 1.0);
    return kept * plain + (1.0 - kept) * slow;
}

int anepy_model_projects(const anepy_model *model, const anepy_tensor *tensor) {
    switch (tensor->role) {
    case ANEPY_WQ:
    case ANEPY_WK:
    case ANEPY_WV:
    case ANEPY_WO:
    case ANEPY_W1:
    case ANEPY_W3:
    case ANEPY_W2: return 1;
    default: return tensor == anepy_model_find(model, 0, ANEPY_CLASSIFIER);
    }
}

/* Of the products of one token with the weights of this role and their adapter. */
static double token_flops(const anepy_model *model, int32_t layer, int32_t role, int trainable) {
    anepy_projection p = anepy_model_projection(model, layer, role);
    double n = 2.0 * p.in * p.out, adapter = 2.0 * model->adapter.rank * ((double)p.in + p.out);
    if (trainable && !anepy_tensor_has(p.weight, ANEPY_TENSOR_TRAINABLE)) n = 0.0;
    return p.a != NULL ? n + adapter : n;
}

/* The backward pass goes down by halves of layers, as far as something is trainable. */
static void add_half(const anepy_model *model, anepy_flops *out, int32_t layer, int32_t first,
                     int32_t last) {
    int passed = anepy_model_trains(model, layer, last);
    for (int32_t role = first; role <= last; role++) {
        const anepy_tensor *t = anepy_model_find(model, layer, role);
        if (t == NULL || !anepy_model_projects(model, t)) continue;
        out->forward += token_flops(model, layer, role, 0);
        if (passed) out->backward_dx += token_flops(model, layer, role, 0);
        out->backward_dw += token_flops(model, layer, role, 1);
    }
}

int32_t anepy_step_flops(const anepy_model *model, anepy_flops *out, int32_t sequences,
                         int32_t tokens) {
    const anepy_config *c = &model->config;
    if (out->struct_size < sizeof *out)
        return anepy_fail(ANEPY_E_ARGUMENT, "flops have %u bytes, expected %zu", out->struct_size,
                          sizeof *out);
    double n = (double)sequences * tokens;
    int32_t attended = 0;
    out->forward = out->backward_dx = out->backward_dw = 0.0;
    for (int32_t l = 0; l < c->n_layers; l++) {
        add_half(model, out, l, ANEPY_ATTENTION_NORM, ANEPY_WO);
        add_half(model, out, l, ANEPY_FFN_NORM, ANEPY_W2);
        attended += anepy_model_trains(model, l, ANEPY_WO);
    }
    out->forward *= n;
    out->backward_dx *= n;
    out->backward_dw *= n;
    out->attention = 2.0 * 5 * attended * model->q_dim * tokens * n;
    out->classifier = (2.0 * token_flops(model, 0, ANEPY_CLASSIFIER, 0) +
                       token_flops(model, 0, ANEPY_CLASSIFIER, 1)) *
                      n;
    out->total =
        out->forward + out->backward_dx + out->backward_dw + out->attention + out->classifier;
    return ANEPY_OK;
}
