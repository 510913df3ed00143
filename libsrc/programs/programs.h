/* programs/programs.h - the program table: every fused program of the training step, defined once.
 *
 * A program reads named ranges of channels [C, S] and writes others; weights are baked or live. The
 * step engine, the devices and the MIL generator take names, channel counts, offsets in a packed
 * surface and weights from here and nowhere else (docs/neural-engine.md#research-programs; RoPE and
 * grouped-query attention, which the research programs lack, included).
 *
 * Programs from ANEPY_RMSNORM_BWD on are offloads: the step may do their work on the host instead,
 * or, of whole layers, in several programs. Device cpu has no need of those and of weight
 * gradients. Set `live` of a described program to have its weights passed as inputs. */
#ifndef ANEPY_PROGRAMS_H
#define ANEPY_PROGRAMS_H

#include "model/model.h"

typedef enum {
    ANEPY_SDPA_FWD,
    ANEPY_FFN_FWD,
    ANEPY_FFN_BWD,
    ANEPY_SDPA_BWD1,
    ANEPY_SDPA_BWD2,
    ANEPY_QKV_BWD,
    ANEPY_RMSNORM_BWD, /* from here on: offloads */
    ANEPY_RMSNORM_BWD_FFN,
    ANEPY_LAYER_FWD, /* fused_layer: sdpa_fwd and ffn_fwd */
    ANEPY_LAYER_BWD, /* all of the backward pass of a layer, norms included */
    ANEPY_LAYER_DW,  /* offload_dw: the weight gradients of a layer */
    ANEPY_RMSNORM_BWD_FINAL,
    ANEPY_FINAL_RMSNORM,
    ANEPY_CLASSIFIER_FWD,
    ANEPY_CLASSIFIER_BWD,
    ANEPY_SOFTMAX,
    ANEPY_HEAD_FWD, /* fused_layer: final_rmsnorm and classifier_fwd */
    ANEPY_HEAD_BWD,
    ANEPY_CLASSIFIER_DW,
    ANEPY_PROGRAM_N
} anepy_program_id;

#define ANEPY_HOST_TENSOR 27 /* the first that is in memory of the host only */
#define ANEPY_PROGRAM_TENSORS 31
#define ANEPY_PROGRAM_WEIGHTS 28
#define ANEPY_PROGRAM_SURFACES 6

/* Where an output lives where tensors can be bound to any memory. */
typedef enum {
    ANEPY_PLACE_OWN,
    ANEPY_PLACE_NONE,    /* neither it nor its reader needs it in memory */
    ANEPY_PLACE_NEXT,    /* in memory that the next such output overwrites */
    ANEPY_PLACE_QKV_BWD, /* the input of this name in the packed ones of qkv_bwd, so that dX and dW
                            of wq, wk, wv are one product */
    ANEPY_PLACE_XNORM,   /* in host memory, where the step goes on with it */
    ANEPY_PLACE_LOGITS,
} anepy_place;

typedef struct {
    const char *name;
    int32_t channels;
    int32_t channel; /* first channel when all inputs (or all outputs) share one packed surface */
    int32_t surface; /* of an input: in which surface that channel is, see anepy_program_place */
    int32_t factor;  /* an output that nothing but products reads, inside and outside */
    anepy_place place;
} anepy_program_tensor;

/* Inputs first, then outputs, each in packed order. From ANEPY_HOST_TENSOR on: what programs save
 * and take besides on devices whose tensors are bound; MIL has none of it. Their channels count
 * from 0 again. */
typedef struct {
    anepy_program_id id;
    const char *name;
    int32_t input_n, output_n, host_n;
    int32_t input_channels, output_channels; /* of the packed surfaces */
    int32_t surface_n, surface_channels[ANEPY_PROGRAM_SURFACES]; /* of inputs: the packed one */
    int32_t output_width; /* columns of the packed output: width, but of weight gradients */
    int32_t host_channels;
    anepy_program_tensor tensors[ANEPY_PROGRAM_TENSORS];
    /* Of projections with adapters, ANEPY_INTO_W2...: the position of scale A x in tensors[], in
     * the backward pass that of scale B^T dy; of all with this input together, behind each other.
     * 0: it has none. */
    int32_t low[ANEPY_INTO_N];
    int32_t weight_n;
    int32_t weights[ANEPY_PROGRAM_WEIGHTS]; /* roles of tensors, ANEPY_WQ... */
    int32_t width;                          /* columns it was described for */
    int32_t live;                           /* 1: weights are further inputs; 0: they are baked,
                                               but those of adapters */
    int32_t part, parts; /* classifier programs: which slice of the vocabulary, of how many */
    int32_t first_row;   /* first token of that slice */
} anepy_program;

/* A weight of a program. As an input it is a surface of its own: a matrix [1, channels, 1, columns]
 * is itself, row = channel, padded with zeros to multiples of 32 (contractions must be); a vector
 * repeats each value along its row (one column would be below what the ANE handles). */
typedef struct {
    const char *name;   /* wq */
    char parameter[24]; /* w1_wq, x0_wq_lora_a: names sort in program order, behind a_in */
    const anepy_tensor *tensor;
    int32_t first_row, rows, cols; /* the part of it that is used; a vector is one row */
    int32_t channels, columns;     /* of its surface */
} anepy_program_matrix;

/* Positions in tensors[], inputs before outputs. */
enum {
    SDPA_FWD_X,
    SDPA_FWD_OUT,
    SDPA_FWD_Q,
    SDPA_FWD_K,
    SDPA_FWD_V,
    SDPA_FWD_ATTN,
    SDPA_FWD_XNORM,
    SDPA_FWD_Q_RAW, /* of models with qk_norm */
    SDPA_FWD_K_RAW,
    SDPA_FWD_LSE = ANEPY_HOST_TENSOR
};
enum { FFN_FWD_X, FFN_FWD_OUT, FFN_FWD_H1, FFN_FWD_H3, FFN_FWD_GATE, FFN_FWD_XNORM };
enum { FFN_BWD_DY, FFN_BWD_H1, FFN_BWD_H3, FFN_BWD_DX, FFN_BWD_DH1, FFN_BWD_DH3 };
enum {
    SDPA_BWD1_Q,
    SDPA_BWD1_K,
    SDPA_BWD1_V,
    SDPA_BWD1_DY,
    SDPA_BWD1_DV,
    SDPA_BWD1_P,
    SDPA_BWD1_DP
};
enum {
    SDPA_BWD2_P,
    SDPA_BWD2_DP,
    SDPA_BWD2_Q,
    SDPA_BWD2_K,
    SDPA_BWD2_DQ,
    SDPA_BWD2_DK,
    SDPA_BWD2_V = ANEPY_HOST_TENSOR, /* this and what follows instead of P and DP */
    SDPA_BWD2_ATTN,
    SDPA_BWD2_LSE,
    SDPA_BWD2_DV /* which sdpa_bwd1 leaves out then */
};
enum { QKV_BWD_DQ, QKV_BWD_DK, QKV_BWD_DV, QKV_BWD_DX };
enum { RMSNORM_BWD_DY, RMSNORM_BWD_X, RMSNORM_BWD_DX };
enum { FINAL_RMSNORM_X, FINAL_RMSNORM_XNORM };
enum { CLASSIFIER_FWD_X, CLASSIFIER_FWD_LOGITS };
enum { CLASSIFIER_BWD_DLOGITS, CLASSIFIER_BWD_DX };
enum { SOFTMAX_LOGITS, SOFTMAX_PROBS };

enum {
    LAYER_FWD_X,
    LAYER_FWD_OUT, /* of the attention half */
    LAYER_FWD_Q,
    LAYER_FWD_K,
    LAYER_FWD_V,
    LAYER_FWD_ATTN,
    LAYER_FWD_XNORM,
    LAYER_FWD_X2,
    LAYER_FWD_FFN_OUT,
    LAYER_FWD_H1,
    LAYER_FWD_H3,
    LAYER_FWD_GATE,
    LAYER_FWD_XNORM2,
    LAYER_FWD_Q_RAW,
    LAYER_FWD_K_RAW
};
enum {
    LAYER_BWD_DY,
    LAYER_BWD_X,
    LAYER_BWD_X2,
    LAYER_BWD_H1,
    LAYER_BWD_H3,
    LAYER_BWD_Q,
    LAYER_BWD_K,
    LAYER_BWD_V,
    LAYER_BWD_INPUT_N
};
enum { /* of the outputs, from input_n on: q_raw and k_raw may be inputs as well */
    LAYER_BWD_DXNORM2,
    LAYER_BWD_THROUGH2, /* dxnorm2 through the norm */
    LAYER_BWD_DX2,
    LAYER_BWD_DH1,
    LAYER_BWD_DH3,
    LAYER_BWD_DQ, /* of q_raw with qk_norm, as LAYER_BWD_DK */
    LAYER_BWD_DK,
    LAYER_BWD_DV,
    LAYER_BWD_DXNORM,
    LAYER_BWD_THROUGH,
    LAYER_BWD_DQ_NORMED, /* with qk_norm */
    LAYER_BWD_DK_NORMED
};
enum {
    LAYER_DW_DQ,
    LAYER_DW_DK,
    LAYER_DW_DV,
    LAYER_DW_XNORM,
    LAYER_DW_DX2,
    LAYER_DW_ATTN,
    LAYER_DW_DH1,
    LAYER_DW_DH3,
    LAYER_DW_XNORM2,
    LAYER_DW_DY,
    LAYER_DW_GATE,
    LAYER_DW_WQ,
    LAYER_DW_WK,
    LAYER_DW_WV,
    LAYER_DW_WO, /* transposed, as w2: [q_dim, dim] */
    LAYER_DW_W1,
    LAYER_DW_W3,
    LAYER_DW_W2
};
enum { HEAD_FWD_X, HEAD_FWD_XNORM, HEAD_FWD_LOGITS };
enum { HEAD_BWD_DLOGITS, HEAD_BWD_X, HEAD_BWD_DXNORM, HEAD_BWD_THROUGH };
enum { CLASSIFIER_DW_DLOGITS, CLASSIFIER_DW_XNORM, CLASSIFIER_DW_OUTPUT };

/* Fills out for a model and a surface width (columns of every tensor, >= the sequence length). */
void anepy_program_describe(anepy_program *out, anepy_program_id id, const anepy_model *model,
                            int32_t width);

/* The same for one slice of the vocabulary: classifier programs have more than one part above 32768
 * tokens; partial sums of classifier_bwd add up. All others have one. 0 <= part < out->parts. */
void anepy_program_describe_part(anepy_program *out, anepy_program_id id, const anepy_model *model,
                                 int32_t width, int32_t part);

/* Takes inputs from other surfaces than the packed one: first with tensor -1, then for each input,
 * in any order, from a channel of surface `surface`, which has `channels`. */
void anepy_program_place(anepy_program *program, int32_t tensor, int32_t surface, int32_t channels,
                         int32_t channel);

/* Weight `index` of a described program in a layer (ignored for those that belong to none). */
void anepy_program_weight(anepy_program_matrix *out, const anepy_program *program,
                          const anepy_model *model, int32_t layer, int32_t index);

/* Whether it is an input: A and B of adapters, which are trained, always are. */
static inline int anepy_program_passes(const anepy_program *program, int32_t index) {
    return program->live || (program->weights[index] & ANEPY_LORA) != 0;
}

/* Floating-point operations of the products of one sequence, two per multiply-add. */
double anepy_program_flops(const anepy_program *program, const anepy_model *model);
/* Elements of the inputs and outputs of so many sequences, and of the weights. */
int64_t anepy_program_elements(const anepy_program *program, const anepy_model *model,
                               int32_t count);

/* Which of them this tensor is; -1: none. */
int32_t anepy_program_find_weight(const anepy_program *program, const anepy_model *model,
                                  int32_t layer, const anepy_tensor *tensor);

/* Where it is in an arena, and its first element there. */
anepy_storage anepy_program_stored(const anepy_program_matrix *matrix, const void *arena);
int64_t anepy_program_offset(const anepy_program_matrix *matrix);

/* Token v belongs to group v % G of `softmax`, G = this: up to 128 tokens each. Probabilities over
 * a vocabulary of 32000 lie around 3e-5, where the ANE flushes to zero; within a group they do
 * not, and 128 is an axis every chip takes. The host joins the groups with one logit of each:
 *     lse_g = logits[r] - log(probs[r])   for the token r of group g with the largest probs[r]
 *     lse = log(sum_g exp(lse_g));  p[v] = probs[v] * exp(lse_{v % G} - lse)
 * and the loss of token t is lse - logits[t]: no logarithm of a rounded probability. */
#define ANEPY_SOFTMAX_GROUP 128
static inline int32_t anepy_softmax_groups(const anepy_model *model) {
    return (model->config.vocab_size + ANEPY_SOFTMAX_GROUP - 1) / ANEPY_SOFTMAX_GROUP;
}

const char *anepy_program_name(anepy_program_id id);

/* The program with this name; ANEPY_E_NAME with the list of all names. */
int32_t anepy_program_find(anepy_program_id *out, const char *name);

#endif
