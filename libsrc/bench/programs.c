/* bench/programs.c - cases on the CPU device: programs of the table, and attention alone.
 *
 * One layer; data is written and read as float32. */
#include <stdio.h>
#include <string.h>

#include "bench/bench.h"
#include "device/cpu/cpu.h"

/* Buffers of a case: output and input of the program, and weights. The backward pass of attention
 * has those of sdpa_fwd, which runs before it, and gradients of q, k, v, of attn and of the layer.
 */
enum { OUTPUT, INPUT, WEIGHTS, GRADIENTS, DATTN, DY };

static int is_attention(const anepy_bench *b) { return b->what->run != anepy_bench_run_program; }

static int is_backward(const anepy_bench *b) {
    return b->what->option == ANEPY_SDPA_BWD1 || b->what->option == ANEPY_SDPA_BWD2;
}

/* Operations that have to be computed: for each query the keys up to it. */
static double operations(const anepy_bench *b) {
    const anepy_config *c = &b->model->config;
    double s = b->seq, dim = c->dim, q = b->model->q_dim, kv = b->model->kv_dim;
    double attention = q * s * (s + 1.0); /* one product of queries with keys, all heads */
    double feed_forward = 6.0 * s * dim * c->hidden_dim, qkv = 2.0 * s * dim * (q + 2.0 * kv);
    if (is_attention(b) && !is_backward(b)) return 2.0 * attention;
    switch (b->what->option) {
    case ANEPY_SDPA_FWD: return qkv + 2.0 * s * dim * q + 2.0 * attention;
    case ANEPY_SDPA_BWD1: return 2.0 * s * dim * q;
    case ANEPY_SDPA_BWD2: return 5.0 * attention; /* scores again, and their four gradients */
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
    double channels = p.input_channels + p.output_channels;
    if (b->what->option == ANEPY_SDPA_BWD1) channels = (double)config.dim + b->one->q_dim;
    if (b->what->option == ANEPY_SDPA_BWD2) /* q, k, v, attn and dattn; dq, dk, dv */
        channels = 4.0 * b->one->q_dim + 4.0 * b->one->kv_dim;
    double moved = channels * b->seq;
    anepy_bench_limit(b, anepy_bench_arithmetic(b), operations(b), 4.0 * (weights + moved),
                      b->model->config.n_layers);
    if (is_attention(b))
        ANEPY_BENCH_SHAPE(b, "%d x %d x %d", config.n_heads, b->model->head_dim, b->seq);
    else ANEPY_BENCH_SHAPE(b, "%d, %d x %d", config.dim, config.hidden_dim, b->seq);
    if (is_backward(b)) describe(&p, b, ANEPY_SDPA_FWD);
    anepy_bench_add(b, surface_n(b, p.output_channels), INOUT, -1.0f, 1.0f);
    anepy_bench_add(b, surface_n(b, p.input_channels), IN, -1.0f, 1.0f);
    anepy_bench_add(b, b->one->arena_n, IN, -0.05f, 0.05f);
    if (!is_backward(b)) return ANEPY_OK;
    anepy_bench_add(b, surface_n(b, b->one->q_dim + 2 * b->one->kv_dim), OUT, 0.0f, 0.0f);
    anepy_bench_add(b, surface_n(b, b->one->q_dim), INOUT, -1.0f, 1.0f);
    anepy_bench_add(b, surface_n(b, config.dim), IN, -1.0f, 1.0f);
    return ANEPY_OK;
}

static int32_t compile(anepy_bench *b, anepy_program *p, int32_t id, anepy_executable **out) {
    anepy_instance instance = {p, 0};
    describe(p, b, id);
    return b->device->ops->compile(b->device, &instance, 1, b->buffers[WEIGHTS].data, out);
}

static int32_t open_one(anepy_bench *b, int32_t id) {
    const anepy_device_ops *ops = b->device->ops;
    anepy_program p;
    ANEPY_TRY(compile(b, &p, id, &b->programs[0]));
    ANEPY_TRY(ops->surface_create(b->device, p.input_channels, 0, 0, &b->surfaces[0]));
    ANEPY_TRY(ops->surface_create(b->device, p.output_channels, 0, 0, &b->surfaces[1]));
    for (int32_t t = 0; t < p.input_n + p.output_n; t++)
        ANEPY_TRY(ops->bind(b->programs[0], t, b->surfaces[t >= p.input_n], p.tensors[t].channel));
    if (id == ANEPY_SDPA_FWD) {
        ANEPY_TRY(ops->surface_create(b->device, p.host_channels, 0, 0, &b->surfaces[4]));
        ANEPY_TRY(ops->bind(b->programs[0], SDPA_FWD_LSE, b->surfaces[4], 0));
    }
    ANEPY_TRY(anepy_surface_write(b->surfaces[0], 0, p.input_channels, b->buffers[INPUT].data));
    /* attention reads q, k, v from the output of sdpa_fwd */
    return anepy_surface_write(b->surfaces[1], 0, p.output_channels, b->buffers[OUTPUT].data);
}

/* The backward pass reads what sdpa_fwd computed, as in a step, without scores in memory. */
static int32_t open_backward(anepy_bench *b) {
    const anepy_device_ops *ops = b->device->ops;
    int32_t dim = b->one->config.dim, q_dim = b->one->q_dim, kv = b->one->kv_dim;
    anepy_program fwd, p;
    describe(&fwd, b, ANEPY_SDPA_FWD);
    int32_t q = fwd.tensors[SDPA_FWD_Q].channel, k = fwd.tensors[SDPA_FWD_K].channel;
    const struct {
        int32_t program, tensor, surface, channel;
    } bound[] = {{0, SDPA_BWD1_DY, 3, 0},
                 {1, SDPA_BWD2_Q, 1, q},
                 {1, SDPA_BWD2_K, 1, k},
                 {1, SDPA_BWD2_V, 1, fwd.tensors[SDPA_FWD_V].channel},
                 {1, SDPA_BWD2_ATTN, 1, fwd.tensors[SDPA_FWD_ATTN].channel},
                 {1, SDPA_BWD2_LSE, 4, 0},
                 {1, SDPA_BWD2_DV, 2, q_dim + kv},
                 {1, SDPA_BWD2_DQ, 2, 0},
                 {1, SDPA_BWD2_DK, 2, q_dim}};
    ANEPY_TRY(open_one(b, ANEPY_SDPA_FWD));
    ANEPY_TRY(compile(b, &p, ANEPY_SDPA_BWD1, &b->programs[1]));
    ANEPY_TRY(compile(b, &p, ANEPY_SDPA_BWD2, &b->programs[2]));
    ANEPY_TRY(ops->surface_create(b->device, q_dim + 2 * kv, 0, 0, &b->surfaces[2]));
    ANEPY_TRY(ops->surface_create(b->device, dim, 0, 0, &b->surfaces[3]));
    ANEPY_TRY(anepy_surface_write(b->surfaces[3], 0, dim, b->buffers[DY].data));
    for (size_t i = 0; i < sizeof bound / sizeof bound[0]; i++)
        ANEPY_TRY(ops->bind(b->programs[1 + bound[i].program], bound[i].tensor,
                            b->surfaces[bound[i].surface], bound[i].channel));
    anepy_cpu_attention(b->programs[0], b->seq, b->width);
    ANEPY_TRY(ops->evaluate(b->programs[1], b->seq, 1));
    if (b->what->option == ANEPY_SDPA_BWD2)
        memcpy(b->programs[0]->cpu->dattn, b->buffers[DATTN].data,
               (size_t)b->buffers[DATTN].n * sizeof(float));
    return ANEPY_OK;
}

int32_t anepy_bench_open_program(anepy_bench *b) {
    anepy_device_options options = {
        .model = b->one, .gemm = &b->gemm, .width = b->width, .seq_len = b->seq, .dtype = b->dtype};
    float *weights = b->buffers[WEIGHTS].data;
    const int32_t norms[2] = {ANEPY_ATTENTION_NORM, ANEPY_FFN_NORM};
    for (int32_t i = 0; i < 2; i++)
        for (int32_t c = 0; c < b->one->config.dim; c++)
            weights[anepy_model_find(b->one, 0, norms[i])->offset + c] = 1.0f;
    ANEPY_TRY(anepy_device_cpu.open(&b->device, &options));
    return is_backward(b) ? open_backward(b) : open_one(b, b->what->option);
}

int32_t anepy_bench_fetch_program(anepy_bench *b) {
    ANEPY_TRY(
        anepy_surface_read(b->surfaces[1], 0, b->surfaces[1]->channels, b->buffers[OUTPUT].data));
    if (!is_backward(b)) return ANEPY_OK;
    memcpy(b->buffers[DATTN].data, b->programs[0]->cpu->dattn,
           (size_t)b->buffers[DATTN].n * sizeof(float));
    return anepy_surface_read(b->surfaces[2], 0, b->surfaces[2]->channels,
                              b->buffers[GRADIENTS].data);
}

void anepy_bench_close_program(anepy_bench *b) {
    if (b->device != NULL) b->device->ops->close(b->device);
    b->device = NULL;
}

void anepy_bench_run_program(anepy_bench *b) {
    int32_t which = b->what->option == ANEPY_SDPA_BWD1   ? 1
                    : b->what->option == ANEPY_SDPA_BWD2 ? 2
                                                         : 0;
    b->device->ops->evaluate(b->programs[which], b->seq, 1); /* the CPU device never fails */
}

void anepy_bench_run_attention(anepy_bench *b) {
    if (is_backward(b)) anepy_cpu_attention_backward(b->programs[2], b->seq, b->width);
    else anepy_cpu_attention(b->programs[0], b->seq, b->width);
}
