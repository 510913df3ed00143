/* model.c - the tensor table, refused dimensions, and the program table. */
#include "model/model.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "groups.h"
#include "programs/programs.h"

#define LAYERS_MOST 32

static anepy_config config_of(int32_t dim, int32_t hidden, int32_t layers, int32_t heads,
                              int32_t kv, int32_t vocab, int32_t seq, int32_t tied) {
    return (anepy_config){.struct_size = sizeof(anepy_config),
                          .dim = dim,
                          .hidden_dim = hidden,
                          .n_layers = layers,
                          .n_heads = heads,
                          .n_kv_heads = kv,
                          .vocab_size = vocab,
                          .seq_len = seq,
                          .tied = tied};
}

#define CONFIG_N 9

/* stories260K, stories110M, Llama-3-70B's layer shape, the smallest there is, heads of more and of
 * fewer channels than the model, and biases. */
static void configs(anepy_config *out) {
    out[0] = config_of(64, 172, 5, 8, 4, 512, 512, 1);
    out[1] = config_of(768, 2048, 12, 12, 12, 32000, 1024, 1);
    out[2] = config_of(8192, 28672, 3, 64, 8, 128256, 4096, 0);
    out[3] = config_of(2, 1, 1, 1, 1, 1, 1, 0);
    out[4] = config_of(30, 7, LAYERS_MOST, 5, 1, 11, 3, 1);
    out[5] = config_of(64, 96, 2, 4, 2, 70000, 100, 1);
    out[5].head_dim = 128;
    out[6] = config_of(45, 70, 3, 6, 3, 100, 64, 0);
    out[6].head_dim = 2;
    out[7] = config_of(30, 20, 2, 6, 3, 50, 64, 1);
    out[7].head_dim = 8;
    out[7].qkv_bias = 1;
    out[8] = config_of(40, 20, 3, 4, 2, 50, 64, 0);
    out[8].head_dim = 12;
    out[8].qk_norm = 1;
}

/* -------------------------------------------------------------------------------------- tensors */

static int one_line(const char *text) { return strlen(text) > 10 && strchr(text, '\n') == NULL; }

static void check_tensors(const anepy_config *config) {
    anepy_model *model = NULL;
    if (!CHECK(anepy_model_create(&model, config) == ANEPY_OK, "dim %d is refused", config->dim))
        return;
    int32_t n = anepy_model_tensor_n(model), distinct = 1, shaped = 1, without_gaps = 1;
    int64_t next = 0, dim = config->dim, hidden = config->hidden_dim;
    int64_t head = config->head_dim != 0 ? config->head_dim : dim / config->n_heads;
    int64_t q = head * config->n_heads, kv = head * config->n_kv_heads, layers = config->n_layers;
    int64_t biases = config->qkv_bias ? 3 : 0, optional = biases + (config->qk_norm ? 2 : 0);
    int64_t each = 9 + optional;
    static anepy_tensor rows[LAYERS_MOST * 14 + 3];
    CHECK(n == layers * each + 2 + !config->tied, "%d tensors", n);
    for (int32_t i = 0; i < n; i++) {
        anepy_tensor *t = &rows[i];
        t->struct_size = sizeof *t;
        shaped &= anepy_model_tensor(model, i, t) == ANEPY_OK && t->struct_size == sizeof *t;
        uint32_t kind = ANEPY_TENSOR_MATRIX | ANEPY_TENSOR_DECAYS;
        int is_matrix = (t->flags & kind) == kind;
        shaped &= t->rows >= 1 && t->cols >= 1 && (is_matrix || t->rows == 1);
        int is_vector = strstr(t->name, "norm") != NULL || strstr(t->name, ".bias") != NULL;
        shaped &= is_vector == ((t->flags & kind) == 0) && is_vector != is_matrix;
        shaped &= t->gradient == t->offset && (t->flags & ANEPY_TENSOR_TRAINABLE);
        shaped &= anepy_model_find(model, t->layer, t->role) == &model->tensors[i];
        without_gaps &= t->offset == next;
        next += t->rows * t->cols;
        for (int32_t j = 0; j < i; j++) distinct &= strcmp(t->name, rows[j].name) != 0;
    }
    CHECK(shaped, "dim %d: an odd row", config->dim);
    CHECK(without_gaps && next == anepy_model_arena_n(model),
          "dim %d: %lld of %lld elements are named", config->dim, (long long)next,
          (long long)anepy_model_arena_n(model));
    CHECK(distinct, "dim %d: a name twice", config->dim);
    int64_t expected = config->vocab_size * dim * (config->tied ? 1 : 2) + dim +
                       layers * (2 * dim + 2 * dim * q + 2 * kv * dim + 3 * dim * hidden +
                                 (biases ? q + 2 * kv : 0) + (config->qk_norm ? 2 * head : 0));
    CHECK(next == expected, "dim %d: %lld parameters, not %lld", config->dim, (long long)next,
          (long long)expected);
    CHECK(strcmp(rows[0].name, "tok_embeddings.weight") == 0 &&
              strcmp(rows[each * layers + 1].name, "norm.weight") == 0 &&
              strcmp(rows[2].name, "layers.0.attention.wq.weight") == 0,
          "the first tensors are %s, %s", rows[0].name, rows[2].name);
    const anepy_tensor *classifier = anepy_model_find(model, 0, ANEPY_CLASSIFIER);
    CHECK(classifier == &model->tensors[config->tied ? 0 : n - 1] &&
              anepy_model_projects(model, classifier) &&
              anepy_model_gradient_n(model) == anepy_model_arena_n(model),
          "dim %d: another classifier, or something is frozen", config->dim);
    CHECK(model->head_dim == head && model->q_dim == q && model->kv_dim == kv &&
              rows[2].rows == q && rows[5 + optional].cols == q,
          "dim %d: heads of %d channels", config->dim, model->head_dim);
    CHECK(rows[3].offset == rows[2].offset + dim * q &&
              rows[8 + optional].offset == rows[7 + optional].offset + hidden * dim,
          "wk does not follow wq, or w3 w1");
    for (int32_t role = ANEPY_WQ; role <= ANEPY_WV; role++) {
        anepy_projection p = anepy_model_projection(model, 0, role);
        const anepy_tensor *bias = anepy_model_find(model, 0, role + ANEPY_BQ - ANEPY_WQ);
        CHECK(p.bias == bias && (bias != NULL) == (biases > 0) && p.in == dim &&
                  p.out == (role == ANEPY_WQ ? q : kv) && (bias == NULL || bias->cols == p.out),
              "dim %d: projection %d has another bias or shape", config->dim, role);
    }
    char text[200];
    anepy_tensor beyond = {.struct_size = sizeof beyond};
    CHECK(anepy_model_tensor(model, n, &beyond) == ANEPY_E_ARGUMENT &&
              anepy_model_tensor(model, -1, &beyond) == ANEPY_E_ARGUMENT,
          "there is a tensor %d", n);
    anepy_last_error(text, sizeof text);
    CHECK(strstr(text, "-1") != NULL, "says '%s'", text);
    anepy_model_free(model);
}

static void check_refused(anepy_config config, const char *about) {
    anepy_model *model = (anepy_model *)&config;
    char text[512] = "";
    anepy_fail(ANEPY_OK, "-");
    CHECK(anepy_model_create(&model, &config) == ANEPY_E_ARGUMENT, "%s is accepted", about);
    anepy_last_error(text, sizeof text);
    CHECK(one_line(text) && strstr(text, about) != NULL, "%s: says '%s'", about, text);
    CHECK(model == (anepy_model *)&config, "%s: a refused call writes its output", about);
}

static void check_bad_dimensions(void) {
    static const int32_t bad[] = {0, -1, INT32_MIN, INT32_MAX};
    anepy_config good = config_of(64, 172, 5, 8, 4, 512, 512, 1), c;
    static const struct {
        const char *name;
        size_t offset;
    } fields[] = {
        {"dim", offsetof(anepy_config, dim)},
        {"hidden_dim", offsetof(anepy_config, hidden_dim)},
        {"n_layers", offsetof(anepy_config, n_layers)},
        {"n_heads", offsetof(anepy_config, n_heads)},
        {"n_kv_heads", offsetof(anepy_config, n_kv_heads)},
        {"vocab_size", offsetof(anepy_config, vocab_size)},
        {"seq_len", offsetof(anepy_config, seq_len)},
    };
    for (size_t f = 0; f < sizeof fields / sizeof fields[0]; f++) {
        for (size_t b = 0; b < sizeof bad / sizeof bad[0]; b++) {
            c = good;
            memcpy((char *)&c + fields[f].offset, &bad[b], sizeof bad[b]);
            check_refused(c, fields[f].name);
        }
    }
    c = good;
    c.dim = 65;
    check_refused(c, "n_heads");
    c = good;
    c.dim = 72;
    check_refused(c, "odd");
    c = good;
    c.n_kv_heads = 3;
    check_refused(c, "n_kv_heads");
    c = good;
    c.n_kv_heads = 16;
    check_refused(c, "n_kv_heads");
    c = good;
    c.head_dim = 9;
    check_refused(c, "odd");
    c = good;
    c.head_dim = -8;
    check_refused(c, "head_dim");
    c = good;
    c.head_dim = 8194;
    check_refused(c, "head_dim");
    c = good;
    c.tied = 2;
    check_refused(c, "tied");
    c = good;
    c.tied = -1;
    check_refused(c, "tied");
    c = good;
    c.struct_size = sizeof c - 4;
    check_refused(c, "bytes");
    c = good;
    c.struct_size = 0;
    check_refused(c, "bytes");
    anepy_model_free(NULL);
}

/* Numbers that are not whole; what says nothing of a setting must not look at it. */
static void check_bad_numbers(void) {
    static const double bad[] = {-1.0, 1e-30, 1e30, INFINITY, -INFINITY, NAN};
    static const struct {
        const char *name;
        size_t offset;
        int32_t scaling; /* from this one on it is looked at */
    } fields[] = {
        {"norm_eps", offsetof(anepy_config, norm_eps), 0},
        {"rope_theta", offsetof(anepy_config, rope_theta), 0},
        {"rope_factor", offsetof(anepy_config, rope_factor), ANEPY_ROPE_LINEAR},
        {"rope_low_freq_factor", offsetof(anepy_config, rope_low_freq_factor), ANEPY_ROPE_LLAMA3},
        {"rope_high_freq_factor", offsetof(anepy_config, rope_high_freq_factor), ANEPY_ROPE_LLAMA3},
    };
    anepy_config good = config_of(64, 172, 5, 8, 4, 512, 512, 1), c;
    good.rope_factor = 8.0;
    good.rope_low_freq_factor = 1.0;
    good.rope_high_freq_factor = 4.0;
    good.rope_original_max_position = 8192;
    for (size_t f = 0; f < sizeof fields / sizeof fields[0]; f++) {
        for (size_t b = 0; b < sizeof bad / sizeof bad[0]; b++) {
            for (int32_t scaling = 0; scaling <= ANEPY_ROPE_LLAMA3; scaling++) {
                anepy_model *model = NULL;
                c = good;
                c.rope_scaling = scaling;
                memcpy((char *)&c + fields[f].offset, &bad[b], sizeof bad[b]);
                if (scaling >= fields[f].scaling) {
                    check_refused(c, fields[f].name);
                } else {
                    CHECK(anepy_model_create(&model, &c) == ANEPY_OK, "%s of no use is refused",
                          fields[f].name);
                    anepy_model_free(model);
                }
            }
        }
    }
    for (int32_t scaling = -1; scaling <= 3; scaling += 4) {
        c = good;
        c.rope_scaling = scaling;
        check_refused(c, "rope_scaling");
    }
    c = good;
    c.rope_scaling = ANEPY_ROPE_LLAMA3;
    c.rope_high_freq_factor = 1.0;
    check_refused(c, "rope_high_freq_factor");
    c.rope_high_freq_factor = 4.0;
    c.rope_original_max_position = 0;
    check_refused(c, "rope_original_max_position");
}

/* Frequencies by another way: turns within the original context, each pair on its own. */
static void check_frequencies(void) {
    anepy_config c = config_of(64, 172, 1, 1, 1, 512, 512, 1);
    c.rope_theta = 5e5;
    c.rope_factor = 8.0;
    c.rope_low_freq_factor = 1.0;
    c.rope_high_freq_factor = 4.0;
    c.rope_original_max_position = 8192;
    int32_t kept = 0, divided = 0, between = 0;
    for (c.rope_scaling = 0; c.rope_scaling <= ANEPY_ROPE_LLAMA3; c.rope_scaling++) {
        anepy_model *model = NULL;
        if (!CHECK(anepy_model_create(&model, &c) == ANEPY_OK, "scaling %d", c.rope_scaling))
            return;
        for (int32_t pair = 0; pair < 32; pair++) {
            double plain = exp(-log(5e5) * pair / 32.0), expected = plain;
            double length = 6.283185307179586 / plain; /* tokens per turn */
            if (c.rope_scaling == ANEPY_ROPE_LINEAR) expected = plain / 8.0;
            if (c.rope_scaling == ANEPY_ROPE_LLAMA3 && length > 8192.0) {
                expected = plain / 8.0;
                divided++;
            } else if (c.rope_scaling == ANEPY_ROPE_LLAMA3 && length > 2048.0) {
                double smooth = (8192.0 / length - 1.0) / 3.0;
                expected = (1.0 - smooth) * plain / 8.0 + smooth * plain;
                between++;
            } else {
                kept += c.rope_scaling == ANEPY_ROPE_LLAMA3;
            }
            double found = anepy_rope_frequency(model, pair);
            CHECK(fabs(found - expected) <= 1e-13 * expected,
                  "scaling %d, pair %d: %.17g, not %.17g", c.rope_scaling, pair, found, expected);
        }
        anepy_model_free(model);
    }
    CHECK(kept > 0 && divided > 0 && between > 0, "pairs: %d kept, %d between, %d divided", kept,
          between, divided);
}

static void check_flags(void) {
    anepy_config c = config_of(64, 172, 5, 8, 4, 512, 512, 1);
    c.qkv_bias = 2;
    check_refused(c, "qkv_bias");
    c.qkv_bias = 0;
    c.qk_norm = 2;
    check_refused(c, "qk_norm");
}

/* ------------------------------------------------------------------------------------- programs */

static int32_t width_of(const anepy_model *model) {
    return (int32_t)anepy_round_up(model->config.seq_len, 64);
}

/* One half of the tensors: consecutive from channel 0 to the packed total. */
static int packed(const anepy_program_tensor *tensors, int32_t n, int32_t total) {
    int32_t next = 0;
    for (int32_t i = 0; i < n; i++) {
        if (tensors[i].channel != next || tensors[i].channels < 1) return 0;
        next += tensors[i].channels;
    }
    return next == total;
}

static int named_once(const anepy_program_tensor *tensors, int32_t n) {
    for (int32_t i = 0; i < n; i++) {
        if (tensors[i].name == NULL || tensors[i].name[0] == '\0') return 0;
        for (int32_t j = 0; j < i; j++)
            if (strcmp(tensors[i].name, tensors[j].name) == 0) return 0;
    }
    return 1;
}

static void check_program(anepy_program_id id, const anepy_model *model) {
    anepy_program p;
    memset(&p, 0x5a, sizeof p);
    anepy_program_describe(&p, id, model, width_of(model));
    int32_t n = p.input_n + p.output_n, weights = 1;
    CHECK(p.id == id && strcmp(p.name, anepy_program_name(id)) == 0, "program %d is %s", (int)id,
          p.name);
    if (!CHECK(p.input_n >= 1 && p.output_n >= 1 && n <= ANEPY_HOST_TENSOR && p.host_n >= 0 &&
                   p.host_n <= ANEPY_PROGRAM_TENSORS - ANEPY_HOST_TENSOR && p.weight_n >= 0 &&
                   p.weight_n <= ANEPY_PROGRAM_WEIGHTS,
               "%s has %d inputs, %d outputs, %d weights", p.name, p.input_n, p.output_n,
               p.weight_n))
        return;
    CHECK(packed(p.tensors, p.input_n, p.input_channels), "%s: inputs have gaps", p.name);
    CHECK(packed(p.tensors + p.input_n, p.output_n, p.output_channels), "%s: outputs have gaps",
          p.name);
    const anepy_program_tensor *outputs = p.tensors + p.input_n;
    const anepy_program_tensor *host = p.tensors + ANEPY_HOST_TENSOR;
    CHECK(packed(host, p.host_n, p.host_channels), "%s: what is saved has gaps", p.name);
    CHECK(named_once(p.tensors, p.input_n) && named_once(outputs, p.output_n) &&
              named_once(host, p.host_n),
          "%s: a name twice", p.name);
    for (int32_t i = 0; i < p.output_n; i++)
        CHECK(outputs[i].place >= ANEPY_PLACE_OWN && outputs[i].place <= ANEPY_PLACE_LOGITS,
              "%s: %s is in no place", p.name, outputs[i].name);
    for (int32_t i = 0; i < p.weight_n; i++) {
        weights &= p.weights[i] >= 0 && p.weights[i] <= ANEPY_CLASSIFIER;
        for (int32_t j = 0; j < i; j++) weights &= p.weights[i] != p.weights[j];
    }
    CHECK(weights, "%s: an odd weight", p.name);
    CHECK(p.width == width_of(model) && p.part == 0 && p.parts >= 1 && p.first_row == 0,
          "%s: part %d of %d, width %d", p.name, p.part, p.parts, p.width);
}

/* The positions other files use are those of the names. */
static void check_positions(const anepy_model *model) {
    static const struct {
        anepy_program_id id;
        int32_t position;
        const char *name;
    } known[] = {
        {ANEPY_SDPA_FWD, SDPA_FWD_X, "x"},
        {ANEPY_SDPA_FWD, SDPA_FWD_OUT, "out"},
        {ANEPY_SDPA_FWD, SDPA_FWD_Q, "q"},
        {ANEPY_SDPA_FWD, SDPA_FWD_K, "k"},
        {ANEPY_SDPA_FWD, SDPA_FWD_V, "v"},
        {ANEPY_SDPA_FWD, SDPA_FWD_ATTN, "attn"},
        {ANEPY_SDPA_FWD, SDPA_FWD_XNORM, "xnorm"},
        {ANEPY_SDPA_FWD, SDPA_FWD_LSE, "lse"},
        {ANEPY_SDPA_BWD2, SDPA_BWD2_V, "v"},
        {ANEPY_SDPA_BWD2, SDPA_BWD2_ATTN, "attn"},
        {ANEPY_SDPA_BWD2, SDPA_BWD2_LSE, "lse"},
        {ANEPY_SDPA_BWD2, SDPA_BWD2_DV, "dv"},
        {ANEPY_FFN_FWD, FFN_FWD_X, "x"},
        {ANEPY_FFN_FWD, FFN_FWD_OUT, "out"},
        {ANEPY_FFN_FWD, FFN_FWD_H1, "h1"},
        {ANEPY_FFN_FWD, FFN_FWD_H3, "h3"},
        {ANEPY_FFN_FWD, FFN_FWD_GATE, "gate"},
        {ANEPY_FFN_FWD, FFN_FWD_XNORM, "xnorm"},
        {ANEPY_FFN_BWD, FFN_BWD_DY, "dy"},
        {ANEPY_FFN_BWD, FFN_BWD_H1, "h1"},
        {ANEPY_FFN_BWD, FFN_BWD_H3, "h3"},
        {ANEPY_FFN_BWD, FFN_BWD_DX, "dx"},
        {ANEPY_FFN_BWD, FFN_BWD_DH1, "dh1"},
        {ANEPY_FFN_BWD, FFN_BWD_DH3, "dh3"},
        {ANEPY_SDPA_BWD1, SDPA_BWD1_Q, "q"},
        {ANEPY_SDPA_BWD1, SDPA_BWD1_K, "k"},
        {ANEPY_SDPA_BWD1, SDPA_BWD1_V, "v"},
        {ANEPY_SDPA_BWD1, SDPA_BWD1_DY, "dy"},
        {ANEPY_SDPA_BWD1, SDPA_BWD1_DV, "dv"},
        {ANEPY_SDPA_BWD1, SDPA_BWD1_P, "probs"},
        {ANEPY_SDPA_BWD1, SDPA_BWD1_DP, "dprobs"},
        {ANEPY_SDPA_BWD2, SDPA_BWD2_P, "probs"},
        {ANEPY_SDPA_BWD2, SDPA_BWD2_DP, "dprobs"},
        {ANEPY_SDPA_BWD2, SDPA_BWD2_Q, "q"},
        {ANEPY_SDPA_BWD2, SDPA_BWD2_K, "k"},
        {ANEPY_SDPA_BWD2, SDPA_BWD2_DQ, "dq"},
        {ANEPY_SDPA_BWD2, SDPA_BWD2_DK, "dk"},
        {ANEPY_QKV_BWD, QKV_BWD_DQ, "dq"},
        {ANEPY_QKV_BWD, QKV_BWD_DK, "dk"},
        {ANEPY_QKV_BWD, QKV_BWD_DV, "dv"},
        {ANEPY_QKV_BWD, QKV_BWD_DX, "dx"},
        {ANEPY_RMSNORM_BWD, RMSNORM_BWD_DY, "dy"},
        {ANEPY_RMSNORM_BWD, RMSNORM_BWD_X, "x"},
        {ANEPY_RMSNORM_BWD, RMSNORM_BWD_DX, "dx"},
        {ANEPY_RMSNORM_BWD_FFN, RMSNORM_BWD_DX, "dx"},
        {ANEPY_FINAL_RMSNORM, FINAL_RMSNORM_X, "x"},
        {ANEPY_FINAL_RMSNORM, FINAL_RMSNORM_XNORM, "xnorm"},
        {ANEPY_CLASSIFIER_FWD, CLASSIFIER_FWD_X, "x"},
        {ANEPY_CLASSIFIER_FWD, CLASSIFIER_FWD_LOGITS, "logits"},
        {ANEPY_CLASSIFIER_BWD, CLASSIFIER_BWD_DLOGITS, "dlogits"},
        {ANEPY_CLASSIFIER_BWD, CLASSIFIER_BWD_DX, "dx"},
        {ANEPY_SOFTMAX, SOFTMAX_LOGITS, "logits"},
        {ANEPY_SOFTMAX, SOFTMAX_PROBS, "probs"},
    };
    anepy_program p;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        anepy_program_describe(&p, known[i].id, model, width_of(model));
        int32_t position = known[i].position, host = position - ANEPY_HOST_TENSOR;
        CHECK((host < 0 ? position < p.input_n + p.output_n : host < p.host_n) &&
                  strcmp(p.tensors[known[i].position].name, known[i].name) == 0,
              "%s: tensor %d is not %s", p.name, known[i].position, known[i].name);
    }
    anepy_program_describe(&p, ANEPY_SDPA_FWD, model, width_of(model));
    CHECK(model->config.qk_norm ? p.output_n == 8 && SDPA_FWD_K_RAW == 8 &&
                                      strcmp(p.tensors[SDPA_FWD_Q_RAW].name, "q_raw") == 0 &&
                                      strcmp(p.tensors[SDPA_FWD_K_RAW].name, "k_raw") == 0
                                : p.output_n == 6,
          "sdpa_fwd has %d outputs", p.output_n);
    anepy_program_describe(&p, ANEPY_SDPA_BWD1, model, width_of(model));
    CHECK(p.tensors[SDPA_BWD1_P].channels == model->config.n_heads * width_of(model) &&
              p.tensors[SDPA_BWD1_DV].channels == model->kv_dim,
          "sdpa_bwd1 has other shapes");
}

/* The parts of a classifier cover the vocabulary once, in order. */
static void check_parts(anepy_program_id id, int32_t logits, const anepy_model *model) {
    anepy_program p;
    int32_t next = 0, part = 0, in_order = 1;
    do {
        anepy_program_describe_part(&p, id, model, width_of(model), part);
        in_order &= p.part == part && p.first_row == next;
        next += p.tensors[logits].channels;
    } while (++part < p.parts);
    CHECK(in_order && next == model->config.vocab_size && part == p.parts,
          "%s: %d parts cover %d of %d tokens", p.name, part, next, model->config.vocab_size);
}

void checks_model(void) {
    anepy_config c[CONFIG_N];
    configs(c);
    for (int32_t i = CONFIG_N - 1; i >= 0; i--) {
        anepy_model *model = NULL;
        check_tensors(&c[i]);
        if (anepy_model_create(&model, &c[i]) != ANEPY_OK) continue;
        for (int id = 0; id < ANEPY_PROGRAM_N; id++) {
            check_program((anepy_program_id)id, model);
            for (int other = 0; other < id; other++)
                CHECK(strcmp(anepy_program_name((anepy_program_id)id),
                             anepy_program_name((anepy_program_id)other)) != 0,
                      "programs %d and %d have one name", id, other);
        }
        check_positions(model);
        check_parts(ANEPY_CLASSIFIER_FWD, CLASSIFIER_FWD_LOGITS, model);
        check_parts(ANEPY_CLASSIFIER_BWD, CLASSIFIER_BWD_DLOGITS, model);
        check_parts(ANEPY_CLASSIFIER_DW, CLASSIFIER_DW_OUTPUT, model);
        anepy_model_free(model);
    }
    check_bad_dimensions();
    check_bad_numbers();
    check_frequencies();
    check_flags();
}
