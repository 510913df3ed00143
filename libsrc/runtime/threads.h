/* runtime/threads.h - a small thread pool: parallel loops, and a queue of background loops.
 *
 * The calling thread is worker 0 and computes too. A loop has `count` indices, which are taken in
 * ascending order. Timing decides which thread computes which index, so results must not depend on
 * it: each index writes its own output, or waits for a lower index.
 *
 * While the caller has no loop running, the other workers take indices of background loops; a new
 * foreground loop calls them back after their current index. Threads start with the first loop, and
 * again after fork. One thread at a time may call into a pool. */
#ifndef ANEPY_RUNTIME_THREADS_H
#define ANEPY_RUNTIME_THREADS_H

#include <pthread.h>

#include "runtime/status.h"

typedef struct anepy_pool anepy_pool;

/* worker is in [0, threads): it selects scratch memory. */
typedef void (*anepy_loop_fn)(void *context, int32_t index, int32_t worker);

/* One loop. The caller owns the memory and keeps it alive until the loop is done. */
typedef struct anepy_loop {
    anepy_loop_fn fn;
    void *context;
    int32_t count;
    int32_t background;
    _Atomic int32_t next;   /* first index nobody has taken */
    _Atomic int32_t active; /* workers inside */
    struct anepy_loop *link;
} anepy_loop;

int32_t anepy_pool_create(anepy_pool **out, int32_t threads); /* 0: the machine's default */
void anepy_pool_free(anepy_pool *pool);                       /* accepts NULL */
int32_t anepy_pool_threads(const anepy_pool *pool);

/* Computes all indices, then returns. */
void anepy_pool_run(anepy_pool *pool, int32_t count, anepy_loop_fn fn, void *context);

/* For a loop that is bound by memory: computes all indices, each worker a range of neighbours, so
 * that it reads one stream, which the processor fetches ahead. A worker that is done helps the
 * others. */
void anepy_pool_stream(anepy_pool *pool, int32_t count, anepy_loop_fn fn, void *context);

/* Queues a background loop. With serial != 0 it starts only when all loops before it are done;
 * otherwise it starts as soon as a worker is free. */
void anepy_pool_submit(anepy_pool *pool, anepy_loop *loop, int32_t count, anepy_loop_fn fn,
                       void *context, int32_t serial);

/* Computes indices of background loops until all of them are done; or until this one is. */
void anepy_pool_wait(anepy_pool *pool);
void anepy_pool_wait_for(anepy_pool *pool, anepy_loop *loop);

/* Whether a loop that was queued is done: all that it wrote is visible then. */
int anepy_pool_finished(anepy_pool *pool, anepy_loop *loop);

/* Tells the processor that this thread spins. */
void anepy_cpu_pause(void);

/* Inside a loop: spins until a lower index has stored `value` at `at`; then all that it wrote
 * before is visible. */
void anepy_pool_await(const _Atomic int32_t *at, int32_t value);

/* Starts a thread that blocks all signals, so that Python's threads handle them. */
int32_t anepy_thread_start(pthread_t *out, void *(*main)(void *), void *context);

/* Milliseconds that all workers together spent in background loops since the last call. */
double anepy_pool_take_busy_ms(anepy_pool *pool);

#endif
