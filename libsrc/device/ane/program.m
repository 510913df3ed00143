/* device/ane/program.m - compiles, loads, evaluates and frees programs. */
#include "device/ane/program.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "device/ane/folder.h"

#define QOS 21             /* every value was equally fast: docs/neural-engine.md#calls */
#define LOAD_ATTEMPTS 4    /* loading fails now and then while memory is being reclaimed */
#define FIRST_PAUSE_MS 50L /* doubled each time */

static _Atomic int32_t compiles;

int32_t anepy_ane_compiles(void) { return atomic_load(&compiles); }

/* ------------------------------------------------------------------------------------- lifetime */

static void let_go(anepy_ane_program *p) {
    for (int32_t f = 0; f < p->function_n; f++) anepy_unbind(&p->bound[f]);
    [p->model release];
    p->model = nil;
}

void anepy_program_hold(anepy_ane_program *p) { atomic_fetch_add(&p->users, 1); }

void anepy_program_drop(anepy_ane_program *p) {
    if (atomic_fetch_sub(&p->users, 1) != 1) return;
    @autoreleasepool {
        let_go(p);
    }
    anepy_ane_drop(p->ane);
    free(p->bound);
    free(p);
}

static anepy_ane_program *program_of(anepy_job *job) {
    return (anepy_ane_program *)((char *)job - offsetof(anepy_ane_program, other));
}

static void other_drop(anepy_job *job) { anepy_program_drop(program_of(job)); }

static int32_t unload_run(anepy_job *job) {
    anepy_ane_program *p = program_of(job);
    NSError *error = nil;
    if (!p->loaded) return ANEPY_OK;
    p->loaded = 0;
    if (![p->model unloadWithQoS:QOS error:&error])
        return anepy_fail(ANEPY_E_DEVICE, "%s", anepy_ane_error(error));
    /* The system caches what it compiled. Programs with weights change with every update and would
     * fill the cache. */
    if (p->baked) [p->model purgeCompiledModel];
    return ANEPY_OK;
}

static int32_t call_other(anepy_ane_program *p, int32_t (*run)(anepy_job *), anepy_slot *slot,
                          double seconds, const char *what) {
    p->other = (anepy_job){.run = run, .drop = other_drop};
    anepy_program_hold(p);
    int32_t status = anepy_ane_call(p->ane, slot, &p->other, seconds, what);
    if (status == ANEPY_OK) other_drop(&p->other);
    return status;
}

void anepy_ane_program_free(anepy_ane_program *p) {
    char sentence[512]; /* the caller's error sentence, which cleaning up must not replace */
    if (p == NULL || anepy_ane_forked(p->ane)) return;
    anepy_last_error(sentence, sizeof sentence);
    anepy_folder_remove(p->folder);
    /* After a call that never returned, another would not return either. */
    if (!atomic_load(&p->ane->hung) && p->loaded &&
        call_other(p, unload_run, &p->ane->work, p->ane->limits.evaluate_seconds, "unloading") !=
            ANEPY_OK)
        anepy_ane_poison(p->ane);
    anepy_program_drop(p);
    anepy_fail(ANEPY_OK, "%s", sentence);
}

/* -------------------------------------------------------------------------------------- compile */

typedef struct {
    anepy_job job;
    anepy_ane_program *program;
    char **weights; /* names in the folder */
    int32_t weight_n;
    int32_t fresh, compiled;
} compile_job;

static void compile_drop(anepy_job *job) {
    compile_job *c = (compile_job *)job;
    anepy_program_drop(c->program);
    for (int32_t i = 0; i < c->weight_n; i++) free(c->weights[i]);
    free(c->weights);
    free(c);
}

/* A weight file as the framework takes it, mapped so that it needs no memory of its own. */
static NSData *contents(anepy_ane_program *p, const char *name) {
    NSString *path = [NSString stringWithFormat:@"%s/%s", p->folder, name];
    NSError *error = nil;
    NSData *data = [NSData dataWithContentsOfFile:path
                                          options:NSDataReadingMappedIfSafe
                                            error:&error];
    if (data == nil) anepy_fail(ANEPY_E_SYSTEM, "cannot read %s: %s", name, anepy_ane_error(error));
    return data;
}

static int32_t make_model(compile_job *c) {
    anepy_ane_program *p = c->program;
    NSData *text = contents(p, "model.mil");
    NSMutableDictionary *weights = [NSMutableDictionary dictionary];
    if (text == nil) return ANEPY_E_SYSTEM;
    for (int32_t i = 0; i < c->weight_n; i++) {
        NSData *data = contents(p, c->weights[i]);
        if (data == nil) return ANEPY_E_SYSTEM;
        NSString *path = [NSString stringWithFormat:@"@model_path/%s", c->weights[i]];
        [weights setObject:@{@"offset" : @0, @"data" : data} forKey:path];
    }
    id descriptor = [p->ane->classes.descriptor modelWithMILText:text
                                                         weights:weights
                                                    optionsPlist:nil];
    if (descriptor == nil) return anepy_fail(ANEPY_E_DEVICE, "the framework takes no MIL text");
    p->model = [[p->ane->classes.model inMemoryModelWithDescriptor:descriptor] retain];
    if (p->model == nil) return anepy_fail(ANEPY_E_DEVICE, "the framework makes no model");
    NSString *folder = [NSString stringWithUTF8String:p->folder];
    [p->model setModelURL:[NSURL fileURLWithPath:folder isDirectory:YES]];
    return ANEPY_OK;
}

static int32_t load(anepy_ane_program *p, anepy_job *job) {
    NSError *error = nil;
    struct timespec pause = {0, FIRST_PAUSE_MS * 1000000};
    for (int32_t attempt = 0; attempt < LOAD_ATTEMPTS; attempt++) {
        if (attempt > 0) nanosleep(&pause, NULL);
        if (attempt > 0) pause.tv_nsec *= 2;
        if (atomic_load(&job->abandoned)) return ANEPY_E_DEVICE;
        error = nil;
        p->loaded = [p->model loadWithQoS:QOS options:@{} error:&error];
        if (p->loaded) return ANEPY_OK;
    }
    return anepy_fail(ANEPY_E_UNSUPPORTED, "the compiled program does not load: %s",
                      anepy_ane_error(error));
}

static int32_t compile_run(anepy_job *job) {
    compile_job *c = (compile_job *)job;
    anepy_ane_program *p = c->program;
    NSError *error = nil;
    ANEPY_TRY(make_model(c));
    int32_t status = ANEPY_E_UNSUPPORTED;
    if ([p->model compiledModelExists]) {
        if (!c->fresh) status = load(p, job);
        if (status != ANEPY_OK) [p->model purgeCompiledModel];
    }
    if (status != ANEPY_OK) {
        if (atomic_load(&job->abandoned)) return ANEPY_E_DEVICE;
        c->compiled = 1;
        atomic_fetch_add(&compiles, 1);
        if (![p->model compileWithQoS:QOS options:@{} error:&error])
            return anepy_fail(ANEPY_E_UNSUPPORTED, "the program is refused: %s",
                              anepy_ane_error(error));
        ANEPY_TRY(load(p, job));
    }
    return p->function_n > 0 ? anepy_bind_functions(p) : ANEPY_OK;
}

/* Makes the program and the names of its weight files; after a failure compile_drop frees both. */
static int32_t prepare(compile_job *c, const anepy_trial_source *source,
                       const anepy_ane_function *functions, int32_t n) {
    anepy_ane_program *p = c->program;
    p->bound = calloc((size_t)n + 1, sizeof *p->bound);
    c->weights = calloc((size_t)source->file_n + 1, sizeof *c->weights);
    if (p->bound == NULL || c->weights == NULL)
        return anepy_fail(ANEPY_E_MEMORY, "no memory for a program");
    for (int32_t f = 0; f < n; f++) p->bound[f].function = functions[f];
    p->function_n = n;
    p->baked = source->file_n > 0;
    for (; c->weight_n < source->file_n; c->weight_n++) {
        const char *name;
        ANEPY_TRY(anepy_folder_weight_name(&name, source->paths[c->weight_n]));
        c->weights[c->weight_n] = strdup(name);
        if (c->weights[c->weight_n] == NULL)
            return anepy_fail(ANEPY_E_MEMORY, "no memory for a program");
    }
    return anepy_folder_create(p->folder, sizeof p->folder, source);
}

int32_t anepy_ane_compile(anepy_ane *ane, anepy_ane_program **out, const anepy_trial_source *source,
                          const anepy_ane_function *functions, int32_t function_n, int32_t fresh,
                          int32_t *compiled) {
    ANEPY_TRY(anepy_ane_check(ane));
    anepy_ane_program *p = calloc(1, sizeof *p);
    compile_job *c = calloc(1, sizeof *c);
    if (p == NULL || c == NULL) {
        free(p);
        free(c);
        return anepy_fail(ANEPY_E_MEMORY, "no memory for a program");
    }
    atomic_init(&p->users, 2);
    anepy_ane_hold(ane);
    p->ane = ane;
    c->job = (anepy_job){.run = compile_run, .drop = compile_drop};
    c->program = p;
    c->fresh = fresh;
    int32_t status = prepare(c, source, functions, function_n);
    if (status != ANEPY_OK) {
        compile_drop(&c->job);
    } else {
        status =
            anepy_ane_call(ane, &ane->compile, &c->job, ane->limits.compile_seconds, "compiling");
        if (status == ANEPY_OK) {
            if (compiled != NULL) *compiled = c->compiled;
            compile_drop(&c->job);
            *out = p;
            return ANEPY_OK;
        }
    }
    anepy_ane_program_free(p);
    return status;
}

static int32_t reload_run(anepy_job *job) {
    anepy_ane_program *p = program_of(job);
    NSError *error = nil;
    if (p->loaded && ![p->model unloadWithQoS:QOS error:&error])
        return anepy_fail(ANEPY_E_DEVICE, "%s", anepy_ane_error(error));
    p->loaded = 0;
    return load(p, job);
}

int32_t anepy_ane_reload(anepy_ane_program *p, const anepy_trial_source *source) {
    ANEPY_TRY(anepy_ane_check(p->ane));
    ANEPY_TRY(anepy_folder_weights(p->folder, source));
    return call_other(p, reload_run, &p->ane->compile, p->ane->limits.compile_seconds,
                      "loading again");
}

/* ------------------------------------------------------------------------------------------ run */

static void run_drop(anepy_job *job) {
    anepy_run_job *run = (anepy_run_job *)job;
    for (int32_t i = 0; i < run->port_n; i++) CFRelease(run->surfaces[i]);
    anepy_program_drop(run->program);
}

static int32_t evaluate(anepy_ane_program *p, anepy_bound *bound, const anepy_run_job *run) {
    id request = nil;
    NSError *error = nil;
    ANEPY_TRY(anepy_request_find(p, bound, run, &request));
    if ([p->model evaluateWithQoS:QOS options:@{} request:request error:&error]) return ANEPY_OK;
    return anepy_fail(ANEPY_E_DEVICE, "%s: %s", bound->function.name, anepy_ane_error(error));
}

static int32_t run_run(anepy_job *job) {
    anepy_run_job *run = (anepy_run_job *)job;
    anepy_ane_program *p = run->program;
    if (p->function_n > 0) return evaluate(p, &p->bound[run->function], run);
    anepy_bound bound = {0};
    int32_t status =
        anepy_bind_raw(p, &bound, run->function, run->input_n, run->port_n - run->input_n);
    if (status == ANEPY_OK) status = evaluate(p, &bound, run);
    anepy_unbind(&bound);
    return status;
}

static int32_t check_surfaces(const anepy_ane_program *p, const anepy_ane_call_surfaces *s) {
    if (p->function_n == 0) return ANEPY_OK;
    const anepy_ane_function *f = &p->bound[s->function].function;
    for (int32_t i = 0; i < s->input_n + s->output_n; i++)
        if (f->input_n != s->input_n || f->output_n != s->output_n ||
            s->surfaces[i]->nbytes < f->ports[i].nbytes)
            return anepy_fail(ANEPY_E_DEVICE, "device ane: %s.%s does not fit its surface", f->name,
                              f->ports[i].name);
    return ANEPY_OK;
}

int32_t anepy_ane_run(anepy_ane_program *p, const anepy_ane_call_surfaces *s) {
    anepy_run_job *run = &p->run;
    ANEPY_TRY(anepy_ane_check(p->ane));
    ANEPY_TRY(check_surfaces(p, s));
    run->job = (anepy_job){.run = run_run, .drop = run_drop};
    run->program = p;
    run->function = s->function;
    run->input_n = s->input_n;
    run->port_n = s->input_n + s->output_n;
    for (int32_t i = 0; i < run->port_n; i++) {
        run->surfaces[i] = (IOSurfaceRef)CFRetain(s->surfaces[i]->surface);
        run->ids[i] = s->surfaces[i]->id;
        if (i >= s->input_n) atomic_store(&s->surfaces[i]->stale, 1);
    }
    anepy_program_hold(p);
    int32_t status = anepy_ane_call(p->ane, &p->ane->work, &run->job,
                                    p->ane->limits.evaluate_seconds, "evaluating");
    if (status == ANEPY_OK) {
        run_drop(&run->job);
        for (int32_t i = s->input_n; i < s->input_n + s->output_n; i++)
            atomic_store(&s->surfaces[i]->stale, 0);
        return ANEPY_OK;
    }
    return status;
}
