/* train/engine.h - the types of the step engine, and what is asked of them everywhere.
 *
 * One step: embed, layers forward, final norm, classifier, loss, and the same backward. Programs
 * run on the device; norms outside programs, classifier, loss, weight gradients (dW) and the update
 * run on the host. What a switch changes stands where it is asked: `anepy_on(engine, SWITCH)`.
 *
 * Activations are [channels, columns], a token a column. Four names of lengths:
 *   tokens   of each running sequence
 *   padded   columns of each running sequence: tokens rounded up to a multiple of 64, or all that
 *            there is room for on devices that always compute whole surfaces
 *   columns  of all sequences that run side by side
 *   room     columns that surfaces and buffers have, `room->width`: the distance of their rows */
#ifndef ANEPY_TRAIN_ENGINE_H
#define ANEPY_TRAIN_ENGINE_H

#include "device/metal/metal.h"
#include "runtime/clock.h"
#include "train/switches.h"

/* Programs that belong to a layer: the first in the table. */
#define ANEPY_LAYER_PROGRAM_N (ANEPY_LAYER_DW + 1)

/* How a program's input gets there. */
typedef enum {
    BOUND,  /* the program reads the source itself */
    WRITE,  /* host float32 -> surface */
    COPY,   /* surface -> surface, raw */
    BOUNCE, /* surface -> host float32 -> surface: what skip_dead_reads saves */
} anepy_transfer;

typedef struct {
    anepy_transfer how;
    anepy_surface *source;
    int32_t channel; /* in source */
} anepy_link;

/* Weight-gradient products of a layer. Weights with one input lie beside each other in the arena
 * and have one product. */
enum {
    DW_W2 = ANEPY_INTO_W2,
    DW_W13 = ANEPY_INTO_W13,
    DW_WO = ANEPY_INTO_WO,
    DW_QKV = ANEPY_INTO_QKV,
    DW_N = ANEPY_INTO_N
};

/* A factor of a product: where it is, and a float32 copy where one is needed; with fp16_cache the
 * raw half-precision values behind it, which the product's task converts. */
typedef struct {
    anepy_surface *source;
    int32_t channel, channels;
    int32_t exact; /* it is never rounded to bf16 for a product */
    float *capture;
} anepy_operand;

/* Rows of dy of trainable tensors that lie beside each other, so that their gradients do too. */
typedef struct {
    const anepy_tensor *tensor; /* the first */
    int32_t row, rows;
} anepy_dw_rows;

/* The rows of a factor as the host finds them: float32, or bf16. */
typedef struct {
    const float *rows;
    const uint16_t *rounded; /* if rows is NULL */
} anepy_factor;

/* Gradients of adapters: dB = dy (scale A x)^T, dA = (scale B^T dy) x^T. Of projections with one
 * input the A have one product. */
typedef struct {
    anepy_operand forward, backward; /* scale A x; scale B^T dy */
    const anepy_tensor *a;           /* the first */
    struct {
        const anepy_tensor *b;
        int32_t row, low_row; /* in dy, in the two above */
    } parts[3];
    int32_t part_n;
    const float *forward_rows, *backward_rows; /* these, once they are there */
    anepy_factor dy, x;
} anepy_dw_adapter;

#define ANEPY_DW_RUNS 2 /* wq and wv, with wk frozen between them */

typedef struct {
    anepy_dw_rows of;
    int32_t pieces;
    double *squares; /* one per piece, of the gradient that it leaves */
    anepy_gemm_job job;
} anepy_dw_product;

/* Each weight gradient that has the factors dy and x, and those of the biases: the sums of the rows
 * of dy. Factors that nothing trainable needs have no channels. */
typedef struct {
    anepy_operand dy, x;
    int32_t on_device; /* a program has the products; only the rest is for the host */
    anepy_dw_product products[ANEPY_DW_RUNS];
    anepy_dw_rows biases[ANEPY_DW_RUNS];
    int32_t product_n, bias_n;
    anepy_dw_adapter adapter;
    const float *dy_rows; /* dy, once it is there; NULL: only rounded */
    anepy_engine *engine;
    int32_t conversions;       /* pieces that convert factors come first */
    int32_t sums;              /* then those of the biases */
    _Atomic int32_t converted; /* and have to be done before the product's */
    anepy_loop loop;
} anepy_dw;

#define ANEPY_GIVEN_ROWS 64    /* of a surface in a piece */
#define ANEPY_GIVEN_PARTS 7    /* weights of a layer */
#define ANEPY_GIVEN_PIECES 1040 /* of as many channels as a surface may have */

/* Weight gradients that a program has left in its output, on their way to the others. */
typedef struct {
    anepy_engine *engine;
    anepy_surface *surface;
    struct {
        const anepy_tensor *tensor;
        int32_t channel, rows; /* in the surface */
        int32_t first_row;     /* of the tensor; or the first column, if they are transposed */
        int32_t transposed;
    } parts[ANEPY_GIVEN_PARTS];
    int32_t part_n, pieces;
    int32_t started; /* the surface is locked, the loop was submitted */
    int32_t adds;    /* to what is there; else they replace it */
    float sign;
    uint8_t taken[ANEPY_GIVEN_PIECES]; /* pieces that went there: those that are finite */
    anepy_loop loop;
} anepy_given;

typedef struct anepy_compiler anepy_compiler;

/* One program of the step: what it computes, for which weights, and where its tensors live. */
typedef struct {
    anepy_program program;
    int32_t layer; /* 0 if it belongs to none */
    anepy_executable *executable;
    anepy_surface *input;   /* packed; only where tensors cannot be bound */
    anepy_surface *output;  /* packed */
    anepy_surface *factors; /* outputs that only products read, rounded; NULL: in output */
    anepy_link links[ANEPY_PROGRAM_TENSORS];
    anepy_given given; /* of programs that compute weight gradients */
} anepy_node;

typedef struct {
    anepy_node *nodes[ANEPY_LAYER_PROGRAM_N]; /* NULL: an offload that is off */
    anepy_surface x, x2;   /* host: what the attention and the feed-forward half start from */
    anepy_surface dy, dx2; /* host: gradients of the layer's output and of x2 */
    anepy_dw dw[DW_N];
} anepy_layer;

/* All that has the width of the surfaces. Nothing in it outlives a step, so a step that needs more
 * columns gets a new room in place of the old one. */
typedef struct {
    int32_t width;
    anepy_gemm gemm;
    anepy_device *device;
    anepy_metal *metal; /* with metal_dw: computes the weight gradients of the layers */
    anepy_node *nodes;  /* all programs that run: layer by layer, then those of no layer */
    int32_t node_n;
    anepy_node *tail[ANEPY_PROGRAM_N]; /* of no layer: the first part of each; NULL: it is off */
    anepy_layer *layers;
    anepy_compiler *compiler; /* background_compile */
    const void *effective;    /* the weights that steps compute with: params, or a copy of them */
    int32_t stale;            /* the programs are not those of params */

    _Atomic int32_t overflow; /* a gradient that a program read or wrote is not finite */

    int32_t held;          /* the layer whose activations are there, with recompute */
    anepy_surface x_final; /* host: residual stream after the last layer */
    anepy_surface dx;      /* host: gradient that reaches the embedding */
    float *staging[2];     /* [max(dim, q_dim, hidden), width]: read-back of program outputs */
    float *xnorm;          /* [dim, width] after the final norm */
    float *dxnorm;         /* [dim, width] */
    float *logits;         /* [vocab, logits_width], then their gradients in place */
    int32_t logits_width;  /* width; less where the classifier is frozen (loss.h) */
    anepy_surface host_xnorm, host_dxnorm, host_logits; /* these as programs see them */
    anepy_surface host_next; /* [dim, width]: what a half of a layer adds to the residual stream */
    float *group_lse;    /* offload_softmax: [groups, width], log-sum-exp of each group */
    uint16_t *dlogits;   /* bf16: [ANEPY_CHUNK_ROWS, width], gradients of some logits */
    float *xnorm_panels; /* bf16: xnorm as dW of the classifier reads it */
    float *rstd, *coef;  /* [width]: statistics of one RMSNorm backward */
    float *lse;          /* [width]: log-sum-exp of the logits of each column */
    float *zeros;        /* [width] */
    int32_t *documents;  /* [width]: of a run with starts, as the device takes them */
    float *head_partial; /* qk_norm: [n_heads, head_dim], gradients of each head of q or k */
    anepy_surface dqk;   /* host: gradients of q_raw, k_raw, where programs do not read memory */
    float *partial;      /* soft-max: [2, chunks, width], largest logit and sum of each chunk */

    float *host; /* one mapping: the buffers above */
    uint64_t host_nbytes;
    float *captures; /* another: what belongs to the weight-gradient products */
    uint64_t captures_nbytes;
} anepy_room;

/* Columns whose logits exist at a time: a multiple of 64. */
typedef struct {
    int32_t first, columns;
} anepy_window;

/* The running call. */
typedef struct {
    const int32_t *ids;     /* of the running sequences, one after the other */
    const int32_t *targets; /* below 0: not counted; NULL: only logits are wanted */
    const uint8_t *starts;  /* not 0 where a document begins; NULL: at each sequence only */
    double *losses;         /* of each target, 0 where it is not counted; NULL: not wanted */
    int32_t sequences;      /* of the call */
    int32_t counted;        /* targets of the call that are */
    int32_t added;          /* sequences that are done: of a step, in the gradients already */
    int32_t beside;         /* of those, running side by side now */
    int32_t most;           /* that may, of such a length */
    int32_t tokens;         /* of each sequence */
    int32_t padded;         /* columns of each sequence */
    int32_t columns;        /* beside * padded */
    anepy_window window;    /* of these: whose logits there are */
    int32_t summed;         /* targets whose losses stats.loss is the sum of, until the end */
    int32_t dw_started;     /* products whose results may have been added to the gradients */
    const float *reached;   /* [dim, width]: the gradient that the backward pass ended with */
    anepy_step_stats stats;
} anepy_run;

/* What the gradients are, loss scaling, and what must not reach an update.
 *
 * Gradients are the sum over counted targets of the gradient of each one's loss, times loss_scale /
 * unit. The unit is the number of counted targets of the first step since the last update: after
 * that step they are the gradient of its mean loss, times loss_scale, and steps after it weigh as
 * many of it as they have targets for each of its. In fp16 loss_scale follows the unit, so that a
 * target's own gradient keeps its size in half precision however many are counted. */
typedef struct {
    double loss_scale;   /* 1 unless products are fp16 */
    double unit;         /* 0: not known yet; the gradients are of `counted` steps, all alike */
    double joint;        /* what anepy_scale_join set last for a target; 0: nothing yet */
    int64_t clean_steps; /* since the scale was last lowered or raised */
    int32_t damaged;     /* something not finite, or half a step, was accumulated: no update */
    int32_t skipped;     /* a step since the last update was */
} anepy_scaling;

/* Sums of squares of the gradients, taken by the products that write them, for their norm. */
typedef struct {
    double *sums;   /* one per piece of the embedding */
    double *rows;   /* [vocab]: of the rows of the classifier's gradient */
    int64_t step;   /* of an accumulation, from 1: the one whose products take them; 0: none */
    int32_t taking; /* the running sequences are its last */
    int32_t known;  /* what was taken belongs to the gradients as they are */
    int32_t lent;   /* since the last update the caller may have changed gradients */
} anepy_squares;

struct anepy_engine {
    _Atomic int32_t busy;   /* a call is running, and all that follows is its own */
    uint64_t caller_fpmode; /* given back when it returns */
    const anepy_model *model;
    /* The caller's; grads: by anepy_gradient only; adam_v: NULL where no tensor has one. */
    void *params;
    float *grads;
    void *adam_m, *adam_v;                   /* by moments.h */
    int bf16_moments;                        /* stored as that */
    float *adapter;                          /* as well; NULL: the model has none */
    const struct anepy_optimizer *optimizer; /* a row of the table in update.c */
    struct anepy_muon *muon;                 /* NULL: another optimizer */
    const anepy_device_type *type;
    char *detail; /* what followed the device's name and a colon; NULL: nothing */
    uint32_t switches;
    anepy_dtype dtype;
    int32_t seq_len;   /* most tokens of a sequence */
    int32_t recompute; /* the layers share all memory but that of their inputs */
    int32_t hold_embedding; /* the last sequences of a step leave its gradient alone */
    const anepy_kernels *kernels;
    const struct anepy_blas *blas; /* NULL: the own kernels */
    anepy_pool *pool;
    int64_t accumulated; /* steps since the last update */
    int64_t counted; /* targets that the gradients are the sum over; 0: there are no gradients */
    int64_t updates;
    float *norm_gradients; /* [2 * n_layers + 1, dim]: of this step; attention, ffn, ..., final */
    float *head_gradients; /* qk_norm: [2 * n_layers, head_dim]: of q_norm, k_norm of each layer */
    anepy_run run;
    anepy_scaling scaling;
    anepy_squares squares;
    _Atomic int64_t ready; /* what ready.c tells other threads */
    anepy_room *room;
    float *memory; /* one mapping: norm_gradients and squares */
    uint64_t memory_nbytes;
};

/* The weights of a layer, or of none, that steps compute with. */
static inline anepy_storage anepy_weights(const anepy_engine *e, int32_t layer, int32_t role) {
    return anepy_stored(anepy_model_find(e->model, layer, role), e->room->effective);
}

/* Elements of head_gradients. */
static inline int64_t anepy_head_gradients_n(const anepy_model *model) {
    return model->config.qk_norm ? 2 * (int64_t)model->config.n_layers * model->head_dim : 0;
}

/* Where the gradient of a tensor is; NULL: it is frozen. */
static inline float *anepy_gradient(const anepy_engine *e, const anepy_tensor *tensor) {
    return tensor->gradient >= 0 ? e->grads + tensor->gradient : NULL;
}

/* All gradients, [gradient_n]. */
static inline float *anepy_gradients(const anepy_engine *e) { return e->grads; }

/* Where the values of a trainable tensor are. */
static inline float *anepy_values(const anepy_engine *e, const anepy_tensor *tensor) {
    int adapter = anepy_tensor_has(tensor, ANEPY_TENSOR_ADAPTER);
    return (float *)(void *)((char *)(adapter ? e->adapter : e->params) + tensor->byte);
}

static inline int anepy_on(const anepy_engine *e, anepy_switch s) { return e->switches >> s & 1; }

/* Whether the device has this capability. */
static inline int anepy_can(const anepy_engine *e, uint32_t capability) {
    return (e->type->capabilities & capability) != 0;
}

/* Whether losses are scaled: fp16 gradients would underflow without. */
static inline int anepy_scaled(const anepy_engine *e) { return e->dtype == ANEPY_F16; }

/* Whether products start in the backward pass, so that what they read may be overwritten before its
 * end. Those of scaled losses wait until it is known to be finite. */
static inline int anepy_dw_at_once(const anepy_engine *e) { return !anepy_scaled(e); }

/* Whether the backward pass of a layer takes place where that of the layer above did, whose
 * products are waited for: those of adapters are thin, and end almost as soon as they can begin. */
static inline int anepy_shares_backward(const anepy_engine *e) {
    return e->recompute || e->adapter != NULL;
}

/* Whether the running sequences add to gradients. The first after an update replace them. */
static inline int anepy_adds(const anepy_engine *e) { return e->counted > 0 || e->run.added > 0; }

/* Whether no sequence of the step comes after the running ones. */
static inline int anepy_last_group(const anepy_engine *e) {
    return e->run.added + e->run.beside == e->run.sequences;
}

/* Runs on [0, count) pieces on all threads with the engine as context. */
static inline void anepy_engine_run(anepy_engine *e, int32_t count, anepy_loop_fn fn) {
    anepy_pool_run(e->pool, count, fn, e);
}

/* Counts work on elements: so many rows of all columns, read or written so often. */
static inline void anepy_touch(anepy_engine *e, int64_t rows, int32_t times) {
    e->run.stats.host_nbytes += rows * e->run.columns * times * (int64_t)sizeof(float);
}

/* Adds the time since *mark to a phase and moves the mark. */
static inline void anepy_count(double *mark, double *phase) {
    double now = anepy_now_ms();
    *phase += now - *mark;
    *mark = now;
}

/* --------------------------------------------------------------- columns of the running sequences
 *
 * Columns between the tokens of two sequences count nothing: their values are finite and their
 * gradients exactly zero. */

static inline int32_t anepy_running_tokens(const anepy_engine *e) {
    return e->run.beside * e->run.tokens;
}

/* What weight gradients are summed over: all columns to the last token. */
static inline int32_t anepy_reduction(const anepy_engine *e) {
    return e->run.columns - e->run.padded + e->run.tokens;
}

/* The tokens in the 64 columns from this one on. */
typedef struct {
    int32_t first, count;
} anepy_span;

static inline anepy_span anepy_span_at(const anepy_engine *e, int32_t column) {
    int32_t position = column % e->run.padded, left = e->run.tokens - position;
    return (anepy_span){column / e->run.padded * e->run.tokens + position,
                        anepy_max_i32(0, anepy_min_i32(ANEPY_COLUMNS, left))};
}

/* ---------------------------------------------------------------------------------- targets */

static inline int32_t anepy_counted(const int32_t *targets, int32_t n) {
    int32_t counted = 0;
    for (int32_t i = 0; i < n; i++) counted += targets[i] >= 0;
    return counted;
}

/* What the gradient of each counted target's loss is multiplied with. */
static inline double anepy_target_scale(const anepy_engine *e) {
    return e->scaling.loss_scale / e->scaling.unit;
}

#endif
