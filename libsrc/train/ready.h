/* train/ready.h - how far the gradients of the running step are final, for other threads to ask.
 *
 * Buckets become final from the end of the model down: final norm and classifier, the layers from
 * the last to the first, the embedding. */
#ifndef ANEPY_TRAIN_READY_H
#define ANEPY_TRAIN_READY_H

#include "train/engine.h"

void anepy_ready_begin(anepy_engine *e);             /* a step begins: none is final */
void anepy_ready_last(anepy_engine *e);              /* final norm and classifier are */
void anepy_ready_layers(anepy_engine *e, int32_t l); /* of the layers from l on, all was started */
void anepy_ready_all(anepy_engine *e);               /* no step is running */

int32_t anepy_ready_get(const anepy_engine *e, int64_t *steps); /* buckets; from any thread */

#endif
