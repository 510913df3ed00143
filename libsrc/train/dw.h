/* train/dw.h - weight gradients of the layers: products in the background, and their factors. */
#ifndef ANEPY_TRAIN_DW_H
#define ANEPY_TRAIN_DW_H

#include "train/engine.h"

/* Both factors of a product are there: notes them, and starts it unless the step may still be
 * skipped. */
int32_t anepy_dw_ready(anepy_engine *e, int32_t layer, int32_t which);
/* Starts those that waited to know that the step is not skipped. */
int32_t anepy_dw_start_all(anepy_engine *e);
/* Until those of a layer are done that do not run on the GPU. */
void anepy_dw_wait_layer(anepy_engine *e, int32_t layer);
int anepy_dw_layer_done(anepy_engine *e, int32_t layer); /* whether all of it are that started */
/* Until those of a layer have read their factors, if they do so before the end of the step: the
 * memory of these may have other values then. */
int32_t anepy_dw_release(anepy_engine *e, int32_t layer);
/* Until all are done; frees the capture buffers that were allocated for them. */
int32_t anepy_dw_wait(anepy_engine *e);

/* Whether capture buffers are there from the start. A GPU reads only what it was given once. */
int anepy_keeps_captures(const anepy_engine *e);
/* float32 elements of the capture buffer of a factor; 0: it is read where it is. */
int64_t anepy_capture_n(const anepy_engine *e, const anepy_operand *o);
/* Raw half-precision values of a factor, [channels, width]; NULL: it was read back as float32. */
const uint16_t *anepy_capture_raw(const anepy_engine *e, const anepy_operand *o);

int32_t anepy_dw_open_gpu(anepy_engine *e); /* shares all that products read and write */

#endif
