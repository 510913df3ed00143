/* device/ane/lane.h - a thread for calls that may never return.
 *
 * A wedged driver keeps its caller for ever (docs/neural-engine.md#errors). So every call into the
 * private framework is a job of a lane: the caller waits a bounded time, then abandons the job. A
 * job owns all that it uses, because its thread may return at any time, or never. */
#ifndef ANEPY_DEVICE_ANE_LANE_H
#define ANEPY_DEVICE_ANE_LANE_H

#include <stdatomic.h>

#include "runtime/status.h"

typedef struct anepy_job anepy_job;
typedef struct anepy_lane anepy_lane;

struct anepy_job {
    /* Runs on the lane's thread, in an autorelease pool. An exception becomes ANEPY_E_DEVICE. */
    int32_t (*run)(anepy_job *job);
    /* Frees the job. Called once, by its last user, perhaps on the lane's thread. */
    void (*drop)(anepy_job *job);
    int32_t status; /* result of run, with its error sentence in message */
    char message[512];
    int32_t done;
    _Atomic int32_t abandoned; /* 1: nobody waits for the result, run should end early */
};

int32_t anepy_lane_create(anepy_lane **out);
/* Ends the thread; a thread that does not return keeps its memory. Accepts NULL. */
void anepy_lane_free(anepy_lane *lane);

/* Returns 1 if the job is done: status and message are set, and the caller drops it. Returns 0 if
 * it takes longer than `seconds`: the job belongs to the lane, which takes no other; call
 * anepy_lane_free. One caller at a time. */
int32_t anepy_lane_run(anepy_lane *lane, anepy_job *job, double seconds);

#endif
