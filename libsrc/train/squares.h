/* train/squares.h - the sum of squares of the gradients. */
#ifndef ANEPY_TRAIN_SQUARES_H
#define ANEPY_TRAIN_SQUARES_H

#include "train/engine.h"

void anepy_squares_begin(anepy_engine *e); /* before the backward pass of a group */
void anepy_squares_end(anepy_engine *e);   /* when all that it adds to gradients is there */

/* as_left: the gradients are as the last step left them. */
double anepy_squares_sum(anepy_engine *e, int as_left);

#endif
