/* anepy.h - the only public header of libanepy.
 *
 * Trains transformers of the Llama family. One step engine runs on several devices; optimizations
 * are switches. The library never prints, aborts, exits, installs signal handlers or changes the
 * caller's floating-point mode. Every function returns a status (0 or a frozen negative number)
 * unless it says otherwise; anepy_last_error() gives the sentence that belongs to this thread's
 * last failure.
 *
 * Threads: one handle is used by one thread at a time (a second call that computes gets
 * ANEPY_E_BUSY). Pointers must not be NULL unless NULL is given a meaning.
 * Structs: the caller fills struct_size; fields are only ever appended; zero means default.
 */
#ifndef ANEPY_H
#define ANEPY_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ANEPY_ABI_VERSION 4

#if defined(_WIN32)
#define ANEPY_API __declspec(dllexport)
#else
#define ANEPY_API __attribute__((visibility("default")))
#endif

/* ------------------------------------------------------------------------------------ status */

#define ANEPY_OK 0
#define ANEPY_E_ARGUMENT (-10)    /* a value is out of range */
#define ANEPY_E_NAME (-11)        /* unknown variant, switch, device or precision */
#define ANEPY_E_TOKEN (-12)       /* a token id is outside the vocabulary */
#define ANEPY_E_PROGRAM (-13)     /* MIL text or its weights are wrong; the sentence says where */
#define ANEPY_E_MEMORY (-20)      /* the system gave no memory */
#define ANEPY_E_BUSY (-30)        /* another thread is using this handle */
#define ANEPY_E_STATE (-31)       /* the call does not fit the handle's state */
#define ANEPY_E_DEVICE (-40)      /* the device failed */
#define ANEPY_E_UNAVAILABLE (-41) /* the device cannot be used on this machine */
#define ANEPY_E_BUDGET (-42)      /* this process may compile no more programs */
#define ANEPY_E_UNSUPPORTED (-50) /* this device cannot do what was asked */
#define ANEPY_E_SYSTEM (-60)      /* the operating system refused a thread or a mapping */

ANEPY_API int32_t anepy_abi_version(void);
ANEPY_API const char *anepy_build_id(void);              /* hash of the sources, static text */
ANEPY_API const char *anepy_status_name(int32_t status); /* static text, never NULL */

/* Copies this thread's last error sentence into buf (at most cap bytes with the final zero) and
 * returns its full length without the zero. */
ANEPY_API int32_t anepy_last_error(char *buf, uint64_t cap);

/* The structs of this header, for anepy_struct_size. */
enum {
    ANEPY_STRUCT_CONFIG,
    ANEPY_STRUCT_TENSOR,
    ANEPY_STRUCT_ENGINE_OPTIONS,
    ANEPY_STRUCT_ENGINE_INFO,
    ANEPY_STRUCT_STEP_STATS,
    ANEPY_STRUCT_UPDATE_OPTIONS,
    ANEPY_STRUCT_UPDATE_STATS,
    ANEPY_STRUCT_LIBRARY_INFO,
    ANEPY_STRUCT_DEVICE_INFO,
    ANEPY_STRUCT_PROGRAM_OPTIONS,
    ANEPY_STRUCT_PROGRAM_INFO,
    ANEPY_STRUCT_PROGRAM_PORT,
    ANEPY_STRUCT_SIM_OPTIONS,
    ANEPY_STRUCT_SIM_TENSOR,
    ANEPY_STRUCT_SIM_REPORT,
    ANEPY_STRUCT_PEAKS,
    ANEPY_STRUCT_BENCH_OPTIONS,
    ANEPY_STRUCT_BENCH_RESULT,
    ANEPY_STRUCT_FLOPS
};

/* sizeof of a struct, for callers that declare the structs in another language; -1 beyond the last.
 */
ANEPY_API int32_t anepy_struct_size(int32_t index);

/* --------------------------------------------------------------------------- model, tensors */

/* How rope_scaling changes the frequencies of RoPE, each given as f here (Python: RopeScaling). */
enum {
    ANEPY_ROPE_PLAIN,
    ANEPY_ROPE_LINEAR, /* f / rope_factor: positions interpolated (Chen et al. 2023, 2306.15595) */
    ANEPY_ROPE_LLAMA3, /* Llama 3.1: with t = rope_original_max_position * f / 2 pi, the turns
                        * within the original context: f where t >= rope_high_freq_factor, f /
                        * rope_factor where t <= rope_low_freq_factor, linear in t between */
};

/* Dimensions of a model of the Llama family. All zero behind `tied`: Llama 2. */
typedef struct anepy_config {
    uint32_t struct_size;
    uint32_t flags;
    int32_t dim;        /* D, model width */
    int32_t hidden_dim; /* F, feed-forward width */
    int32_t n_layers;
    int32_t n_heads;
    int32_t n_kv_heads;   /* divides n_heads; head h reads KV head h / (n_heads / n_kv_heads) */
    int32_t vocab_size;   /* V */
    int32_t seq_len;      /* longest position the model knows */
    int32_t tied;         /* 1: the classifier is tok_embeddings; 0: separate output.weight */
    int32_t head_dim;     /* channels of a head, even; 0: dim / n_heads */
    int32_t qkv_bias;     /* 1: wq, wk and wv add a bias */
    int32_t qk_norm;      /* 1: each head of q and k goes through an RMSNorm before RoPE */
    int32_t rope_scaling; /* ANEPY_ROPE_PLAIN ... */
    int32_t rope_original_max_position;
    int32_t reserved;
    double norm_eps;   /* added to the mean square in every RMSNorm; 0: 1e-5 */
    double rope_theta; /* base of the frequencies of RoPE; 0: 10000 */
    double rope_factor;
    double rope_low_freq_factor;
    double rope_high_freq_factor;
} anepy_config;

#define ANEPY_TENSOR_MATRIX 1u    /* [rows, cols]; else a vector [cols] */
#define ANEPY_TENSOR_DECAYS 2u    /* weight decay shrinks it: matrices, not norms and biases */
#define ANEPY_TENSOR_TRAINABLE 4u /* it has a gradient and moments */
#define ANEPY_TENSOR_ADAPTER 8u   /* A or B of an adapter: it is in the arena of these */

/* One row of the tensor table. The arena of weights holds all tensors, those of gradients and of
 * Adam's m and v the trainable ones, that of adapters theirs, in this order and without gaps. */
typedef struct anepy_tensor {
    uint32_t struct_size;
    uint32_t flags;   /* ANEPY_TENSOR_... */
    char name[64];    /* as in Meta's Llama, e.g. layers.0.attention.wq.weight */
    int64_t offset;   /* how many numbers stand before it there; bytes / 4 if all are float32 */
    int64_t gradient; /* first element in the arenas of gradients and moments; -1: it is frozen */
    int64_t rows;     /* 1 for vectors */
    int64_t cols;
    int32_t layer;   /* -1: of none */
    int32_t role;    /* a number for what it is in its layer, or in the model */
    int64_t byte;    /* where it begins in the arena of weights, or of adapters */
    int32_t storage; /* ANEPY_STORED_... */
    int32_t reserved;
} anepy_tensor;

typedef struct anepy_model anepy_model; /* dimensions + tensor table; holds no weights */

ANEPY_API int32_t anepy_model_create(anepy_model **out, const anepy_config *config);
ANEPY_API void anepy_model_free(anepy_model *model); /* accepts NULL */
ANEPY_API int32_t anepy_model_tensor_n(const anepy_model *model);
ANEPY_API int32_t anepy_model_tensor(const anepy_model *model, int32_t index, anepy_tensor *out);
/* Numbers in the arena of weights, the parameters, and the bytes they take. */
ANEPY_API int64_t anepy_model_arena_n(const anepy_model *model);
ANEPY_API int64_t anepy_model_params_nbytes(const anepy_model *model);
/* Elements (float32) of the arenas of gradients and moments: the number of trainable parameters. */
ANEPY_API int64_t anepy_model_gradient_n(const anepy_model *model);

/* Takes a tensor out of training, before engines are made with this table: it has no gradient and
 * no moments, and no update changes it. Fails if none would be left to train. */
ANEPY_API int32_t anepy_model_freeze(anepy_model *model, int32_t index);

/* How a tensor is stored. */
#define ANEPY_STORED_F32 0
#define ANEPY_STORED_BF16 2
#define ANEPY_STORED_Q8 3 /* 32 numbers of a row in 34 bytes: a binary16 scale, int8 values */

/* Stores a matrix smaller, before engines and decoders are made with this table: its place and
 * those of the tensors behind it change. It is frozen, as only float32 is trained. Vectors stay
 * float32; a matrix whose rows are no multiple of 32 long becomes bf16 where Q8 is asked for. */
ANEPY_API int32_t anepy_model_store(anepy_model *model, int32_t index, int32_t storage);
/* Converts n numbers, of Q8 whole blocks; fails if one is too large for its storage. bf16 is
 * rounded to nearest even; Q8 has the scale max |x| / 127, as GGUF's Q8_0. */
ANEPY_API int32_t anepy_pack(void *dst, const float *src, int32_t storage, int64_t n);
ANEPY_API int32_t anepy_unpack(float *dst, const void *src, int32_t storage, int64_t n);

/* Bits of the projections that anepy_model_adapt takes, in the order of the table. */
enum { ANEPY_TARGET_WQ = 1, ANEPY_TARGET_WK = 2, ANEPY_TARGET_WV = 4, ANEPY_TARGET_WO = 8 };
enum { ANEPY_TARGET_W1 = 16, ANEPY_TARGET_W3 = 32, ANEPY_TARGET_W2 = 64, ANEPY_TARGET_N = 7 };
#define ANEPY_ADAPTER_RANK 512 /* the largest */
/* Adds low-rank adapters (Hu et al. 2021, arXiv 2106.09685) and freezes all else, before engines
 * are made with this table: y = W x + scale B (A x). A [rank, in] and B [out, rank] are rows behind
 * all others, like layers.0.attention.wq.lora_a and .lora_b. */
ANEPY_API int32_t anepy_model_adapt(anepy_model *model, int32_t rank, double scale,
                                    uint32_t targets);
ANEPY_API int64_t anepy_model_adapter_n(const anepy_model *model); /* elements of their arena */

/* Radians per position by which RoPE turns pair `pair` of a head, 0 <= pair < head_dim / 2: its
 * channels 2 pair and 2 pair + 1. Scaling included. */
ANEPY_API double anepy_rope_frequency(const anepy_model *model, int32_t pair);

/* Floating-point operations of one step in matrix products, two per multiply-add. Counted as the
 * research programs do (docs/neural-engine.md#flops): attention counts in the backward pass alone,
 * with five products of [tokens, tokens] per head. What frozen tensors save is not counted. */
typedef struct anepy_flops {
    uint32_t struct_size;
    uint32_t flags;
    double forward; /* products of the layers with their weights */
    double backward_dx;
    double backward_dw;
    double attention;
    double classifier; /* logits and their gradients */
    double total;
} anepy_flops;

ANEPY_API int32_t anepy_step_flops(const anepy_model *model, anepy_flops *out, int32_t sequences,
                                   int32_t tokens);

/* Zeroed, 64 KiB aligned memory, on large pages where the system has them. The pages are backed
 * when first touched. Free with the same size. */
ANEPY_API int32_t anepy_memory_alloc(void **out, uint64_t nbytes);
ANEPY_API void anepy_memory_free(void *memory, uint64_t nbytes); /* accepts NULL */

/* ------------------------------------------------------------------------------------ engine */

typedef struct anepy_engine anepy_engine;

/* Programs are compiled when first needed, not at once: for callers that will call
 * anepy_engine_restore, which compiles them for the weights it is told of. */
#define ANEPY_ENGINE_DEFER 1u
/* Of the activations of a layer only its input is kept; the backward pass computes the others
 * again: one forward pass more, the same bits, less memory. */
#define ANEPY_ENGINE_RECOMPUTE 2u
/* adam_m and adam_v are bf16, uint16 instead of float32, rounded at random so that the mean is
 * right; equal runs have equal bits. */
#define ANEPY_ENGINE_BF16_MOMENTS 4u

/* The arenas are 64-byte aligned, owned by the caller and alive until anepy_engine_free: params
 * of anepy_model_params_nbytes, which is read and, by update, written; the others
 * float32[anepy_model_gradient_n]. With metal_dw, grads is from anepy_memory_alloc: a GPU takes
 * whole mappings. */
typedef struct anepy_engine_options {
    uint32_t struct_size;
    uint32_t flags; /* ANEPY_ENGINE_... */
    void *params;
    float *grads;
    void *adam_m;
    void *adam_v;
    const char *variant;   /* NULL: "max"; else NAME, then any of +switch -switch */
    const char *device;    /* NULL: "auto"; else NAME or NAME:DETAILS, as "sim:m1,budget=20" */
    const char *precision; /* NULL: "auto" */
    int32_t seq_len;       /* longest sequence of this engine; 0: the model's */
    int32_t threads;       /* 0: affinity, cgroup quota and physical cores decide */
    double loss_scale;     /* fp16: what the dynamic scale starts with; 0: default */
    float *adapter;        /* float32[anepy_model_adapter_n], as params; NULL: the model has none */
    const char *optimizer; /* of anepy_optimizer_name; NULL: "adamw" */
} anepy_engine_options;

typedef struct anepy_engine_info {
    uint32_t struct_size;
    uint32_t switches; /* bit i: switch i of anepy_switch_name */
    char device[16];
    char precision[16];
    char isa[32];
    int32_t threads;
    int32_t seq_len;
    int64_t accumulated;    /* steps since the last update */
    int64_t updates;        /* updates so far: Adam's t */
    double loss_scale;      /* 1 unless losses are scaled */
    int64_t clean_steps;    /* since the scale last changed */
    int64_t compiles;       /* compilations so far; 0 where weights are live */
    int64_t compile_budget; /* most that this process may do, all engines together; 0: no limit */
    int32_t stale;          /* 1: no programs hold the weights as they are */
    int32_t reserved;
    uint64_t memory; /* bytes of activations, surfaces and buffers, for as many sequences as ran at
                      * once so far; arenas not included */
    int64_t counted; /* targets that the gradients are the sum over; 0: none, or not known */
    double unit;     /* that of each is in them times loss_scale / unit; 0: not known */
} anepy_engine_info;

/* What one step did. Times are milliseconds of the calling thread, except dw_ms. */
typedef struct anepy_step_stats {
    uint32_t struct_size;
    uint32_t skipped;      /* 1: a gradient was not finite, nothing was accumulated */
    double loss;           /* mean cross-entropy of the counted targets in nats */
    double loss_scale;     /* gradients carry this factor; 1 without fp16 */
    double flops;          /* total of anepy_step_flops */
    double step_ms;        /* all of it */
    double device_ms;      /* programs on the device, forward and backward */
    double io_ms;          /* to and from surfaces */
    double classifier_ms;  /* logits and their gradients */
    double softmax_ms;     /* softmax + loss */
    double norm_ms;        /* RMSNorm outside the programs */
    double elementwise_ms; /* embedding, residuals */
    double dw_ms;          /* weight-gradient products, summed over all threads */
    double dw_wait_ms;     /* waiting for them at the end of the step */
    int64_t allocations;   /* heap operations during the step */
    double forward_ms;     /* up to and with the loss */
    double backward_ms;    /* the rest */
    int64_t tokens;        /* targets that are counted */
    /* What there was to do, for a prediction of its time elsewhere. */
    int64_t dispatches;    /* programs evaluated on the device */
    int64_t device_nbytes; /* their inputs, outputs and weights, each once */
    int64_t io_nbytes;     /* moved between host and surfaces, or from surface to surface */
    int64_t host_nbytes;   /* read and written by the host's work on elements, as float32 */
    int64_t host_exps;     /* exponentials on the host: of soft-max */
    double device_flops;   /* of the products in those programs */
    double host_flops;     /* of the classifier's products on the host */
    double dw_flops;       /* of weight gradients on the host, but the classifier's */
    int64_t dw_nbytes;     /* read and written to add those that the device has computed */
} anepy_step_stats;

#define ANEPY_LEAVE_GRADIENTS 1u   /* nobody reads them before the next step, which replaces them */
#define ANEPY_GRADIENTS_AS_LEFT 2u /* nobody has written to them since the last step */
#define ANEPY_SQUARES_GIVEN 4u     /* squares is the sum of the squares of the gradients */

typedef struct anepy_update_options {
    uint32_t struct_size;
    uint32_t flags; /* ANEPY_LEAVE_GRADIENTS saves the time to clear gradients;
                     * ANEPY_GRADIENTS_AS_LEFT, from the second such update on, the time to read
                     * them for their norm */
    double lr;
    double beta1;
    double beta2;
    double eps;
    double weight_decay; /* of tensors with ANEPY_TENSOR_DECAYS */
    double grad_clip;    /* largest global norm; 0: none */
    double momentum;     /* sgd, and muon's matrices */
    double matrix_lr;    /* muon: of the matrices of the layers, in place of lr */
    double squares;
    /* Updates a part of what is trained only: part_n elements of the arena of gradients from
     * part_first on, and of each part_stride further. part_n 0: everything. Not with muon. */
    int64_t part_first;
    int64_t part_n;
    int64_t part_stride;
} anepy_update_options;

typedef struct anepy_update_stats {
    uint32_t struct_size;
    uint32_t skipped; /* 1: a gradient was not finite: weights untouched, gradients dropped */
    double grad_norm; /* of the mean gradient, before clipping; NaN where nothing asks for it */
    double update_ms;
    double compile_ms; /* baked weights: programs for the new ones */
} anepy_update_stats;

/* Names of the optimizers; NULL beyond the last. */
ANEPY_API const char *anepy_optimizer_name(int32_t index);
/* Moments it keeps of a trainable tensor: 1 (adam_m) or 2. adam_v may be NULL where none has two.
 */
ANEPY_API int32_t anepy_optimizer_moments(const char *optimizer, const anepy_tensor *tensor);

ANEPY_API int32_t anepy_engine_create(anepy_engine **out, const anepy_model *model,
                                      const anepy_engine_options *options);
ANEPY_API void anepy_engine_free(anepy_engine *engine); /* joins its threads; accepts NULL */
ANEPY_API int32_t anepy_engine_get_info(const anepy_engine *engine, anepy_engine_info *out);

/* Forward + backward of one sequence, one step.
 * tokens, targets: int32[n], 1 <= n <= seq_len; tokens in [0, vocab_size), targets below that. A
 * target below 0, -100 by custom, is not counted: it has no loss and no gradient. A call in which
 * none is counted fails with ANEPY_E_ARGUMENT and has changed nothing.
 *
 * The loss is the mean over the counted targets. Gradients accumulate: they are the sum over all
 * targets counted since the last update of the gradient of each one's loss, times loss_scale /
 * unit. The unit is the number of targets counted in the first of those steps, after which they are
 * loss_scale times the gradient of its loss. A step that fails, or is skipped, adds nothing that an
 * update would use. */
ANEPY_API int32_t anepy_engine_step(anepy_engine *engine, anepy_step_stats *out,
                                    const int32_t *tokens, const int32_t *targets, int32_t n);

/* Forward + backward of `count` sequences of n tokens, int32[count, n], as one step. A sequence may
 * have no counted target. Device cpu computes as many sequences side by side as fit into 512
 * columns, n rounded up to 64 for each. The first such step, or anepy_engine_reserve before it,
 * makes room for them; if there is no memory for it they fail with ANEPY_E_MEMORY and nothing has
 * changed.
 *
 * starts, here and below: uint8[count, n], not 0 for the first token of a document, which is
 * computed as if it were a sequence: no token looks into another one, and positions begin at 0 in
 * each. The target of a last token should be below 0. A sequence always begins one; NULL: it is
 * one. Device cpu only; others fail with ANEPY_E_UNSUPPORTED. */
ANEPY_API int32_t anepy_engine_step_batch(anepy_engine *engine, anepy_step_stats *out,
                                          const int32_t *tokens, const int32_t *targets,
                                          const uint8_t *starts, int32_t count, int32_t n);
ANEPY_API int32_t anepy_engine_reserve(anepy_engine *engine, int32_t count, int32_t n);

/* The engine's optimizer with the mean gradient of the targets counted since the last update, then
 * clears the gradients. adamw is as in PyTorch (Loshchilov & Hutter 2019); libsrc/train/update.c
 * and muon.c have the formulas of the others. Fails with ANEPY_E_STATE if none
 * was. Where weights are baked, it compiles programs for the new ones. If that fails the update is
 * still complete, and `stale` in the engine's info is 1: the next call that needs the programs
 * compiles them, and tells the reason if it fails again. That is ANEPY_E_BUDGET if the process may
 * compile no more programs. */
ANEPY_API int32_t anepy_engine_update(anepy_engine *engine, anepy_update_stats *out,
                                      const anepy_update_options *options);

/* Says that the caller will change the gradients in place until the next update, which takes their
 * norm anew. To train with several engines as one, add the gradients of all of them then, each
 * having called this with the same numbers: counted is the sum of what their infos say (below 0:
 * this engine's), scale the smallest of their loss_scale / unit (0: this engine's). The gradients
 * are multiplied to carry scale first. They become NaN if this engine must not update, because one
 * of them is not finite or all its steps were skipped: then none does. An engine without a step
 * since the last update has gradients of zero, and must be told both numbers; without, it fails
 * with ANEPY_E_STATE. counted 0 says that no engine may update: the next update is skipped.
 * ANEPY_REDUCED: the gradients carry scale already. */
#define ANEPY_REDUCED 1u
ANEPY_API int32_t anepy_engine_reduce(anepy_engine *engine, int64_t counted, double scale,
                                      uint32_t flags);

/* With on, steps leave out what their last sequences, those that run side by side at the end, add
 * to the gradient of the embedding. All else of it is final with the first bucket then. `holds`
 * returns how many tokens those sequences have in a step of `count` sequences of n. The last call
 * copies what the step before it left out, for the caller to add: float32 [tokens, dim], a row for
 * each of them. It returns how many rows that is; rows NULL: nothing is copied. */
ANEPY_API int32_t anepy_engine_holds(anepy_engine *engine, int32_t count, int32_t n);
ANEPY_API int32_t anepy_engine_hold_embedding(anepy_engine *engine, int32_t on);
ANEPY_API int32_t anepy_engine_held_embedding(anepy_engine *engine, float *rows);

/* Forgets the steps since the last update; gradients are zero. */
ANEPY_API int32_t anepy_engine_discard(anepy_engine *engine);

/* How many buckets of gradients are final; of how many steps that have begun: *steps. Any thread
 * may ask, also while a step runs. Buckets become final from the end of the arena down: what stands
 * behind the layers; each layer, the last one first; the embedding. One in which everything is
 * frozen is none. All are when no step runs. */
ANEPY_API int32_t anepy_engine_ready(const anepy_engine *engine, int64_t *steps);

/* Mean cross-entropy of the counted targets, without gradients; the same of several sequences, as
 * many side by side as there is room for. losses: double [count, n], that of each target and 0
 * where it is not counted; NULL: not wanted. */
ANEPY_API int32_t anepy_engine_evaluate(anepy_engine *engine, double *loss, const int32_t *tokens,
                                        const int32_t *targets, int32_t n);
ANEPY_API int32_t anepy_engine_evaluate_batch(anepy_engine *engine, double *loss, double *losses,
                                              const int32_t *tokens, const int32_t *targets,
                                              const uint8_t *starts, int32_t count, int32_t n);

/* logits: float32 [n, vocab_size], row t predicts token t+1; or [count, n, vocab_size]. No
 * gradients. */
ANEPY_API int32_t anepy_engine_logits(anepy_engine *engine, float *logits, const int32_t *tokens,
                                      int32_t n);
ANEPY_API int32_t anepy_engine_logits_batch(anepy_engine *engine, float *logits,
                                            const int32_t *tokens, const uint8_t *starts,
                                            int32_t count, int32_t n);

/* Tells the engine that the arenas were filled from a checkpoint: takes over accumulated, counted,
 * unit, updates, loss_scale and clean_steps, and recompiles where weights are baked. counted 0: the
 * gradients are the sum of those of the mean losses of `accumulated` steps with as many targets
 * each as the next step, if one follows. */
ANEPY_API int32_t anepy_engine_restore(anepy_engine *engine, const anepy_engine_info *info);

/* ----------------------------------------------------------------------------------- decoder */

typedef struct anepy_decoder anepy_decoder; /* computes logits with a key/value cache */

/* params: of anepy_model_params_nbytes, alive until anepy_decoder_free. */
ANEPY_API int32_t anepy_decoder_create(anepy_decoder **out, const anepy_model *model,
                                       const void *params, int32_t max_len, int32_t threads);
ANEPY_API void anepy_decoder_free(anepy_decoder *decoder); /* accepts NULL */
/* logits: float32[vocab_size]. Positions run 0, 1, 2, ...; position 0 starts anew. */
ANEPY_API int32_t anepy_decoder_forward(anepy_decoder *decoder, float *logits, int32_t token,
                                        int32_t position);
/* The same for n >= 1 tokens at positions [position, position + n), many at once: a prompt. logits
 * are those after the last one; NULL: none. */
ANEPY_API int32_t anepy_decoder_prefill(anepy_decoder *decoder, float *logits,
                                        const int32_t *tokens, int32_t n, int32_t position);

/* ------------------------------------------------------------------------------ introspection */

typedef struct anepy_library_info {
    uint32_t struct_size;
    uint32_t flags;
    char isa[32];       /* instruction set in use */
    char isa_all[128];  /* all that can be used here, best first, separated by spaces */
    char compiler[128]; /* what built the library */
    char gemm[64];      /* name of the matrix kernel in use */
    int32_t threads;    /* what "0 threads" means here */
    int32_t cores;      /* physical cores this process may use */
} anepy_library_info;

typedef struct anepy_device_info {
    uint32_t struct_size;
    int32_t usable;
    char name[16];
    char reason[240]; /* why it cannot be used here; else what it is */
} anepy_device_info;

ANEPY_API int32_t anepy_library_get_info(anepy_library_info *out);
ANEPY_API int32_t anepy_device_get_info(int32_t index, anepy_device_info *out); /* as below */
ANEPY_API const char *anepy_switch_name(int32_t index);  /* NULL beyond the last */
ANEPY_API const char *anepy_variant_name(int32_t index); /* NULL beyond the last */
/* The switches a variant text stands for on a device ("auto" included), for a model or, with NULL,
 * for one that every switch takes. */
ANEPY_API int32_t anepy_variant_parse(const char *text, const char *device,
                                      const anepy_model *model, uint32_t *switches);

/* --------------------------------------------------------------------------------- measurement */

/* What this machine can do at most: arithmetic in registers; memory with arrays of 128 MiB, by the
 * bytes that are read and written (1 GB is 1e9 bytes). */
typedef struct anepy_peaks {
    uint32_t struct_size;
    int32_t threads;
    char isa[32];
    double fp32_gflops; /* fused multiply-adds, two operations each */
    double bf16_gflops; /* bf16 dot products; 0: this instruction set has none */
    double read_gbs;    /* sum of a */
    double copy_gbs;    /* a = b */
    double triad_gbs;   /* a += b */
} anepy_peaks;
/* isa: one of isa_all, NULL: the one in use; threads 0: default. Takes about 0.05 s, and with
 * memory, which is measured then too, 0.15 s and 256 MiB. */
ANEPY_API int32_t anepy_peaks_measure(anepy_peaks *out, const char *isa, int32_t threads,
                                      int32_t memory);

/* The benchmark: parts of the training step, one at a time. */
typedef struct anepy_bench_options {
    uint32_t struct_size;
    int32_t seq_len;       /* tokens */
    const char *name;      /* as anepy_bench_at */
    const char *isa;       /* one of isa_all; NULL: the one in use */
    const char *precision; /* of the factors of products, fp32 or bf16; NULL: fp32 */
    int32_t threads;       /* 0: default */
    int32_t rounds;        /* 0: only describe the case */
    double round_ms;       /* each round repeats the case for about so long, at least once */
    double limit_ms;       /* after three rounds none begins past this time; 0: no limit */
} anepy_bench_options;

typedef struct anepy_bench_result {
    uint32_t struct_size;
    int32_t threads;
    int32_t rounds;      /* measured */
    int32_t repetitions; /* in each round */
    int32_t fp32;        /* whether there is such a form of it */
    int32_t bf16;
    char isa[32];
    char precision[16];
    char shape[64];
    char limit[32];    /* what bounds it: fp32, bf16 (arithmetic), read, copy, triad (memory) */
    double operations; /* of one repetition */
    double bytes;      /* that it has to read and write at least */
    double calls;      /* repetitions in a step, or in an update */
    double error;      /* |result - scalar| / |scalar|, the largest of its outputs */
} anepy_bench_result;

ANEPY_API const char *anepy_bench_at(int32_t index); /* names; NULL beyond the last */
/* Checks a case against the scalar kernels (ANEPY_E_STATE if it is wrong), then times it.
 * seconds: double[rounds], of one repetition each. */
ANEPY_API int32_t anepy_bench_run(const anepy_model *model, anepy_bench_result *out,
                                  double *seconds, const anepy_bench_options *options);

#ifdef __cplusplus
}
#endif

#include "anepy_programs.h" /* the rest: programs, simulator */

#endif
