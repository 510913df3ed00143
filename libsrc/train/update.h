/* train/update.h - the optimizer step. */
#ifndef ANEPY_TRAIN_UPDATE_H
#define ANEPY_TRAIN_UPDATE_H

#include "train/engine.h"

/* One optimizer; update.c has the table. */
typedef struct anepy_optimizer anepy_optimizer;

/* The one with this name; NULL is the first. ANEPY_E_NAME with the list of all. */
int32_t anepy_optimizer_find(const anepy_optimizer **out, const char *name);
/* How many moments it keeps of a trainable tensor: 1 (m) or 2 (m and v). */
int32_t anepy_optimizer_keeps(const anepy_optimizer *optimizer, const anepy_tensor *tensor);
/* Makes what it needs beside the moments. */
int32_t anepy_optimizer_open(anepy_engine *e);

/* Options are valid and e->counted > 0. Recompiles where weights are baked; if that fails the
 * weights are updated but the programs still hold the old ones. */
int32_t anepy_update(anepy_engine *e, anepy_update_stats *stats,
                     const anepy_update_options *options);

#endif
