/* train/wiring.h - nodes, their surfaces and links; moving data along the links. */
#ifndef ANEPY_TRAIN_WIRING_H
#define ANEPY_TRAIN_WIRING_H

#include "train/engine.h"

/* Makes nodes, surfaces and links of e->room. */
int32_t anepy_wire(anepy_engine *e);
/* Tells the node's new kernel where its tensors live. */
int32_t anepy_bind(anepy_engine *e, anepy_node *node);

/* Moves a program's inputs to where it reads them. */
int32_t anepy_transfer_inputs(anepy_engine *e, anepy_node *node);
/* Computes a program whose inputs are in place. */
int32_t anepy_compute(anepy_engine *e, anepy_node *node);
/* Both, each with its time: from *mark on, which moves. */
int32_t anepy_evaluate(anepy_engine *e, anepy_node *node, double *mark);
/* A program's output as float32 [channels, width], in staging[which] if it is not host memory. */
int32_t anepy_read_output(anepy_engine *e, anepy_node *node, int32_t tensor, int32_t which,
                          const float **out);

#endif
