/* train/room.h - everything with the width of the surfaces: host buffers, device, programs. */
#ifndef ANEPY_TRAIN_ROOM_H
#define ANEPY_TRAIN_ROOM_H

#include "train/engine.h"

/* Makes e->room with this many columns, a multiple of 64. compile: the programs are compiled now,
 * not when first needed. What was there is freed when the new one is complete; after a failure it
 * is still there. */
int32_t anepy_room_make(anepy_engine *e, int32_t width, int compile);

/* Makes a larger room if the running sequences need one. */
int32_t anepy_room_widen(anepy_engine *e);

void anepy_room_free(anepy_room *room); /* accepts NULL */

/* Hands out host memory, cache line by cache line. Without a base it only measures. */
typedef struct {
    float *base;
    int64_t used;
} anepy_carver;

static inline float *anepy_carve(anepy_carver *c, int64_t n) {
    float *at = c->base != NULL ? c->base + c->used : NULL;
    c->used += anepy_round_up(n, 16);
    return at;
}

#endif
