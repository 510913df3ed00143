/* device/ane/framework.m - finds the framework, and makes calls into it under a time limit. */
#include "device/ane/framework.h"

#include <dlfcn.h>
#include <objc/runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "device/ane/folder.h"

#define FRAMEWORK "/System/Library/PrivateFrameworks/AppleNeuralEngine.framework/AppleNeuralEngine"
#define FIRST_FAMILY 13 /* M1; older families take no MIL (docs/neural-engine.md#framework) */

/* kinds: of what is returned and of each argument, B for BOOL, I for 32 bits, @ for an object, ^ for
 * a pointer, v for nothing. */
typedef struct {
    const char *class_name, *selector, *kinds;
    int32_t of_class; /* "+" */
} method;

static const method METHODS[] = {
    {"_ANEInMemoryModelDescriptor", "modelWithMILText:weights:optionsPlist:", "@@@@", 1},
    {"_ANEInMemoryModel", "inMemoryModelWithDescriptor:", "@@", 1},
    {"_ANEInMemoryModel", "setModelURL:", "v@", 0},
    {"_ANEInMemoryModel", "compiledModelExists", "B", 0},
    {"_ANEInMemoryModel", "purgeCompiledModel", "v", 0},
    {"_ANEInMemoryModel", "compileWithQoS:options:error:", "BI@^", 0},
    {"_ANEInMemoryModel", "loadWithQoS:options:error:", "BI@^", 0},
    {"_ANEInMemoryModel", "unloadWithQoS:error:", "BI^", 0},
    {"_ANEInMemoryModel", "evaluateWithQoS:options:request:error:", "BI@@^", 0},
    {"_ANEInMemoryModel", "model", "@", 0},
    {"_ANEModel", "modelAttributes", "@", 0},
    {"_ANEModel", "inputSymbolIndicesForProcedureIndex:", "@I", 0},
    {"_ANEModel", "outputSymbolIndicesForProcedureIndex:", "@I", 0},
    {"_ANEIOSurfaceObject", "objectWithIOSurface:", "@^", 1},
    {"_ANERequest",
     "requestWithInputs:inputIndices:outputs:outputIndices:weightsBuffer:perfStats:procedureIndex:",
     "@@@@@@@@", 1},
};

/* What a code is known to mean (docs/neural-engine.md#errors), in brackets; or "". */
static const char *meaning(NSError *error) {
    const char *text = [[error description] UTF8String];
    if ([error code] == 10 && text != NULL && strstr(text, "verifyBundle") != NULL)
        return " (macOS 27 loads programs with one weight file only)";
    if ([error code] == 42) return " (a surface is too small for rows padded to 64 bytes)";
    return "";
}

const char *anepy_ane_error(NSError *error) {
    static _Thread_local char text[400];
    if (error == nil) return "no reason given";
    snprintf(text, sizeof text, "%s %ld%s: %s", [[error domain] UTF8String], (long)[error code],
             meaning(error), [[error description] UTF8String]);
    for (char *p = text; *p != '\0'; p++)
        if (*p == '\n') *p = ' ';
    return text;
}

/* -------------------------------------------------------------------------------- state, calls */

void anepy_ane_hold(anepy_ane *ane) { atomic_fetch_add(&ane->users, 1); }

void anepy_ane_drop(anepy_ane *ane) {
    if (atomic_fetch_sub(&ane->users, 1) != 1) return;
    pthread_mutex_destroy(&ane->mutex);
    pthread_mutex_destroy(&ane->work.turn);
    pthread_mutex_destroy(&ane->compile.turn);
    free(ane);
}

void anepy_ane_poison(anepy_ane *ane) {
    pthread_mutex_lock(&ane->mutex);
    if (ane->failure[0] == '\0') anepy_last_error(ane->failure, sizeof ane->failure);
    pthread_mutex_unlock(&ane->mutex);
}

int32_t anepy_ane_forked(const anepy_ane *ane) { return ane->pid != getpid(); }

int32_t anepy_ane_check(anepy_ane *ane) {
    if (anepy_ane_forked(ane))
        return anepy_fail(ANEPY_E_DEVICE, "device ane was opened before this process was forked: "
                                          "open it here, or start processes with spawn");
    pthread_mutex_lock(&ane->mutex);
    int32_t failed = ane->failure[0] != '\0';
    if (failed) anepy_fail(ANEPY_E_DEVICE, "device ane is out of use since: %s", ane->failure);
    pthread_mutex_unlock(&ane->mutex);
    return failed ? ANEPY_E_DEVICE : ANEPY_OK;
}

int32_t anepy_ane_call(anepy_ane *ane, anepy_slot *slot, anepy_job *job, double seconds,
                       const char *what) {
    pthread_mutex_lock(&slot->turn);
    int32_t status = slot->lane != NULL ? ANEPY_OK : anepy_lane_create(&slot->lane);
    if (status == ANEPY_OK && !anepy_lane_run(slot->lane, job, seconds)) {
        anepy_lane_free(slot->lane);
        slot->lane = NULL;
        atomic_store(&ane->hung, 1);
        anepy_fail(ANEPY_E_DEVICE, "device ane: %s did not return within %g s: the driver hangs",
                   what, seconds);
        anepy_ane_poison(ane);
        pthread_mutex_unlock(&slot->turn);
        return ANEPY_E_DEVICE;
    }
    pthread_mutex_unlock(&slot->turn);
    if (status == ANEPY_OK) {
        status = job->status;
        if (status != ANEPY_OK) anepy_fail(status, "device ane: %s: %s", what, job->message);
    }
    if (status != ANEPY_OK) job->drop(job);
    return status;
}

/* -------------------------------------------------------------------------------- open, close */

typedef struct {
    anepy_job job;
    anepy_ane *ane;
} open_job;

static void open_drop(anepy_job *job) {
    anepy_ane_drop(((open_job *)job)->ane);
    free(job);
}

/* The kind of a type as compilers write it into a method; BOOL and the size of an int depend on the
 * processor. */
static char kind_of(const char *type) {
    static const char *const ALIKE[] = {"BcC", "Ii", "@#"};
    type += strspn(type, "rnNoORV");
    for (size_t i = 0; i < sizeof ALIKE / sizeof ALIKE[0]; i++)
        if (memchr(ALIKE[i], *type, strlen(ALIKE[i])) != NULL) return ALIKE[i][0];
    return *type;
}

/* Whether a method takes and returns what our protocols say; a call would crash otherwise. */
static int is_as_known(Method found, const char *kinds) {
    char type[64] = "";
    size_t n = strlen(kinds) - 1;
    if (method_getNumberOfArguments(found) != n + 2) return 0;
    method_getReturnType(found, type, sizeof type);
    int same = kind_of(type) == kinds[0];
    for (size_t i = 0; i < n && same; i++) {
        method_getArgumentType(found, (unsigned int)i + 2, type, sizeof type);
        same = kind_of(type) == kinds[i + 1];
    }
    return same;
}

static int32_t check_methods(void) {
    for (size_t i = 0; i < sizeof METHODS / sizeof METHODS[0]; i++) {
        const method *m = &METHODS[i];
        Class class = NSClassFromString([NSString stringWithUTF8String:m->class_name]);
        SEL selector = sel_registerName(m->selector);
        if (class == Nil)
            return anepy_fail(ANEPY_E_UNAVAILABLE,
                              "this macOS has no class %s, so its Neural Engine interface is one "
                              "that anepy does not know: please send `anepy info --json`",
                              m->class_name);
        int there = m->of_class ? [class respondsToSelector:selector]
                                : [class instancesRespondToSelector:selector];
        Method found = !there        ? NULL
                       : m->of_class ? class_getClassMethod(class, selector)
                                     : class_getInstanceMethod(class, selector);
        if (found == NULL || !is_as_known(found, m->kinds))
            return anepy_fail(ANEPY_E_UNAVAILABLE,
                              "this macOS has %s %c[%s %s], so its Neural Engine interface is one "
                              "that anepy does not know: please send `anepy info --json`",
                              found == NULL ? "no" : "another", m->of_class ? '+' : '-',
                              m->class_name, m->selector);
    }
    return ANEPY_OK;
}

/* Fails if the framework says that there is no ANE, or one of a family that takes no MIL. */
static int32_t check_family(void) {
    Class<AnepyDeviceInfoClass> info = NSClassFromString(@"_ANEDeviceInfo");
    if ([(id)info respondsToSelector:@selector(hasANE)] && ![info hasANE])
        return anepy_fail(ANEPY_E_UNAVAILABLE, "this machine has no Neural Engine (virtual "
                                               "machines have none)");
    if (![(id)info respondsToSelector:@selector(aneSubType)]) return ANEPY_OK;
    const char *chip = [[info aneSubType] UTF8String];
    if (chip == NULL) return ANEPY_OK;
    if (chip[0] == 'h' && strtol(chip + 1, NULL, 10) < FIRST_FAMILY)
        return anepy_fail(ANEPY_E_UNAVAILABLE,
                          "Neural Engine family %.15s takes no MIL programs, h%d (M1) is the first",
                          chip, FIRST_FAMILY);
    return ANEPY_OK;
}

static int32_t open_run(anepy_job *job) {
    anepy_ane *ane = ((open_job *)job)->ane;
    if (dlopen(FRAMEWORK, RTLD_NOW) == NULL) {
        const char *reason = dlerror();
        return anepy_fail(ANEPY_E_UNAVAILABLE, "AppleNeuralEngine.framework does not open: %.300s",
                          reason != NULL ? reason : "no reason given");
    }
    ANEPY_TRY(check_methods());
    ane->classes.descriptor = NSClassFromString(@"_ANEInMemoryModelDescriptor");
    ane->classes.model = NSClassFromString(@"_ANEInMemoryModel");
    ane->classes.request = NSClassFromString(@"_ANERequest");
    ane->classes.surface = NSClassFromString(@"_ANEIOSurfaceObject");
    return check_family();
}

void anepy_ane_limits_set(anepy_ane_limits *limits, int32_t timeout_ms) {
    /* Compiling a program with 340 MB of weights may take a minute. */
    limits->evaluate_seconds = timeout_ms > 0 ? timeout_ms * 1e-3 : 30.0;
    limits->compile_seconds = 30.0 * limits->evaluate_seconds;
}

int32_t anepy_ane_open(anepy_ane **out, const anepy_ane_limits *limits) {
    anepy_ane *ane = calloc(1, sizeof *ane);
    open_job *job = calloc(1, sizeof *job);
    if (ane == NULL || job == NULL) {
        free(ane);
        free(job);
        return anepy_fail(ANEPY_E_MEMORY, "no memory for device ane");
    }
    atomic_init(&ane->users, 1);
    ane->pid = getpid();
    ane->limits = *limits;
    pthread_mutex_init(&ane->mutex, NULL);
    pthread_mutex_init(&ane->work.turn, NULL);
    pthread_mutex_init(&ane->compile.turn, NULL);
    job->job = (anepy_job){.run = open_run, .drop = open_drop};
    job->ane = ane;
    anepy_ane_hold(ane);
    int32_t status =
        anepy_ane_call(ane, &ane->work, &job->job, limits->evaluate_seconds, "opening");
    if (status != ANEPY_OK) {
        anepy_ane_close(ane);
        return status;
    }
    job->job.drop(&job->job);
    anepy_folder_sweep();
    *out = ane;
    return ANEPY_OK;
}

void anepy_ane_close(anepy_ane *ane) {
    if (ane == NULL || anepy_ane_forked(ane)) return;
    anepy_lane_free(ane->work.lane);
    anepy_lane_free(ane->compile.lane);
    ane->work.lane = ane->compile.lane = NULL;
    anepy_ane_drop(ane);
}
