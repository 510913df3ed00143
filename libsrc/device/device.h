/* device/device.h - the interface between the step engine and the devices that run its programs.
 *
 * A device owns surfaces ([channels, width] in its element type), compiles programs of the table
 * for the weights of one layer, and evaluates them. A new device is a file with one
 * anepy_device_type and a row in the table of device.c; capabilities say what the step engine may
 * skip. Every call returns a status; after a failed evaluation its outputs are undefined. */
#ifndef ANEPY_DEVICE_H
#define ANEPY_DEVICE_H

#include "kernels/gemm.h"
#include "programs/programs.h"

/* Capabilities: they say what the step engine may skip and which switches have an effect. */
/* Tensors may be bound to channels of any surface, so nothing is packed, and programs have host
 * tensors. The scores of sdpa_bwd1 and sdpa_bwd2 may stay unbound, if these are bound and both run
 * one after the other. */
#define ANEPY_BINDS 1u
#define ANEPY_LIVE_WEIGHTS 2u /* reads the parameters themselves: updates need no recompilation */
#define ANEPY_OFFLOADS 4u     /* has the programs for norms, classifier and soft-max */
#define ANEPY_DYNAMIC 8u      /* can take weights through surfaces */
#define ANEPY_COMPILES_BESIDE 16u /* can compile while evaluating */
#define ANEPY_BATCHES 32u         /* surfaces may hold several sequences beside each other */
#define ANEPY_PACKS 64u           /* keeps documents within a sequence apart */
#define ANEPY_FUSES 128u          /* has the programs of whole layers and of weight gradients */

typedef struct anepy_device anepy_device;
typedef struct anepy_surface anepy_surface;
typedef struct anepy_executable anepy_executable; /* a compiled program */

struct anepy_surface {
    anepy_device *device;
    anepy_dtype dtype;
    int32_t channels, width;
    void *data; /* memory between lock and unlock, row-major */
};

/* A program for the weights of one layer. */
typedef struct {
    const anepy_program *program;
    int32_t layer;
} anepy_instance;

/* What a device is opened for. All that is pointed to outlives the device. */
typedef struct {
    const anepy_model *model;
    const anepy_gemm *gemm; /* kernels, threads and scratch for host work, and for the cpu device */
    int32_t width; /* columns of every surface: a multiple of 64, >= seq_len; with ANEPY_BATCHES it
                      may exceed the width of programs, which are described for one sequence */
    int32_t seq_len;
    anepy_dtype dtype;  /* of products, and of surfaces: of all (fp16), or of factors only (bf16) */
    const float *adapter; /* the arena of adapters, whose values are always read as they are now */
    const char *detail; /* details behind the colon of "sim:m1" (traits.h); NULL: none */
} anepy_device_options;

/* MIL text by itself, outside of a step engine, with which probes question the hardware. A device
 * takes it unchanged: surfaces by slot with the given sizes, nothing rounded up, and without the
 * device's budget, so that the answer is the hardware's own. */
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
    int32_t function; /* number of the function in the text */
    int32_t input_n, output_n;
    const void *const *inputs;
    const uint64_t *input_nbytes;
    void *const *outputs; /* undefined after a failure */
    const uint64_t *output_nbytes;
} anepy_trial_surfaces;

typedef struct {
    /* *compiled becomes 0 if the result of an earlier run was loaded instead. detail: words behind
     * the device's colon, or NULL. */
    int32_t (*create)(anepy_trial **out, const anepy_trial_source *source, const char *detail,
                      int32_t *compiled);
    /* Replaces the weight files by others of equal size and loads again without compiling. */
    int32_t (*reload)(anepy_trial *trial, const anepy_trial_source *source);
    int32_t (*run)(anepy_trial *trial, const anepy_trial_surfaces *surfaces);
    void (*release)(anepy_trial *trial);
} anepy_trial_ops;

typedef struct {
    const char *name;
    const char *about;
    uint32_t precisions; /* bit per anepy_dtype; "auto" takes the fastest */
    uint32_t capabilities;
    uint32_t slow; /* capabilities whose switches cost time here, so that "max" leaves them out */
    int32_t channels; /* most that a tensor of a program may have; 0: any number */
    /* OK, or ANEPY_E_UNAVAILABLE with the reason as error sentence. */
    int32_t (*probe)(void);
    /* OK, or ANEPY_E_UNSUPPORTED and why this machine lacks a precision; NULL: it has all. */
    int32_t (*has_precision)(anepy_dtype dtype);
    int32_t (*open)(anepy_device **out, const anepy_device_options *options);
    const anepy_trial_ops *trial; /* NULL: the device runs no MIL text, or is the simulator */
} anepy_device_type;

typedef struct {
    void (*close)(anepy_device *device); /* also frees its surfaces and executables */
    /* factors != 0: for tensors that are only factors of products. width 0: the device's. */
    int32_t (*surface_create)(anepy_device *device, int32_t channels, int32_t width,
                              int32_t factors, anepy_surface **out);
    /* Called before and after the host uses surface->data. */
    int32_t (*lock)(anepy_surface *surface, int32_t for_writing);
    int32_t (*unlock)(anepy_surface *surface, int32_t for_writing);
    /* Compiles all instances, in as few compilations as the device can, with the current weights in
     * params. Gives all of out[0..n), or none and an error: ANEPY_E_BUDGET, before anything is
     * compiled, if the process may not compile so many. With ANEPY_COMPILES_BESIDE, and if no
     * weight is live, it may run on another thread while older executables are evaluated. */
    int32_t (*compile)(anepy_device *device, const anepy_instance *instances, int32_t n,
                       const void *params, anepy_executable **out);
    void (*release)(anepy_executable *executable);
    /* Loads the current live weights from params; NULL without ANEPY_DYNAMIC. */
    int32_t (*load_weights)(anepy_device *device, const void *params);
    /* Binds tensor `index` of the program to the channels of surface from `channel` on. */
    int32_t (*bind)(anepy_executable *executable, int32_t index, anepy_surface *surface,
                    int32_t channel);
    /* Computes `count` sequences of n tokens, each in columns from a multiple of 64 on. count is 1
     * unless the device has ANEPY_BATCHES. Other columns of the outputs are finite, but otherwise
     * undefined. */
    int32_t (*evaluate)(anepy_executable *executable, int32_t n, int32_t count);
} anepy_device_ops;

struct anepy_device {
    const anepy_device_type *type;
    const anepy_device_ops *ops;
    anepy_device_options options;
    uint64_t nbytes;          /* bytes of its surfaces */
    uint64_t moved;           /* bytes that the calls below have moved so far */
    _Atomic int64_t compiles; /* so far; another thread may be compiling */
    int64_t compile_budget;   /* most compilations of the process; 0: no limit */
    /* With ANEPY_PACKS: of each column the position, in its sequence, of the first token of its
     * document. Attention does not look behind it, and RoPE counts from it. NULL: a sequence is one
     * document. Set before evaluations, by the step engine. */
    const int32_t *documents;
    /* Programs are evaluated once more for what the backward pass reads: the outputs that the step
     * engine alone reads may be left as they are. Set before evaluations as well. */
    int32_t again;
};

/* The device type with this name; NULL or "auto" is the first usable one. If details follow a
 * colon, *detail (may be NULL) points to them. Returns NULL with an error sentence if there is
 * none. */
const anepy_device_type *anepy_device_find(const char *name, const char **detail);

/* Bytes of so many channels. */
static inline uint64_t anepy_surface_nbytes(const anepy_surface *surface, int32_t count) {
    return (uint64_t)(anepy_dtype_nbytes(surface->dtype) * count * surface->width);
}

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
