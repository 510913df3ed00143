/* device/bank.h - what all devices that run MIL have in common.
 *
 * All programs of one compilation are functions of one text with one weight file: a bank, so that a
 * weight update costs one compile (docs/neural-engine.md#procedures), unless the traits want a text
 * for each. Hardware that refuses that gets the older dialect, then a text for each program.
 * Programs of the same text share a function.
 * Each has one packed input and one packed output surface; live weights have surfaces of their own,
 * which all programs that read the same weight share. A backend gives memory and executes. */
#ifndef ANEPY_DEVICE_BANK_H
#define ANEPY_DEVICE_BANK_H

#include "device/device.h"
#include "device/traits.h"
#include "programs/mil_generate.h"

#define ANEPY_BANK_INPUTS (1 + ANEPY_PROGRAM_WEIGHTS)

typedef struct anepy_bank anepy_bank;
typedef struct anepy_bank_device anepy_bank_device;

/* Surfaces are [1, channels, 1, width] in fp16. */
typedef struct anepy_bank_surface {
    anepy_surface base;          /* base.data: where the host sees it while it is locked */
    uint64_t nbytes;             /* rounded up to 64 KiB */
    anepy_program_matrix weight; /* the live weight it holds; weight.tensor NULL: none */
    void *memory;                /* the backend's */
    struct anepy_bank_surface *next;
} anepy_bank_surface;

struct anepy_kernel {
    anepy_bank_device *device;
    const anepy_program *program;
    anepy_bank *bank;
    int32_t function;
    int32_t input_n;                               /* 1, and the live weights */
    anepy_bank_surface *inputs[ANEPY_BANK_INPUTS]; /* [0] is packed; in the order of MIL names */
    anepy_bank_surface *output;
    void *request;                 /* the backend's; made when all are bound */
    anepy_kernel *previous, *next; /* all kernels of the device */
};

typedef struct {
    /* Memory of surface->nbytes, zeroed; sets surface->memory and, if it never moves, data. */
    int32_t (*memory_create)(anepy_bank_device *device, anepy_bank_surface *surface);
    void (*memory_free)(anepy_bank_device *device, anepy_bank_surface *surface);
    int32_t (*lock)(anepy_surface *surface, int32_t for_writing);
    int32_t (*unlock)(anepy_surface *surface, int32_t for_writing);
    /* Compiles and loads a text whose functions are these items, in order; *out is the backend's.
     * *compiled becomes 0 if it only had to be loaded. ANEPY_E_UNSUPPORTED: the hardware refuses
     * the text, another form of it may do. May run on a thread beside evaluations. */
    int32_t (*compile)(anepy_bank_device *device, const anepy_mil_source *source,
                       const anepy_mil_item *items, int32_t n, void **out, int32_t *compiled);
    void (*release)(anepy_bank_device *device, void *compiled);
    int32_t (*compiles)(void); /* of the process so far */
    int32_t (*run)(anepy_kernel *kernel, void *compiled);
    void (*forget)(anepy_kernel *kernel); /* frees kernel->request; NULL: there is none */
    void (*close)(anepy_bank_device *device);
} anepy_bank_backend;

struct anepy_bank_device {
    anepy_device base; /* ops: anepy_bank_ops */
    const anepy_bank_backend *backend;
    anepy_traits traits;
    int32_t form; /* of texts: the one that was taken last */
    anepy_bank_surface *surfaces;
    anepy_kernel *kernels;
};

extern const anepy_device_ops anepy_bank_ops;

#endif
