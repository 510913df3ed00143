/* programs/mil_generate.c - every program of the table as MIL.
 *
 * The mathematics of each stands above TABLE in programs.c; the order of operations here is chosen
 * for the range and rounding of fp16. */
#include "programs/mil_generate.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"
#include "programs/mil_writer.h"

/* Vocabulary rows per product: a convolution over 32000 input channels is refused, over 4096 known
 * to work. */
#define PRODUCT_ROWS 4096
#define PRODUCTS_MAX 16

static mil_tensor input(mil_writer *w, int32_t tensor) {
    const anepy_program_tensor *t = &w->program->tensors[tensor];
    return anepy_emit_slice(w, w->surfaces[t->surface], t->channel, t->channels, t->name);
}

/* Ends a program whose outputs are these and the thin ones of adapters. */
static void output(mil_writer *w, const mil_tensor *tensors, int32_t n) {
    mil_tensor all[ANEPY_PROGRAM_TENSORS];
    memcpy(all, tensors, (size_t)n * sizeof *all);
    memcpy(all + n, w->low, (size_t)w->low_n * sizeof *all);
    anepy_emit_concat(w, all, n + w->low_n, "z_out");
}

/* ------------------------------------------------------------------------------------ programs */

/* One emitting call per statement, because C leaves the order of calls within a statement open, and
 * the text must not depend on the compiler. */

/* What the two halves of a layer compute, in the order of their outputs. */
typedef struct {
    mil_tensor out, q, k, v, attn, xnorm, q_raw, k_raw;
} attention;
typedef struct {
    mil_tensor out, h1, h3, gate, xnorm;
} feed_forward;

static attention attend(mil_writer *w, mil_tensor x) {
    const anepy_config *c = &w->model->config;
    attention a;
    a.xnorm = anepy_emit_rmsnorm(w, ANEPY_ATTENTION_NORM, x, "xnorm");
    a.q_raw = anepy_emit_linear(w, ANEPY_WQ, 0, a.xnorm, "q");
    a.q = anepy_emit_head_norm(w, ANEPY_Q_NORM, a.q_raw, c->n_heads, "q");
    a.q = anepy_emit_rope(w, a.q, c->n_heads, 0, "q");
    a.k_raw = anepy_emit_linear(w, ANEPY_WK, 0, a.xnorm, "k");
    a.k = anepy_emit_head_norm(w, ANEPY_K_NORM, a.k_raw, c->n_kv_heads, "k");
    a.k = anepy_emit_rope(w, a.k, c->n_kv_heads, 0, "k");
    a.v = anepy_emit_linear(w, ANEPY_WV, 0, a.xnorm, "v");
    mil_tensor probs = anepy_emit_probabilities(w, a.q, a.k);
    a.attn = anepy_emit_gather_keys(w, anepy_emit_keys(w, a.v), probs, "attn");
    a.out = anepy_emit_linear(w, ANEPY_WO, 0, a.attn, "out");
    return a;
}

/* The logistic function, through tanh: its table has a quarter of the error
 * (docs/neural-engine.md#training-under-it). */
static mil_tensor sigmoid(mil_writer *w, mil_tensor x) {
    mil_tensor t = anepy_emit_with_scalar(w, "mul", x, 0.5, "half");
    t = anepy_emit_with_scalar(w, "mul", anepy_emit_tanh(w, t, "tanh"), 0.5, "half");
    return anepy_emit_with_scalar(w, "add", t, 0.5, "sigmoid");
}

static feed_forward feed(mil_writer *w, mil_tensor x) {
    feed_forward f;
    f.xnorm = anepy_emit_rmsnorm(w, ANEPY_FFN_NORM, x, "xnorm");
    f.h1 = anepy_emit_linear(w, ANEPY_W1, 0, f.xnorm, "h1");
    f.h3 = anepy_emit_linear(w, ANEPY_W3, 0, f.xnorm, "h3");
    f.gate = anepy_emit_binary(w, "mul", f.h1, sigmoid(w, f.h1), "silu");
    f.gate = anepy_emit_binary(w, "mul", f.gate, f.h3, "gate");
    f.out = anepy_emit_linear(w, ANEPY_W2, 0, f.gate, "out");
    return f;
}

static void sdpa_fwd(mil_writer *w) {
    attention a = attend(w, input(w, SDPA_FWD_X));
    mil_tensor out[] = {a.out, a.q, a.k, a.v, a.attn, a.xnorm, a.q_raw, a.k_raw};
    output(w, out, w->model->config.qk_norm ? 8 : 6);
}

static void ffn_fwd(mil_writer *w) {
    feed_forward f = feed(w, input(w, FFN_FWD_X));
    mil_tensor out[] = {f.out, f.h1, f.h3, f.gate, f.xnorm};
    output(w, out, 5);
}

static void layer_fwd(mil_writer *w) {
    mil_tensor x = input(w, LAYER_FWD_X);
    attention a = attend(w, x);
    mil_tensor x2 = anepy_emit_binary(w, "add", x, a.out, "x2");
    feed_forward f = feed(w, x2);
    mil_tensor out[] = {a.out, a.q,  a.k,  a.v,    a.attn,  a.xnorm, x2,
                        f.out, f.h1, f.h3, f.gate, f.xnorm, a.q_raw, a.k_raw};
    output(w, out, w->model->config.qk_norm ? 14 : 12);
}

typedef struct {
    mil_tensor dx, dh1, dh3;
} feed_backward;

static feed_backward feed_back(mil_writer *w, mil_tensor dy, mil_tensor h1, mil_tensor h3) {
    feed_backward f;
    mil_tensor dgate = anepy_emit_linear(w, ANEPY_W2, 1, dy, "dgate");
    mil_tensor s = sigmoid(w, h1);
    mil_tensor t = anepy_emit_binary(w, "mul", dgate, s, "through");
    f.dh3 = anepy_emit_binary(w, "mul", t, h1, "dh3");
    mil_tensor slope = anepy_emit_scalar_with(w, "sub", 1.0, s, "slope");
    slope = anepy_emit_binary(w, "mul", h1, slope, "slope");
    slope = anepy_emit_with_scalar(w, "add", slope, 1.0, "slope");
    t = anepy_emit_binary(w, "mul", t, h3, "through");
    f.dh1 = anepy_emit_binary(w, "mul", t, slope, "dh1");
    mil_tensor a = anepy_emit_linear(w, ANEPY_W1, 1, f.dh1, "dx1");
    mil_tensor b = anepy_emit_linear(w, ANEPY_W3, 1, f.dh3, "dx3");
    f.dx = anepy_emit_binary(w, "add", a, b, "dx");
    return f;
}

static void ffn_bwd(mil_writer *w) {
    mil_tensor h1 = input(w, FFN_BWD_H1), h3 = input(w, FFN_BWD_H3);
    feed_backward f = feed_back(w, input(w, FFN_BWD_DY), h1, h3);
    mil_tensor out[] = {f.dx, f.dh1, f.dh3};
    output(w, out, 3);
}

/* Probabilities, [1, kv, n, width], and their gradients; that of v. */
typedef struct {
    mil_tensor probs, dprobs, dv;
} scores;

static scores score_back(mil_writer *w, mil_tensor dy, mil_tensor q, mil_tensor k, mil_tensor v) {
    scores s;
    mil_tensor dattn = anepy_emit_linear(w, ANEPY_WO, 1, dy, "dattn");
    mil_queries rows = anepy_emit_queries(w, dattn);
    mil_tensor values = anepy_emit_keys(w, v);
    s.probs = anepy_emit_probabilities(w, q, k);
    s.dprobs = anepy_emit_dot_heads(w, rows, values, "dprobs");
    s.dv = anepy_emit_sum_queries(w, rows, s.probs, "dv");
    return s;
}

static void sdpa_bwd1(mil_writer *w) {
    int32_t count = w->model->config.n_heads * w->width;
    mil_tensor v = input(w, SDPA_BWD1_V), dy = input(w, SDPA_BWD1_DY);
    mil_tensor q = input(w, SDPA_BWD1_Q), k = input(w, SDPA_BWD1_K);
    scores s = score_back(w, dy, q, k, v);
    s.probs = anepy_emit_reshape(w, s.probs, count, 1, w->width, "probs");
    s.dprobs = anepy_emit_reshape(w, s.dprobs, count, 1, w->width, "dprobs");
    mil_tensor out[] = {s.dv, s.probs, s.dprobs};
    output(w, out, 3);
}

typedef struct {
    mil_tensor dq, dk;
} query_key;

static query_key query_back(mil_writer *w, mil_tensor probs, mil_tensor dprobs, mil_tensor q,
                            mil_tensor k) {
    const anepy_config *c = &w->model->config;
    int32_t kv = c->n_kv_heads;
    double scale = 1.0 / sqrt(w->model->head_dim);
    query_key d;
    /* Row sums by a product with ones, which accumulates wide and spreads the sum over the row: M1
     * does not broadcast a runtime operand with one column. */
    mil_tensor sums = anepy_emit_binary(w, "mul", probs, dprobs, "terms");
    sums = anepy_emit_matmul(w, sums, 0, anepy_emit_ones_square(w, kv), 0, "sums");
    mil_tensor t = anepy_emit_binary(w, "sub", dprobs, sums, "centred");
    mil_tensor dscores = anepy_emit_binary(w, "mul", probs, t, "dscores");
    /* q and k are scaled, because scaled score gradients could be subnormal. */
    k = anepy_emit_with_scalar(w, "mul", k, scale, "scaled");
    q = anepy_emit_with_scalar(w, "mul", q, scale, "scaled");
    d.dq = anepy_emit_gather_keys(w, anepy_emit_keys(w, k), dscores, "dq");
    d.dk = anepy_emit_sum_queries(w, anepy_emit_queries(w, q), dscores, "dk");
    d.dq = anepy_emit_rope(w, d.dq, c->n_heads, 1, "dq");
    d.dk = anepy_emit_rope(w, d.dk, kv, 1, "dk");
    return d;
}

static void sdpa_bwd2(mil_writer *w) {
    int32_t kv = w->model->config.n_kv_heads, queries = w->model->config.n_heads / kv * w->width;
    mil_tensor probs = anepy_emit_reshape(w, input(w, SDPA_BWD2_P), kv, queries, w->width, "probs");
    mil_tensor dprobs =
        anepy_emit_reshape(w, input(w, SDPA_BWD2_DP), kv, queries, w->width, "dprobs");
    mil_tensor q = input(w, SDPA_BWD2_Q), k = input(w, SDPA_BWD2_K);
    query_key d = query_back(w, probs, dprobs, q, k);
    mil_tensor out[] = {d.dq, d.dk};
    anepy_emit_concat(w, out, 2, "z_out");
}

/* Gradient of the input of the three projections. */
static mil_tensor project_back(mil_writer *w, query_key d, mil_tensor dv, const char *hint) {
    mil_tensor a = anepy_emit_linear(w, ANEPY_WQ, 1, d.dq, "dx");
    mil_tensor b = anepy_emit_linear(w, ANEPY_WK, 1, d.dk, "dx");
    mil_tensor c = anepy_emit_linear(w, ANEPY_WV, 1, dv, "dx");
    a = anepy_emit_binary(w, "add", a, b, "dx");
    return anepy_emit_binary(w, "add", a, c, hint);
}

static void qkv_bwd(mil_writer *w) {
    query_key d = {input(w, QKV_BWD_DQ), input(w, QKV_BWD_DK)};
    int adapters = w->program->low[ANEPY_INTO_QKV] > 0;
    mil_tensor dx = project_back(w, d, input(w, QKV_BWD_DV), adapters ? "dx" : "z_out");
    if (adapters) output(w, &dx, 1);
}

static void rmsnorm_bwd(mil_writer *w) {
    mil_tensor x = input(w, RMSNORM_BWD_X), dy = input(w, RMSNORM_BWD_DY);
    anepy_emit_rmsnorm_back(w, w->program->weights[0], dy, x, "z_out");
}

static void layer_bwd(mil_writer *w) {
    const anepy_config *c = &w->model->config;
    mil_tensor dy = input(w, LAYER_BWD_DY), x2 = input(w, LAYER_BWD_X2);
    mil_tensor h1 = input(w, LAYER_BWD_H1), h3 = input(w, LAYER_BWD_H3);
    mil_tensor q = input(w, LAYER_BWD_Q), k = input(w, LAYER_BWD_K), v = input(w, LAYER_BWD_V);
    feed_backward f = feed_back(w, dy, h1, h3);
    mil_tensor through2 = anepy_emit_rmsnorm_back(w, ANEPY_FFN_NORM, f.dx, x2, "through");
    mil_tensor dx2 = anepy_emit_binary(w, "add", dy, through2, "dx2");
    scores s = score_back(w, dx2, q, k, v);
    query_key normed = query_back(w, s.probs, s.dprobs, q, k), d = normed;
    if (c->qk_norm) {
        mil_tensor q_raw = input(w, LAYER_BWD_INPUT_N), k_raw = input(w, LAYER_BWD_INPUT_N + 1);
        d.dq = anepy_emit_head_norm_back(w, ANEPY_Q_NORM, d.dq, q_raw, c->n_heads, "dq");
        d.dk = anepy_emit_head_norm_back(w, ANEPY_K_NORM, d.dk, k_raw, c->n_kv_heads, "dk");
    }
    mil_tensor dxnorm = project_back(w, d, s.dv, "dx");
    mil_tensor through =
        anepy_emit_rmsnorm_back(w, ANEPY_ATTENTION_NORM, dxnorm, input(w, LAYER_BWD_X), "through");
    mil_tensor out[] = {f.dx, through2, dx2,    f.dh1,   f.dh3,     d.dq,
                        d.dk, s.dv,     dxnorm, through, normed.dq, normed.dk};
    output(w, out, c->qk_norm ? 12 : 10);
}

/* Rows of dy times those of x, [1, rows of dy, 1, rows of x]: summed over columns. */
static mil_tensor gradient(mil_writer *w, mil_tensor dy, mil_tensor x, const char *hint) {
    int32_t rows = dy.dims[1];
    x = anepy_emit_pad_channels(w, x, (int32_t)anepy_round_up(x.dims[1], 32));
    dy = anepy_emit_reshape(w, dy, 1, rows, w->width, "left");
    x = anepy_emit_reshape(w, x, 1, x.dims[1], w->width, "right");
    mil_tensor y = anepy_emit_matmul(w, dy, 0, x, 1, "product");
    return anepy_emit_reshape(w, y, rows, 1, y.dims[3], hint);
}

/* Those of wo and w2 transposed, so that all have dim columns. */
static void layer_dw(mil_writer *w) {
    static const struct {
        int32_t rows, columns;
    } FACTORS[] = {{LAYER_DW_DQ, LAYER_DW_XNORM},   {LAYER_DW_DK, LAYER_DW_XNORM},
                   {LAYER_DW_DV, LAYER_DW_XNORM},   {LAYER_DW_ATTN, LAYER_DW_DX2},
                   {LAYER_DW_DH1, LAYER_DW_XNORM2}, {LAYER_DW_DH3, LAYER_DW_XNORM2},
                   {LAYER_DW_GATE, LAYER_DW_DY}};
    mil_tensor out[7];
    for (int32_t i = 0; i < 7; i++) {
        mil_tensor rows = input(w, FACTORS[i].rows), columns = input(w, FACTORS[i].columns);
        out[i] = gradient(w, rows, columns, "dw");
    }
    anepy_emit_concat(w, out, 7, "z_out");
}

static void final_rmsnorm(mil_writer *w) {
    anepy_emit_rmsnorm(w, ANEPY_FINAL_NORM, input(w, FINAL_RMSNORM_X), "z_out");
}

/* Tokens as [1, 128, groups, width]: token c * groups + g is channel c of group g. */
static void softmax(mil_writer *w) {
    int32_t vocab = w->program->input_channels, groups = anepy_softmax_groups(w->model);
    int32_t padded = ANEPY_SOFTMAX_GROUP * groups, exact = padded == vocab;
    mil_tensor x = input(w, SOFTMAX_LOGITS);
    if (!exact) {
        mil_tensor both[2] = {x, anepy_emit_masked(w, padded - vocab)};
        x = anepy_emit_concat(w, both, 2, "padded");
    }
    x = anepy_emit_reshape(w, x, ANEPY_SOFTMAX_GROUP, groups, w->width, "groups");
    x = anepy_emit_softmax(w, x, 1, exact && groups == 1 ? "z_out" : "probs");
    x = anepy_emit_reshape(w, x, padded, 1, w->width, exact ? "z_out" : "padded");
    anepy_emit_slice(w, x, 0, vocab, "z_out");
}

/* Rows [first, first + rows) of a live classifier as [1, 1, rows, columns]. */
static mil_tensor live_rows(mil_writer *w, mil_tensor surface, int32_t first, int32_t rows) {
    mil_tensor part = anepy_emit_slice(w, surface, first, rows, "rows");
    return anepy_emit_reshape(w, part, 1, rows, surface.dims[3], "matrix");
}

/* Which of the program's weights the classifier is. */
static int32_t classifier_index(const mil_writer *w) {
    int32_t i = 0;
    while (w->program->weights[i] != ANEPY_CLASSIFIER) i++;
    return i;
}

/* A baked classifier is one convolution, whose output channels have no limit. */
static mil_tensor classify(mil_writer *w, mil_tensor x, const char *hint) {
    anepy_program_matrix m;
    mil_tensor matrix = w->parameters[classifier_index(w)];
    anepy_program_weight(&m, w->program, w->model, w->layer, classifier_index(w));
    if (!w->program->live || m.rows <= PRODUCT_ROWS)
        return anepy_emit_linear(w, ANEPY_CLASSIFIER, 0, x, hint);
    mil_tensor out[PRODUCTS_MAX];
    int32_t columns = matrix.dims[3], n = 0;
    x = anepy_emit_pad_channels(w, x, columns);
    x = anepy_emit_reshape(w, x, 1, columns, w->width, "columns");
    for (int32_t first = 0; first < m.rows; first += PRODUCT_ROWS) {
        /* The last rows of the surface may be padding. */
        int32_t rows = anepy_min_i32(PRODUCT_ROWS, matrix.dims[1] - first);
        int32_t used = anepy_min_i32(PRODUCT_ROWS, m.rows - first);
        mil_tensor y = anepy_emit_matmul(w, live_rows(w, matrix, first, rows), 0, x, 0, "product");
        y = anepy_emit_reshape(w, y, rows, 1, w->width, "logits");
        out[n++] = anepy_emit_slice(w, y, 0, used, "logits");
    }
    return anepy_emit_concat(w, out, n, hint);
}

static void classifier_fwd(mil_writer *w) { classify(w, input(w, CLASSIFIER_FWD_X), "z_out"); }

static void head_fwd(mil_writer *w) {
    mil_tensor xnorm = anepy_emit_rmsnorm(w, ANEPY_FINAL_NORM, input(w, HEAD_FWD_X), "xnorm");
    mil_tensor logits = classify(w, xnorm, "logits"), out[] = {xnorm, logits};
    anepy_emit_concat(w, out, 2, "z_out");
}

/* Products of parts of the vocabulary are added in pairs, which rounds less than adding one by one.
 */
static mil_tensor classify_back(mil_writer *w, mil_tensor dlogits, const char *hint) {
    int32_t vocab = dlogits.dims[1], dim = w->model->config.dim, n = 0;
    if (vocab <= PRODUCT_ROWS) return anepy_emit_linear(w, ANEPY_CLASSIFIER, 1, dlogits, hint);
    mil_tensor parts[PRODUCTS_MAX], matrix = w->parameters[classifier_index(w)];
    anepy_program_matrix m;
    anepy_program_weight(&m, w->program, w->model, w->layer, classifier_index(w));
    for (int32_t first = 0; first < vocab; first += PRODUCT_ROWS) {
        int32_t rows = anepy_min_i32(PRODUCT_ROWS, vocab - first);
        mil_tensor dy = anepy_emit_slice(w, dlogits, first, rows, "dlogits");
        if (!w->program->live) {
            parts[n++] =
                anepy_emit_conv(w, anepy_emit_baked_matrix(w, &m, 1, first, rows), dy, "dx");
            continue;
        }
        int32_t padded = anepy_min_i32(PRODUCT_ROWS, matrix.dims[1] - first);
        dy = anepy_emit_pad_channels(w, dy, padded);
        dy = anepy_emit_reshape(w, dy, 1, padded, w->width, "columns");
        mil_tensor y =
            anepy_emit_matmul(w, live_rows(w, matrix, first, padded), 1, dy, 0, "product");
        y = anepy_emit_reshape(w, y, y.dims[2], 1, w->width, "dx");
        parts[n++] = anepy_emit_slice(w, y, 0, dim, "dx");
    }
    for (; n > 1; n = (n + 1) / 2) {
        for (int32_t i = 0; i < n / 2; i++)
            parts[i] =
                anepy_emit_binary(w, "add", parts[2 * i], parts[2 * i + 1], n == 2 ? hint : "dx");
        if (n % 2 != 0) parts[n / 2] = parts[n - 1];
    }
    return parts[0];
}

static void classifier_bwd(mil_writer *w) {
    classify_back(w, input(w, CLASSIFIER_BWD_DLOGITS), "z_out");
}

static void head_bwd(mil_writer *w) {
    mil_tensor dxnorm = classify_back(w, input(w, HEAD_BWD_DLOGITS), "dxnorm");
    mil_tensor x = input(w, HEAD_BWD_X);
    mil_tensor through = anepy_emit_rmsnorm_back(w, ANEPY_FINAL_NORM, dxnorm, x, "through");
    mil_tensor out[] = {dxnorm, through};
    anepy_emit_concat(w, out, 2, "z_out");
}

static void classifier_dw(mil_writer *w) {
    mil_tensor dlogits = input(w, CLASSIFIER_DW_DLOGITS), xnorm = input(w, CLASSIFIER_DW_XNORM);
    mil_tensor parts[PRODUCTS_MAX];
    int32_t vocab = dlogits.dims[1], n = 0;
    for (int32_t first = 0; first < vocab; first += PRODUCT_ROWS) {
        int32_t rows = anepy_min_i32(PRODUCT_ROWS, vocab - first);
        mil_tensor dy = anepy_emit_slice(w, dlogits, first, rows, "dlogits");
        parts[n++] = gradient(w, dy, xnorm, "dw");
    }
    anepy_emit_concat(w, parts, n, "z_out");
}

static void (*const PROGRAMS[ANEPY_PROGRAM_N])(mil_writer *) = {
    [ANEPY_SDPA_FWD] = sdpa_fwd,
    [ANEPY_FFN_FWD] = ffn_fwd,
    [ANEPY_FFN_BWD] = ffn_bwd,
    [ANEPY_SDPA_BWD1] = sdpa_bwd1,
    [ANEPY_SDPA_BWD2] = sdpa_bwd2,
    [ANEPY_QKV_BWD] = qkv_bwd,
    [ANEPY_RMSNORM_BWD] = rmsnorm_bwd,
    [ANEPY_RMSNORM_BWD_FFN] = rmsnorm_bwd,
    [ANEPY_LAYER_FWD] = layer_fwd,
    [ANEPY_LAYER_BWD] = layer_bwd,
    [ANEPY_LAYER_DW] = layer_dw,
    [ANEPY_RMSNORM_BWD_FINAL] = rmsnorm_bwd,
    [ANEPY_FINAL_RMSNORM] = final_rmsnorm,
    [ANEPY_CLASSIFIER_FWD] = classifier_fwd,
    [ANEPY_CLASSIFIER_BWD] = classifier_bwd,
    [ANEPY_SOFTMAX] = softmax,
    [ANEPY_HEAD_FWD] = head_fwd,
    [ANEPY_HEAD_BWD] = head_bwd,
    [ANEPY_CLASSIFIER_DW] = classifier_dw,
};

/* -------------------------------------------------------------------------------------- texts */

static mil_tensor surface(mil_writer *w, const char *name, int32_t channels, int32_t columns) {
    mil_tensor t = {.dims = {1, channels, 1, columns}};
    snprintf(t.name, sizeof t.name, "%s", name);
    if (channels > ANEPY_MIL_LARGEST_CHANNELS || columns > ANEPY_MIL_LARGEST_EXTENT)
        anepy_emit_fail(w, ANEPY_E_UNSUPPORTED,
                        "%s is [1, %d, 1, %d], the ANE takes %d channels and M1 to M3 %d columns",
                        name, channels, columns, ANEPY_MIL_LARGEST_CHANNELS,
                        ANEPY_MIL_LARGEST_EXTENT);
    return t;
}

static void write_function(mil_writer *w, const anepy_mil_item *item, const char *name) {
    w->program = item->program;
    w->params = item->params;
    w->layer = item->layer;
    if (w->program->width != w->width)
        anepy_emit_fail(w, ANEPY_E_ARGUMENT, "it was described for width %d, not %d",
                        w->program->width, w->width);
    if (w->layer < 0 || w->layer >= w->model->config.n_layers)
        anepy_emit_fail(w, ANEPY_E_ARGUMENT, "layer %d of %d", w->layer, w->model->config.n_layers);
    if (!w->program->live && w->program->weight_n > 0 && w->params == NULL)
        anepy_emit_fail(w, ANEPY_E_ARGUMENT, "its weights are to be baked, but there are none");
    if (w->status != ANEPY_OK) return;
    for (int32_t i = 0; i < w->program->surface_n; i++) {
        char letter[] = "a_in";
        letter[0] = (char)('a' + i);
        w->surfaces[i] = surface(w, letter, w->program->surface_channels[i], w->width);
    }
    memset(w->matrices, 0, sizeof w->matrices);
    w->low_n = 0;
    for (int32_t i = 0; i < w->program->weight_n; i++) {
        if (!anepy_program_passes(w->program, i)) continue;
        anepy_program_matrix m;
        anepy_program_weight(&m, w->program, w->model, w->layer, i);
        w->parameters[i] = surface(w, m.parameter, m.channels, m.columns);
    }
    anepy_emit_begin_function(w, name);
    PROGRAMS[w->program->id](w);
    anepy_emit_end_function(w);
}

/* Reserves room for all weights, because growing a file of hundreds of megabytes would copy it. */
static int32_t reserve(mil_writer *w, const anepy_mil_item *items, int32_t count) {
    uint64_t total = 1 << 16;
    for (int32_t i = 0; i < count; i++)
        for (int32_t j = 0; j < items[i].program->weight_n; j++) {
            anepy_program_matrix m;
            if (anepy_program_passes(items[i].program, j)) continue;
            anepy_program_weight(&m, items[i].program, w->model, items[i].layer, j);
            total += anepy_blob_record_nbytes((uint64_t)m.rows * (uint64_t)m.cols * 2);
        }
    return anepy_blob_reserve(&w->out->blob, total);
}

static int32_t write_text(mil_writer *w, const anepy_mil_item *items, int32_t count) {
    if (anepy_kernels_get() == NULL) return ANEPY_E_NAME;
    ANEPY_TRY(reserve(w, items, count));
    ANEPY_TRY(anepy_blob_begin(&w->out->blob));
    anepy_emit_begin_program(w);
    for (int32_t i = 0; i < count && w->status == ANEPY_OK; i++) {
        char name[24] = "main";
        if (count > 1) snprintf(name, sizeof name, "procedure%03d", i);
        w->function = i;
        write_function(w, &items[i], name);
    }
    anepy_emit_end_program(w);
    if (w->record_n == 0) anepy_blob_free(&w->out->blob);
    return w->status;
}

int32_t anepy_mil_generate(anepy_mil_source *out, const anepy_mil_item *items, int32_t count,
                           const anepy_model *model, int32_t width, int32_t seq_len,
                           anepy_dialect dialect) {
    *out = (anepy_mil_source){0};
    if (width < 64 || width % 64 != 0 || seq_len < 1 || seq_len > width)
        return anepy_fail(ANEPY_E_ARGUMENT,
                          "width %d for sequences of %d: it must be a multiple of 64 and no less",
                          width, seq_len);
    if (count < 1 || count > 1000)
        return anepy_fail(ANEPY_E_ARGUMENT, "%d programs in one text, expected 1 to 1000", count);
    mil_writer *w = calloc(1, sizeof *w);
    if (w == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory to write a program");
    w->out = out;
    w->dialect = dialect;
    w->model = model;
    w->width = width;
    int32_t status = write_text(w, items, count);
    free(w->records);
    free(w);
    if (status != ANEPY_OK) anepy_mil_source_free(out);
    return status;
}

void anepy_mil_source_free(anepy_mil_source *source) {
    free(source->text);
    anepy_blob_free(&source->blob);
    *source = (anepy_mil_source){0};
}
