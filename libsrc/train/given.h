/* train/given.h - offload_dw: weight gradients that programs compute, and how they reach the
 * others.
 *
 * They are half precision in a surface. Pieces of it are added to the gradients in the background
 * as soon as they are there, if they are finite; if the step is skipped after all they are taken
 * back, which leaves a rounding. */
#ifndef ANEPY_TRAIN_GIVEN_H
#define ANEPY_TRAIN_GIVEN_H

#include "train/engine.h"

/* Finds which gradients each program computes. */
void anepy_given_wire(anepy_engine *e);
/* Forgets overflows; before a backward pass. */
void anepy_given_begin(anepy_engine *e);
/* Computes a program of this kind whose inputs are in place, and sends what it gives on its way.
 * node NULL: there is none. */
int32_t anepy_given_compute(anepy_engine *e, anepy_node *node, double *mark);
/* Until all are where they belong. */
void anepy_given_wait(anepy_engine *e);
int anepy_given_finite(const anepy_engine *e); /* whether all have been so far */
/* Gives the surfaces back. back: takes from the gradients what was added to them. */
int32_t anepy_given_end(anepy_engine *e, int back);

#endif
