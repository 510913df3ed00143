/* device/ane/lane.h - a thread for calls that may never return.
 *
 * A wedged driver keeps its caller for ever (docs/neural-engine.md#errors). So every call into the
 * private framework is a job of a lane: the caller waits a bounded time, then goes on without it.
 * What the job uses is its own, because the thread may come back to it at any time, or never. */
#ifndef ANEPY_DEVICE_ANE_LANE_H
#define ANEPY_DEVICE_ANE_LANE_H

#include <stdatomic.h>

#include "runtime/status.h"

typedef struct anepy_job anepy_job;
typedef struct anepy_lane anepy_lane;

struct anepy_job {
    /* On the lane's thread, in an autorelease pool. An exception becomes ANEPY_E_DEVICE. */
    int32_t (*run)(anepy_job *job);
    /* Gives the job back: once, by whoever uses it last; possibly on the lane's thread. */
    void (*drop)(anepy_job *job);
    int32_t status; /* what run returned, and its error sentence */
    char message[512];
    int32_t done;
    _Atomic int32_t abandoned; /* nobody waits for it any more: it had better stop */
};

int32_t anepy_lane_create(anepy_lane **out);
/* Ends the thread; one that does not return keeps its memory. Accepts NULL. */
void anepy_lane_free(anepy_lane *lane);

/* 1: the job is done, status and message are set, the caller drops it. 0: it takes longer than that
 * and is no longer the caller's; the lane is of no use but for anepy_lane_free. One caller at a
 * time. */
int32_t anepy_lane_run(anepy_lane *lane, anepy_job *job, double seconds);

#endif
