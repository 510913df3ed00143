/* api_programs.c - exported functions of the program table: they describe a program, write its MIL
 * text and weight file, and run it natively. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device/device.h"
#include "programs/mil_generate.h"
#include "runtime/fpmode.h"
#include "runtime/memory.h"

_Static_assert(sizeof(anepy_program_options) == 32, "program options");
_Static_assert(sizeof(anepy_program_info) == 40, "program info");
_Static_assert(sizeof(anepy_program_port) == 88, "program port");

const char *anepy_program_at(int32_t index) {
    return index >= 0 && index < ANEPY_PROGRAM_N ? anepy_program_name((anepy_program_id)index)
                                                 : NULL;
}

static int32_t describe(anepy_program *out, const anepy_model *model,
                        const anepy_program_options *o) {
    anepy_program_id id;
    if (o->struct_size < sizeof *o)
        return anepy_fail(ANEPY_E_ARGUMENT, "program options have %u bytes, expected %zu",
                          o->struct_size, sizeof *o);
    ANEPY_TRY(anepy_program_find(&id, o->name != NULL ? o->name : ""));
    int64_t width = o->width != 0 ? o->width : anepy_round_up(model->config.seq_len, ANEPY_COLUMNS);
    if (width < ANEPY_COLUMNS || width > ANEPY_MIL_LARGEST_EXTENT || width % ANEPY_COLUMNS != 0)
        return anepy_fail(ANEPY_E_ARGUMENT,
                          "program %s: width %lld, expected a multiple of %d up to %d", o->name,
                          (long long)width, ANEPY_COLUMNS, ANEPY_MIL_LARGEST_EXTENT);
    if (o->layer < 0 || o->layer >= model->config.n_layers)
        return anepy_fail(ANEPY_E_ARGUMENT, "program %s: layer %d, the model has 0 to %d", o->name,
                          o->layer, model->config.n_layers - 1);
    anepy_program_describe(out, id, model, (int32_t)width);
    if (o->part < 0 || o->part >= out->parts)
        return anepy_fail(ANEPY_E_ARGUMENT, "program %s: part %d, it has 0 to %d", o->name, o->part,
                          out->parts - 1);
    anepy_program_describe_part(out, id, model, (int32_t)width, o->part);
    out->live = (o->flags & ANEPY_LIVE_WEIGHT_INPUTS) != 0;
    return ANEPY_OK;
}

int32_t anepy_program_get_info(const anepy_model *model, anepy_program_info *out,
                               const anepy_program_options *options) {
    anepy_program p;
    ANEPY_TRY(describe(&p, model, options));
    *out = (anepy_program_info){.struct_size = out->struct_size,
                                .flags = options->flags,
                                .width = p.width,
                                .input_channels = p.input_channels,
                                .output_channels = p.output_channels,
                                .input_n = p.input_n,
                                .output_n = p.output_n,
                                .weight_n = p.weight_n,
                                .parts = p.parts,
                                .first_row = p.first_row};
    return ANEPY_OK;
}

int32_t anepy_program_get_port(const anepy_model *model, anepy_program_port *out,
                               const anepy_program_options *options, int32_t index) {
    anepy_program p;
    ANEPY_TRY(describe(&p, model, options));
    int32_t tensors = p.input_n + p.output_n;
    if (index < 0 || index >= tensors + p.weight_n)
        return anepy_fail(ANEPY_E_ARGUMENT, "program %s: tensor %d of %d", p.name, index,
                          tensors + p.weight_n);
    uint32_t size = out->struct_size;
    memset(out, 0, sizeof *out);
    out->struct_size = size;
    if (index < tensors) {
        const anepy_program_tensor *t = &p.tensors[index];
        out->kind = index < p.input_n ? ANEPY_PROGRAM_INPUT : ANEPY_PROGRAM_OUTPUT;
        out->channel = t->channel;
        out->channels = t->channels;
        out->columns = index < p.input_n ? p.width : p.output_width;
        snprintf(out->name, sizeof out->name, "%s", t->name);
        snprintf(out->surface, sizeof out->surface, index < p.input_n ? "a_in" : "z_out");
        return ANEPY_OK;
    }
    anepy_program_matrix m;
    anepy_program_weight(&m, &p, model, options->layer, index - tensors);
    out->kind = ANEPY_PROGRAM_WEIGHT;
    out->rows = m.rows;
    out->cols = m.cols;
    out->offset = anepy_program_offset(&m);
    out->channels = m.channels;
    out->columns = m.columns;
    snprintf(out->name, sizeof out->name, "%s", m.name);
    if (anepy_program_passes(&p, index - tensors))
        snprintf(out->surface, sizeof out->surface, "%s", m.parameter);
    return ANEPY_OK;
}

/* ------------------------------------------------------------------------------- text and file */

static int32_t parse_dialect(anepy_dialect *out, const char *name) {
    *out = ANEPY_DIALECT_13;
    if (name == NULL || strcmp(name, "1.3") == 0) return ANEPY_OK;
    *out = ANEPY_DIALECT_10;
    if (strcmp(name, "1.0") == 0) return ANEPY_OK;
    return anepy_fail(ANEPY_E_NAME, "unknown MIL dialect '%.20s': use one of 1.3, 1.0", name);
}

static int32_t copy(const char *what, void *to, uint64_t *n, const void *from, uint64_t from_n) {
    uint64_t room = *n;
    *n = from_n;
    if (to == NULL) return ANEPY_OK;
    if (room < from_n)
        return anepy_fail(ANEPY_E_ARGUMENT, "the %s has %llu bytes, there is room for %llu", what,
                          (unsigned long long)from_n, (unsigned long long)room);
    if (from_n > 0) memcpy(to, from, from_n);
    return ANEPY_OK;
}

int32_t anepy_mil_write(const anepy_model *model, const void *params,
                        const anepy_program_options *programs, int32_t count, const char *dialect,
                        char *text, uint64_t *text_n, uint8_t *blob, uint64_t *blob_n) {
    anepy_dialect which;
    anepy_mil_source source = {0};
    ANEPY_TRY(parse_dialect(&which, dialect));
    if (count < 1 || count > 1000)
        return anepy_fail(ANEPY_E_ARGUMENT, "%d programs in one text, expected 1 to 1000", count);
    anepy_program *described = calloc((size_t)count, sizeof *described);
    anepy_mil_item *items = calloc((size_t)count, sizeof *items);
    int32_t status = ANEPY_OK;
    if (described == NULL || items == NULL)
        status = anepy_fail(ANEPY_E_MEMORY, "no memory for %d programs", count);
    /* A caller built for a later version may pass longer structs. */
    const char *at = (const char *)programs;
    for (int32_t i = 0; i < count && status == ANEPY_OK; i++, at += programs->struct_size) {
        const anepy_program_options *o = (const anepy_program_options *)(const void *)at;
        status = describe(&described[i], model, o);
        items[i] = (anepy_mil_item){&described[i], params, o->layer};
    }
    if (status == ANEPY_OK)
        status = anepy_mil_generate(&source, items, count, model, described[0].width,
                                    described[0].width, which);
    free(described);
    free(items);
    if (status == ANEPY_OK) status = copy("text", text, text_n, source.text, source.n);
    if (status == ANEPY_OK)
        status = copy("weight file", blob, blob_n, source.blob.data, source.blob.n);
    anepy_mil_source_free(&source);
    return status;
}

/* -------------------------------------------------------------------------------- run natively */

static int32_t run(anepy_device *device, const anepy_program *p, const void *params, int32_t layer,
                   int32_t n, const float *in, float *out) {
    anepy_surface *input, *output;
    anepy_executable *executable;
    anepy_instance instance = {p, layer};
    ANEPY_TRY(device->ops->surface_create(device, p->input_channels, 0, 0, &input));
    ANEPY_TRY(device->ops->surface_create(device, p->output_channels, 0, 0, &output));
    ANEPY_TRY(device->ops->compile(device, &instance, 1, params, &executable));
    for (int32_t t = 0; t < p->input_n + p->output_n; t++)
        ANEPY_TRY(device->ops->bind(executable, t, t < p->input_n ? input : output,
                                    p->tensors[t].channel));
    ANEPY_TRY(anepy_surface_write(input, 0, p->input_channels, in));
    ANEPY_TRY(device->ops->evaluate(executable, n, 1));
    return anepy_surface_read(output, 0, p->output_channels, out);
}

int32_t anepy_program_run_native(const anepy_model *model, const void *params,
                                 const anepy_program_options *options, int32_t n, int32_t threads,
                                 const float *in, float *out) {
    anepy_program p;
    ANEPY_TRY(describe(&p, model, options));
    if (n < 1 || n > p.width)
        return anepy_fail(ANEPY_E_ARGUMENT, "program %s: %d columns of %d", p.name, n, p.width);
    if (model->adapter.rank > 0)
        return anepy_fail(ANEPY_E_UNSUPPORTED, "program %s of a model with adapters", p.name);
    anepy_gemm gemm = {.kernels = anepy_kernels_get()};
    if (gemm.kernels == NULL) return ANEPY_E_NAME;
    ANEPY_TRY(anepy_pool_create(&gemm.pool, threads));
    gemm.scratch_n = anepy_round_up(anepy_gemm_scratch_n(p.width), 16);
    int64_t scratch_n = gemm.scratch_n * anepy_pool_threads(gemm.pool);
    uint64_t nbytes = (uint64_t)(scratch_n + anepy_gemm_panels_n(p.width)) * sizeof(float);
    anepy_device *device = NULL;
    anepy_device_options device_options = {
        .model = model, .gemm = &gemm, .width = p.width, .seq_len = p.width, .dtype = ANEPY_F32};
    uint64_t fpmode = anepy_fpmode_enter();
    int32_t status = ANEPY_OK;
    gemm.scratch = anepy_map(nbytes);
    if (gemm.scratch == NULL)
        status = anepy_fail(ANEPY_E_MEMORY, "no memory for %llu bytes of scratch",
                            (unsigned long long)nbytes);
    else gemm.panels = gemm.scratch + scratch_n;
    if (status == ANEPY_OK) status = anepy_device_cpu.open(&device, &device_options);
    if (status == ANEPY_OK) status = run(device, &p, params, options->layer, n, in, out);
    anepy_fpmode_leave(fpmode);
    anepy_pool_free(gemm.pool);
    if (device != NULL) device->ops->close(device);
    anepy_unmap(gemm.scratch, nbytes);
    return status;
}
