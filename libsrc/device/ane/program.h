/* device/ane/program.h - a loaded program and the binding of its surfaces. Objective-C only. */
#ifndef ANEPY_DEVICE_ANE_PROGRAM_H
#define ANEPY_DEVICE_ANE_PROGRAM_H

#include <limits.h>

#include "device/ane/surface.h"

/* A request of the framework for surfaces with these ids; kept for the next evaluation. */
typedef struct anepy_request {
    struct anepy_request *next;
    id request;
    uint64_t ids[ANEPY_ANE_PORTS];
} anepy_request;

/* A function of a loaded program. */
typedef struct {
    anepy_ane_function function;
    NSNumber *procedure;
    NSArray *indices[2]; /* symbol numbers of inputs and of outputs, in the order of the request */
    int32_t order[2][ANEPY_ANE_PORTS]; /* port that each of those symbols belongs to */
    anepy_request *requests;
} anepy_bound;

typedef struct {
    anepy_job job;
    anepy_ane_program *program;
    int32_t function, port_n;
    IOSurfaceRef surfaces[ANEPY_ANE_PORTS]; /* retained */
    uint64_t ids[ANEPY_ANE_PORTS];
    int32_t input_n;
} anepy_run_job;

struct anepy_ane_program {
    _Atomic int32_t users; /* references: the owner and jobs */
    anepy_ane *ane;
    char folder[PATH_MAX];
    id<AnepyModel> model;
    int32_t loaded;
    int32_t baked; /* 1: it holds weights, so no later program is equal to it */
    anepy_bound *bound;
    int32_t function_n; /* 0: surfaces are bound in the order of symbols */
    anepy_run_job run;
    anepy_job other; /* job for unloading and loading again */
};

/* Finds the order of surfaces of each function in the loaded program by their names.
 * ANEPY_E_UNSUPPORTED if the program does not say it, or expects surfaces of another size. */
int32_t anepy_bind_functions(anepy_ane_program *program);
/* Binds the surfaces of one procedure in ascending order of its symbols. */
int32_t anepy_bind_raw(anepy_ane_program *program, anepy_bound *bound, int32_t procedure,
                       int32_t input_n, int32_t output_n);
void anepy_unbind(anepy_bound *bound);

/* The request of a function for these surfaces; not retained. */
int32_t anepy_request_find(anepy_ane_program *program, anepy_bound *bound, const anepy_run_job *job,
                           id *out);

void anepy_program_hold(anepy_ane_program *program);
void anepy_program_drop(anepy_ane_program *program);

#endif
