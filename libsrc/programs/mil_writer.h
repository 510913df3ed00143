/* programs/mil_writer.h - types and functions shared by the files of the MIL generator.
 *
 * mil_text.c writes one operation per call, mil_baked.c puts constants into the weight file,
 * mil_blocks.c builds norms, projections and heads from operations, and mil_generate.c builds
 * programs from those. `status` keeps the first failure; all calls after it do nothing. */
#ifndef ANEPY_PROGRAMS_MIL_WRITER_H
#define ANEPY_PROGRAMS_MIL_WRITER_H

#include "programs/mil_generate.h"

#define MIL_NAME 32
#define MIL_CONSTANTS 128 /* most small constants of a function; programs have up to 50 */

/* A tensor of the function being written: its name and [1, C, H, W], always of rank 4. */
typedef struct {
    char name[MIL_NAME];
    int32_t dims[4];
} mil_tensor;

/* Identifies a stored constant: equal keys mean equal bytes. */
typedef struct {
    int32_t kind;
    int64_t a, b, c; /* parameters of the kind */
} mil_key;

typedef struct {
    mil_key key;
    uint64_t offset;
    int32_t function; /* the last function that declared it, as `tensor` */
    mil_tensor tensor;
} mil_record;

/* A small constant this function has declared: "int32(1)". */
typedef struct {
    char text[80];
    char name[MIL_NAME];
} mil_constant;

typedef struct {
    anepy_mil_source *out;
    uint64_t capacity; /* of out->text */
    anepy_dialect dialect;
    int32_t status;
    const anepy_model *model;
    int32_t width;
    const anepy_program *program;
    const void *params;
    int32_t layer;
    int32_t function; /* number of the function being written */
    int32_t counter;  /* makes names unique in the function */
    mil_constant constants[MIL_CONSTANTS];
    int32_t constant_n;
    mil_record *records;
    int32_t record_n, record_cap;
    mil_tensor surfaces[ANEPY_PROGRAM_SURFACES];  /* a_in, b_in... */
    mil_tensor parameters[ANEPY_PROGRAM_WEIGHTS]; /* live weights */
    mil_tensor matrices[ANEPY_PROGRAM_WEIGHTS]; /* live weights reshaped to [1, 1, rows, cols], when
                                                   first used */
    mil_tensor low[7];                          /* of adapters: the thin outputs so far */
    int32_t low_n;
} mil_writer;

/* --------------------------------------------------------------------------------- mil_text.c */

int32_t anepy_emit_fail(mil_writer *w, int32_t status, const char *format, ...) ANEPY_PRINTF(3, 4);
void anepy_emit_begin_program(mil_writer *w);
void anepy_emit_end_program(mil_writer *w);
void anepy_emit_begin_function(mil_writer *w, const char *name);
void anepy_emit_end_function(mil_writer *w);

/* Each writes one operation and returns its result, whose name begins with `hint`; the output of
 * the function is named exactly "z_out". */
mil_tensor anepy_emit_slice(mil_writer *w, mil_tensor x, int32_t channel, int32_t channels,
                            const char *hint);
mil_tensor anepy_emit_concat(mil_writer *w, const mil_tensor *x, int32_t n, const char *hint);
mil_tensor anepy_emit_reshape(mil_writer *w, mil_tensor x, int32_t c, int32_t h, int32_t width,
                              const char *hint); /* returns x if it has this shape */
mil_tensor anepy_emit_swap_last(mil_writer *w, mil_tensor x,
                                const char *hint); /* swaps the last two axes */
mil_tensor anepy_emit_conv(mil_writer *w, mil_tensor weight, mil_tensor x,
                           const char *hint); /* a 1x1 convolution */
mil_tensor anepy_emit_matmul(mil_writer *w, mil_tensor x, int transpose_x, mil_tensor y,
                             int transpose_y, const char *hint);
mil_tensor anepy_emit_binary(mil_writer *w, const char *op, mil_tensor x, mil_tensor y,
                             const char *hint);
/* op(x, value), or op(value, x); the value must be a normal fp16 number. */
mil_tensor anepy_emit_with_scalar(mil_writer *w, const char *op, mil_tensor x, double value,
                                  const char *hint);
mil_tensor anepy_emit_scalar_with(mil_writer *w, const char *op, double value, mil_tensor x,
                                  const char *hint);
mil_tensor anepy_emit_tanh(mil_writer *w, mil_tensor x, const char *hint);
mil_tensor anepy_emit_softmax(mil_writer *w, mil_tensor x, int32_t axis, const char *hint);

/* Declares a constant whose fp16 record is in the weight file at offset. */
mil_tensor anepy_emit_declare_blob(mil_writer *w, const int32_t dims[4], uint64_t offset,
                                   const char *hint);

/* -------------------------------------------------------------------------------- mil_baked.c */

/* Rows [first, first + rows) of a weight as conv weight [rows, cols, 1, 1], or transposed as [cols,
 * rows, 1, 1]. */
mil_tensor anepy_emit_baked_matrix(mil_writer *w, const anepy_program_matrix *m, int transposed,
                                   int32_t first, int32_t rows);
/* Times a factor, [1, cols, 1, 1]; of_head: for the channels of each head, [1, 1, cols, 1]. */
mil_tensor anepy_emit_baked_vector(mil_writer *w, const anepy_program_matrix *m, double factor,
                                   int of_head);
mil_tensor anepy_emit_ones_column(mil_writer *w,
                                  double value); /* [1, dim, 1, 1]: a sum over channels */
/* Sums over the channels of each head, put in all of its channels: the factor of a product per head
 * [1, heads, head_dim, head_dim], or a conv weight [heads * head_dim, heads * head_dim, 1, 1]. */
mil_tensor anepy_emit_head_sum(mil_writer *w, int32_t heads, double value, int as_conv);
mil_tensor anepy_emit_ones_square(mil_writer *w,
                                  int32_t channels);          /* [1, channels, width, width] */
mil_tensor anepy_emit_zeros(mil_writer *w, int32_t channels); /* [1, channels, 1, width] */
/* [1, channels, 1, width] with the value of a masked logit. */
mil_tensor anepy_emit_masked(mil_writer *w, int32_t channels);
mil_tensor anepy_emit_causal_mask(mil_writer *w);      /* [1, 1, width, width] */
mil_tensor anepy_emit_angles(mil_writer *w, int sine); /* [1, 1, head_dim, width] */
/* The quarter turn of every channel pair: per head [1, heads, head_dim, head_dim], or as one conv
 * weight [heads * head_dim, heads * head_dim, 1, 1]. */
mil_tensor anepy_emit_quarter_turn(mil_writer *w, int32_t heads, int as_conv);
/* Conv weight that spreads heads of head_dim channels to `padded` channels, zeros behind, or takes
 * them out again. */
mil_tensor anepy_emit_head_padding(mil_writer *w, int32_t heads, int32_t padded, int remove);

/* ------------------------------------------------------------------------------- mil_blocks.c */

/* The projection of x with the weight of this role, ANEPY_WQ..., and its adapter; with transposed
 * != 0 the gradient of its input from that of its output. */
mil_tensor anepy_emit_linear(mil_writer *w, int32_t role, int transposed, mil_tensor x,
                             const char *hint);

/* Appends channels of zeros up to n channels. */
mil_tensor anepy_emit_pad_channels(mil_writer *w, mil_tensor x, int32_t n);

/* x / rms(x) * 16 / sqrt(dim) without norm weight, and the factor 16 / (sqrt(dim) rms(x)), [1, 1,
 * 1, width]. */
typedef struct {
    mil_tensor unit, inverse;
} mil_normalized;
mil_normalized anepy_emit_normalize(mil_writer *w, mil_tensor x, int want_inverse);
mil_tensor anepy_emit_norm_weight(mil_writer *w, int32_t role); /* times sqrt(dim) / 16 */
mil_tensor anepy_emit_rmsnorm(mil_writer *w, int32_t role, mil_tensor x, const char *hint);
/* The gradient of x from that of its norm. */
mil_tensor anepy_emit_rmsnorm_back(mil_writer *w, int32_t role, mil_tensor dy, mil_tensor x,
                                   const char *hint);
/* Of the channels of each head, in [1, heads * head_dim, 1, width]; x if the model has none. */
mil_tensor anepy_emit_head_norm(mil_writer *w, int32_t role, mil_tensor x, int32_t heads,
                                const char *hint);
/* The gradient of x from that of its norm, for a model that has these. */
mil_tensor anepy_emit_head_norm_back(mil_writer *w, int32_t role, mil_tensor dy, mil_tensor x,
                                     int32_t heads, const char *hint);

/* RoPE of [1, heads * head_dim, 1, width]; with inverse != 0 rotates back. */
mil_tensor anepy_emit_rope(mil_writer *w, mil_tensor x, int32_t heads, int inverse,
                           const char *hint);

/* Attention's operands, from [1, heads * head_dim, 1, width]; heads are filled up with zeros to a
 * multiple of 32. Keys (or values): [1, kv, head, width]. Queries (or their gradients): those that
 * share a K/V head side by side, [1, kv, head, n] as columns, else [1, kv, n, head], with
 * n = group * width. */
typedef struct {
    mil_tensor x;
    int columns;
} mil_queries;
mil_tensor anepy_emit_keys(mil_writer *w, mil_tensor x);
mil_queries anepy_emit_queries(mil_writer *w, mil_tensor x);
/* sum_d queries[d, q] * keys[d, t]: scores, [1, kv, n, width]. */
mil_tensor anepy_emit_dot_heads(mil_writer *w, mil_queries q, mil_tensor keys, const char *hint);
/* For every query the sum of keys[:, t] weighted by its scores: [1, dim, 1, width]. */
mil_tensor anepy_emit_gather_keys(mil_writer *w, mil_tensor keys, mil_tensor scores,
                                  const char *hint);
/* For every key the sum of queries[:, q] weighted by its scores, over all query heads that share
 * it, in one wide accumulation: [1, kv_dim, 1, width]. */
mil_tensor anepy_emit_sum_queries(mil_writer *w, mil_queries q, mil_tensor scores,
                                  const char *hint);
/* softmax(q k / sqrt(head_dim) + causal mask): [1, kv, n, width]. */
mil_tensor anepy_emit_probabilities(mil_writer *w, mil_tensor q, mil_tensor k);

#endif
