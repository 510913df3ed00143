/* control.m - counters, faults, rules. */
#undef NDEBUG /* it hides GNUstep's count of objects */
#include "control.h"

#import <Foundation/Foundation.h>
#import <Foundation/NSDebug.h>

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const CALLS[] = {
    "_ANEInMemoryModelDescriptor",
    "_ANEInMemoryModel",
    "_ANEModel",
    "_ANERequest",
    "_ANEIOSurfaceObject",
    "_ANEDeviceInfo",
    "modelWithMILText:weights:optionsPlist:",
    "inMemoryModelWithDescriptor:",
    "setModelURL:",
    "compiledModelExists",
    "purgeCompiledModel",
    "compileWithQoS:options:error:",
    "loadWithQoS:options:error:",
    "unloadWithQoS:error:",
    "evaluateWithQoS:options:request:error:",
    "modelAttributes",
    "model",
    "inputSymbolIndicesForProcedureIndex:",
    "outputSymbolIndicesForProcedureIndex:",
    "objectWithIOSurface:",
    "requestWithInputs:inputIndices:outputs:outputIndices:weightsBuffer:perfStats:procedureIndex:",
    "hasANE",
    "aneSubType",
    "dlopen",
    "NSTemporaryDirectory",
    "dataWithContentsOfFile:options:error:",
    "IOSurfaceCreate",
    "IOSurfaceGetBaseAddress",
    "IOSurfaceLock",
    "IOSurfaceUnlock",
};
#define CALL_N ((int32_t)(sizeof CALLS / sizeof CALLS[0]))

static const struct {
    const char *name;
    int64_t usual;
} OPTIONS[] = {{"family", 16}, {"engine", 1}, {"framework", 1},  {"reverse", 0},
               {"shuffle", 0}, {"suffix", 1}, {"procedures", 1}, {"dialect", 13},
               {"rename", 0},  {"stride", 0}, {"attributes", 1}, {"equal", 0},
               {"wide", 0},    {"loads", 120},  {"files", 64},    {"types", 0},
               {"padded", 0}};
#define OPTION_N ((int32_t)(sizeof OPTIONS / sizeof OPTIONS[0]))

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int64_t counts[CALL_N], values[OPTION_N], hits, nth, calls_left, hung, live, loaded;
static int32_t fault_call = -1, ready, hold;
static standin_fault_kind fault;
static char broken[300];

static int32_t find(const char *call) {
    for (int32_t i = 0; i < CALL_N; i++)
        if (strcmp(CALLS[i], call) == 0) return i;
    fprintf(stderr, "standin: no call %s\n", call);
    abort();
}

static int32_t find_option(const char *name) {
    if (!ready)
        for (int32_t i = 0; i < OPTION_N; i++) values[i] = OPTIONS[i].usual;
    ready = 1;
    for (int32_t i = 0; i < OPTION_N; i++)
        if (strcmp(OPTIONS[i].name, name) == 0) return i;
    fprintf(stderr, "standin: no option %s\n", name);
    abort();
}

const char *standin_call_name(int32_t index) {
    return index >= 0 && index < CALL_N ? CALLS[index] : NULL;
}

void standin_fault(const char *call, int64_t at, int32_t kind) {
    int32_t index = find(call);
    pthread_mutex_lock(&mutex);
    fault_call = index;
    nth = calls_left = at;
    fault = (standin_fault_kind)kind;
    hits = 0;
    hold = 1;
    pthread_mutex_unlock(&mutex);
}

static int64_t get(const int64_t *counter) {
    pthread_mutex_lock(&mutex);
    int64_t value = *counter;
    pthread_mutex_unlock(&mutex);
    return value;
}

int64_t standin_fault_hits(void) { return get(&hits); }

void standin_reset(void) {
    standin_forget_compiled();
    pthread_mutex_lock(&mutex);
    fault_call = -1;
    hits = 0;
    ready = 0;
    broken[0] = '\0';
    memset(counts, 0, sizeof counts);
    pthread_mutex_unlock(&mutex);
}

int64_t standin_calls(const char *call) { return get(&counts[find(call)]); }
const char *standin_broken_rule(void) { return broken; }
int64_t standin_live(void) { return get(&live); }

int64_t standin_objects(void) {
    int64_t n = 0;
    Class *classes = GSDebugAllocationClassList();
    for (Class *c = classes; c != NULL && *c != Nil; c++) n += GSDebugAllocationCount(*c);
    NSZoneFree(NSDefaultMallocZone(), classes);
    return n;
}

int standin_hung(void) {
    pthread_mutex_lock(&mutex);
    int yes = hung > 0;
    pthread_mutex_unlock(&mutex);
    return yes;
}
int64_t standin_loaded(void) { return get(&loaded); }

static void add(int64_t *counter, int64_t change) {
    pthread_mutex_lock(&mutex);
    *counter += change;
    pthread_mutex_unlock(&mutex);
}

void standin_born(void) { add(&live, 1); }
void standin_dead(void) { add(&live, -1); }
void standin_count_loaded(int64_t change) { add(&loaded, change); }

void standin_set(const char *option, int64_t value) {
    pthread_mutex_lock(&mutex);
    values[find_option(option)] = value;
    pthread_mutex_unlock(&mutex);
}

int64_t standin_get(const char *option) {
    pthread_mutex_lock(&mutex);
    int64_t value = values[find_option(option)];
    pthread_mutex_unlock(&mutex);
    return value;
}

void standin_free_hung(void) {
    pthread_mutex_lock(&mutex);
    hold = 0;
    fault_call = -1;
    pthread_cond_broadcast(&changed);
    while (hung > 0) pthread_cond_wait(&changed, &mutex);
    pthread_mutex_unlock(&mutex);
}

void standin_break_rule(const char *format, ...) {
    va_list args;
    pthread_mutex_lock(&mutex);
    va_start(args, format);
    if (broken[0] == '\0') vsnprintf(broken, sizeof broken, format, args);
    va_end(args);
    pthread_mutex_unlock(&mutex);
}

static void hang(void) {
    hung++;
    while (hold) pthread_cond_wait(&changed, &mutex);
    hung--;
    pthread_cond_broadcast(&changed);
}

/* STANDIN_FAULT=call/nth/kind: for processes whose library no test can reach. */
static void start(void) {
    char call[128];
    long at;
    int kind;
    const char *text = getenv("STANDIN_FAULT");
    GSDebugAllocationActive(YES);
    if (text != NULL && sscanf(text, "%127[^/]/%ld/%d", call, &at, &kind) == 3)
        standin_fault(call, at, kind);
}

standin_fault_kind standin_enter(const char *call) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    int32_t index = find(call);
    standin_fault_kind kind = STANDIN_NONE;
    pthread_once(&once, start);
    pthread_mutex_lock(&mutex);
    counts[index]++;
    if (index == fault_call && (nth == 0 || --calls_left == 0)) {
        kind = fault;
        hits++;
    }
    if (kind == STANDIN_HANG) hang();
    pthread_mutex_unlock(&mutex);
    if (kind == STANDIN_MISSING) /* it was called although it had said it is not there */
        [NSException raise:NSInvalidArgumentException format:@"unrecognized selector %s", call];
    if (kind == STANDIN_THROW) [NSException raise:@"StandinException" format:@"thrown by %s", call];
    return kind == STANDIN_HANG ? STANDIN_NONE : kind;
}

int standin_missing(const char *call) {
    for (int32_t i = 0; i < CALL_N; i++) {
        if (strcmp(CALLS[i], call) != 0) continue;
        pthread_mutex_lock(&mutex);
        int yes = fault_call == i && fault == STANDIN_MISSING;
        hits += yes;
        pthread_mutex_unlock(&mutex);
        return yes;
    }
    return 0;
}
