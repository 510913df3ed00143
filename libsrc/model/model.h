/* model/model.h - dimensions of a model of the Llama family, and the tensor table.
 *
 * One table serves the params, grads, Adam m and Adam v arenas. Its order is that of the forward
 * pass. Tensors that are multiplied with the same input stand next to each other (wq wk wv; w1 w3),
 * so that one product covers them. */
#ifndef ANEPY_MODEL_H
#define ANEPY_MODEL_H

#include "runtime/status.h"
#include "runtime/storage.h"

/* What a tensor is for: those of a layer, in arena order, then those of none. */
enum {
    ANEPY_ATTENTION_NORM,
    ANEPY_WQ,
    ANEPY_WK,
    ANEPY_WV,
    ANEPY_BQ, /* biases of wq, wk, wv */
    ANEPY_BK,
    ANEPY_BV,
    ANEPY_Q_NORM, /* of each head of q, of each head of k */
    ANEPY_K_NORM,
    ANEPY_WO,
    ANEPY_FFN_NORM,
    ANEPY_W1,
    ANEPY_W3,
    ANEPY_W2,
    ANEPY_LAYER_TENSORS,
    ANEPY_EMBEDDING = ANEPY_LAYER_TENSORS,
    ANEPY_FINAL_NORM,
    ANEPY_CLASSIFIER, /* the embedding when tied */
    /* Of an adapter, added to the role of the projection that it belongs to. */
    ANEPY_LORA_A = 32,
    ANEPY_LORA_B = 64,
    ANEPY_LORA = ANEPY_LORA_A | ANEPY_LORA_B
};

/* Projections that have one input, and so one product: they stand beside each other in the table.
 * In the order in which a backward pass comes to them. */
enum { ANEPY_INTO_W2, ANEPY_INTO_W13, ANEPY_INTO_WO, ANEPY_INTO_QKV, ANEPY_INTO_N };
extern const struct anepy_siblings {
    int32_t role, count; /* the first weight, and how many there are */
} anepy_siblings[ANEPY_INTO_N];

/* What RoPE turns pairs of channels by: rope_ of anepy_config, without the prefix. */
typedef struct {
    int32_t scaling, original_max_position;
    double theta, factor, low_freq_factor, high_freq_factor;
} anepy_rope;

/* The adapters of a model (LoRA, Hu et al. 2021, arXiv 2106.09685): y = W x + b + scale B (A x).
 * Their rows stand behind all others, layer by layer; their values are in an arena of their own. */
typedef struct {
    int32_t rank; /* 0: there are none */
    float scale;
    int64_t n;                                /* elements of their arena */
    int32_t first, layer_n;                   /* their first row, and how many rows a layer has */
    int32_t position[2][ANEPY_LAYER_TENSORS]; /* of A and B in a layer, by role; -1: none */
} anepy_adapter;

/* config is as it was given; what follows from it and from its defaults stands beside it. */
struct anepy_model {
    anepy_config config;
    int32_t head_dim;
    int32_t q_dim;  /* n_heads * head_dim: of q and attn; need not be dim */
    int32_t kv_dim; /* n_kv_heads * head_dim */
    float norm_eps;
    anepy_rope rope;
    int32_t layer_n;                       /* tensors of a layer */
    int32_t position[ANEPY_LAYER_TENSORS]; /* among them, by role; -1: the model has none */
    int32_t tensor_n;
    int32_t own_n;  /* without those of adapters */
    int32_t lowest; /* the first that is trainable or has an adapter */
    int64_t arena_n;
    int64_t params_nbytes;
    int64_t gradient_n;
    anepy_adapter adapter;
    anepy_tensor tensors[]; /* embeddings, layers, final norm, classifier if separate; adapters */
};

/* The tensor of a layer (ignored for those of none) for this; NULL: the model has none. The
 * classifier is the embedding when tied. */
const anepy_tensor *anepy_model_find(const anepy_model *model, int32_t layer, int32_t role);

static inline int64_t anepy_tensor_n(const anepy_tensor *tensor) {
    return tensor->rows * tensor->cols;
}

static inline int anepy_tensor_has(const anepy_tensor *tensor, uint32_t flag) {
    return (tensor->flags & flag) != 0;
}

/* Whether something up to this tensor in the forward pass is trainable, so that a gradient has to
 * reach it. */
int anepy_model_trains(const anepy_model *model, int32_t layer, int32_t role);

/* Where its weights are in an arena. */
anepy_storage anepy_stored(const anepy_tensor *tensor, const void *arena);

/* A linear map y = W x + b, with an adapter y = W x + b + scale B (A x). All that multiplies with
 * weights, writes their gradients or counts operations takes shapes and tensors from here. */
typedef struct {
    const anepy_tensor *weight; /* [out, in] */
    const anepy_tensor *bias;   /* [out]; NULL: none */
    int32_t in, out;            /* channels */
    const anepy_tensor *a, *b;  /* [rank, in], [out, rank]; NULL: it has no adapter */
} anepy_projection;

/* The one whose weight this is: ANEPY_WQ, WK, WV, WO, W1, W3, W2 of a layer, or ANEPY_CLASSIFIER.
 */
anepy_projection anepy_model_projection(const anepy_model *model, int32_t layer, int32_t role);

/* Whether this tensor is the weight of one. */
int anepy_model_projects(const anepy_model *model, const anepy_tensor *tensor);

/* Rows of A x of all projections with one input that have adapters, ANEPY_INTO_W2...; their A lie
 * behind each other, in their order. */
int32_t anepy_adapter_rows(const anepy_model *model, int32_t into);

#endif
