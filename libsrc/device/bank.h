/* device/bank.h - the common part of devices that run MIL.
 *
 * All programs of one compilation are functions of one text with one weight file, a bank, so that a
 * weight update costs one compilation (docs/neural-engine.md#procedures). Hardware that refuses the
 * bank gets the older dialect, then a text per program; the traits can ask for the latter at once.
 * Programs with equal text share a function. A program has one packed output surface and one packed
 * input, or those of other programs as inputs; a live weight has a surface that all programs which
 * read it share. A backend provides memory and executes. */
#ifndef ANEPY_DEVICE_BANK_H
#define ANEPY_DEVICE_BANK_H

#include "device/device.h"
#include "device/traits.h"
#include "programs/mil_generate.h"

#define ANEPY_BANK_INPUTS (ANEPY_PROGRAM_SURFACES + ANEPY_PROGRAM_WEIGHTS)

typedef struct anepy_bank anepy_bank;
typedef struct anepy_bank_device anepy_bank_device;

/* Surfaces are [1, channels, 1, width] in fp16. */
typedef struct anepy_bank_surface {
    anepy_surface base;          /* base.data: its memory while the host has locked it */
    uint64_t nbytes;             /* rounded up to 64 KiB */
    anepy_program_matrix weight; /* the live weight in it; weight.tensor NULL: none */
    void *memory;                /* owned by the backend */
    struct anepy_bank_surface *next;
} anepy_bank_surface;

struct anepy_executable {
    anepy_bank_device *device;
    const anepy_program *program;
    anepy_bank *bank;
    int32_t function;
    int32_t input_n; /* those of tensors, and the live weights */
    /* In the order of names in MIL. */
    anepy_bank_surface *inputs[ANEPY_BANK_INPUTS];
    anepy_bank_surface *output;
    void *request;                     /* owned by the backend, made when all surfaces are bound */
    anepy_executable *previous, *next; /* in the list of all executables of the device */
};

typedef struct {
    /* Allocates surface->nbytes of zeroed memory and sets surface->memory and, if the address never
     * changes, base.data. */
    int32_t (*memory_create)(anepy_bank_device *device, anepy_bank_surface *surface);
    void (*memory_free)(anepy_bank_device *device, anepy_bank_surface *surface);
    int32_t (*lock)(anepy_surface *surface, int32_t for_writing);
    int32_t (*unlock)(anepy_surface *surface, int32_t for_writing);
    /* Compiles and loads a text whose functions are the items, in their order; the backend owns
     * *out. *compiled becomes 0 if it was only loaded. ANEPY_E_UNSUPPORTED: the hardware refuses
     * the text, another form of it may work. May run on another thread during evaluations. */
    int32_t (*compile)(anepy_bank_device *device, const anepy_mil_source *source,
                       const anepy_mil_item *items, int32_t n, void **out, int32_t *compiled);
    void (*release)(anepy_bank_device *device, void *compiled);
    int32_t (*compiles)(void); /* compilations of this process so far */
    int32_t (*run)(anepy_executable *executable, void *compiled);
    void (*forget)(
        anepy_executable *executable); /* frees executable->request; NULL: there is none */
    void (*close)(anepy_bank_device *device);
} anepy_bank_backend;

struct anepy_bank_device {
    anepy_device base; /* ops: anepy_bank_ops */
    const anepy_bank_backend *backend;
    anepy_traits traits;
    int32_t form; /* index of the form of texts that was taken last */
    anepy_bank_surface *surfaces;
    anepy_executable *executables;
};

extern const anepy_device_ops anepy_bank_ops;

#endif
