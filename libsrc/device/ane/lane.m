/* device/ane/lane.m - the thread: one mutex, one job at a time, exceptions end here. */
#import <Foundation/Foundation.h>

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

#include "device/ane/lane.h"
#include "runtime/clock.h"

struct anepy_lane {
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t work, done;
    anepy_job *job;
    int32_t stop;
    int32_t orphan; /* 1: the thread frees the lane when it ends */
};

static void lane_destroy(anepy_lane *lane) {
    pthread_mutex_destroy(&lane->mutex);
    pthread_cond_destroy(&lane->work);
    pthread_cond_destroy(&lane->done);
    free(lane);
}

static int32_t thrown(id exception) {
    const char *name = "an object", *reason = "";
    if ([exception isKindOfClass:[NSException class]]) {
        name = [[exception name] UTF8String];
        reason = [[exception reason] UTF8String];
    }
    return anepy_fail(ANEPY_E_DEVICE, "the framework threw %s: %s", name,
                      reason != NULL ? reason : "no reason given");
}

/* Calls run or drop of the job; an Objective-C exception becomes an error. */
static int32_t catch_objects(int32_t (*call)(anepy_job *), anepy_job *job) {
    int32_t status = ANEPY_E_DEVICE;
    @autoreleasepool {
        @try {
            status = call(job);
        } @catch (id exception) {
            status = thrown(exception);
        }
    }
    return status;
}

/* Catches C++ exceptions too: the framework is C++ inside. */
static int32_t guarded(int32_t (*call)(anepy_job *), anepy_job *job) {
    int32_t status = ANEPY_E_DEVICE;
    @try {
        status = catch_objects(call, job);
    } @catch (...) {
        status = anepy_fail(ANEPY_E_DEVICE, "the framework threw an exception of C++");
    }
    return status;
}

static int32_t drop(anepy_job *job) {
    job->drop(job);
    return ANEPY_OK;
}

static void *lane_main(void *argument) {
    anepy_lane *lane = argument;
    pthread_set_qos_class_self_np(QOS_CLASS_USER_INITIATED, 0);
    pthread_mutex_lock(&lane->mutex);
    for (;;) {
        while (lane->job == NULL && !lane->stop) pthread_cond_wait(&lane->work, &lane->mutex);
        anepy_job *job = lane->job;
        if (job == NULL) break;
        pthread_mutex_unlock(&lane->mutex);
        job->status = guarded(job->run, job);
        anepy_last_error(job->message, sizeof job->message);
        pthread_mutex_lock(&lane->mutex);
        lane->job = NULL;
        job->done = 1;
        if (!atomic_load(&job->abandoned)) {
            pthread_cond_signal(&lane->done);
        } else {
            pthread_mutex_unlock(&lane->mutex);
            guarded(drop, job);
            pthread_mutex_lock(&lane->mutex);
        }
    }
    int32_t orphan = lane->orphan;
    pthread_mutex_unlock(&lane->mutex);
    if (orphan) lane_destroy(lane);
    return NULL;
}

int32_t anepy_lane_create(anepy_lane **out) {
    anepy_lane *lane = calloc(1, sizeof *lane);
    if (lane == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for a thread");
    pthread_mutex_init(&lane->mutex, NULL);
    pthread_cond_init(&lane->work, NULL);
    pthread_cond_init(&lane->done, NULL);
    sigset_t all, saved; /* signals must be handled by Python's threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &saved);
    int error = pthread_create(&lane->thread, NULL, lane_main, lane);
    pthread_sigmask(SIG_SETMASK, &saved, NULL);
    if (error != 0) {
        lane_destroy(lane);
        return anepy_fail(ANEPY_E_SYSTEM, "no thread for the Neural Engine: error %d", error);
    }
    *out = lane;
    return ANEPY_OK;
}

void anepy_lane_free(anepy_lane *lane) {
    if (lane == NULL) return;
    pthread_t thread = lane->thread; /* copied, as an orphan may free the lane after unlock */
    pthread_mutex_lock(&lane->mutex);
    int32_t stuck = lane->orphan = lane->job != NULL;
    lane->stop = 1;
    pthread_cond_signal(&lane->work);
    pthread_mutex_unlock(&lane->mutex);
    if (stuck) {
        pthread_detach(thread);
        return;
    }
    pthread_join(thread, NULL);
    lane_destroy(lane);
}

int32_t anepy_lane_run(anepy_lane *lane, anepy_job *job, double seconds) {
    double end = anepy_now_ms() + seconds * 1e3;
    int late = 0;
    pthread_mutex_lock(&lane->mutex);
    job->done = 0;
    atomic_store(&job->abandoned, 0);
    lane->job = job;
    pthread_cond_signal(&lane->work);
    while (!job->done && late != ETIMEDOUT) {
        double left = (end - anepy_now_ms()) * 1e-3;
        if (left < 0.0) left = 0.0;
        struct timespec wait = {(time_t)left, (long)((left - (double)(time_t)left) * 1e9)};
        late = pthread_cond_timedwait_relative_np(&lane->done, &lane->mutex, &wait);
    }
    int32_t done = job->done;
    atomic_store(&job->abandoned, !done);
    pthread_mutex_unlock(&lane->mutex);
    return done;
}
