/* train/embed.h - token embeddings. */
#ifndef ANEPY_TRAIN_EMBED_H
#define ANEPY_TRAIN_EMBED_H

#include "train/engine.h"

void anepy_embed(anepy_engine *e);          /* ids -> layers[0].x */
/* Before the first rows are added: those of the last update are cleared, unless a tied classifier
 * has replaced them. */
void anepy_embed_clear(anepy_engine *e);
void anepy_embed_backward(anepy_engine *e); /* dx -> its gradient, added; frozen: nothing */
int anepy_embed_holds(const anepy_engine *e); /* the running sequences leave it out */
void anepy_embed_held(anepy_engine *e, float *rows); /* what they left out: [tokens, dim] */

#endif
