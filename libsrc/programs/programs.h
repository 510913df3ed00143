/* programs/programs.h - the program table: every fused program of the training step, defined once.
 *
 * A program reads named ranges of channels [C, S] and writes others; weights are baked or live. The
 * step engine, the devices and later the MIL generator take names, channel counts, offsets in a
 * packed surface and weights from here and nowhere else (ane-facts.md 6.1; RoPE and grouped-query
 * attention, which the research programs lack, included). */
#ifndef ANEPY_PROGRAMS_H
#define ANEPY_PROGRAMS_H

#include "model/model.h"

typedef enum {
    ANEPY_SDPA_FWD,
    ANEPY_FFN_FWD,
    ANEPY_FFN_BWD,
    ANEPY_SDPA_BWD1,
    ANEPY_SDPA_BWD2,
    ANEPY_QKV_BWD,
    ANEPY_PROGRAM_N
} anepy_program_id;

#define ANEPY_PROGRAM_TENSORS 8
#define ANEPY_PROGRAM_WEIGHTS 5

typedef struct {
    const char *name;
    int32_t channels;
    int32_t channel; /* first channel when all inputs (or all outputs) share one packed surface */
} anepy_program_tensor;

/* Inputs first, then outputs, each in packed order. */
typedef struct {
    anepy_program_id id;
    const char *name;
    int32_t input_n, output_n;
    int32_t input_channels, output_channels; /* of the packed surfaces */
    anepy_program_tensor tensors[ANEPY_PROGRAM_TENSORS];
    int32_t weight_n;
    int32_t weights[ANEPY_PROGRAM_WEIGHTS]; /* tensors of the layer, ANEPY_WQ... */
} anepy_program;

/* Positions in tensors[], inputs before outputs. */
enum { SDPA_FWD_X, SDPA_FWD_OUT, SDPA_FWD_Q, SDPA_FWD_K, SDPA_FWD_V, SDPA_FWD_ATTN, SDPA_FWD_XNORM };
enum { FFN_FWD_X, FFN_FWD_OUT, FFN_FWD_H1, FFN_FWD_H3, FFN_FWD_GATE, FFN_FWD_XNORM };
enum { FFN_BWD_DY, FFN_BWD_H1, FFN_BWD_H3, FFN_BWD_DX, FFN_BWD_DH1, FFN_BWD_DH3 };
enum { SDPA_BWD1_Q, SDPA_BWD1_K, SDPA_BWD1_V, SDPA_BWD1_DY, SDPA_BWD1_DV, SDPA_BWD1_P, SDPA_BWD1_DP };
enum { SDPA_BWD2_P, SDPA_BWD2_DP, SDPA_BWD2_Q, SDPA_BWD2_K, SDPA_BWD2_DQ, SDPA_BWD2_DK };
enum { QKV_BWD_DQ, QKV_BWD_DK, QKV_BWD_DV, QKV_BWD_DX };

/* Fills out for a model and a surface width (columns of every tensor, >= the sequence length). */
void anepy_program_describe(anepy_program *out, anepy_program_id id, const anepy_model *model,
                            int32_t width);

const char *anepy_program_name(anepy_program_id id);

#endif
