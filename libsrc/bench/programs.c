/* bench/programs.c - cases that run on the CPU device: whole programs of the table as the step
 * evaluates them, and attention alone. One layer; data is handed over and fetched as float32. */
#include <stdio.h>
#include <string.h>

#include "bench/bench.h"
#include "device/cpu/cpu.h"

/* Buffers of a case: input and output of the program, the weights, then what attention_backward
 * needs beside them. */
enum { OUTPUT, INPUT, WEIGHTS, SECOND_OUTPUT, SECOND_INPUT, GRADIENT };

static int is_backward_attention(const anepy_bench *b) {
    return b->what->run == anepy_bench_run_attention_backward;
}

static int is_attention(const anepy_bench *b) { return b->what->run != anepy_bench_run_program; }

/* Only what has to be computed: keys up to the query, once each. */
static double operations(const anepy_bench *b) {
    const anepy_config *c = &b->model->config;
    double s = b->seq, dim = c->dim, kv = b->model->kv_dim;
    double attention = dim * s * (s + 1.0); /* one product of queries with keys, all heads */
    double feed_forward = 6.0 * s * dim * c->hidden_dim, qkv = 2.0 * s * dim * (dim + 2.0 * kv);
    if (is_backward_attention(b)) return 5.0 * attention;
    if (is_attention(b)) return 2.0 * attention;
    switch (b->what->option) {
    case ANEPY_SDPA_FWD: return qkv + 2.0 * s * dim * dim + 2.0 * attention;
    case ANEPY_SDPA_BWD1: return 2.0 * s * dim * dim + 3.0 * attention;
    case ANEPY_SDPA_BWD2: return 2.0 * attention;
    case ANEPY_QKV_BWD: return qkv;
    default: return feed_forward;
    }
}

static void describe(anepy_program *out, const anepy_bench *b, int32_t id) {
    anepy_program_describe(out, (anepy_program_id)id, b->one, b->width);
}

static int64_t surface_n(const anepy_bench *b, int32_t channels) {
    return (int64_t)channels * b->width;
}

int32_t anepy_bench_prepare_program(anepy_bench *b) {
    anepy_config config = b->model->config;
    anepy_program p;
    config.n_layers = 1;
    config.vocab_size = 1;
    if (config.seq_len < b->seq) config.seq_len = b->seq;
    config.tied = 1;
    ANEPY_TRY(anepy_model_create(&b->one, &config));
    describe(&p, b, b->what->option);
    b->exact = b->dtype == ANEPY_BF16;
    b->columns = b->width;
    b->valid = b->seq;
    double weights = 0.0;
    for (int32_t w = 0; w < p.weight_n && !is_attention(b); w++) {
        anepy_program_matrix m;
        anepy_program_weight(&m, &p, b->one, 0, w);
        weights += (double)m.rows * (double)m.cols;
    }
    double moved = (double)(p.input_channels + p.output_channels) * b->seq;
    anepy_bench_limit(b, anepy_bench_arithmetic(b), operations(b), 4.0 * (weights + moved),
                      b->model->config.n_layers);
    if (is_attention(b))
        ANEPY_BENCH_SHAPE(b, "%d x %d x %d", config.n_heads, b->model->head_dim, b->seq);
    else ANEPY_BENCH_SHAPE(b, "%d, %d x %d", config.dim, config.hidden_dim, b->seq);
    anepy_bench_add(b, surface_n(b, p.output_channels), INOUT, -1.0f, 1.0f);
    anepy_bench_add(b, surface_n(b, p.input_channels), IN, -1.0f, 1.0f);
    anepy_bench_add(b, b->one->arena_n, IN, -0.05f, 0.05f);
    if (!is_backward_attention(b)) return ANEPY_OK;
    describe(&p, b, ANEPY_SDPA_BWD2);
    anepy_bench_add(b, surface_n(b, p.output_channels), OUT, 0.0f, 0.0f);
    anepy_bench_add(b, surface_n(b, p.input_channels), IN, -1.0f, 1.0f);
    anepy_bench_add(b, surface_n(b, config.dim), IN, -1.0f, 1.0f);
    return ANEPY_OK;
}

static int32_t open_one(anepy_bench *b, int32_t which, int32_t id) {
    const anepy_device_ops *ops = b->device->ops;
    anepy_surface **surface = &b->surfaces[2 * which];
    anepy_program p;
    describe(&p, b, id);
    anepy_instance instance = {&p, 0};
    ANEPY_TRY(ops->surface_create(b->device, p.input_channels, &surface[0]));
    ANEPY_TRY(ops->surface_create(b->device, p.output_channels, &surface[1]));
    ANEPY_TRY(ops->compile(b->device, &instance, 1, b->buffers[WEIGHTS].data, &b->programs[which]));
    for (int32_t t = 0; t < p.input_n + p.output_n; t++)
        ANEPY_TRY(ops->bind(b->programs[which], t, surface[t >= p.input_n], p.tensors[t].channel));
    const float *in = b->buffers[which == 0 ? INPUT : SECOND_INPUT].data;
    return anepy_surface_write(surface[0], 0, p.input_channels, in);
}

/* Scores and their gradients pass from the first half of the backward pass to the second where they
 * lie. */
static int32_t join_halves(anepy_bench *b) {
    anepy_program first;
    describe(&first, b, ANEPY_SDPA_BWD1);
    const int32_t from[2] = {SDPA_BWD1_P, SDPA_BWD1_DP}, to[2] = {SDPA_BWD2_P, SDPA_BWD2_DP};
    for (int32_t i = 0; i < 2; i++)
        ANEPY_TRY(b->device->ops->bind(b->programs[1], to[i], b->surfaces[1],
                                       first.tensors[from[i]].channel));
    memcpy(b->programs[0]->cpu->dattn, b->buffers[GRADIENT].data,
           (size_t)b->buffers[GRADIENT].n * sizeof(float));
    return ANEPY_OK;
}

int32_t anepy_bench_open_program(anepy_bench *b) {
    anepy_device_options options = {
        .model = b->one, .gemm = &b->gemm, .width = b->width, .seq_len = b->seq, .dtype = b->dtype};
    float *weights = b->buffers[WEIGHTS].data;
    const int32_t norms[2] = {ANEPY_ATTENTION_NORM, ANEPY_FFN_NORM};
    for (int32_t i = 0; i < 2; i++)
        for (int32_t c = 0; c < b->one->config.dim; c++)
            weights[anepy_model_layer(b->one, 0, norms[i]) + c] = 1.0f;
    ANEPY_TRY(anepy_device_cpu.open(&b->device, &options));
    ANEPY_TRY(open_one(b, 0, b->what->option));
    ANEPY_TRY(anepy_surface_write(b->surfaces[1], 0, b->surfaces[1]->channels,
                                  b->buffers[OUTPUT].data)); /* attention reads q, k, v there */
    if (!is_backward_attention(b)) return ANEPY_OK;
    ANEPY_TRY(open_one(b, 1, ANEPY_SDPA_BWD2));
    return join_halves(b);
}

int32_t anepy_bench_fetch_program(anepy_bench *b) {
    ANEPY_TRY(
        anepy_surface_read(b->surfaces[1], 0, b->surfaces[1]->channels, b->buffers[OUTPUT].data));
    if (!is_backward_attention(b)) return ANEPY_OK;
    return anepy_surface_read(b->surfaces[3], 0, b->surfaces[3]->channels,
                              b->buffers[SECOND_OUTPUT].data);
}

void anepy_bench_close_program(anepy_bench *b) {
    if (b->device != NULL) b->device->ops->close(b->device);
    b->device = NULL;
}

void anepy_bench_run_program(anepy_bench *b) {
    b->device->ops->evaluate(b->programs[0], b->seq, 1); /* the CPU device never fails */
}

void anepy_bench_run_attention(anepy_bench *b) {
    anepy_cpu_attention(b->programs[0], b->seq, b->width);
}

void anepy_bench_run_attention_backward(anepy_bench *b) {
    anepy_cpu_attention_backward1(b->programs[0], b->seq, b->width);
    anepy_cpu_attention_backward2(b->programs[1], b->seq, b->width);
}
