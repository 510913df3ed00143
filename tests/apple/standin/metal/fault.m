/* fault.m - the one armed fault, and counters. */
#import <Foundation/Foundation.h>

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "fault.h"

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char armed[64];
static int32_t left;
static gpu_outcome wanted;
static _Atomic int32_t broken, live;

void gpu_arm(const char *call, int32_t nth, gpu_outcome outcome) {
    pthread_mutex_lock(&mutex);
    snprintf(armed, sizeof armed, "%s", call != NULL ? call : "");
    left = nth;
    wanted = outcome;
    pthread_mutex_unlock(&mutex);
}

int gpu_fired(void) {
    pthread_mutex_lock(&mutex);
    int fired = left <= 0;
    pthread_mutex_unlock(&mutex);
    return fired;
}

gpu_outcome gpu_enter(const char *call) {
    pthread_mutex_lock(&mutex);
    int now = strcmp(call, armed) == 0 && --left == 0;
    gpu_outcome outcome = now ? wanted : GPU_WORKS;
    pthread_mutex_unlock(&mutex);
    if (outcome == GPU_THROW)
        [NSException raise:NSInvalidArgumentException format:@"told to throw in %s", call];
    return outcome;
}

void gpu_broken(const char *format, ...) {
    if (atomic_fetch_add(&broken, 1) > 0) return;
    va_list args;
    va_start(args, format);
    fprintf(stderr, "stand-in: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
}

int32_t gpu_take_broken(void) { return atomic_exchange(&broken, 0); }

void gpu_count(int32_t change) { atomic_fetch_add(&live, change); }
int32_t gpu_live(void) { return atomic_load(&live); }
