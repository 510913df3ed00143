/* device/device.h - the one interface between the step engine and whatever runs its programs.
 *
 * A device owns surfaces ([channels, width] in its element type), compiles programs of the table
 * for the weights of one layer, and evaluates them. A new device is a file with one
 * anepy_device_type and a row in the table of device.c; capabilities say what the engine may skip.
 * Every call returns a status; a failed evaluation leaves its outputs undefined and says so. */
#ifndef ANEPY_DEVICE_H
#define ANEPY_DEVICE_H

#include "kernels/gemm.h"
#include "programs/programs.h"

/* Capabilities: what the engine may leave out, and which switches mean something. */
/* Tensors may be bound to channels of any surface, so nothing is packed; the scores of sdpa_bwd1
 * and sdpa_bwd2 may be bound to none, if sdpa_bwd2 follows the other programs of its layer. */
#define ANEPY_BINDS 1u
#define ANEPY_LIVE_WEIGHTS 2u /* reads the parameters themselves: updates need no recompilation */
#define ANEPY_OFFLOADS 4u     /* has the programs for norms, classifier and soft-max */
#define ANEPY_DYNAMIC 8u      /* can take weights through surfaces */
#define ANEPY_COMPILES_BESIDE 16u /* can compile while evaluating */
#define ANEPY_BATCHES 32u         /* surfaces may hold several sequences beside each other */

typedef struct anepy_device anepy_device;
typedef struct anepy_surface anepy_surface;
typedef struct anepy_kernel anepy_kernel; /* a compiled program */

struct anepy_surface {
    anepy_device *device;
    anepy_dtype dtype;
    int32_t channels, width;
    void *data; /* where the host sees it between lock and unlock, row-major */
};

/* One program for the weights of one layer. */
typedef struct {
    const anepy_program *program;
    int32_t layer;
} anepy_instance;

/* What a device is opened for. Everything outlives the device. */
typedef struct {
    const anepy_model *model;
    const anepy_gemm *gemm; /* kernels, threads and scratch: host work, and the cpu device's own */
    int32_t width;          /* columns of every surface: a multiple of 64, >= seq_len; programs are
                             * described for one sequence, so that with ANEPY_BATCHES it may be more
                             * than theirs */
    int32_t seq_len;
    anepy_dtype dtype;  /* of products, and of surfaces: of all, or of those of factors */
    const char *detail; /* what follows the colon of "sim:m1" (traits.h); NULL: nothing */
} anepy_device_options;

/* MIL text on its own, outside of any engine: what probes find a machine out with. A device takes
 * it as it is: surfaces by slot with the sizes given, nothing rounded up, and no budget of its own,
 * so that the hardware's answer is what comes back. */
typedef struct anepy_trial anepy_trial;

typedef struct {
    const char *text;
    uint64_t text_n;
    const char *const *paths; /* of file_n weight files, as in BLOBFILE */
    const void *const *files;
    const uint64_t *file_nbytes;
    int32_t file_n;
} anepy_trial_source;

typedef struct {
    int32_t function; /* position in the text */
    int32_t input_n, output_n;
    const void *const *inputs;
    const uint64_t *input_nbytes;
    void *const *outputs; /* undefined after a failure */
    const uint64_t *output_nbytes;
} anepy_trial_surfaces;

typedef struct {
    /* *compiled becomes 0 if what an earlier run compiled could be loaded instead. detail as in
     * anepy_device_options. */
    int32_t (*create)(anepy_trial **out, const anepy_trial_source *source, const char *detail,
                      int32_t *compiled);
    /* Puts other weight files in place of the same size and loads again without compiling. */
    int32_t (*reload)(anepy_trial *trial, const anepy_trial_source *source);
    int32_t (*run)(anepy_trial *trial, const anepy_trial_surfaces *surfaces);
    void (*release)(anepy_trial *trial);
} anepy_trial_ops;

typedef struct {
    const char *name;
    const char *about;
    uint32_t precisions; /* bit per anepy_dtype; "auto" takes the fastest (engine.c) */
    uint32_t capabilities;
    uint32_t slow; /* those whose switches do not help here: not part of "max" */
    /* OK, or ANEPY_E_UNAVAILABLE with the reason as error sentence. */
    int32_t (*probe)(void);
    /* OK, or ANEPY_E_UNSUPPORTED and why this machine lacks one of those; NULL: it lacks none. */
    int32_t (*has_precision)(anepy_dtype dtype);
    int32_t (*open)(anepy_device **out, const anepy_device_options *options);
    const anepy_trial_ops *trial; /* NULL: runs no MIL text, or is the simulator itself */
} anepy_device_type;

typedef struct {
    void (*close)(anepy_device *device); /* frees its surfaces and kernels as well */
    /* For tensors that are factors of products only, or for any. */
    int32_t (*surface_create)(anepy_device *device, int32_t channels, int32_t factors,
                              anepy_surface **out);
    /* Before and after the host touches surface->data. */
    int32_t (*lock)(anepy_surface *surface, int32_t for_writing);
    int32_t (*unlock)(anepy_surface *surface, int32_t for_writing);
    /* Compiles all instances, in as few compilations as the device can, with the weights that the
     * arena params holds now: all of out[0..n), or none and an error; ANEPY_E_BUDGET, before
     * anything is compiled, if the process may not compile that many. With ANEPY_COMPILES_BESIDE it
     * may run on another thread while older kernels are evaluated, where no weight is live. */
    int32_t (*compile)(anepy_device *device, const anepy_instance *instances, int32_t n,
                       const float *params, anepy_kernel **out);
    void (*release)(anepy_kernel *kernel);
    /* Live weights as the arena holds them now; NULL without ANEPY_DYNAMIC. */
    int32_t (*load_weights)(anepy_device *device, const float *params);
    /* Tensor `index` of the program lives at surface[channel ...] from now on. */
    int32_t (*bind)(anepy_kernel *kernel, int32_t index, anepy_surface *surface, int32_t channel);
    /* Computes `count` sequences of n tokens, each from the next multiple of 64 columns on: the
     * first n columns, unless it has ANEPY_BATCHES. Further columns of the outputs are unspecified
     * but finite. */
    int32_t (*evaluate)(anepy_kernel *kernel, int32_t n, int32_t count);
} anepy_device_ops;

struct anepy_device {
    const anepy_device_type *type;
    const anepy_device_ops *ops;
    anepy_device_options options;
    uint64_t nbytes;          /* of its surfaces */
    _Atomic int64_t compiles; /* texts so far; one may be compiling on another thread */
    int64_t compile_budget;   /* most that the process may compile; 0: no limit */
};

/* The type with this name; NULL or "auto" is the first usable one. A colon and what the device
 * makes of it may follow; *detail (may be NULL) then points behind it. NULL with an error sentence.
 */
const anepy_device_type *anepy_device_find(const char *name, const char **detail);

/* Copies channels between a surface and host memory of [count, width] float32, converting. */
int32_t anepy_surface_read(anepy_surface *surface, int32_t channel, int32_t count, float *dst);
int32_t anepy_surface_write(anepy_surface *surface, int32_t channel, int32_t count,
                            const float *src);
/* Copies channels between two surfaces of one device without converting. */
int32_t anepy_surface_copy(anepy_surface *dst, int32_t dst_channel, anepy_surface *src,
                           int32_t src_channel, int32_t count);

extern const anepy_device_type anepy_device_ane;
extern const anepy_device_type anepy_device_cpu;
extern const anepy_device_type anepy_device_sim;

#endif
