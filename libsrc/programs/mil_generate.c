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
    return anepy_emit_slice(w, w->input, t->channel, t->channels, t->name);
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

static void sdpa_fwd(mil_writer *w) {
    const anepy_config *c = &w->model->config;
    mil_tensor xnorm = anepy_emit_rmsnorm(w, ANEPY_ATTENTION_NORM, input(w, SDPA_FWD_X), "xnorm");
    mil_tensor q_raw = anepy_emit_linear(w, ANEPY_WQ, 0, xnorm, "q");
    mil_tensor q = anepy_emit_head_norm(w, ANEPY_Q_NORM, q_raw, c->n_heads, "q");
    q = anepy_emit_rope(w, q, c->n_heads, 0, "q");
    mil_tensor k_raw = anepy_emit_linear(w, ANEPY_WK, 0, xnorm, "k");
    mil_tensor k = anepy_emit_head_norm(w, ANEPY_K_NORM, k_raw, c->n_kv_heads, "k");
    k = anepy_emit_rope(w, k, c->n_kv_heads, 0, "k");
    mil_tensor v = anepy_emit_linear(w, ANEPY_WV, 0, xnorm, "v");
    mil_tensor probs = anepy_emit_probabilities(w, q, k);
    mil_tensor attn = anepy_emit_gather_keys(w, anepy_emit_keys(w, v), probs, "attn");
    mil_tensor y = anepy_emit_linear(w, ANEPY_WO, 0, attn, "out");
    mil_tensor out[] = {y, q, k, v, attn, xnorm, q_raw, k_raw};
    output(w, out, c->qk_norm ? 8 : 6);
}

/* The logistic function, through tanh: its table has a quarter of the error
 * (docs/neural-engine.md#training-under-it). */
static mil_tensor sigmoid(mil_writer *w, mil_tensor x) {
    mil_tensor t = anepy_emit_with_scalar(w, "mul", x, 0.5, "half");
    t = anepy_emit_with_scalar(w, "mul", anepy_emit_tanh(w, t, "tanh"), 0.5, "half");
    return anepy_emit_with_scalar(w, "add", t, 0.5, "sigmoid");
}

static void ffn_fwd(mil_writer *w) {
    mil_tensor xnorm = anepy_emit_rmsnorm(w, ANEPY_FFN_NORM, input(w, FFN_FWD_X), "xnorm");
    mil_tensor h1 = anepy_emit_linear(w, ANEPY_W1, 0, xnorm, "h1");
    mil_tensor h3 = anepy_emit_linear(w, ANEPY_W3, 0, xnorm, "h3");
    mil_tensor gate = anepy_emit_binary(w, "mul", h1, sigmoid(w, h1), "silu");
    gate = anepy_emit_binary(w, "mul", gate, h3, "gate");
    mil_tensor out[] = {anepy_emit_linear(w, ANEPY_W2, 0, gate, "out"), h1, h3, gate, xnorm};
    output(w, out, 5);
}

static void ffn_bwd(mil_writer *w) {
    mil_tensor h1 = input(w, FFN_BWD_H1), h3 = input(w, FFN_BWD_H3);
    mil_tensor dgate = anepy_emit_linear(w, ANEPY_W2, 1, input(w, FFN_BWD_DY), "dgate");
    mil_tensor s = sigmoid(w, h1);
    mil_tensor t = anepy_emit_binary(w, "mul", dgate, s, "through");
    mil_tensor dh3 = anepy_emit_binary(w, "mul", t, h1, "dh3");
    mil_tensor slope = anepy_emit_scalar_with(w, "sub", 1.0, s, "slope");
    slope = anepy_emit_binary(w, "mul", h1, slope, "slope");
    slope = anepy_emit_with_scalar(w, "add", slope, 1.0, "slope");
    t = anepy_emit_binary(w, "mul", t, h3, "through");
    mil_tensor dh1 = anepy_emit_binary(w, "mul", t, slope, "dh1");
    mil_tensor a = anepy_emit_linear(w, ANEPY_W1, 1, dh1, "dx1"),
               b = anepy_emit_linear(w, ANEPY_W3, 1, dh3, "dx3");
    mil_tensor out[] = {anepy_emit_binary(w, "add", a, b, "dx"), dh1, dh3};
    output(w, out, 3);
}

static void sdpa_bwd1(mil_writer *w) {
    int32_t scores = w->model->config.n_heads * w->width;
    mil_tensor dattn = anepy_emit_linear(w, ANEPY_WO, 1, input(w, SDPA_BWD1_DY), "dattn");
    mil_queries rows = anepy_emit_queries(w, dattn);
    mil_tensor v = anepy_emit_keys(w, input(w, SDPA_BWD1_V));
    mil_tensor q = input(w, SDPA_BWD1_Q), k = input(w, SDPA_BWD1_K);
    mil_tensor probs = anepy_emit_probabilities(w, q, k);
    mil_tensor dprobs = anepy_emit_dot_heads(w, rows, v, "dprobs");
    mil_tensor dv = anepy_emit_sum_queries(w, rows, probs, "dv");
    probs = anepy_emit_reshape(w, probs, scores, 1, w->width, "probs");
    dprobs = anepy_emit_reshape(w, dprobs, scores, 1, w->width, "dprobs");
    mil_tensor out[] = {dv, probs, dprobs};
    output(w, out, 3);
}

static void sdpa_bwd2(mil_writer *w) {
    const anepy_config *c = &w->model->config;
    int32_t kv = c->n_kv_heads, queries = c->n_heads / kv * w->width;
    double scale = 1.0 / sqrt(w->model->head_dim);
    mil_tensor probs = anepy_emit_reshape(w, input(w, SDPA_BWD2_P), kv, queries, w->width, "probs");
    mil_tensor dprobs =
        anepy_emit_reshape(w, input(w, SDPA_BWD2_DP), kv, queries, w->width, "dprobs");
    /* Row sums by a product with ones, which accumulates wide and spreads the sum over the row: M1
     * does not broadcast a runtime operand with one column. */
    mil_tensor sums = anepy_emit_binary(w, "mul", probs, dprobs, "terms");
    sums = anepy_emit_matmul(w, sums, 0, anepy_emit_ones_square(w, kv), 0, "sums");
    mil_tensor t = anepy_emit_binary(w, "sub", dprobs, sums, "centred");
    mil_tensor dscores = anepy_emit_binary(w, "mul", probs, t, "dscores");
    /* q and k are scaled, because scaled score gradients could be subnormal. */
    mil_tensor k = anepy_emit_with_scalar(w, "mul", input(w, SDPA_BWD2_K), scale, "scaled");
    mil_tensor q = anepy_emit_with_scalar(w, "mul", input(w, SDPA_BWD2_Q), scale, "scaled");
    mil_tensor dq = anepy_emit_gather_keys(w, anepy_emit_keys(w, k), dscores, "dq");
    mil_tensor dk = anepy_emit_sum_queries(w, anepy_emit_queries(w, q), dscores, "dk");
    dq = anepy_emit_rope(w, dq, c->n_heads, 1, "dq");
    dk = anepy_emit_rope(w, dk, kv, 1, "dk");
    mil_tensor out[] = {dq, dk};
    anepy_emit_concat(w, out, 2, "z_out");
}

static void qkv_bwd(mil_writer *w) {
    mil_tensor a = anepy_emit_linear(w, ANEPY_WQ, 1, input(w, QKV_BWD_DQ), "dx");
    mil_tensor b = anepy_emit_linear(w, ANEPY_WK, 1, input(w, QKV_BWD_DK), "dx");
    mil_tensor c = anepy_emit_linear(w, ANEPY_WV, 1, input(w, QKV_BWD_DV), "dx");
    a = anepy_emit_binary(w, "add", a, b, "dx");
    a = anepy_emit_binary(w, "add", a, c, w->low_n > 0 ? "dx" : "z_out");
    if (w->low_n > 0) output(w, &a, 1);
}

/* With n = x / rms: dx = (w dy - n mean(w dy n)) / rms. The constant 16 / sqrt(dim) of
 * anepy_emit_normalize turns the mean into a sum / 256, and cancels elsewhere. */
static void rmsnorm_bwd(mil_writer *w) {
    mil_normalized n = anepy_emit_normalize(w, input(w, RMSNORM_BWD_X), 1);
    mil_tensor weight = anepy_emit_norm_weight(w, w->program->weights[0]);
    mil_tensor dn = anepy_emit_binary(w, "mul", input(w, RMSNORM_BWD_DY), weight, "dnorm");
    mil_tensor t = anepy_emit_binary(w, "mul", dn, n.unit, "along");
    t = anepy_emit_conv(w, anepy_emit_ones_column(w, 1.0 / 256), t, "along");
    t = anepy_emit_binary(w, "mul", n.unit, t, "along");
    t = anepy_emit_binary(w, "sub", dn, t, "across");
    anepy_emit_binary(w, "mul", t, n.inverse, "z_out");
}

static void final_rmsnorm(mil_writer *w) {
    anepy_emit_rmsnorm(w, ANEPY_FINAL_NORM, input(w, FINAL_RMSNORM_X), "z_out");
}

/* Tokens as [1, 128, groups, width]: token c * groups + g is channel c of group g. */
static void softmax(mil_writer *w) {
    int32_t vocab = w->program->input_channels, groups = anepy_softmax_groups(w->model);
    int32_t padded = ANEPY_SOFTMAX_GROUP * groups, exact = padded == vocab;
    mil_tensor x = w->input;
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
static mil_tensor live_rows(mil_writer *w, int32_t first, int32_t rows) {
    mil_tensor surface = w->parameters[0];
    mil_tensor part = anepy_emit_slice(w, surface, first, rows, "rows");
    return anepy_emit_reshape(w, part, 1, rows, surface.dims[3], "matrix");
}

/* A baked classifier is one convolution, whose output channels have no limit. */
static void classifier_fwd(mil_writer *w) {
    mil_tensor x = input(w, CLASSIFIER_FWD_X);
    int32_t vocab = w->program->output_channels;
    if (!w->program->live || vocab <= PRODUCT_ROWS) {
        anepy_emit_linear(w, ANEPY_CLASSIFIER, 0, x, "z_out");
        return;
    }
    mil_tensor out[PRODUCTS_MAX];
    int32_t columns = w->parameters[0].dims[3], n = 0;
    x = anepy_emit_pad_channels(w, x, columns);
    x = anepy_emit_reshape(w, x, 1, columns, w->width, "columns");
    for (int32_t first = 0; first < vocab; first += PRODUCT_ROWS) {
        /* The last rows of the surface may be padding. */
        int32_t rows = anepy_min_i32(PRODUCT_ROWS, w->parameters[0].dims[1] - first);
        int32_t used = anepy_min_i32(PRODUCT_ROWS, vocab - first);
        mil_tensor y = anepy_emit_matmul(w, live_rows(w, first, rows), 0, x, 0, "product");
        y = anepy_emit_reshape(w, y, rows, 1, w->width, "logits");
        out[n++] = anepy_emit_slice(w, y, 0, used, "logits");
    }
    anepy_emit_concat(w, out, n, "z_out");
}

/* Products of parts of the vocabulary are added in pairs, which rounds less than adding one by one.
 */
static void classifier_bwd(mil_writer *w) {
    int32_t vocab = w->program->input_channels, dim = w->model->config.dim, n = 0;
    if (vocab <= PRODUCT_ROWS) {
        anepy_emit_linear(w, ANEPY_CLASSIFIER, 1, input(w, CLASSIFIER_BWD_DLOGITS), "z_out");
        return;
    }
    mil_tensor parts[PRODUCTS_MAX];
    anepy_program_matrix m;
    anepy_program_weight(&m, w->program, w->model, w->layer, 0);
    for (int32_t first = 0; first < vocab; first += PRODUCT_ROWS) {
        int32_t rows = anepy_min_i32(PRODUCT_ROWS, vocab - first);
        mil_tensor dy = anepy_emit_slice(w, w->input, first, rows, "dlogits");
        if (!w->program->live) {
            parts[n++] =
                anepy_emit_conv(w, anepy_emit_baked_matrix(w, &m, 1, first, rows), dy, "dx");
            continue;
        }
        int32_t padded = anepy_min_i32(PRODUCT_ROWS, w->parameters[0].dims[1] - first);
        dy = anepy_emit_pad_channels(w, dy, padded);
        dy = anepy_emit_reshape(w, dy, 1, padded, w->width, "columns");
        mil_tensor y = anepy_emit_matmul(w, live_rows(w, first, padded), 1, dy, 0, "product");
        y = anepy_emit_reshape(w, y, y.dims[2], 1, w->width, "dx");
        parts[n++] = anepy_emit_slice(w, y, 0, dim, "dx");
    }
    for (; n > 1; n = (n + 1) / 2) {
        for (int32_t i = 0; i < n / 2; i++)
            parts[i] = anepy_emit_binary(w, "add", parts[2 * i], parts[2 * i + 1],
                                         n == 2 ? "z_out" : "dx");
        if (n % 2 != 0) parts[n / 2] = parts[n - 1];
    }
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
    [ANEPY_RMSNORM_BWD_FINAL] = rmsnorm_bwd,
    [ANEPY_FINAL_RMSNORM] = final_rmsnorm,
    [ANEPY_CLASSIFIER_FWD] = classifier_fwd,
    [ANEPY_CLASSIFIER_BWD] = classifier_bwd,
    [ANEPY_SOFTMAX] = softmax,
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
    w->input = surface(w, "a_in", w->program->input_channels, w->width);
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
