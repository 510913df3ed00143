/* train/step.h - a step: the sequences of a batch, and what becomes of those that overflow or fail.
 */
#ifndef ANEPY_TRAIN_STEP_H
#define ANEPY_TRAIN_STEP_H

#include "train/engine.h"

/* The sequences of a call: ids and targets int32[sequences, tokens], all valid; targets below 0 are
 * not counted, and without one that is the call fails with ANEPY_E_ARGUMENT. starts:
 * uint8[sequences, tokens], not 0 where a document begins; NULL: at the first token only. */
typedef struct {
    const int32_t *ids, *targets; /* targets: NULL for logits */
    const uint8_t *starts;
    int32_t sequences, tokens;
} anepy_batch;

/* Makes the room that such a step needs. */
int32_t anepy_step_reserve(anepy_engine *e, int32_t sequences, int32_t tokens);
/* How many tokens the sequences have that run last in it. */
int32_t anepy_step_holds(anepy_engine *e, int32_t sequences, int32_t tokens);
/* Forward and backward, all sequences or none; e->run.stats tells about it. */
int32_t anepy_step(anepy_engine *e, const anepy_batch *batch);
/* Mean loss of the counted targets; losses: double [sequences, tokens], that of each target and 0
 * where it is not counted, or NULL. */
int32_t anepy_step_evaluate(anepy_engine *e, double *loss, double *losses,
                            const anepy_batch *batch);
/* logits: [sequences, tokens, vocab]. */
int32_t anepy_step_logits(anepy_engine *e, float *logits, const anepy_batch *batch);

#endif
