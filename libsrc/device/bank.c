/* device/bank.c - surfaces, executables and weights of devices that run MIL. */
#include "device/bank.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/weights.h"

/* Default size step of surfaces: smaller ones fail on some chips (docs/neural-engine.md#surfaces).
 */
#define SURFACE_STEP 65536

/* A compiled text. */
struct anepy_bank {
    void *compiled;
    int32_t users; /* references: executables that are functions of it */
};

/* ------------------------------------------------------------------------------------ surfaces */

static int32_t create(anepy_bank_device *d, int32_t channels, int32_t width,
                      anepy_bank_surface **out) {
    anepy_bank_surface *s = calloc(1, sizeof *s);
    if (s == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for a surface");
    uint64_t nbytes = (uint64_t)channels * (uint64_t)width * sizeof(uint16_t);
    s->base = (anepy_surface){&d->base, ANEPY_F16, channels, width, NULL};
    uint64_t step =
        d->traits.surface_nbytes > 0 ? (uint64_t)d->traits.surface_nbytes : SURFACE_STEP;
    s->nbytes = (nbytes + step - 1) / step * step;
    int32_t status = d->backend->memory_create(d, s);
    if (status != ANEPY_OK) {
        free(s);
        return status;
    }
    s->next = d->surfaces;
    d->surfaces = s;
    d->base.nbytes += s->nbytes;
    *out = s;
    return ANEPY_OK;
}

static int32_t bank_surface_create(anepy_device *device, int32_t channels, int32_t width,
                                   int32_t factors, anepy_surface **out) {
    (void)factors; /* factors or not, all are fp16 */
    anepy_bank_surface *surface = NULL;
    if (width == 0) width = device->options.width;
    ANEPY_TRY(create((anepy_bank_device *)device, channels, width, &surface));
    *out = &surface->base;
    return ANEPY_OK;
}

static int32_t bank_lock(anepy_surface *surface, int32_t for_writing) {
    return ((anepy_bank_device *)surface->device)->backend->lock(surface, for_writing);
}

static int32_t bank_unlock(anepy_surface *surface, int32_t for_writing) {
    return ((anepy_bank_device *)surface->device)->backend->unlock(surface, for_writing);
}

/* -------------------------------------------------------------------------------- live weights */

typedef struct {
    const anepy_bank_surface *surface;
    const anepy_kernels *kernels;
    const void *params;
} weight_task;

static void write_weight_rows(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const weight_task *t = context;
    const anepy_bank_surface *s = t->surface;
    anepy_storage from = anepy_program_stored(&s->weight, t->params);
    int32_t first = index * ANEPY_PIECE_ROWS, end = first + ANEPY_PIECE_ROWS;
    int vector = !anepy_tensor_has(s->weight.tensor, ANEPY_TENSOR_MATRIX);
    if (vector) { /* each value fills its row */
        for (int32_t r = first; r < anepy_min_i32(end, s->base.channels); r++) {
            uint16_t *row = (uint16_t *)s->base.data + (int64_t)r * s->base.width;
            t->kernels->to_half(row, anepy_weights_vector(from) + r, 1);
            for (int32_t i = 1; i < s->base.width; i++) row[i] = row[0];
        }
        return;
    }
    for (int32_t r = first; r < anepy_min_i32(end, from.rows); r++)
        anepy_weights_to_half(t->kernels, (uint16_t *)s->base.data + (int64_t)r * s->base.width,
                              anepy_storage_rows(from, r, 1), 0);
}

static int32_t write_weight(anepy_bank_device *d, anepy_bank_surface *s, const void *params) {
    int adapter = anepy_tensor_has(s->weight.tensor, ANEPY_TENSOR_ADAPTER);
    weight_task task = {s, d->base.options.gemm->kernels,
                        adapter ? d->base.options.adapter : params};
    ANEPY_TRY(bank_lock(&s->base, 1));
    anepy_pool_run(d->base.options.gemm->pool, anepy_pieces(s->base.channels, ANEPY_PIECE_ROWS),
                   write_weight_rows, &task);
    return bank_unlock(&s->base, 1);
}

static int32_t bank_load_weights(anepy_device *device, const void *params) {
    anepy_bank_device *d = (anepy_bank_device *)device;
    for (anepy_bank_surface *s = d->surfaces; s != NULL; s = s->next)
        if (s->weight.tensor != NULL) ANEPY_TRY(write_weight(d, s, params));
    return ANEPY_OK;
}

/* Finds the surface of a live weight, or makes and fills one. */
static int32_t weight_surface(anepy_bank_device *d, const anepy_program_matrix *m,
                              const void *params, anepy_bank_surface **out) {
    for (*out = d->surfaces; *out != NULL; *out = (*out)->next)
        if ((*out)->weight.tensor == m->tensor && (*out)->weight.first_row == m->first_row)
            return ANEPY_OK;
    ANEPY_TRY(create(d, m->channels, m->columns, out));
    (*out)->weight = *m;
    return write_weight(d, *out, params);
}

/* --------------------------------------------------------------------------------- executables */

static void bank_release(anepy_executable *executable) {
    anepy_bank_device *d = executable->device;
    if (executable->request != NULL) d->backend->forget(executable);
    if (executable->previous != NULL) executable->previous->next = executable->next;
    else d->executables = executable->next;
    if (executable->next != NULL) executable->next->previous = executable->previous;
    if (--executable->bank->users == 0) {
        d->backend->release(d, executable->bank->compiled);
        free(executable->bank);
    }
    free(executable);
}

static int32_t add_executable(anepy_bank_device *d, anepy_bank *bank,
                              const anepy_instance *instance, int32_t function, const void *params,
                              anepy_executable **out) {
    const anepy_program *program = instance->program;
    anepy_executable *executable = calloc(1, sizeof *executable);
    if (executable == NULL)
        return anepy_fail(ANEPY_E_MEMORY, "no memory for program %s", program->name);
    executable->device = d;
    executable->program = program;
    executable->function = function;
    executable->input_n = program->surface_n;
    int32_t status = ANEPY_OK;
    for (int32_t i = 0; i < program->weight_n && status == ANEPY_OK; i++) {
        anepy_program_matrix matrix;
        if (!anepy_program_passes(program, i)) continue;
        anepy_program_weight(&matrix, program, d->base.options.model, instance->layer, i);
        status = weight_surface(d, &matrix, params, &executable->inputs[executable->input_n++]);
    }
    if (status != ANEPY_OK) {
        free(executable);
        return status;
    }
    executable->bank = bank;
    bank->users++;
    executable->next = d->executables;
    if (d->executables != NULL) d->executables->previous = executable;
    d->executables = executable;
    *out = executable;
    return ANEPY_OK;
}

/* Whether two instances have equal text: then no weights of different layers are baked. */
static int same_text(const anepy_instance *a, const anepy_instance *b) {
    const anepy_program *p = a->program, *q = b->program;
    return p->id == q->id && p->part == q->part && p->live == q->live &&
           (p->live || p->weight_n == 0 || a->layer == b->layer);
}

/* Lists the distinct texts of instances; functions[i] becomes the text of instance i. */
static int32_t distinct(const anepy_instance *instances, int32_t n, const void *params,
                        anepy_mil_item *items, int32_t *functions) {
    int32_t count = 0;
    for (int32_t i = 0; i < n; i++) {
        int32_t j = 0;
        while (j < i && !same_text(&instances[i], &instances[j])) j++;
        functions[i] = j < i ? functions[j] : count;
        if (j == i)
            items[count++] = (anepy_mil_item){instances[i].program, params, instances[i].layer};
    }
    return count;
}

static int32_t compile_text(anepy_bank_device *d, const anepy_mil_item *items, int32_t n,
                            anepy_dialect dialect, anepy_bank **out) {
    const anepy_device_options *o = &d->base.options;
    anepy_mil_source source = {0};
    int32_t compiled = 1;
    anepy_bank *bank = calloc(1, sizeof *bank);
    if (bank == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for %d programs", n);
    int32_t status = anepy_mil_generate(&source, items, n, o->model, o->width, o->seq_len, dialect);
    if (status == ANEPY_OK)
        status = d->backend->compile(d, &source, items, n, &bank->compiled, &compiled);
    anepy_mil_source_free(&source);
    if (status != ANEPY_OK) {
        free(bank);
        return status;
    }
    atomic_fetch_add(&d->base.compiles, compiled);
    *out = bank;
    return ANEPY_OK;
}

static int32_t check_budget(const anepy_bank_device *d, int32_t texts) {
    int64_t budget = d->base.compile_budget, used = d->backend->compiles();
    if (budget == 0 || used + texts <= budget) return ANEPY_OK;
    if (texts > budget)
        return anepy_fail(ANEPY_E_BUDGET,
                          "device %s: the programs need %d compilations, a process may make %lld: "
                          "allow more, or leave out procedures=no",
                          d->base.type->name, texts, (long long)budget);
    return anepy_fail(ANEPY_E_BUDGET,
                      "device %s: the weights need %d compilations, this process has made %lld "
                      "of the %lld it may; nothing is lost: save the model or a checkpoint and go "
                      "on in a new process",
                      d->base.type->name, texts, (long long)used, (long long)budget);
}

/* A form of texts: the dialect, and how many programs one has. */
typedef struct {
    anepy_dialect dialect;
    int32_t single; /* one text for each program */
} form;

static const form FORMS[] = {
    {ANEPY_DIALECT_13, 0}, {ANEPY_DIALECT_10, 0}, {ANEPY_DIALECT_13, 1}, {ANEPY_DIALECT_10, 1}};
#define FORM_N ((int32_t)(sizeof FORMS / sizeof FORMS[0]))

static int possible(const anepy_traits *t, const form *f) {
    return (!t->single || f->single) && (t->dialect != 13 || f->dialect == ANEPY_DIALECT_13) &&
           (t->dialect != 10 || f->dialect == ANEPY_DIALECT_10);
}

/* The data of one compilation. */
typedef struct {
    anepy_mil_item *items; /* distinct texts */
    int32_t *functions;    /* index of the item of each instance */
    anepy_bank **banks;
} plan;

static int32_t compile_form(anepy_bank_device *d, const plan *p, const anepy_instance *instances,
                            int32_t n, const void *params, const form *f, anepy_executable **out) {
    int32_t count = distinct(instances, n, params, p->items, p->functions), made = 0, status;
    int32_t texts = f->single ? count : 1, each = f->single ? 1 : count;
    ANEPY_TRY(check_budget(d, texts));
    memset(p->banks, 0, (size_t)n * sizeof *p->banks);
    status = ANEPY_OK;
    for (int32_t t = 0; t < texts && status == ANEPY_OK; t++)
        status = compile_text(d, p->items + t * each, each, f->dialect, &p->banks[t]);
    while (made < n && status == ANEPY_OK) {
        int32_t which = p->functions[made];
        status = add_executable(d, p->banks[which / each], &instances[made], which % each, params,
                                &out[made]);
        made += status == ANEPY_OK;
    }
    if (status == ANEPY_OK) return ANEPY_OK;
    /* A text without executables is freed here, others with their last executable. */
    for (int32_t t = 0; t < texts; t++) {
        if (p->banks[t] == NULL || p->banks[t]->users > 0) continue;
        d->backend->release(d, p->banks[t]->compiled);
        free(p->banks[t]);
    }
    while (made > 0) bank_release(out[--made]);
    return status;
}

/* Tries the forms in turn until the hardware takes one; the next compilation begins with that one.
 * If none is taken, the error is that of the first. */
static int32_t compile_plan(anepy_bank_device *d, const plan *p, const anepy_instance *instances,
                            int32_t n, const void *params, anepy_executable **out) {
    char first[512] = "";
    for (int32_t i = d->form; i < FORM_N; i++) {
        if (!possible(&d->traits, &FORMS[i])) continue;
        int32_t status = compile_form(d, p, instances, n, params, &FORMS[i], out);
        if (status == ANEPY_OK) d->form = i;
        if (status != ANEPY_E_UNSUPPORTED) return status;
        if (first[0] == '\0') anepy_last_error(first, sizeof first);
    }
    return anepy_fail(ANEPY_E_UNSUPPORTED, "%s", first);
}

static int32_t bank_compile(anepy_device *device, const anepy_instance *instances, int32_t n,
                            const void *params, anepy_executable **out) {
    plan p = {.items = calloc((size_t)n, sizeof *p.items),
              .functions = calloc((size_t)n, sizeof *p.functions),
              .banks = calloc((size_t)n, sizeof(anepy_bank *))};
    int32_t status = p.items != NULL && p.functions != NULL && p.banks != NULL
                         ? compile_plan((anepy_bank_device *)device, &p, instances, n, params, out)
                         : anepy_fail(ANEPY_E_MEMORY, "no memory for %d programs", n);
    free(p.items);
    free(p.functions);
    free(p.banks);
    return status;
}

static int32_t bank_bind(anepy_executable *executable, int32_t index, anepy_surface *surface,
                         int32_t channel) {
    const anepy_program *program = executable->program;
    int32_t is_input = index < program->input_n, at = program->tensors[index].surface;
    int32_t channels = is_input ? program->surface_channels[at] : program->output_channels;
    anepy_bank_surface **slot = is_input ? &executable->inputs[at] : &executable->output;
    anepy_bank_surface *packed = (anepy_bank_surface *)surface;
    if (surface->device != &executable->device->base || surface->channels != channels ||
        channel != program->tensors[index].channel || (*slot != NULL && *slot != packed))
        return anepy_fail(ANEPY_E_UNSUPPORTED, "%s.%s is not at its place in its surface",
                          program->name, program->tensors[index].name);
    *slot = packed;
    return ANEPY_OK;
}

static int32_t bank_evaluate(anepy_executable *executable, int32_t n, int32_t count) {
    (void)n, (void)count; /* the ANE always computes whole surfaces */
    return executable->device->backend->run(executable, executable->bank->compiled);
}

static void bank_close(anepy_device *device) {
    anepy_bank_device *d = (anepy_bank_device *)device;
    while (d->executables != NULL) bank_release(d->executables);
    while (d->surfaces != NULL) {
        anepy_bank_surface *surface = d->surfaces;
        d->surfaces = surface->next;
        d->backend->memory_free(d, surface);
        free(surface);
    }
    d->backend->close(d);
}

const anepy_device_ops anepy_bank_ops = {
    .close = bank_close,
    .surface_create = bank_surface_create,
    .lock = bank_lock,
    .unlock = bank_unlock,
    .compile = bank_compile,
    .release = bank_release,
    .load_weights = bank_load_weights,
    .bind = bank_bind,
    .evaluate = bank_evaluate,
};
