/* device/ane/ane.h - the Apple Neural Engine (ANE) through the private framework, as plain C.
 *
 * MIL text and weight file are written to a folder of their own, compiled, loaded and evaluated on
 * IOSurfaces (docs/neural-engine.md#calls). Classes and selectors are looked up and checked, every
 * BOOL, NSError and exception becomes a status with a sentence, every call has a time limit, and
 * how a loaded program orders its surfaces is read back and compared by name. A call that never
 * returns poisons the device: all later calls say why.
 *
 * Only builds for macOS have this; elsewhere none.c stands for the device. Threads: one thread may
 * compile programs while another evaluates; a program and a surface belong to one thread at a time,
 * except that several may read a surface. */
#ifndef ANEPY_DEVICE_ANE_ANE_H
#define ANEPY_DEVICE_ANE_ANE_H

#include "device/device.h"

typedef struct anepy_ane anepy_ane;
typedef struct anepy_ane_surface anepy_ane_surface;
typedef struct anepy_ane_program anepy_ane_program; /* a loaded text: one function or several */

#define ANEPY_ANE_PORTS 36 /* most inputs plus outputs of one function */

typedef struct {
    double evaluate_seconds; /* an evaluation that takes longer counts as never returning */
    double compile_seconds;
} anepy_ane_limits;

void anepy_ane_limits_set(anepy_ane_limits *limits, int32_t timeout_ms); /* 0: 30 s */

/* ANEPY_E_UNAVAILABLE with the reason if the framework, a class, a selector or the ANE is missing.
 */
int32_t anepy_ane_open(anepy_ane **out, const anepy_ane_limits *limits);
void anepy_ane_close(anepy_ane *ane);    /* after its programs and surfaces; accepts NULL */
int32_t anepy_ane_check(anepy_ane *ane); /* OK, or the failure that poisoned the device */
/* From now on every call fails with this thread's error sentence. Poisoning again changes nothing.
 */
void anepy_ane_poison(anepy_ane *ane);

int32_t anepy_ane_surface_create(anepy_ane *ane, anepy_ane_surface **out, uint64_t nbytes);
void anepy_ane_surface_free(anepy_ane_surface *surface); /* accepts NULL */
/* *data is valid until unlock. Fails for reading if the evaluation that last wrote the surface
 * failed. */
int32_t anepy_ane_surface_lock(anepy_ane_surface *surface, int32_t for_writing, void **data);
int32_t anepy_ane_surface_unlock(anepy_ane_surface *surface, int32_t for_writing);

/* An input or output: fp16 [1, nbytes / row_nbytes, 1, row_nbytes / 2]. */
typedef struct {
    char name[32];
    uint64_t nbytes;
    uint64_t row_nbytes;
} anepy_ane_port;

typedef struct {
    char name[32];
    int32_t input_n, output_n;
    anepy_ane_port ports[ANEPY_ANE_PORTS]; /* inputs, then outputs */
} anepy_ane_function;

/* Compilations of this process so far. */
int32_t anepy_ane_compiles(void);

/* Compiles and loads a text with these functions; *compiled (may be NULL) becomes 1. With fresh = 0
 * a result that an earlier run left is loaded instead, and *compiled becomes 0. functions NULL: any
 * functions, whose surfaces are taken in the order of their symbols. ANEPY_E_UNSUPPORTED: the ANE
 * does not take this text; another form of it may work. */
int32_t anepy_ane_compile(anepy_ane *ane, anepy_ane_program **out, const anepy_trial_source *source,
                          const anepy_ane_function *functions, int32_t function_n, int32_t fresh,
                          int32_t *compiled);
/* Puts other weight files in place and loads again without compiling. */
int32_t anepy_ane_reload(anepy_ane_program *program, const anepy_trial_source *source);
void anepy_ane_program_free(anepy_ane_program *program); /* accepts NULL */

/* Surfaces in the order of the function's ports, or by ascending symbol if the program was compiled
 * without functions. At least one input and one output, together at most ANEPY_ANE_PORTS. */
typedef struct {
    int32_t function;
    int32_t input_n, output_n;
    anepy_ane_surface *surfaces[ANEPY_ANE_PORTS]; /* inputs, then outputs */
} anepy_ane_call_surfaces;

int32_t anepy_ane_run(anepy_ane_program *program, const anepy_ane_call_surfaces *surfaces);

extern const anepy_trial_ops anepy_ane_trial; /* trial.m */

/* Keeps a refused text as a file that a person can look into; path[path_n] gets its name. */
int32_t anepy_ane_keep(const char *text, uint64_t text_n, char *path, uint64_t path_cap);

#endif
