/* programs/programs.c - the table itself. */
#include "programs/programs.h"

#include <string.h>

typedef enum { DIM, KV, HIDDEN, SCORES } extent; /* what a channel count is made of */

typedef struct {
    const char *name; /* NULL ends a list */
    extent channels;
} range;

/* Mathematics, per column unless attention says otherwise (float64 form: tests/reference):
 *   sdpa_fwd   xnorm = rmsnorm(x); q, k = rope(wq xnorm), rope(wk xnorm); v = wv xnorm;
 *              attn = softmax(q^T k / sqrt(head) + causal) v per head; out = wo attn
 *   ffn_fwd    xnorm = rmsnorm(x); h1 = w1 xnorm; h3 = w3 xnorm; gate = silu(h1) h3; out = w2 gate
 *   ffn_bwd    gradients of h1, h3 and xnorm (dx) from that of out (dy)
 *   sdpa_bwd1  probs again from q and k (channel = head * width + query, column = key);
 *              gradients of v and of the probabilities from that of out (dy)
 *   sdpa_bwd2  gradients of wq xnorm and wk xnorm: through soft-max, scale and inverse RoPE
 *   qkv_bwd    gradient of xnorm (dx) */
static const struct {
    const char *name;
    range inputs[5], outputs[7];
    int32_t weight_n;
    int32_t weights[ANEPY_PROGRAM_WEIGHTS];
} TABLE[ANEPY_PROGRAM_N] = {
    [ANEPY_SDPA_FWD] = {"sdpa_fwd",
                        {{"x", DIM}},
                        {{"out", DIM}, {"q", DIM}, {"k", KV}, {"v", KV}, {"attn", DIM},
                         {"xnorm", DIM}},
                        5,
                        {ANEPY_ATTENTION_NORM, ANEPY_WQ, ANEPY_WK, ANEPY_WV, ANEPY_WO}},
    [ANEPY_FFN_FWD] = {"ffn_fwd",
                       {{"x", DIM}},
                       {{"out", DIM}, {"h1", HIDDEN}, {"h3", HIDDEN}, {"gate", HIDDEN},
                        {"xnorm", DIM}},
                       4,
                       {ANEPY_FFN_NORM, ANEPY_W1, ANEPY_W3, ANEPY_W2}},
    [ANEPY_FFN_BWD] = {"ffn_bwd",
                       {{"dy", DIM}, {"h1", HIDDEN}, {"h3", HIDDEN}},
                       {{"dx", DIM}, {"dh1", HIDDEN}, {"dh3", HIDDEN}},
                       3,
                       {ANEPY_W2, ANEPY_W1, ANEPY_W3}},
    [ANEPY_SDPA_BWD1] = {"sdpa_bwd1",
                         {{"q", DIM}, {"k", KV}, {"v", KV}, {"dy", DIM}},
                         {{"dv", KV}, {"probs", SCORES}, {"dprobs", SCORES}},
                         1,
                         {ANEPY_WO}},
    [ANEPY_SDPA_BWD2] = {"sdpa_bwd2",
                         {{"probs", SCORES}, {"dprobs", SCORES}, {"q", DIM}, {"k", KV}},
                         {{"dq", DIM}, {"dk", KV}},
                         0,
                         {0}},
    [ANEPY_QKV_BWD] = {"qkv_bwd",
                       {{"dq", DIM}, {"dk", KV}, {"dv", KV}},
                       {{"dx", DIM}},
                       3,
                       {ANEPY_WQ, ANEPY_WK, ANEPY_WV}},
};

static int32_t channels_of(extent e, const anepy_model *model, int32_t width) {
    switch (e) {
    case DIM: return model->config.dim;
    case KV: return model->kv_dim;
    case HIDDEN: return model->config.hidden_dim;
    default: return model->config.n_heads * width;
    }
}

/* Appends a list to out->tensors; returns how many, and their channels in *total. */
static int32_t fill(anepy_program_tensor *out, const range *list, const anepy_model *model,
                    int32_t width, int32_t *total) {
    int32_t n = 0;
    for (*total = 0; list[n].name != NULL; n++) {
        int32_t channels = channels_of(list[n].channels, model, width);
        out[n] = (anepy_program_tensor){list[n].name, channels, *total};
        *total += channels;
    }
    return n;
}

void anepy_program_describe(anepy_program *out, anepy_program_id id, const anepy_model *model,
                            int32_t width) {
    memset(out, 0, sizeof *out);
    out->id = id;
    out->name = TABLE[id].name;
    out->input_n = fill(out->tensors, TABLE[id].inputs, model, width, &out->input_channels);
    out->output_n =
        fill(out->tensors + out->input_n, TABLE[id].outputs, model, width, &out->output_channels);
    out->weight_n = TABLE[id].weight_n;
    memcpy(out->weights, TABLE[id].weights, sizeof out->weights);
}

const char *anepy_program_name(anepy_program_id id) { return TABLE[id].name; }
