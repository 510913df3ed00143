/* train/engine.h - inside of the step engine.
 *
 * One step: embed, layers forward, final norm, classifier, loss, and the same backward. Programs
 * run on the device; norms outside programs, classifier, loss, weight gradients (dW) and the update
 * run on the host. What a switch changes stands where it is asked: `anepy_on(engine, SWITCH)`. */
#ifndef ANEPY_TRAIN_ENGINE_H
#define ANEPY_TRAIN_ENGINE_H

#include "device/metal/metal.h"
#include "train/switches.h"

/* Programs that belong to a layer: the first in the table. */
#define ANEPY_LAYER_PROGRAM_N (ANEPY_RMSNORM_BWD_FFN + 1)

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

/* Weight-gradient products of a layer; those of one input are one product (model.h). */
enum { DW_W2, DW_W13, DW_WO, DW_QKV, DW_N };

/* A factor of a product: where it is, and a float32 copy where one is needed; with fp16_cache the
 * raw half-precision values behind it, which the product's task converts. */
typedef struct {
    anepy_surface *source;
    int32_t channel, channels;
    float *capture;
} anepy_operand;

typedef struct {
    anepy_operand dy, x;
    int64_t gradient; /* offset in the arena */
    double *squares;  /* one per piece of the product: squares.c */
    anepy_engine *engine;
    anepy_gemm_job job;
    int32_t conversions;       /* pieces that convert raw factors come first */
    _Atomic int32_t converted; /* and have to be done before the product's */
    anepy_loop loop;
} anepy_dw;

typedef struct anepy_compiler anepy_compiler; /* compile.c */

/* One program of the step: what it computes, for which weights, and where its tensors live. */
typedef struct {
    anepy_program program;
    int32_t layer; /* 0 if it belongs to none */
    anepy_kernel *kernel;
    anepy_surface *input;   /* packed; only where tensors cannot be bound */
    anepy_surface *output;  /* packed */
    anepy_surface *factors; /* outputs that only products read, rounded; NULL: in output */
    anepy_link links[ANEPY_PROGRAM_TENSORS];
} anepy_node;

typedef struct {
    anepy_node *nodes[ANEPY_LAYER_PROGRAM_N]; /* NULL: an offload that is off */
    anepy_surface x, x2;   /* host: what the attention and the feed-forward half start from */
    anepy_surface dy, dx2; /* host: gradients of the layer's output and of x2 */
    anepy_dw dw[DW_N];
} anepy_layer;

struct anepy_engine {
    _Atomic int32_t busy;   /* a call is running: all that follows is its own */
    uint64_t caller_fpmode; /* given back when it returns */
    const anepy_model *model;
    float *params, *grads, *adam_m, *adam_v;
    const float *weights; /* what steps compute with: params, or the set that is compiled */
    uint32_t switches;
    anepy_dtype dtype;
    int32_t seq_len, longest; /* longest: seq_len rounded up to a panel */
    int32_t width;            /* columns there is room for: of several such sequences */
    int64_t accumulated, updates;
    double loss_scale;   /* what gradients are multiplied with on their way down */
    int64_t clean_steps; /* since the scale last changed */
    int32_t damaged;     /* something not finite, or half a step, was accumulated: no update */
    int32_t dw_started;  /* products of the running step that may have been added */
    int32_t stale;       /* the programs are not those of the weights */
    anepy_pool *pool;
    anepy_gemm gemm;
    anepy_device *device;
    anepy_metal *metal; /* with metal_dw: computes the weight gradients of the layers */
    anepy_node *nodes;  /* all programs that run: layer by layer, then those of no layer */
    int32_t node_n;
    anepy_node *tail[ANEPY_PROGRAM_N]; /* of no layer: the first part of each; NULL: it is off */
    anepy_layer *layers;
    anepy_surface x_final; /* host: residual stream after the last layer */
    anepy_surface dx;      /* host: gradient that reaches the embedding */
    float *staging[2];     /* [max(dim, hidden), width]: read-back of program outputs */
    float *xnorm;          /* [dim, width] after the final norm */
    float *dxnorm;         /* [dim, width] */
    float *logits;         /* [vocab, width], then their gradients in place */
    anepy_surface host_xnorm, host_dxnorm, host_logits; /* these as programs see them */
    float *group_lse;                                   /* [groups, width]: offload_softmax */
    anepy_compiler *compiler;                           /* background_compile */
    uint16_t *dlogits;     /* bf16: [ANEPY_CHUNK_ROWS, width], gradients of some logits */
    float *xnorm_panels;   /* bf16: xnorm as dW of the classifier reads it */
    float *norm_gradients; /* [2 * n_layers + 1, dim]: of this step; attention, ffn, ..., final */
    float *rstd, *coef;    /* [width]: statistics of one RMSNorm backward */
    float *lse;            /* [width] */
    float *zeros;          /* [width] */
    float *partial;        /* soft-max: [2, chunks, width] */
    double *sums;          /* gradient norm: one per update piece */
    double *row_squares;   /* [vocab]: of the rows of the classifier's gradient */
    int64_t
        squares_step; /* of an accumulation: the one to note them, if the next is as long; or 0 */
    int32_t notes_squares; /* the running sequences note them */
    int32_t knows_squares; /* those that were noted are of the gradients as they are */
    const int32_t *tokens; /* of the running sequences, one behind the other */
    const int32_t *targets;
    int32_t sequences; /* of the running step */
    int32_t added;     /* those of them that are in the gradients already */
    int32_t beside;    /* those that run now, beside each other */
    int32_t n;         /* tokens of each */
    int32_t stride;    /* its columns: n rounded up to a panel; all where programs always are */
    int32_t columns;   /* of those that run */
    anepy_step_stats stats; /* of the running step */
    float *host;            /* one mapping: all of the host's memory above */
    uint64_t host_nbytes;
    float *captures; /* another: what belongs to the weight-gradient products */
    uint64_t captures_nbytes;
};

static inline int anepy_on(const anepy_engine *e, anepy_switch s) { return e->switches >> s & 1; }

/* Has the device this capability (device.h)? */
static inline int anepy_can(const anepy_engine *e, uint32_t capability) {
    return (e->device->type->capabilities & capability) != 0;
}

/* Do the running sequences add to gradients? The first after an update replace them. */
static inline int anepy_adds(const anepy_engine *e) { return e->accumulated > 0 || e->added > 0; }

/* The sequences that run now lie beside each other, and the columns between them count nothing:
 * their values are finite, their gradients exactly zero. */
static inline int32_t anepy_running_tokens(const anepy_engine *e) { return e->beside * e->n; }
static inline int32_t anepy_column(const anepy_engine *e, int32_t token) {
    return token / e->n * e->stride + token % e->n;
}
/* What weight gradients are summed over: all columns to the last token. */
static inline int32_t anepy_reduction(const anepy_engine *e) {
    return e->columns - e->stride + e->n;
}

/* The tokens in the 64 columns from this one on. */
typedef struct {
    int32_t first, count;
} anepy_span;

static inline anepy_span anepy_span_at(const anepy_engine *e, int32_t column) {
    int32_t position = column % e->stride, left = e->n - position;
    return (anepy_span){column / e->stride * e->n + position,
                        anepy_max_i32(0, anepy_min_i32(ANEPY_COLUMNS, left))};
}

/* What the gradient of each token's loss is multiplied with. */
static inline double anepy_token_scale(const anepy_engine *e) {
    return e->loss_scale / ((double)e->n * e->sequences);
}

static inline const anepy_kernels *anepy_vector(const anepy_engine *e) { return e->gemm.kernels; }

int32_t anepy_chunks(const anepy_engine *e); /* pieces of the vocabulary in loss.c */
#define ANEPY_CHUNK_ROWS 1024 /* of the vocabulary whose gradients exist at once in bf16 */

/* Runs on [0, count) pieces on all threads with the engine as context. */
void anepy_engine_run(anepy_engine *e, int32_t count, anepy_loop_fn fn);

/* engine.c: room for so many columns, if there is less; after a failure there is as much as before.
 */
int32_t anepy_engine_widen(anepy_engine *e, int32_t columns);

/* wiring.c: nodes, surfaces and links. */
int32_t anepy_wire(anepy_engine *e);
/* Moves a program's inputs to where it reads them. */
int32_t anepy_transfer_inputs(anepy_engine *e, anepy_node *node);
/* A program's output as float32 [channels, width], in staging[which] if it is not host memory. */
int32_t anepy_read_output(anepy_engine *e, anepy_node *node, int32_t tensor, int32_t which,
                          const float **out);
/* Tells the node's new kernel where its tensors live. */
int32_t anepy_bind(anepy_engine *e, anepy_node *node);

/* compile.c: the weights that programs hold. */
int32_t anepy_compile_open(anepy_engine *e); /* compiles nothing yet */
/* Programs for the weights as they are now. */
int32_t anepy_compile(anepy_engine *e);
/* The same after the weights have changed, where they are baked; at_once: not in the background. A
 * failure is not told yet: the engine stays stale, and who needs the programs compiles again. */
void anepy_recompile(anepy_engine *e, int at_once);
/* Before they change, or are evaluated: waits for what compiles in the background and takes it
 * over. If it failed, the weights it was to replace stay in use. */
int32_t anepy_compile_settle(anepy_engine *e);
uint64_t anepy_compile_nbytes(const anepy_engine *e); /* of copies of the weights */
void anepy_compile_close(anepy_engine *e);

/* embed.c */
void anepy_embed(anepy_engine *e);
void anepy_embed_backward(anepy_engine *e);

/* norm.c */
void anepy_final_norm(anepy_engine *e);
/* dx = residual (NULL: 0) + gradient through RMSNorm of x with the weight at this offset; row
 * `which` of norm_gradients gets the weight's own gradient. through: the gradient that a device
 * computed; NULL: compute it. */
void anepy_norm_backward(anepy_engine *e, float *dx, const float *residual, const float *dy,
                         const float *x, const float *through, int64_t weight, int32_t which);
/* Adds norm_gradients to the arena. */
void anepy_norm_accumulate(anepy_engine *e);
void anepy_residual_add(anepy_engine *e, float *out, const float *a, const float *b);

/* loss.c */
void anepy_classifier(anepy_engine *e);              /* xnorm -> logits */
void anepy_logits_copy(anepy_engine *e, float *out); /* [n, vocab] */
double anepy_loss(anepy_engine *e, int gradient);    /* mean; with gradient: logits -> dlogits */
void anepy_loss_padding(anepy_engine *e); /* so that exp(logit - lse) is 0 beyond the tokens */
void anepy_loss_targets(anepy_engine *e); /* takes the targets' one off the gradients */
void anepy_classifier_backward(anepy_engine *e); /* dlogits -> dxnorm */
void anepy_classifier_dw(anepy_engine *e);       /* dlogits, xnorm -> gradient of the classifier */

/* offload.c: the same on the device. mark: see anepy_count. */
int32_t anepy_offload_logits(anepy_engine *e, double *mark);
int32_t anepy_offload_classifier_backward(anepy_engine *e, double *mark);
int32_t anepy_offload_softmax(anepy_engine *e, int gradient, double *loss, double *mark);

/* step.c: tokens (and targets) are set. */
int32_t anepy_forward(anepy_engine *e);                               /* to the logits */
int32_t anepy_step_loss(anepy_engine *e, int gradient, double *loss); /* as anepy_loss */
int32_t anepy_backward(anepy_engine *e);
/* Moves the inputs and evaluates. */
int32_t anepy_evaluate(anepy_engine *e, anepy_node *node, double *mark);
/* Adds the time since *mark to a phase and moves the mark. */
void anepy_count(double *mark, double *phase);
double anepy_step_flops(const anepy_model *model, int32_t n);

/* dw.c: both factors of a product are there: notes them, and starts it unless the step may still
 * be skipped. */
int32_t anepy_dw_ready(anepy_engine *e, int32_t layer, int32_t which);
int32_t anepy_dw_start_all(anepy_engine *e); /* those that waited for the verdict */
int32_t anepy_dw_wait(anepy_engine *e);      /* until done; frees what was allocated */
/* Are capture buffers there from the start? A GPU reads only what it was given once. */
int anepy_keeps_captures(const anepy_engine *e);
/* float32 elements of the capture buffer of a factor; 0: it is read where it is. */
int64_t anepy_capture_n(const anepy_engine *e, const anepy_operand *o);
/* Raw half-precision values of a factor, [channels, width]; NULL: it was read back as float32. */
const uint16_t *anepy_capture_raw(const anepy_engine *e, const anepy_operand *o);
int32_t anepy_dw_open_gpu(anepy_engine *e); /* shares all that products read and write */

/* squares.c */
void anepy_squares_begin(anepy_engine *e); /* the backward pass of a sequence does */
void anepy_squares_end(anepy_engine *e);   /* and all it adds to gradients is there */
/* Sum of squares of the gradients; as_left: nobody has written to them since the last step. */
double anepy_squares_sum(anepy_engine *e, int as_left);

/* scaling.c */
int anepy_scaled(const anepy_engine *e);
int anepy_gradients_finite(anepy_engine *e); /* of the running step, before anything is added */
int anepy_input_gradient_finite(anepy_engine *e); /* where IEEE arithmetic carries all others to */
void anepy_scale_step(anepy_engine *e, int skipped);
void anepy_scale_grow(anepy_engine *e); /* after an update, when nothing is accumulated */

#endif
