/* fault.h - what the stand-in GPU is told and tells: calls that fail, rules that were broken,
 * objects that live.
 *
 * A stand-in calls gpu_enter with the name of the call it stands for; a test arms one fault. */
#ifndef GPU_FAULT_H
#define GPU_FAULT_H

#include <stdint.h>

typedef enum { GPU_WORKS, GPU_NIL, GPU_ERROR, GPU_THROW } gpu_outcome;

/* The nth call (from 1) of this name has this outcome, all others work. NULL: nothing fails. */
void gpu_arm(const char *call, int32_t nth, gpu_outcome outcome);
/* Did the armed call come? */
int gpu_fired(void);
/* Throws an NSException by itself for GPU_THROW. Used from any thread. */
gpu_outcome gpu_enter(const char *call);

/* The program did what hardware would refuse, or silently get wrong. */
void gpu_broken(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* How many since the last call; the first one's sentence goes to standard error at once. */
__attribute__((visibility("default"))) int32_t gpu_take_broken(void);

/* Objects of the stand-ins: +1 when made, -1 when deallocated. */
void gpu_count(int32_t change);
__attribute__((visibility("default"))) int32_t gpu_live(void);

#endif
