/* train/embed.h - token embeddings. */
#ifndef ANEPY_TRAIN_EMBED_H
#define ANEPY_TRAIN_EMBED_H

#include "train/engine.h"

void anepy_embed(anepy_engine *e);          /* ids -> layers[0].x */
void anepy_embed_backward(anepy_engine *e); /* dx -> its gradient, added; frozen: nothing */

#endif
