/* train/offload.h - classifier and soft-max on the device. The time of each part counts from *mark
 * on, which moves. */
#ifndef ANEPY_TRAIN_OFFLOAD_H
#define ANEPY_TRAIN_OFFLOAD_H

#include "train/engine.h"

int32_t anepy_offload_logits(anepy_engine *e, double *mark);              /* as anepy_classifier */
int32_t anepy_offload_classifier_backward(anepy_engine *e, double *mark); /* to dxnorm */
/* *loss as of anepy_loss. */
int32_t anepy_offload_softmax(anepy_engine *e, int gradient, double *loss, double *mark);

#endif
