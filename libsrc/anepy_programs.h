/* anepy_programs.h - programs of the step as MIL text, and the simulator that runs any. A part of
 * anepy.h, which includes it. */
#ifndef ANEPY_PROGRAMS_PUBLIC_H
#define ANEPY_PROGRAMS_PUBLIC_H

#include "anepy.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---------------------------------------------------------------------------------- programs */

#define ANEPY_LIVE_WEIGHT_INPUTS 1u /* weights are further inputs instead of baked */

/* One program of the table for one layer. */
typedef struct anepy_program_options {
    uint32_t struct_size;
    uint32_t flags;   /* ANEPY_LIVE_WEIGHT_INPUTS */
    const char *name; /* as anepy_program_at */
    int32_t width;    /* columns of every tensor, a multiple of 64; 0: the model's seq_len */
    int32_t layer;
    int32_t part; /* slice of the vocabulary, for classifier programs with several parts */
    int32_t reserved;
} anepy_program_options;

typedef struct anepy_program_info {
    uint32_t struct_size;
    uint32_t flags;
    int32_t width;
    int32_t input_channels; /* of the packed surfaces "a_in" and "z_out" */
    int32_t output_channels;
    int32_t input_n; /* tensors: inputs, then outputs, then weights */
    int32_t output_n;
    int32_t weight_n;
    int32_t parts;
    int32_t first_row; /* first token of a classifier program's part */
} anepy_program_info;

typedef enum { ANEPY_PROGRAM_INPUT, ANEPY_PROGRAM_OUTPUT, ANEPY_PROGRAM_WEIGHT } anepy_port_kind;

/* A tensor of a program: channels [channel, channel + channels) of surface, columns wide. Weights
 * have a surface of their own when live; when baked, surface is empty. */
typedef struct anepy_program_port {
    uint32_t struct_size;
    int32_t kind; /* anepy_port_kind */
    char name[24];
    char surface[24];
    int32_t channel;
    int32_t channels;
    int32_t columns;
    int32_t rows; /* weights: shape and first element in the parameter arena */
    int64_t cols;
    int64_t offset;
} anepy_program_port;

ANEPY_API const char *anepy_program_at(int32_t index); /* names; NULL beyond the last */
ANEPY_API int32_t anepy_program_get_info(const anepy_model *model, anepy_program_info *out,
                                         const anepy_program_options *options);
ANEPY_API int32_t anepy_program_get_port(const anepy_model *model, anepy_program_port *out,
                                         const anepy_program_options *options, int32_t index);

/* MIL text and weight file of `count` programs: function "main", or procedure000, procedure001...
 * for several. params: the arena of weights, NULL if all weights are live. dialect "1.3"
 * (NULL) or "1.0". *text_n and *blob_n say how many bytes fit and get how many there are, the text
 * without a final zero; with text and blob NULL nothing is copied. No file: *blob_n becomes 0. */
ANEPY_API int32_t anepy_mil_write(const anepy_model *model, const void *params,
                                  const anepy_program_options *programs, int32_t count,
                                  const char *dialect, char *text, uint64_t *text_n, uint8_t *blob,
                                  uint64_t *blob_n);

/* Runs a program as device cpu does, in float32. in: [input_channels, width], out:
 * [output_channels, width], packed; the first n columns are computed. */
ANEPY_API int32_t anepy_program_run_native(const anepy_model *model, const void *params,
                                           const anepy_program_options *options, int32_t n,
                                           int32_t threads, const float *in, float *out);

/* ------------------------------------------------------------------------------ MIL simulator */

typedef struct anepy_sim anepy_sim; /* a parsed program of MIL text that runs on the simulator */
/* Parsed by the simulator and run by it, or by another device that runs MIL text: then no rule is
 * an error and the device has the say. text and files are not needed after anepy_sim_create. */
typedef struct anepy_sim_options {
    uint32_t struct_size;
    uint32_t flags;
    const char *text;
    uint64_t text_n;
    const char *const *paths; /* of file_n weight files, as in BLOBFILE */
    const void *const *files;
    const uint64_t *file_nbytes;
    const uint8_t *actions; /* per rule 0 off, 1 report, 2 error, 255 default; NULL: defaults */
    int32_t file_n;
    int32_t action_n;
    uint64_t memory_nbytes; /* most it may take; 0: 16 GiB */
    uint64_t work;          /* most multiply-adds per run; 0: 2^50 */
    int32_t chip;           /* 1 to 5 for M1 to M5; 0: M4 */
    int32_t threads;        /* 0: affinity, cgroup quota and physical cores decide */
    const char *device;     /* NULL: "sim"; a device that runs MIL, with its details */
} anepy_sim_options;

/* An input or output of a function. */
typedef struct anepy_sim_tensor {
    uint32_t struct_size;
    int32_t type;     /* index of anepy_sim_type_name */
    const char *name; /* valid as long as the program */
    int32_t rank;
    int32_t slot; /* its surface: the position among the names in ascending order */
    int64_t dims[5];
    uint64_t nbytes;
} anepy_sim_tensor;

typedef struct anepy_sim_report {
    uint32_t struct_size;
    uint32_t flags;
    uint64_t count;  /* how often the rule was broken so far */
    char first[480]; /* the first sentence */
} anepy_sim_report;

/* where: int32[2], line and column (from 1) of what is wrong in the text, 0 if it is elsewhere. */
ANEPY_API int32_t anepy_sim_create(anepy_sim **out, const anepy_sim_options *options,
                                   int32_t *where);
ANEPY_API void anepy_sim_free(anepy_sim *sim);              /* accepts NULL */
ANEPY_API int32_t anepy_sim_compiled(const anepy_sim *sim); /* 0: it loaded an earlier result */
/* Puts other weight files in place and loads the program again without compiling it. Whether they
 * are used is the device's affair: the simulator keeps those it was compiled with. */
ANEPY_API int32_t anepy_sim_reload(anepy_sim *sim, const anepy_sim_options *options);
ANEPY_API const char *anepy_sim_function_name(const anepy_sim *sim, int32_t index); /* NULL: end */
/* Tensors in declaration order, inputs (output 0) or outputs (1); ANEPY_E_ARGUMENT: end. */
ANEPY_API int32_t anepy_sim_get_tensor(const anepy_sim *sim, anepy_sim_tensor *out,
                                       int32_t function, int32_t output, int32_t index);
/* inputs, outputs: surfaces by slot, aligned to their element, with nbytes each. */
ANEPY_API int32_t anepy_sim_run(anepy_sim *sim, int32_t function, const void *const *inputs,
                                const uint64_t *input_nbytes, void *const *outputs,
                                const uint64_t *output_nbytes, int32_t *where);
ANEPY_API int32_t anepy_sim_get_report(const anepy_sim *sim, anepy_sim_report *out, int32_t rule);

ANEPY_API const char *anepy_sim_rule_name(int32_t index); /* NULL beyond the last, as below */
ANEPY_API const char *anepy_sim_rule_meaning(int32_t index);
ANEPY_API int32_t anepy_sim_rule_action(int32_t index); /* by default: 0, 1, 2; -1 beyond */
ANEPY_API const char *anepy_sim_op_name(int32_t index);
/* Products of all simulated programs of this process note their largest sum from watch(1) on, which
 * forgets those before. "PROGRAM RESULT" by index, and the sum, 65536 if infinite; NULL beyond the
 * last. */
ANEPY_API void anepy_sim_watch(int32_t on);
ANEPY_API const char *anepy_sim_headroom(int32_t index, double *largest);
ANEPY_API const char *anepy_sim_type_name(int32_t index);

#ifdef __cplusplus
}
#endif
#endif
