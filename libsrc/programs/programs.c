/* programs/programs.c - the table itself. */
#include "programs/programs.h"

#include <stdio.h>
#include <string.h>

/* What a channel count is made of. */
typedef enum {
    DIM,
    Q,
    KV,
    HIDDEN,
    HEADS,
    SCORES,
    VOCAB,
    LOW, /* and what follows: rows of adapters, ANEPY_INTO_W2... */
    LOW_W2 = LOW + ANEPY_INTO_W2,
    LOW_W13 = LOW + ANEPY_INTO_W13,
    LOW_WO = LOW + ANEPY_INTO_WO,
    LOW_QKV = LOW + ANEPY_INTO_QKV
} extent;

#define FACTOR 16  /* nothing but products reads this output, inside and outside */
#define QK_NORM 32 /* there is such an output only in models with qk_norm */
#define PLACED 64  /* times an anepy_place: where this output lives */
#define IN(place) (PLACED * ANEPY_PLACE_##place)

#define PART_ROWS 32768 /* tokens per part of a classifier program: half of what chips take */

typedef struct {
    const char *name; /* NULL ends a list */
    int32_t channels; /* an extent, perhaps FACTOR or QK_NORM, and IN a place */
} range;

/* Mathematics, per column unless attention says otherwise (float64 form: tests/reference):
 *   sdpa_fwd   xnorm = rmsnorm(x); q, k = rope(wq xnorm + bq), rope(wk xnorm + bk);
 *              v = wv xnorm + bv, without biases where the model has none; with qk_norm
 *              q = rope(rmsnorm(q_raw)) per head, q_raw = wq xnorm + bq, and k likewise;
 *              attn = softmax(q^T k / sqrt(head) + causal) v per head; out = wo attn;
 *              lse = log2 of the sum that soft-max divides by, of each query of each head
 *   ffn_fwd    xnorm = rmsnorm(x); h1 = w1 xnorm; h3 = w3 xnorm; gate = silu(h1) h3; out = w2 gate
 *   ffn_bwd    gradients of h1, h3 and xnorm (dx) from that of out (dy)
 *   sdpa_bwd1  probs again from q and k (channel = head * width + query, column = key);
 *              gradients of v and of the probabilities from that of out (dy)
 *   sdpa_bwd2  gradients of q and k before RoPE: through soft-max, scale and inverse RoPE; native
 *              from lse, without scores in memory, and then also that of v
 *   qkv_bwd    gradient of xnorm (dx) from those of v, and of q and k before their norms
 * With adapters W is W + scale B A throughout, never formed: scale A x, [rank] rows for each
 * projection, is an output of the forward program (qkv_a, wo_a, w13_a, w2_a), scale B^T dy of the
 * backward program (qkv_b, ...); gradients of B and A are products with these.
 * Offloads:
 *   rmsnorm_bwd*    gradient of x (dx) from that of w * x / rms(x) (dy); w is attention_norm,
 *                   ffn_norm or norm
 *   final_rmsnorm   norm * x / rms(x)
 *   classifier_fwd  logits of the tokens [first_row, first_row + rows) = output x
 *   classifier_bwd  gradient of x from that of those logits
 *   softmax         over groups of tokens: see anepy_softmax_groups
 * Of a whole layer, where x and dy are its input and the gradient of its output:
 *   layer_fwd   sdpa_fwd of x; x2 = x + out; ffn_fwd of x2
 *   layer_bwd   ffn_bwd of dy, through = rmsnorm_bwd of its dx, dx2 = dy + through; sdpa_bwd1,
 *               sdpa_bwd2 and qkv_bwd of dx2, and rmsnorm_bwd of its dx; what goes through the
 *               norms is an output by itself, as the host adds it in float32
 *   layer_dw    gradients of the weights, [rows, dim], from those of what they multiply
 *   head_*      final_rmsnorm and classifier_fwd; classifier_bwd and rmsnorm_bwd_final
 *   classifier_dw   gradient of the output's rows */
static const struct {
    const char *name;
    range inputs[12], outputs[19];
    int32_t weight_n;
    int32_t weights[ANEPY_PROGRAM_WEIGHTS]; /* those that the model has not are left out */
} TABLE[ANEPY_PROGRAM_N] = {
    [ANEPY_SDPA_FWD] = {"sdpa_fwd",
                        {{"x", DIM}},
                        {{"out", DIM | IN(NEXT)},
                         {"q", Q},
                         {"k", KV},
                         {"v", KV},
                         {"attn", Q},
                         {"xnorm", DIM | FACTOR},
                         {"q_raw", Q | QK_NORM},
                         {"k_raw", KV | QK_NORM},
                         {"qkv_a", LOW_QKV},
                         {"wo_a", LOW_WO}},
                        10,
                        {ANEPY_ATTENTION_NORM, ANEPY_WQ, ANEPY_WK, ANEPY_WV, ANEPY_WO, ANEPY_BQ,
                         ANEPY_BK, ANEPY_BV, ANEPY_Q_NORM, ANEPY_K_NORM}},
    [ANEPY_FFN_FWD] = {"ffn_fwd",
                       {{"x", DIM}},
                       {{"out", DIM | IN(NEXT)},
                        {"h1", HIDDEN},
                        {"h3", HIDDEN},
                        {"gate", HIDDEN | FACTOR},
                        {"xnorm", DIM | FACTOR},
                        {"w13_a", LOW_W13},
                        {"w2_a", LOW_W2}},
                       4,
                       {ANEPY_FFN_NORM, ANEPY_W1, ANEPY_W3, ANEPY_W2}},
    [ANEPY_FFN_BWD] = {"ffn_bwd",
                       {{"dy", DIM}, {"h1", HIDDEN}, {"h3", HIDDEN}},
                       {{"dx", DIM},
                        {"dh1", HIDDEN | FACTOR},
                        {"dh3", HIDDEN | FACTOR},
                        {"w2_b", LOW_W2},
                        {"w13_b", LOW_W13}},
                       3,
                       {ANEPY_W2, ANEPY_W1, ANEPY_W3}},
    [ANEPY_SDPA_BWD1] = {"sdpa_bwd1",
                         {{"q", Q}, {"k", KV}, {"v", KV}, {"dy", DIM}},
                         {{"dv", KV | IN(QKV_BWD)},
                          {"probs", SCORES | IN(NONE)},
                          {"dprobs", SCORES | IN(NONE)},
                          {"wo_b", LOW_WO}},
                         1,
                         {ANEPY_WO}},
    [ANEPY_SDPA_BWD2] = {"sdpa_bwd2",
                         {{"probs", SCORES}, {"dprobs", SCORES}, {"q", Q}, {"k", KV}},
                         {{"dq", Q | IN(QKV_BWD)}, {"dk", KV | IN(QKV_BWD)}},
                         0,
                         {0}},
    [ANEPY_QKV_BWD] = {"qkv_bwd",
                       {{"dq", Q}, {"dk", KV}, {"dv", KV}},
                       {{"dx", DIM}, {"qkv_b", LOW_QKV}},
                       3,
                       {ANEPY_WQ, ANEPY_WK, ANEPY_WV}},
    [ANEPY_RMSNORM_BWD] =
        {"rmsnorm_bwd", {{"dy", DIM}, {"x", DIM}}, {{"dx", DIM}}, 1, {ANEPY_ATTENTION_NORM}},
    [ANEPY_RMSNORM_BWD_FFN] =
        {"rmsnorm_bwd_ffn", {{"dy", DIM}, {"x", DIM}}, {{"dx", DIM}}, 1, {ANEPY_FFN_NORM}},
    [ANEPY_LAYER_FWD] = {"layer_fwd",
                         {{"x", DIM}},
                         {{"out", DIM},
                          {"q", Q},
                          {"k", KV},
                          {"v", KV},
                          {"attn", Q},
                          {"xnorm", DIM},
                          {"x2", DIM},
                          {"ffn_out", DIM},
                          {"h1", HIDDEN},
                          {"h3", HIDDEN},
                          {"gate", HIDDEN},
                          {"xnorm2", DIM},
                          {"q_raw", Q | QK_NORM},
                          {"k_raw", KV | QK_NORM},
                          {"qkv_a", LOW_QKV},
                          {"wo_a", LOW_WO},
                          {"w13_a", LOW_W13},
                          {"w2_a", LOW_W2}},
                         14,
                         {ANEPY_ATTENTION_NORM, ANEPY_WQ, ANEPY_WK, ANEPY_WV, ANEPY_WO, ANEPY_BQ,
                          ANEPY_BK, ANEPY_BV, ANEPY_Q_NORM, ANEPY_K_NORM, ANEPY_FFN_NORM, ANEPY_W1,
                          ANEPY_W3, ANEPY_W2}},
    [ANEPY_LAYER_BWD] = {"layer_bwd",
                         {{"dy", DIM},
                          {"x", DIM},
                          {"x2", DIM},
                          {"h1", HIDDEN},
                          {"h3", HIDDEN},
                          {"q", Q},
                          {"k", KV},
                          {"v", KV},
                          {"q_raw", Q | QK_NORM},
                          {"k_raw", KV | QK_NORM}},
                         {{"dxnorm2", DIM},
                          {"through2", DIM},
                          {"dx2", DIM},
                          {"dh1", HIDDEN},
                          {"dh3", HIDDEN},
                          {"dq", Q},
                          {"dk", KV},
                          {"dv", KV},
                          {"dxnorm", DIM},
                          {"through", DIM},
                          {"dq_normed", Q | QK_NORM},
                          {"dk_normed", KV | QK_NORM},
                          {"w2_b", LOW_W2},
                          {"w13_b", LOW_W13},
                          {"wo_b", LOW_WO},
                          {"qkv_b", LOW_QKV}},
                         11,
                         {ANEPY_W2, ANEPY_W1, ANEPY_W3, ANEPY_FFN_NORM, ANEPY_WO, ANEPY_WQ,
                          ANEPY_WK, ANEPY_WV, ANEPY_ATTENTION_NORM, ANEPY_Q_NORM, ANEPY_K_NORM}},
    [ANEPY_LAYER_DW] = {"layer_dw",
                        {{"dq", Q},
                         {"dk", KV},
                         {"dv", KV},
                         {"xnorm", DIM},
                         {"dx2", DIM},
                         {"attn", Q},
                         {"dh1", HIDDEN},
                         {"dh3", HIDDEN},
                         {"xnorm2", DIM},
                         {"dy", DIM},
                         {"gate", HIDDEN}},
                        {{"wq", Q},
                         {"wk", KV},
                         {"wv", KV},
                         {"wo", Q},
                         {"w1", HIDDEN},
                         {"w3", HIDDEN},
                         {"w2", HIDDEN}},
                        0,
                        {0}},
    [ANEPY_RMSNORM_BWD_FINAL] =
        {"rmsnorm_bwd_final", {{"dy", DIM}, {"x", DIM}}, {{"dx", DIM}}, 1, {ANEPY_FINAL_NORM}},
    [ANEPY_FINAL_RMSNORM] =
        {"final_rmsnorm", {{"x", DIM}}, {{"xnorm", DIM | IN(XNORM)}}, 1, {ANEPY_FINAL_NORM}},
    [ANEPY_CLASSIFIER_FWD] =
        {"classifier_fwd", {{"x", DIM}}, {{"logits", VOCAB | IN(LOGITS)}}, 1, {ANEPY_CLASSIFIER}},
    [ANEPY_CLASSIFIER_BWD] =
        {"classifier_bwd", {{"dlogits", VOCAB}}, {{"dx", DIM}}, 1, {ANEPY_CLASSIFIER}},
    [ANEPY_SOFTMAX] = {"softmax", {{"logits", VOCAB}}, {{"probs", VOCAB}}, 0, {0}},
    [ANEPY_HEAD_FWD] = {"head_fwd",
                        {{"x", DIM}},
                        {{"xnorm", DIM}, {"logits", VOCAB}},
                        2,
                        {ANEPY_FINAL_NORM, ANEPY_CLASSIFIER}},
    [ANEPY_HEAD_BWD] = {"head_bwd",
                        {{"dlogits", VOCAB}, {"x", DIM}},
                        {{"dxnorm", DIM}, {"through", DIM}},
                        2,
                        {ANEPY_CLASSIFIER, ANEPY_FINAL_NORM}},
    [ANEPY_CLASSIFIER_DW] =
        {"classifier_dw", {{"dlogits", VOCAB}, {"xnorm", DIM}}, {{"output", VOCAB}}, 0, {0}},
};

static int writes_dw(anepy_program_id id) {
    return id == ANEPY_LAYER_DW || id == ANEPY_CLASSIFIER_DW;
}

/* Tensors in memory of the host. */
static const range HOST[ANEPY_PROGRAM_N][ANEPY_PROGRAM_TENSORS - ANEPY_HOST_TENSOR + 1] = {
    [ANEPY_SDPA_FWD] = {{"lse", HEADS}},
    [ANEPY_SDPA_BWD2] = {{"v", KV}, {"attn", Q}, {"lse", HEADS}, {"dv", KV | IN(QKV_BWD)}},
};

static const char *const WEIGHT_NAMES[] = {
    [ANEPY_ATTENTION_NORM] = "attention_norm",
    [ANEPY_WQ] = "wq",
    [ANEPY_WK] = "wk",
    [ANEPY_WV] = "wv",
    [ANEPY_BQ] = "wq_bias",
    [ANEPY_BK] = "wk_bias",
    [ANEPY_BV] = "wv_bias",
    [ANEPY_Q_NORM] = "q_norm",
    [ANEPY_K_NORM] = "k_norm",
    [ANEPY_WO] = "wo",
    [ANEPY_FFN_NORM] = "ffn_norm",
    [ANEPY_W1] = "w1",
    [ANEPY_W3] = "w3",
    [ANEPY_W2] = "w2",
    [ANEPY_FINAL_NORM] = "norm",
    [ANEPY_CLASSIFIER] = "output",
    [ANEPY_WQ | ANEPY_LORA_A] = "wq_lora_a",
    [ANEPY_WK | ANEPY_LORA_A] = "wk_lora_a",
    [ANEPY_WV | ANEPY_LORA_A] = "wv_lora_a",
    [ANEPY_WO | ANEPY_LORA_A] = "wo_lora_a",
    [ANEPY_W1 | ANEPY_LORA_A] = "w1_lora_a",
    [ANEPY_W3 | ANEPY_LORA_A] = "w3_lora_a",
    [ANEPY_W2 | ANEPY_LORA_A] = "w2_lora_a",
    [ANEPY_WQ | ANEPY_LORA_B] = "wq_lora_b",
    [ANEPY_WK | ANEPY_LORA_B] = "wk_lora_b",
    [ANEPY_WV | ANEPY_LORA_B] = "wv_lora_b",
    [ANEPY_WO | ANEPY_LORA_B] = "wo_lora_b",
    [ANEPY_W1 | ANEPY_LORA_B] = "w1_lora_b",
    [ANEPY_W3 | ANEPY_LORA_B] = "w3_lora_b",
    [ANEPY_W2 | ANEPY_LORA_B] = "w2_lora_b",
};

/* The letter and number before a weight's name as a parameter: adapters behind all others. */
static void number(anepy_program_matrix *m, const anepy_program *program, int32_t index) {
    int32_t first = 0;
    int adapter = (program->weights[index] & ANEPY_LORA) != 0;
    while (adapter && (program->weights[first] & ANEPY_LORA) == 0) first++;
    snprintf(m->parameter, sizeof m->parameter, "%c%c_%s", adapter ? 'x' : 'w',
             "0123456789abcdef"[index - first], m->name);
}

static int32_t rows_of(const anepy_program *program, const anepy_model *model) {
    int32_t vocab = model->config.vocab_size;
    int32_t rows = (vocab + program->parts - 1) / program->parts;
    return anepy_min_i32(rows, vocab - program->part * rows);
}

static int32_t channels_of(extent e, const anepy_program *program, const anepy_model *model) {
    switch (e) {
    case DIM: return model->config.dim;
    case Q: return model->q_dim;
    case KV: return model->kv_dim;
    case HIDDEN: return model->config.hidden_dim;
    case HEADS: return model->config.n_heads;
    case VOCAB: return rows_of(program, model);
    case LOW_W2:
    case LOW_W13:
    case LOW_WO:
    case LOW_QKV: return anepy_adapter_rows(model, (int32_t)e - LOW);
    default: return model->config.n_heads * program->width;
    }
}

/* Appends a list to tensors from index first on; returns how many, and their channels in *total. */
static int32_t fill(anepy_program *out, int32_t first, const range *list, const anepy_model *model,
                    int32_t *total) {
    int32_t n = first;
    for (*total = 0; list->name != NULL; list++) {
        if (list->channels & QK_NORM && !model->config.qk_norm) continue;
        int32_t e = list->channels & (FACTOR - 1), channels = channels_of(e, out, model);
        if (channels == 0) continue; /* no adapter */
        if (e >= LOW) out->low[e - LOW] = n;
        out->tensors[n++] = (anepy_program_tensor){.name = list->name,
                                                   .channels = channels,
                                                   .channel = *total,
                                                   .factor = (list->channels & FACTOR) != 0,
                                                   .place = (anepy_place)(list->channels / PLACED)};
        *total += channels;
    }
    return n - first;
}

/* Those that the model has, or the parts of their adapters. */
static void add_weights(anepy_program *out, anepy_program_id id, const anepy_model *model,
                        int32_t part) {
    for (int32_t i = 0; i < TABLE[id].weight_n; i++)
        if (anepy_model_find(model, 0, TABLE[id].weights[i] | part) != NULL)
            out->weights[out->weight_n++] = TABLE[id].weights[i] | part;
}

void anepy_program_describe_part(anepy_program *out, anepy_program_id id, const anepy_model *model,
                                 int32_t width, int32_t part) {
    int32_t vocab = model->config.vocab_size;
    int sliced = id == ANEPY_CLASSIFIER_FWD || id == ANEPY_CLASSIFIER_BWD ||
                 id == ANEPY_CLASSIFIER_DW || id == ANEPY_HEAD_FWD || id == ANEPY_HEAD_BWD;
    memset(out, 0, sizeof *out);
    out->id = id;
    out->name = TABLE[id].name;
    out->width = width;
    out->part = part;
    out->parts = sliced ? (vocab + PART_ROWS - 1) / PART_ROWS : 1;
    out->first_row = part * ((vocab + out->parts - 1) / out->parts);
    out->input_n = fill(out, 0, TABLE[id].inputs, model, &out->input_channels);
    out->output_n = fill(out, out->input_n, TABLE[id].outputs, model, &out->output_channels);
    out->surface_n = 1;
    out->surface_channels[0] = out->input_channels;
    out->output_width = writes_dw(id) ? (int32_t)anepy_round_up(model->config.dim, 32) : width;
    out->host_n = fill(out, ANEPY_HOST_TENSOR, HOST[id], model, &out->host_channels);
    add_weights(out, id, model, 0);
    add_weights(out, id, model, ANEPY_LORA_A);
    add_weights(out, id, model, ANEPY_LORA_B);
}

void anepy_program_describe(anepy_program *out, anepy_program_id id, const anepy_model *model,
                            int32_t width) {
    anepy_program_describe_part(out, id, model, width, 0);
}

void anepy_program_place(anepy_program *p, int32_t tensor, int32_t surface, int32_t channels,
                         int32_t channel) {
    if (tensor < 0) {
        p->surface_n = 0;
        return;
    }
    p->tensors[tensor].surface = surface;
    p->tensors[tensor].channel = channel;
    p->surface_channels[surface] = channels;
    p->surface_n = anepy_max_i32(p->surface_n, surface + 1);
}

void anepy_program_weight(anepy_program_matrix *out, const anepy_program *program,
                          const anepy_model *model, int32_t layer, int32_t index) {
    int32_t role = program->weights[index];
    const anepy_tensor *t = anepy_model_find(model, layer, role);
    *out = (anepy_program_matrix){.name = WEIGHT_NAMES[role],
                                  .tensor = t,
                                  .rows = (int32_t)t->rows,
                                  .cols = (int32_t)t->cols};
    number(out, program, index);
    if (role == ANEPY_CLASSIFIER) {
        out->first_row = program->first_row;
        out->rows = rows_of(program, model);
    }
    int matrix = anepy_tensor_has(t, ANEPY_TENSOR_MATRIX);
    out->channels = matrix ? (int32_t)anepy_round_up(out->rows, 32) : out->cols;
    out->columns = matrix ? (int32_t)anepy_round_up(out->cols, 32) : program->width;
}

/* Products of attention, [head_dim, width] by [width, width] for each head, and sums of the rows of
 * the latter by a product with ones. */
static double attention_flops(const anepy_program *p, const anepy_model *model) {
    static const int32_t PRODUCTS[ANEPY_PROGRAM_N] = {[ANEPY_SDPA_FWD] = 2,
                                                      [ANEPY_SDPA_BWD1] = 3,
                                                      [ANEPY_SDPA_BWD2] = 2,
                                                      [ANEPY_LAYER_FWD] = 2,
                                                      [ANEPY_LAYER_BWD] = 5};
    int sums = p->id == ANEPY_SDPA_BWD2 || p->id == ANEPY_LAYER_BWD;
    double rows = PRODUCTS[p->id] * (double)model->q_dim;
    if (sums) rows += (double)model->config.n_heads * p->width;
    return 2.0 * p->width * p->width * rows;
}

double anepy_program_flops(const anepy_program *p, const anepy_model *model) {
    double flops = attention_flops(p, model);
    for (int32_t i = 0; i < p->weight_n; i++) {
        anepy_program_matrix m;
        anepy_program_weight(&m, p, model, 0, i);
        if (anepy_tensor_has(m.tensor, ANEPY_TENSOR_MATRIX))
            flops += 2.0 * m.rows * m.cols * p->width;
    }
    if (writes_dw(p->id)) flops += 2.0 * p->output_channels * model->config.dim * p->width;
    return flops;
}

int64_t anepy_program_elements(const anepy_program *p, const anepy_model *model, int32_t count) {
    int64_t n = (int64_t)p->input_channels * p->width * count;
    n += (int64_t)p->output_channels * p->output_width * (writes_dw(p->id) ? 1 : count);
    for (int32_t i = 0; i < p->weight_n; i++) {
        anepy_program_matrix m;
        anepy_program_weight(&m, p, model, 0, i);
        n += (int64_t)m.rows * m.cols;
    }
    return n;
}

int32_t anepy_program_find_weight(const anepy_program *program, const anepy_model *model,
                                  int32_t layer, const anepy_tensor *tensor) {
    for (int32_t i = 0; i < program->weight_n; i++)
        if (anepy_model_find(model, layer, program->weights[i]) == tensor) return i;
    return -1;
}

anepy_storage anepy_program_stored(const anepy_program_matrix *m, const void *arena) {
    return anepy_storage_rows(anepy_stored(m->tensor, arena), m->first_row, m->rows);
}

int64_t anepy_program_offset(const anepy_program_matrix *m) {
    return m->tensor->offset + (int64_t)m->first_row * m->cols;
}

const char *anepy_program_name(anepy_program_id id) { return TABLE[id].name; }

int32_t anepy_program_find(anepy_program_id *out, const char *name) {
    char known[256] = "";
    for (int32_t i = 0; i < ANEPY_PROGRAM_N; i++) {
        size_t used = strlen(known);
        if (strcmp(name, TABLE[i].name) == 0) {
            *out = (anepy_program_id)i;
            return ANEPY_OK;
        }
        snprintf(known + used, sizeof known - used, "%s%s", i > 0 ? ", " : "", TABLE[i].name);
    }
    return anepy_fail(ANEPY_E_NAME, "unknown program '%.40s': use one of %s", name, known);
}
