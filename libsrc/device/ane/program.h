/* device/ane/program.h - a loaded program, and how its surfaces are bound. Objective-C only. */
#ifndef ANEPY_DEVICE_ANE_PROGRAM_H
#define ANEPY_DEVICE_ANE_PROGRAM_H

#include <limits.h>

#include "device/ane/surface.h"

/* A request, for surfaces with these ids. */
typedef struct anepy_request {
    struct anepy_request *next;
    id request;
    uint64_t ids[ANEPY_ANE_PORTS];
} anepy_request;

/* A function of a loaded program. */
typedef struct {
    anepy_ane_function function;
    NSNumber *procedure;
    NSArray *indices[2]; /* of inputs and outputs: symbols, as the request wants them */
    int32_t order[2][ANEPY_ANE_PORTS]; /* which port each of them is */
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
    _Atomic int32_t users; /* the owner, and jobs */
    anepy_ane *ane;
    char folder[PATH_MAX];
    id<AnepyModel> model;
    int32_t loaded;
    int32_t baked; /* it holds weights: nobody will ask for it again once it is gone */
    anepy_bound *bound;
    int32_t function_n; /* 0: bound as it comes */
    anepy_run_job run;
    anepy_job other; /* unloading, loading again */
};

/* Finds out how the loaded program orders the surfaces of its functions, and checks that against
 * their names. ANEPY_E_UNSUPPORTED if that cannot be told, or another size is expected. */
int32_t anepy_bind_functions(anepy_ane_program *program);
/* Takes the symbols of one procedure as they come. */
int32_t anepy_bind_raw(anepy_ane_program *program, anepy_bound *bound, int32_t procedure,
                       int32_t input_n, int32_t output_n);
void anepy_unbind(anepy_bound *bound);

/* The request of a function for these surfaces; not retained. */
int32_t anepy_request_find(anepy_ane_program *program, anepy_bound *bound, const anepy_run_job *job,
                           id *out);

void anepy_program_hold(anepy_ane_program *program);
void anepy_program_drop(anepy_ane_program *program);

#endif
