/* programs/mil_blocks.c - norms, projections, RoPE and attention as operations that compile on
 * every generation and keep their range in fp16. Facts: docs/neural-engine.md#numerics. */
#include <math.h>

#include "kernels/kernels.h"
#include "programs/mil_writer.h"

/* Times dim: the smallest eps of RMSNorm for which a column of zeros, as beyond the last token, is
 * not divided by zero: 2^-14, the smallest normal fp16 number, after r1 = 90. */
#define SMALLEST_EPS 2e-6

#define CONTRACTION 32 /* sums over runtime tensors must have a multiple of so many terms (M1) */

/* --------------------------------------------------------------------------------- projections */

mil_tensor anepy_emit_pad_channels(mil_writer *w, mil_tensor x, int32_t n) {
    if (x.dims[1] == n) return x;
    mil_tensor both[2] = {x, anepy_emit_zeros(w, n - x.dims[1])};
    return anepy_emit_concat(w, both, 2, "padded");
}

/* Which weight of the program this tensor is. */
static int32_t find(mil_writer *w, const anepy_tensor *tensor, anepy_program_matrix *m) {
    int32_t index = anepy_program_find_weight(w->program, w->model, w->layer, tensor);
    anepy_program_weight(m, w->program, w->model, w->layer, index);
    return index;
}

/* A vector, times a factor, as an operand of the channels it has a value for. of_head: they are the
 * channels of each head, in [1, heads, head_dim, width]. */
static mil_tensor vector(mil_writer *w, const anepy_tensor *tensor, double factor, int of_head) {
    anepy_program_matrix m;
    int32_t index = find(w, tensor, &m);
    if (!w->program->live) return anepy_emit_baked_vector(w, &m, factor, of_head);
    mil_tensor x = w->parameters[index];
    if (of_head) x = anepy_emit_reshape(w, x, 1, m.cols, w->width, "weight");
    return factor == 1.0 ? x : anepy_emit_with_scalar(w, "mul", x, factor, "weight");
}

/* One layout serves both directions: the transpose is a flag, and nothing is copied. */
static mil_tensor live_linear(mil_writer *w, int32_t index, int transposed, mil_tensor x,
                              int32_t rows, const char *hint) {
    mil_tensor *matrix = &w->matrices[index], surface = w->parameters[index];
    if (matrix->name[0] == '\0')
        *matrix = anepy_emit_reshape(w, surface, 1, surface.dims[1], surface.dims[3], "matrix");
    x = anepy_emit_pad_channels(w, x, transposed ? surface.dims[1] : surface.dims[3]);
    x = anepy_emit_reshape(w, x, 1, x.dims[1], w->width, "columns");
    mil_tensor y = anepy_emit_matmul(w, *matrix, transposed, x, 0, "product");
    int exact = y.dims[2] == rows;
    y = anepy_emit_reshape(w, y, y.dims[2], 1, w->width, exact ? hint : "rows");
    return anepy_emit_slice(w, y, 0, rows, hint);
}

static mil_tensor live_product(mil_writer *w, const anepy_tensor *tensor, int transposed,
                               mil_tensor x, const char *hint) {
    anepy_program_matrix m;
    int32_t index = find(w, tensor, &m);
    return live_linear(w, index, transposed, x, transposed ? m.cols : m.rows, hint);
}

/* y + B (scale A x), or backward y + A^T (scale B^T x). */
static mil_tensor with_adapter(mil_writer *w, const anepy_projection *p, int transposed,
                               mil_tensor x, mil_tensor y, const char *hint) {
    double scale = (double)w->model->adapter.scale;
    mil_tensor low = live_product(w, transposed ? p->b : p->a, transposed, x, "low");
    if (scale != 1.0) low = anepy_emit_with_scalar(w, "mul", low, scale, "low");
    w->low[w->low_n++] = low;
    low = live_product(w, transposed ? p->a : p->b, transposed, low, "adapter");
    return anepy_emit_binary(w, "add", y, low, hint);
}

mil_tensor anepy_emit_linear(mil_writer *w, int32_t role, int transposed, mil_tensor x,
                             const char *hint) {
    anepy_projection p = anepy_model_projection(w->model, w->layer, role);
    anepy_program_matrix m;
    int32_t index = find(w, p.weight, &m);
    mil_tensor y =
        w->program->live
            ? live_linear(w, index, transposed, x, transposed ? m.cols : m.rows, hint)
            : anepy_emit_conv(w, anepy_emit_baked_matrix(w, &m, transposed, 0, m.rows), x, hint);
    if (p.a != NULL) y = with_adapter(w, &p, transposed, x, y, hint);
    if (p.bias == NULL || transposed) return y;
    return anepy_emit_binary(w, "add", y, vector(w, p.bias, 1.0, 0), hint);
}

/* --------------------------------------------------------------------------------------- norms */

/* Sums of squares: a convolution of all channels, or a product per head. */
static mil_tensor sum(mil_writer *w, mil_tensor ones, mil_tensor x, const char *hint) {
    return x.dims[2] == 1 ? anepy_emit_conv(w, ones, x, hint)
                          : anepy_emit_matmul(w, ones, 0, x, 0, hint);
}

/* RMSNorm in two passes, because no one scale serves: squares of activations near 0.02 (a fresh
 * model) flush to zero in fp16, squares of those near 200 overflow. The first pass estimates
 * r1 = 128 / |x| (|x|: 2-norm over channels), bounded by 90; the second measures x1 = x r1 itself,
 * so that no error of the first remains:
 *     s1 = sum (x / 8)^2 / 256 = |x|^2 / 2^14;  r1 = (s1 + 2^-13)^-0.5
 *     s2 = sum x1^2 / 256;                      r2 = (s2 + eps dim r1^2 / 256)^-0.5
 * Then x r1 r2 = 16 / sqrt(dim) * x / sqrt(mean x^2 + eps). In range for every |x_c| from 2^-9 to
 * 1400; eps is part of the second pass because alone it is subnormal. Sums are products with a
 * constant: those accumulate wide, reduce_sum does not. `dim` channels are one sum: all, or those
 * of each head. */
static mil_normalized normalize(mil_writer *w, mil_tensor x, double dim, mil_tensor ones,
                                int want_inverse) {
    double eps = sqrt(dim * fmax(w->model->norm_eps, SMALLEST_EPS / dim)) / 16;
    mil_tensor t = anepy_emit_with_scalar(w, "mul", x, 0.125, "eighth");
    t = anepy_emit_binary(w, "mul", t, t, "squares");
    t = sum(w, ones, t, "size");
    t = anepy_emit_with_scalar(w, "add", t, 0x1p-13, "size");
    mil_tensor r1 = anepy_emit_with_scalar(w, "pow", t, -0.5, "rough");
    mil_tensor x1 = anepy_emit_binary(w, "mul", x, r1, "scaled");
    t = anepy_emit_binary(w, "mul", x1, x1, "squares");
    mil_tensor s2 = sum(w, ones, t, "size");
    t = anepy_emit_with_scalar(w, "mul", r1, eps, "eps");
    t = anepy_emit_binary(w, "mul", t, t, "eps");
    t = anepy_emit_binary(w, "add", s2, t, "size");
    mil_tensor r2 = anepy_emit_with_scalar(w, "pow", t, -0.5, "fine");
    mil_normalized n = {.unit = anepy_emit_binary(w, "mul", x1, r2, "unit")};
    if (want_inverse) n.inverse = anepy_emit_binary(w, "mul", r1, r2, "inverse");
    return n;
}

mil_normalized anepy_emit_normalize(mil_writer *w, mil_tensor x, int want_inverse) {
    mil_tensor ones = anepy_emit_ones_column(w, 1.0 / 256);
    return normalize(w, x, w->model->config.dim, ones, want_inverse);
}

mil_tensor anepy_emit_norm_weight(mil_writer *w, int32_t role) {
    const anepy_tensor *tensor = anepy_model_find(w->model, w->layer, role);
    return vector(w, tensor, sqrt(w->model->config.dim) / 16, 0);
}

mil_tensor anepy_emit_rmsnorm(mil_writer *w, int32_t role, mil_tensor x, const char *hint) {
    mil_tensor unit = anepy_emit_normalize(w, x, 0).unit;
    return anepy_emit_binary(w, "mul", unit, anepy_emit_norm_weight(w, role), hint);
}

/* With n = x / rms: dx = (w dy - n mean(w dy n)) / rms. The constant 16 / sqrt(dim) of normalize
 * turns the mean into a sum / 256, and cancels elsewhere. */
static mil_tensor through_norm(mil_writer *w, mil_normalized n, mil_tensor ones, mil_tensor dn,
                               const char *hint) {
    mil_tensor t = anepy_emit_binary(w, "mul", dn, n.unit, "along");
    t = sum(w, ones, t, "along");
    t = anepy_emit_binary(w, "mul", n.unit, t, "along");
    t = anepy_emit_binary(w, "sub", dn, t, "across");
    return anepy_emit_binary(w, "mul", t, n.inverse, hint);
}

mil_tensor anepy_emit_rmsnorm_back(mil_writer *w, int32_t role, mil_tensor dy, mil_tensor x,
                                   const char *hint) {
    mil_normalized n = anepy_emit_normalize(w, x, 1);
    mil_tensor weight = anepy_emit_norm_weight(w, role);
    mil_tensor dn = anepy_emit_binary(w, "mul", dy, weight, "dnorm");
    return through_norm(w, n, anepy_emit_ones_column(w, 1.0 / 256), dn, hint);
}

/* --------------------------------------------------------------------------------------- heads */

static mil_tensor split_heads(mil_writer *w, mil_tensor x, int32_t heads, const char *hint) {
    return anepy_emit_reshape(w, x, heads, x.dims[1] / heads, w->width, hint);
}

/* Sums are spread over the channels of a head by the product that takes them, so that nothing has
 * to be broadcast. */
mil_tensor anepy_emit_head_norm(mil_writer *w, int32_t role, mil_tensor x, int32_t heads,
                                const char *hint) {
    const anepy_tensor *tensor = anepy_model_find(w->model, w->layer, role);
    int32_t channels = x.dims[1], head = w->model->head_dim, as_conv = head % CONTRACTION != 0;
    if (tensor == NULL) return x;
    if (!as_conv) x = split_heads(w, x, heads, "heads");
    mil_tensor ones = anepy_emit_head_sum(w, heads, 1.0 / 256, as_conv);
    x = normalize(w, x, head, ones, 0).unit;
    if (as_conv) x = split_heads(w, x, heads, "heads");
    x = anepy_emit_binary(w, "mul", x, vector(w, tensor, sqrt(head) / 16, 1), "normed");
    return anepy_emit_reshape(w, x, channels, 1, w->width, hint);
}

mil_tensor anepy_emit_head_norm_back(mil_writer *w, int32_t role, mil_tensor dy, mil_tensor x,
                                     int32_t heads, const char *hint) {
    const anepy_tensor *tensor = anepy_model_find(w->model, w->layer, role);
    int32_t channels = x.dims[1], head = w->model->head_dim, as_conv = head % CONTRACTION != 0;
    mil_tensor ones = anepy_emit_head_sum(w, heads, 1.0 / 256, as_conv);
    if (!as_conv) x = split_heads(w, x, heads, "heads");
    mil_normalized n = normalize(w, x, head, ones, 1);
    mil_tensor dn = split_heads(w, dy, heads, "heads");
    dn = anepy_emit_binary(w, "mul", dn, vector(w, tensor, sqrt(head) / 16, 1), "dnorm");
    if (as_conv) dn = anepy_emit_reshape(w, dn, channels, 1, w->width, "dnorm");
    dn = through_norm(w, n, ones, dn, as_conv ? hint : "through");
    return anepy_emit_reshape(w, dn, channels, 1, w->width, hint);
}

/* x cos + (x turned by 90 degrees) sin: no pair of channels is taken apart, which would need slices
 * that M3 Ultra refuses. The turn is exact in fp16. */
mil_tensor anepy_emit_rope(mil_writer *w, mil_tensor x, int32_t heads, int inverse,
                           const char *hint) {
    int32_t channels = x.dims[1], head = w->model->head_dim;
    mil_tensor turned, split;
    if (head % CONTRACTION == 0) {
        split = split_heads(w, x, heads, "heads");
        turned = anepy_emit_matmul(w, anepy_emit_quarter_turn(w, heads, 0), 0, split, 0, "turned");
    } else {
        turned = anepy_emit_conv(w, anepy_emit_quarter_turn(w, heads, 1), x, "turned");
        turned = split_heads(w, turned, heads, "turned");
        split = split_heads(w, x, heads, "heads");
    }
    mil_tensor a = anepy_emit_binary(w, "mul", split, anepy_emit_angles(w, 0), "cosine");
    mil_tensor b = anepy_emit_binary(w, "mul", turned, anepy_emit_angles(w, 1), "sine");
    a = anepy_emit_binary(w, inverse ? "sub" : "add", a, b, "rotated");
    return anepy_emit_reshape(w, a, channels, 1, w->width, hint);
}

/* Attention works on heads filled up with zeros: contractions over them and rows of them must be
 * multiples of 32 and 16. */
static mil_tensor pad_heads(mil_writer *w, mil_tensor x, int32_t heads, const char *hint) {
    int32_t head = w->model->head_dim, padded = (int32_t)anepy_round_up(head, CONTRACTION);
    if (padded != head)
        x = anepy_emit_conv(w, anepy_emit_head_padding(w, heads, padded, 0), x, "padded");
    return split_heads(w, x, heads, hint);
}

/* [1, heads, padded head, width] back to [1, heads * head_dim, 1, width]. */
static mil_tensor join_heads(mil_writer *w, mil_tensor x, const char *hint) {
    int32_t heads = x.dims[1], padded = x.dims[2], exact = padded == w->model->head_dim;
    x = anepy_emit_reshape(w, x, heads * padded, 1, w->width, exact ? hint : "padded");
    return exact ? x : anepy_emit_conv(w, anepy_emit_head_padding(w, heads, padded, 1), x, hint);
}

mil_tensor anepy_emit_keys(mil_writer *w, mil_tensor x) {
    return pad_heads(w, x, w->model->config.n_kv_heads, "keys");
}

mil_queries anepy_emit_queries(mil_writer *w, mil_tensor x) {
    int32_t heads = w->model->config.n_heads, kv = w->model->config.n_kv_heads;
    x = pad_heads(w, x, heads, "queries");
    if (heads == kv) return (mil_queries){x, 1};
    x = anepy_emit_swap_last(w, x, "queries");
    x = anepy_emit_reshape(w, x, kv, heads / kv * w->width, x.dims[3], "queries");
    return (mil_queries){x, 0};
}

mil_tensor anepy_emit_dot_heads(mil_writer *w, mil_queries q, mil_tensor keys, const char *hint) {
    return anepy_emit_matmul(w, q.x, q.columns, keys, 0, hint);
}

mil_tensor anepy_emit_gather_keys(mil_writer *w, mil_tensor keys, mil_tensor scores,
                                  const char *hint) {
    int32_t heads = w->model->config.n_heads, kv = w->model->config.n_kv_heads;
    if (heads == kv)
        return join_heads(w, anepy_emit_matmul(w, keys, 0, scores, 1, "weighted"), hint);
    /* [1, kv, group * width, head]: back to one head after the other. */
    mil_tensor x = anepy_emit_matmul(w, scores, 0, keys, 1, "weighted");
    x = anepy_emit_reshape(w, x, heads, w->width, x.dims[3], "weighted");
    return join_heads(w, anepy_emit_swap_last(w, x, "weighted"), hint);
}

mil_tensor anepy_emit_sum_queries(mil_writer *w, mil_queries q, mil_tensor scores,
                                  const char *hint) {
    return join_heads(w, anepy_emit_matmul(w, q.x, !q.columns, scores, 0, "weighted"), hint);
}

mil_tensor anepy_emit_probabilities(mil_writer *w, mil_tensor q, mil_tensor k) {
    int32_t heads = w->model->config.n_heads, kv = w->model->config.n_kv_heads;
    /* Scaled before the product, so that scores never overflow where scaled ones would not. */
    q = anepy_emit_with_scalar(w, "mul", q, 1.0 / sqrt(w->model->head_dim), "scaled");
    mil_queries queries = anepy_emit_queries(w, q);
    mil_tensor s = anepy_emit_dot_heads(w, queries, anepy_emit_keys(w, k), "scores");
    s = anepy_emit_reshape(w, s, heads, w->width, w->width, "scores");
    s = anepy_emit_binary(w, "add", s, anepy_emit_causal_mask(w), "masked");
    s = anepy_emit_softmax(w, s, -1, "probs");
    return anepy_emit_reshape(w, s, kv, heads / kv * w->width, w->width, "probs");
}
