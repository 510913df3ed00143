/* engine.m - the stand-in engine: reads the files from disk, parses MIL with the simulator, runs
 * it.
 *
 * What was compiled stays, under its name, until it is purged, as the system's daemon keeps it. */
#include "engine.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "control.h"
#include "runtime/memory.h"

typedef struct compiled {
    struct compiled *next;
    char *name, *text;
    uint64_t text_n;
    anepy_mil_file *files;
    int32_t file_n;
    anepy_mil *spare; /* for the first instance */
} compiled;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER, turn = PTHREAD_MUTEX_INITIALIZER;
static compiled *all;

static void *copy(const void *data, size_t n) {
    char *p = malloc(n + 1);
    if (p == NULL) abort();
    memcpy(p, data, n);
    p[n] = '\0';
    return p;
}

static anepy_mil *parse(const char *text, uint64_t n, const anepy_mil_file *files, int32_t file_n) {
    anepy_mil *mil = NULL;
    anepy_mil_options options;
    anepy_mil_options_default(&options, (anepy_chip)(standin_get("family") - 13));
    anepy_mil_parse(&mil, text, n, files, file_n, &options, NULL);
    return mil;
}

/* ------------------------------------------------------------------------------------- compiled */

static compiled *find(const char *name) {
    for (compiled *c = all; c != NULL; c = c->next)
        if (strcmp(c->name, name) == 0) return c;
    return NULL;
}

int standin_compiled(NSString *name) {
    pthread_mutex_lock(&mutex);
    int yes = find([name UTF8String]) != NULL;
    pthread_mutex_unlock(&mutex);
    return yes;
}

static void forget(compiled *c) {
    compiled **link = &all;
    while (*link != c) link = &(*link)->next;
    *link = c->next;
    anepy_mil_free(c->spare);
    for (int32_t i = 0; i < c->file_n; i++) {
        free((void *)c->files[i].path);
        free((void *)c->files[i].data);
    }
    free(c->files);
    free(c->name);
    free(c->text);
    free(c);
}

void standin_purge(NSString *name) {
    pthread_mutex_lock(&mutex);
    compiled *c = find([name UTF8String]);
    if (c != NULL) forget(c);
    pthread_mutex_unlock(&mutex);
}

void standin_forget_compiled(void) {
    pthread_mutex_lock(&mutex);
    while (all != NULL) forget(all);
    pthread_mutex_unlock(&mutex);
}

static anepy_mil_file *copy_files(NSDictionary *weights, int32_t *n) {
    anepy_mil_file *files = calloc([weights count] + 1, sizeof *files);
    *n = 0;
    for (NSString *path in weights) {
        NSData *data = [[weights objectForKey:path] objectForKey:@"data"];
        files[(*n)++] = (anepy_mil_file){copy([path UTF8String], strlen([path UTF8String])),
                                         copy([data bytes], [data length]), [data length]};
    }
    return files;
}

void standin_keep_compiled(NSString *name, NSData *text, NSDictionary *weights, anepy_mil *mil) {
    standin_purge(name);
    compiled *c = calloc(1, sizeof *c);
    if (c == NULL) abort();
    c->name = copy([name UTF8String], strlen([name UTF8String]));
    c->text = copy([text bytes], [text length]);
    c->text_n = [text length];
    c->files = copy_files(weights, &c->file_n);
    c->spare = mil;
    pthread_mutex_lock(&mutex);
    c->next = all;
    all = c;
    pthread_mutex_unlock(&mutex);
}

anepy_mil *standin_instance(NSString *name) {
    pthread_mutex_lock(&mutex);
    compiled *c = find([name UTF8String]);
    anepy_mil *mil = c != NULL ? c->spare : NULL;
    if (mil != NULL) c->spare = NULL;
    else if (c != NULL) mil = parse(c->text, c->text_n, c->files, c->file_n);
    pthread_mutex_unlock(&mutex);
    return mil;
}

/* -------------------------------------------------------------------------------------- compile */

/* The weight files of the folder, mapped, which must be those of the descriptor. */
static NSString *read_weights(NSString *folder, NSDictionary *weights, anepy_mil_file *files,
                              NSMutableArray *keep) {
    int32_t n = 0;
    for (NSString *path in weights) {
        NSDictionary *entry = [weights objectForKey:path];
        NSData *given = [entry objectForKey:@"data"];
        NSString *name = [path stringByReplacingString:@"@model_path" withString:folder];
        NSData *found = [NSData dataWithContentsOfMappedFile:name];
        if (![path hasPrefix:@"@model_path/weights/"] || ![given isKindOfClass:[NSData class]] ||
            [[entry objectForKey:@"offset"] longLongValue] != 0 ||
            [entry objectForKey:@"offset"] == nil)
            return [NSString stringWithFormat:@"weights entry %@ is malformed", path];
        if (found == nil) return [NSString stringWithFormat:@"there is no file %@", name];
        if (![found isEqualToData:given])
            return [NSString stringWithFormat:@"%@ is not what the descriptor has", name];
        [keep addObject:found];
        files[n++] = (anepy_mil_file){[path UTF8String], [found bytes], [found length]};
    }
    return nil;
}

anepy_mil *standin_compile(NSString *folder, NSData *text, NSDictionary *weights,
                           NSString **reason) {
    NSData *found =
        [NSData dataWithContentsOfFile:[folder stringByAppendingPathComponent:@"model.mil"]];
    NSMutableArray *keep = [NSMutableArray array];
    anepy_mil *mil = NULL;
    if (![found isEqualToData:text]) {
        *reason = @"model.mil is missing or not what the descriptor has";
        return NULL;
    }
    anepy_mil_file *files = calloc([weights count] + 1, sizeof *files);
    *reason = read_weights(folder, weights, files, keep);
    if (*reason == nil && standin_get("dialect") == 10 &&
        strncmp([found bytes], "program(1.0)", 12) != 0) {
        *reason = @"InvalidMILProgram: dialect";
    } else if (*reason == nil) {
        mil = parse([found bytes], [found length], files, (int32_t)[weights count]);
        char sentence[512];
        anepy_last_error(sentence, sizeof sentence);
        if (mil == NULL) *reason = [NSString stringWithFormat:@"InvalidMILProgram: %s", sentence];
    }
    free(files);
    if (mil != NULL && anepy_mil_function_n(mil) > 1 && !standin_get("procedures")) {
        anepy_mil_free(mil);
        mil = NULL;
        *reason = @"CompilationFailure: several functions";
    }
    return mil;
}

/* ------------------------------------------------------------------------------------------ run */

/* Its own threads and scratch memory, for ever. */
static const anepy_gemm *products(void) {
    static anepy_gemm gemm;
    static anepy_pool *pool;
    if (pool != NULL) return &gemm;
    gemm.kernels = anepy_kernels_get();
    if (anepy_pool_create(&pool, 0) != ANEPY_OK) abort();
    gemm.pool = pool;
    gemm.scratch_n = anepy_round_up(anepy_gemm_scratch_n(1), 16);
    gemm.scratch = anepy_heap_alloc((uint64_t)gemm.scratch_n * (uint64_t)anepy_pool_threads(pool) *
                                    sizeof(float));
    if (gemm.scratch == NULL) abort();
    return &gemm;
}

BOOL standin_run(anepy_mil *mil, int32_t function, const void *const *inputs,
                 const uint64_t *input_nbytes, void *const *outputs,
                 const uint64_t *output_nbytes) {
    pthread_mutex_lock(&turn);
    int32_t status = anepy_mil_run(mil, function, inputs, input_nbytes, outputs, output_nbytes,
                                   products(), NULL);
    pthread_mutex_unlock(&turn);
    return status == ANEPY_OK;
}
