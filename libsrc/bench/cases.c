/* bench/cases.c - the table of cases, and the cases of single products and kernels. */
#include <stdio.h>
#include <string.h>

#include "bench/bench.h"
#include "runtime/half.h"

#define COLS ANEPY_COLUMNS
/* Most elements of a vector of parameters: 64 MiB, beyond any cache. */
#define LARGE_N ((int64_t)1 << 24)

static int32_t add(anepy_bench *b, int64_t n, anepy_bench_role role, float low, float high) {
    return anepy_bench_add(b, n, role, low, high);
}

static float *at(const anepy_bench *b, int32_t index) { return b->buffers[index].data; }

/* ------------------------------------------------------------------------------------ products */

/* Projections that are one product: the role of the first weight, and how many they are. */
enum { QKV, WO, W13, W2, CLASSIFIER };
static const struct {
    int32_t role, count;
} PRODUCT[] = {[QKV] = {ANEPY_WQ, 3},
               [WO] = {ANEPY_WO, 1},
               [W13] = {ANEPY_W1, 2},
               [W2] = {ANEPY_W2, 1},
               [CLASSIFIER] = {ANEPY_CLASSIFIER, 1}};

/* Returns how many of them a step has. */
static double weight_shape(anepy_bench *b, int32_t which) {
    b->rows = 0;
    for (int32_t i = 0; i < PRODUCT[which].count; i++) {
        anepy_projection p = anepy_model_projection(b->model, 0, PRODUCT[which].role + i);
        b->rows += p.out;
        b->cols = p.in;
    }
    return which == CLASSIFIER ? 1.0 : b->model->config.n_layers;
}

static int32_t prepare_product(anepy_bench *b, const anepy_product *p, int64_t a_n, int64_t b_n,
                               double calls) {
    b->product = *p;
    b->exact = b->dtype == ANEPY_BF16;
    b->columns = b->valid = (int32_t)p->ldc;
    b->rows = p->m;
    b->reduction = p->k;
    add(b, (int64_t)p->m * p->ldc, OUT, -1.0f, 1.0f);
    add(b, a_n, IN, -1.0f, 1.0f);
    add(b, b_n, IN, -1.0f, 1.0f);
    int32_t n = p->b_transposed ? p->n : b->seq, k = p->b_transposed ? b->seq : p->k;
    double size = b->dtype == ANEPY_BF16 ? 2.0 : 4.0;
    anepy_bench_limit(b, anepy_bench_arithmetic(b), 2.0 * p->m * n * k,
                      4.0 * p->m * n + size * ((double)p->m * k + (double)k * n), calls);
    ANEPY_BENCH_SHAPE(b, "%d x %d x %d", p->m, n, k);
    return ANEPY_OK;
}

/* Y = W . X */
static int32_t prepare_forward(anepy_bench *b) {
    double calls = weight_shape(b, b->what->option);
    anepy_product p = {.ldc = b->width,
                       .a_row = b->cols,
                       .a_step = 1,
                       .ldb = b->width,
                       .m = b->rows,
                       .n = b->width,
                       .k = b->cols};
    return prepare_product(b, &p, (int64_t)b->rows * b->cols, (int64_t)b->cols * b->width, calls);
}

/* dX = W^T . dY */
static int32_t prepare_dx(anepy_bench *b) {
    double calls = weight_shape(b, b->what->option);
    anepy_product p = {.ldc = b->width,
                       .a_row = 1,
                       .a_step = b->cols,
                       .ldb = b->width,
                       .m = b->cols,
                       .n = b->width,
                       .k = b->rows};
    return prepare_product(b, &p, (int64_t)b->rows * b->cols, (int64_t)b->rows * b->width, calls);
}

/* dW = dY . X^T, the first of an accumulation */
static int32_t prepare_dw(anepy_bench *b) {
    double calls = weight_shape(b, b->what->option);
    anepy_product p = {.ldc = b->cols,
                       .a_row = b->width,
                       .a_step = 1,
                       .ldb = b->width,
                       .b_transposed = 1,
                       .m = b->rows,
                       .n = b->cols,
                       .k = b->seq};
    return prepare_product(b, &p, (int64_t)b->rows * b->width, (int64_t)b->cols * b->width, calls);
}

/* Multiplies as a step does: weight gradients of layers in background pieces, all other products at
 * once on all threads. */
static void multiply(anepy_bench *b, const anepy_product *p) {
    if (p->b_transposed && b->what->option != CLASSIFIER) {
        anepy_gemm_job job = {&b->gemm, *p};
        anepy_pool_run(b->pool, anepy_gemm_pieces(p), anepy_gemm_piece, &job);
    } else {
        anepy_gemm_run(&b->gemm, p);
    }
}

static void run_product(anepy_bench *b) {
    anepy_product p = b->product;
    p.c = at(b, 0);
    p.a = at(b, 1);
    p.b = at(b, 2);
    if (!b->reference || p.m <= 2 * ANEPY_BENCH_ENDS) {
        multiply(b, &p);
        return;
    }
    anepy_product end = p;
    int32_t first = p.m - ANEPY_BENCH_ENDS;
    end.c += first * end.ldc;
    end.a += first * end.a_row;
    p.m = end.m = ANEPY_BENCH_ENDS;
    multiply(b, &p);
    multiply(b, &end);
}

/* -------------------------------------------------------------------------------- long vectors */

/* Vectors like a whole arena, or like its first 64 MiB; then calls says how many of them make an
 * arena. */
static void vector_case(anepy_bench *b, const char *name, double operations, double bytes) {
    b->n = b->model->arena_n < LARGE_N ? b->model->arena_n : LARGE_N;
    double calls = (double)b->model->arena_n / (double)b->n;
    anepy_bench_limit(b, name, operations * (double)b->n, bytes * (double)b->n, calls);
    ANEPY_BENCH_SHAPE(b, "%lld", (long long)b->n);
}

static int32_t prepare_adam(anepy_bench *b) {
    /* Gradients are not cleared, as in training: the next step replaces them. */
    vector_case(b, "triad", 15.0, 28.0);
    for (int32_t i = 0; i < 3; i++) add(b, b->n, INOUT, -0.01f, 0.01f); /* p, g, m */
    add(b, b->n, INOUT, 0.0f, 1e-4f);                                   /* v */
    return ANEPY_OK;
}

static void adam_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_bench *b = context;
    const anepy_adam a = {.lr = 1e-3f,
                          .beta1 = 0.9f,
                          .beta2 = 0.999f,
                          .one_beta1 = 0.1f,
                          .one_beta2 = 0.001f,
                          .eps = 1e-8f,
                          .decay = 0.9999f,
                          .inv_sqrt_c2 = 1.5f,
                          .grad_scale = 0.5f};
    int64_t i = (int64_t)index * ANEPY_PIECE_ELEMENTS;
    int64_t n = anepy_min_i64(ANEPY_PIECE_ELEMENTS, b->n - i);
    b->kernels->adam(at(b, 0) + i, at(b, 1) + i, at(b, 2) + i, at(b, 3) + i, n, &a);
}

static void run_adam(anepy_bench *b) {
    anepy_pool_run(b->pool, anepy_pieces(b->n, ANEPY_PIECE_ELEMENTS), adam_piece, b);
}

static int32_t prepare_norm_of_gradient(anepy_bench *b) {
    vector_case(b, "read", 2.0, 4.0);
    add(b, 2 * anepy_pieces(b->n, ANEPY_PIECE_ELEMENTS), OUT, 0.0f, 0.0f); /* doubles */
    add(b, b->n, IN, -1.0f, 1.0f);
    return ANEPY_OK;
}

static void sum_squares_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_bench *b = context;
    int64_t i = (int64_t)index * ANEPY_PIECE_ELEMENTS;
    int64_t n = anepy_min_i64(ANEPY_PIECE_ELEMENTS, b->n - i);
    double sum = b->kernels->sum_squares(at(b, 1) + i, n);
    at(b, 0)[2 * index] = (float)sum;
}

static void run_norm_of_gradient(anepy_bench *b) {
    anepy_pool_run(b->pool, anepy_pieces(b->n, ANEPY_PIECE_ELEMENTS), sum_squares_piece, b);
}

enum { TO_HALF, FROM_HALF, TO_BF16, FROM_BF16, COPY };

static int32_t prepare_conversion(anepy_bench *b) {
    int32_t what = b->what->option;
    vector_case(b, "copy", 1.0, what == COPY ? 8.0 : 6.0);
    b->result->calls = 0.0; /* how often depends on device and precision */
    add(b, what == TO_HALF || what == TO_BF16 ? (b->n + 1) / 2 : b->n, OUT, 0.0f, 0.0f);
    if (what == FROM_HALF || what == FROM_BF16) add(b, (b->n + 1) / 2, HALVES, 0.0f, 0.0f);
    else add(b, b->n, IN, -1.0f, 1.0f);
    return ANEPY_OK;
}

/* Rounds to nearest even where the set has no bf16 kernels, as the scalar one. */
static void to_bf16(const anepy_kernels *kernels, uint16_t *dst, const float *src, int64_t n) {
    if (kernels->bf16 != NULL) {
        kernels->bf16->to_bf16(dst, src, n);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &src[i], sizeof bits);
        dst[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

static void conversion_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_bench *b = context;
    int64_t i = (int64_t)index * ANEPY_PIECE_ELEMENTS;
    int64_t n = anepy_min_i64(ANEPY_PIECE_ELEMENTS, b->n - i);
    float *to = at(b, 0), *from = at(b, 1);
    switch (b->what->option) {
    case TO_HALF: b->kernels->to_half((uint16_t *)(void *)to + i, from + i, n); break;
    case FROM_HALF: b->kernels->from_half(to + i, (uint16_t *)(void *)from + i, n); break;
    case TO_BF16: to_bf16(b->kernels, (uint16_t *)(void *)to + i, from + i, n); break;
    case FROM_BF16: b->kernels->from_bf16(to + i, (uint16_t *)(void *)from + i, n); break;
    default: memcpy(to + i, from + i, (size_t)n * sizeof(float)); break;
    }
}

static void run_conversion(anepy_bench *b) {
    anepy_pool_run(b->pool, anepy_pieces(b->n, ANEPY_PIECE_ELEMENTS), conversion_piece, b);
}

/* The classifier of one token of generated text: every weight is read once. */
static int32_t prepare_matvec(anepy_bench *b) {
    b->rows = b->model->config.vocab_size;
    b->cols = b->model->config.dim;
    double n = (double)b->rows * b->cols;
    anepy_bench_limit(b, "read", 2.0 * n, 4.0 * n, 0.0);
    ANEPY_BENCH_SHAPE(b, "%d x %d", b->rows, b->cols);
    add(b, b->rows, OUT, 0.0f, 0.0f);
    add(b, (int64_t)b->rows * b->cols, IN, -1.0f, 1.0f);
    add(b, b->cols, IN, -1.0f, 1.0f);
    return ANEPY_OK;
}

static void matvec_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_bench *b = context;
    int32_t first = index * ANEPY_PIECE_ROWS;
    int32_t rows = anepy_min_i32(ANEPY_PIECE_ROWS, b->rows - first);
    b->kernels->gemv(at(b, 0) + first, at(b, 1) + (int64_t)first * b->cols, b->cols, at(b, 2), rows,
                     b->cols);
}

static void run_matvec(anepy_bench *b) {
    anepy_pool_stream(b->pool, anepy_pieces(b->rows, ANEPY_PIECE_ROWS), matvec_rows, b);
}

/* ------------------------------------------------------------------ norms, gate, soft-max, loss */

/* A case whose outputs and inputs are all [rows, width]. */
static void row_case(anepy_bench *b, int32_t rows, int32_t outputs, int32_t inputs,
                     double operations, double calls) {
    b->rows = rows;
    double n = (double)rows * b->seq;
    anepy_bench_limit(b, "triad", operations * n, 4.0 * (outputs + inputs) * n, calls);
    ANEPY_BENCH_SHAPE(b, "%d x %d", rows, b->seq);
    for (int32_t i = 0; i < outputs + inputs; i++)
        add(b, (int64_t)rows * b->width, i < outputs ? OUT : IN, -2.0f, 2.0f);
}

static int32_t norms(const anepy_bench *b) { return 2 * b->model->config.n_layers + 1; }

static int32_t prepare_rmsnorm(anepy_bench *b) {
    row_case(b, b->model->config.dim, 1, 1, 4.0, norms(b));
    add(b, b->rows, IN, 0.5f, 1.5f); /* weights */
    return ANEPY_OK;
}

static void rmsnorm_panel(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_bench *b = context;
    float rstd[COLS];
    int64_t j = (int64_t)index * COLS;
    b->kernels->rmsnorm(at(b, 0) + j, b->width, rstd, at(b, 1) + j, at(b, 2), b->model->norm_eps,
                        b->rows, b->width);
}

static void run_rmsnorm(anepy_bench *b) {
    anepy_pool_run(b->pool, b->width / COLS, rmsnorm_panel, b);
}

static int32_t prepare_rmsnorm_backward(anepy_bench *b) {
    row_case(b, b->model->config.dim, 1, 3, 12.0, norms(b)); /* dx; residual, dy, x */
    add(b, b->rows, IN, 0.5f, 1.5f);
    add(b, b->rows, OUT, 0.0f, 0.0f);      /* 5: gradient of the weights */
    add(b, 2 * b->width, OUT, 0.0f, 0.0f); /* 6: rstd and coef */
    return ANEPY_OK;
}

static void stats_panel(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_bench *b = context;
    int64_t j = (int64_t)index * COLS;
    b->kernels->rmsnorm_stats(at(b, 6) + j, at(b, 6) + b->width + j, at(b, 2) + j, at(b, 3) + j,
                              at(b, 4), b->model->norm_eps, b->rows, b->width);
}

static void backward_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_bench *b = context;
    int32_t end = anepy_min_i32(b->rows, (index + 1) * ANEPY_PIECE_ROWS);
    for (int64_t c = (int64_t)index * ANEPY_PIECE_ROWS; c < end; c++) {
        int64_t row = c * b->width;
        at(b, 5)[c] =
            b->kernels->rmsnorm_row(at(b, 0) + row, at(b, 1) + row, at(b, 2) + row, at(b, 3) + row,
                                    at(b, 6), at(b, 6) + b->width, at(b, 4)[c], b->width);
    }
}

static void run_rmsnorm_backward(anepy_bench *b) {
    anepy_pool_run(b->pool, b->width / COLS, stats_panel, b);
    anepy_pool_run(b->pool, anepy_pieces(b->rows, ANEPY_PIECE_ROWS), backward_rows, b);
}

enum { GATE, GATE_BACKWARD };

static int32_t prepare_swiglu(anepy_bench *b) {
    int32_t backward = b->what->option == GATE_BACKWARD;
    row_case(b, b->model->config.hidden_dim, backward ? 2 : 1, backward ? 3 : 2,
             backward ? 30.0 : 25.0, b->model->config.n_layers);
    return ANEPY_OK;
}

static void swiglu_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_bench *b = context;
    int64_t i = (int64_t)index * ANEPY_PIECE_ROWS * b->width;
    int64_t n =
        (int64_t)anepy_min_i32(ANEPY_PIECE_ROWS, b->rows - index * ANEPY_PIECE_ROWS) * b->width;
    if (b->what->option == GATE) b->kernels->swiglu(at(b, 0) + i, at(b, 1) + i, at(b, 2) + i, n);
    else
        b->kernels->swiglu_backward(at(b, 0) + i, at(b, 1) + i, at(b, 2) + i, at(b, 3) + i,
                                    at(b, 4) + i, n);
}

static void run_swiglu(anepy_bench *b) {
    anepy_pool_run(b->pool, anepy_pieces(b->rows, ANEPY_PIECE_ROWS), swiglu_rows, b);
}

/* Largest logit and sum of exponentials of every token, for pieces of the vocabulary; then
 * probabilities in place of the logits. */
static int32_t prepare_softmax(anepy_bench *b) {
    int32_t vocab = b->model->config.vocab_size;
    int32_t pieces = anepy_pieces(vocab, ANEPY_LOSS_ROWS);
    double n = (double)vocab * b->seq;
    b->rows = vocab;
    anepy_bench_limit(b, "triad", 30.0 * n, 12.0 * n, 1.0);
    ANEPY_BENCH_SHAPE(b, "%d x %d", vocab, b->seq);
    add(b, (int64_t)vocab * b->width, INOUT, -2.0f, 2.0f);
    add(b, 2 * (int64_t)pieces * b->width, OUT, 0.0f, 0.0f);
    add(b, b->width, IN, 9.0f, 11.0f); /* log of the sums: any will do */
    return ANEPY_OK;
}

static void softmax_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_bench *b = context;
    int32_t panels = b->width / COLS, piece = index / panels;
    int64_t j = (int64_t)(index % panels) * COLS, row = (int64_t)piece * ANEPY_LOSS_ROWS;
    int32_t rows = anepy_min_i32(ANEPY_LOSS_ROWS, b->rows - piece * ANEPY_LOSS_ROWS);
    float *x = at(b, 0) + row * b->width + j, *max = at(b, 1) + 2 * piece * (int64_t)b->width + j;
    b->kernels->logsumexp_columns(max, max + b->width, x, b->width, rows);
    b->kernels->softmax_gradient(x, at(b, 2) + j, 1.0f, b->width, rows);
}

static void run_softmax(anepy_bench *b) {
    anepy_pool_run(b->pool, anepy_pieces(b->rows, ANEPY_LOSS_ROWS) * (b->width / COLS),
                   softmax_piece, b);
}

/* ------------------------------------------------------------------------------------ the table */

#define PRODUCT_TOLERANCE 1e-5 /* float32 sums of up to 32000 terms in another order */
#define PASS_TOLERANCE 1e-5    /* a few roundings, exp to 2 ulp, sums over a few hundred */

#define BOTH (ANEPY_BENCH_FP32 | ANEPY_BENCH_BF16)

#define PRODUCTS(suffix, prepare)                                                                  \
    {"qkv_" suffix, prepare, run_product, PRODUCT_TOLERANCE, QKV, BOTH, NULL, NULL, NULL},         \
        {"wo_" suffix, prepare, run_product, PRODUCT_TOLERANCE, WO, BOTH, NULL, NULL, NULL},       \
        {"w13_" suffix, prepare, run_product, PRODUCT_TOLERANCE, W13, BOTH, NULL, NULL, NULL},     \
        {"w2_" suffix, prepare, run_product, PRODUCT_TOLERANCE, W2, BOTH, NULL, NULL, NULL}, {     \
        "classifier_" suffix, prepare, run_product, PRODUCT_TOLERANCE, CLASSIFIER, BOTH, NULL,     \
            NULL, NULL                                                                             \
    }

#define KERNEL(name, prepare, run, tolerance, option)                                              \
    {name, prepare, run, tolerance, option, ANEPY_BENCH_FP32, NULL, NULL, NULL}

#define PROGRAM(name, run, option, forms)                                                          \
    {name,                                                                                         \
     anepy_bench_prepare_program,                                                                  \
     run,                                                                                          \
     PASS_TOLERANCE,                                                                               \
     option,                                                                                       \
     forms,                                                                                        \
     anepy_bench_open_program,                                                                     \
     anepy_bench_fetch_program,                                                                    \
     anepy_bench_close_program}

static const anepy_bench_case CASES[] = {
    PRODUCTS("forward", prepare_forward),
    PRODUCTS("dx", prepare_dx),
    PRODUCTS("dw", prepare_dw),
    PROGRAM("attention_forward", anepy_bench_run_attention, ANEPY_SDPA_FWD, BOTH),
    PROGRAM("attention_backward", anepy_bench_run_attention, ANEPY_SDPA_BWD2, BOTH),
    KERNEL("rmsnorm", prepare_rmsnorm, run_rmsnorm, PASS_TOLERANCE, 0),
    KERNEL("rmsnorm_backward", prepare_rmsnorm_backward, run_rmsnorm_backward, PASS_TOLERANCE, 0),
    KERNEL("swiglu", prepare_swiglu, run_swiglu, PASS_TOLERANCE, GATE),
    KERNEL("swiglu_backward", prepare_swiglu, run_swiglu, PASS_TOLERANCE, GATE_BACKWARD),
    KERNEL("softmax_loss", prepare_softmax, run_softmax, PASS_TOLERANCE, 0),
    KERNEL("adam", prepare_adam, run_adam, PASS_TOLERANCE, 0),
    KERNEL("gradient_norm", prepare_norm_of_gradient, run_norm_of_gradient, PASS_TOLERANCE, 0),
    KERNEL("to_fp16", prepare_conversion, run_conversion, 0.0, TO_HALF),
    KERNEL("from_fp16", prepare_conversion, run_conversion, 0.0, FROM_HALF),
    {"to_bf16", prepare_conversion, run_conversion, 0.0, TO_BF16, ANEPY_BENCH_BF16, NULL, NULL,
     NULL},
    {"from_bf16", prepare_conversion, run_conversion, 0.0, FROM_BF16, ANEPY_BENCH_BF16, NULL, NULL,
     NULL},
    KERNEL("matvec", prepare_matvec, run_matvec, PRODUCT_TOLERANCE, 0),
    KERNEL("copy", prepare_conversion, run_conversion, 0.0, COPY),
    PROGRAM("sdpa_fwd", anepy_bench_run_program, ANEPY_SDPA_FWD, BOTH),
    PROGRAM("ffn_fwd", anepy_bench_run_program, ANEPY_FFN_FWD, BOTH),
    PROGRAM("ffn_bwd", anepy_bench_run_program, ANEPY_FFN_BWD, BOTH),
    PROGRAM("sdpa_bwd1", anepy_bench_run_program, ANEPY_SDPA_BWD1, BOTH),
    PROGRAM("sdpa_bwd2", anepy_bench_run_program, ANEPY_SDPA_BWD2, BOTH),
    PROGRAM("qkv_bwd", anepy_bench_run_program, ANEPY_QKV_BWD, BOTH),
};

const anepy_bench_case *anepy_bench_case_at(int32_t index) {
    return index >= 0 && index < (int32_t)(sizeof CASES / sizeof CASES[0]) ? &CASES[index] : NULL;
}
