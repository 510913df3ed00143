/* runtime/threads.c - the pool: one mutex, one atomic counter per loop, bounded spinning. */
#define _GNU_SOURCE
#include "runtime/threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runtime/clock.h"
#include "runtime/fpmode.h"
#include "runtime/machine.h"
#include "runtime/memory.h"

#define MAX_WORKERS 256
#define SPIN_MS 0.1 /* longer than the gaps between loops of a step, shorter than a time slice */

#define SPINS 1000  /* spins before the processor is offered to other threads */
#define MOVE_MS 4.0 /* between two moves of a worker: about a time slice */

typedef struct {
    anepy_pool *pool;
    int32_t worker;
    pthread_t thread;
} worker_arg;

struct anepy_pool {
    int32_t threads;
    int32_t started; /* workers running besides the caller */
    pid_t pid;       /* the process they run in */
    pthread_mutex_t mutex;
    pthread_cond_t work; /* a loop was added, or the pool stops */
    pthread_cond_t done; /* the last worker left a loop */
    int32_t sleepers;    /* workers waiting on `work` */
    int32_t watchers;    /* callers waiting on `done` */
    int32_t serial;      /* background loops run one after the other */
    int32_t stop;
    anepy_loop *foreground;
    anepy_loop *head, *tail;     /* background loops, oldest first */
    _Atomic uint32_t epoch;      /* counts added loops; spinning workers watch it */
    _Atomic uint32_t interrupts; /* counts foreground loops; a change calls workers back to them */
    _Atomic int64_t busy_ns;
    _Atomic int32_t
        places[MAX_WORKERS]; /* 1 + the processor that a thread works on; 0: it sleeps */
    worker_arg workers[MAX_WORKERS];
};

void anepy_cpu_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

void anepy_pool_await(const _Atomic int32_t *at, int32_t value) {
    for (int spins = 0; atomic_load_explicit(at, memory_order_acquire) != value; spins++) {
        if (spins < SPINS) anepy_cpu_pause();
        else sched_yield(); /* the thread that is waited for may need this core */
    }
}

static int exhausted(anepy_loop *loop) {
    return atomic_load_explicit(&loop->next, memory_order_relaxed) >= loop->count;
}

int32_t anepy_thread_start(pthread_t *out, void *(*main)(void *), void *context) {
    sigset_t all, saved;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &saved);
    int error = pthread_create(out, NULL, main, context);
    pthread_sigmask(SIG_SETMASK, &saved, NULL);
    return error == 0
               ? ANEPY_OK
               : anepy_fail(ANEPY_E_SYSTEM, "no thread could be started: %s", strerror(error));
}

/* ------------------------------------------------------------------------ with the mutex held */

/* Workers enter a loop with the mutex held, so whoever took an index is counted. */
static int finished(anepy_loop *loop) { return exhausted(loop) && atomic_load(&loop->active) == 0; }

static void drop_finished(anepy_pool *pool) {
    while (pool->head != NULL && finished(pool->head)) {
        pool->head = pool->head->link;
        if (pool->head == NULL) pool->tail = NULL;
    }
}

static anepy_loop *find_loop(anepy_pool *pool) {
    if (pool->foreground != NULL && !exhausted(pool->foreground)) return pool->foreground;
    drop_finished(pool);
    for (anepy_loop *loop = pool->head; loop != NULL; loop = loop->link) {
        if (!exhausted(loop)) return loop;
        if (/* mutate: pool-serial */ pool->serial) return NULL; /* the oldest is not finished */
    }
    return NULL;
}

static void publish(anepy_pool *pool) {
    atomic_fetch_add_explicit(&pool->epoch, 1, memory_order_release);
    if (pool->sleepers > 0) pthread_cond_broadcast(&pool->work);
}

static void leave(anepy_pool *pool, anepy_loop *loop) {
    if (atomic_fetch_sub(&loop->active, 1) != 1) return;
    if (pool->watchers > 0) pthread_cond_broadcast(&pool->done);
    /* Wakes workers: the next serial loop may start now. */
    if (pool->serial && loop->link != NULL) publish(pool);
}

/* ------------------------------------------------------------------------------ without it */

/* seen is the value of `interrupts` when the loop was chosen, so that no foreground loop is missed.
 */
static void take_indices(anepy_pool *pool, anepy_loop *loop, int32_t worker, uint32_t seen) {
    double start = loop->background ? anepy_now_ms() : 0.0;
    for (;;) {
        int32_t index = atomic_fetch_add_explicit(&loop->next, 1, memory_order_relaxed);
        if (index >= loop->count) {
            atomic_store_explicit(&loop->next, loop->count, memory_order_relaxed);
            break;
        }
        loop->fn(loop->context, index, worker);
        if (loop->background &&
            atomic_load_explicit(&pool->interrupts, memory_order_relaxed) != seen)
            break;
    }
    if (loop->background)
        atomic_fetch_add(&pool->busy_ns, (int64_t)((anepy_now_ms() - start) * 1e6));
}

#ifdef __linux__
/* Where a busy neighbour has a processor, the system may leave two threads of the pool on another
 * one for long. A worker that finds one of those before it on its own processor goes to any other
 * that it may use, and may use the same ones afterwards. */
static void keep_apart(anepy_pool *pool, int32_t worker, double *next) {
    int32_t own = sched_getcpu() + 1, shared = 0;
    cpu_set_t usable, free_ones;
    atomic_store_explicit(&pool->places[worker], own, memory_order_relaxed);
    for (int32_t i = 0; i < worker; i++)
        shared |= atomic_load_explicit(&pool->places[i], memory_order_relaxed) == own;
    double now = shared ? anepy_now_ms() : 0.0;
    if (!shared || now < *next) return;
    *next = now + MOVE_MS;
    if (sched_getaffinity(0, sizeof usable, &usable) != 0) return;
    free_ones = usable;
    for (int32_t i = 0; i < worker; i++) {
        int32_t taken = atomic_load_explicit(&pool->places[i], memory_order_relaxed);
        if (taken > 0) CPU_CLR((size_t)(taken - 1), &free_ones);
    }
    if (CPU_COUNT(&free_ones) > 0 && sched_setaffinity(0, sizeof free_ones, &free_ones) == 0)
        sched_setaffinity(0, sizeof usable, &usable);
}
#else
static void keep_apart(anepy_pool *pool, int32_t worker, double *next) {
    (void)pool, (void)worker, (void)next;
}
#endif

/* Runs one loop; returns 0 if there is none. The mutex is held before and after. */
static int work_once(anepy_pool *pool, int32_t worker) {
    anepy_loop *loop = find_loop(pool);
    if (loop == NULL) return 0;
    atomic_fetch_add(&loop->active, 1);
    uint32_t seen = atomic_load_explicit(&pool->interrupts, memory_order_relaxed);
    pthread_mutex_unlock(&pool->mutex);
    take_indices(pool, loop, worker, seen);
    pthread_mutex_lock(&pool->mutex);
    leave(pool, loop);
    return 1;
}

static void spin_for_epoch(anepy_pool *pool, uint32_t seen) {
    double end = anepy_now_ms() + SPIN_MS;
    do {
        for (int i = 0; i < 64; i++) {
            if (atomic_load_explicit(&pool->epoch, memory_order_acquire) != seen) return;
            anepy_cpu_pause();
        }
    } while (anepy_now_ms() < end);
}

static void *worker_main(void *argument) {
    worker_arg *arg = argument;
    anepy_pool *pool = arg->pool;
    anepy_fpmode_enter();
#ifdef __APPLE__
    pthread_set_qos_class_self_np(QOS_CLASS_USER_INITIATED, 0); /* off the efficiency cores */
#endif
    double next_move = 0.0;
    pthread_mutex_lock(&pool->mutex);
    while (!pool->stop) {
        uint32_t seen = atomic_load(&pool->epoch);
        keep_apart(pool, arg->worker, &next_move);
        if (work_once(pool, arg->worker)) continue;
        pthread_mutex_unlock(&pool->mutex);
        spin_for_epoch(pool, seen);
        pthread_mutex_lock(&pool->mutex);
        if (atomic_load(&pool->epoch) != seen || pool->stop) continue;
        atomic_store_explicit(&pool->places[arg->worker], 0, memory_order_relaxed);
        pool->sleepers++;
        pthread_cond_wait(&pool->work, &pool->mutex);
        pool->sleepers--;
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

static void init_sync(anepy_pool *pool) {
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
}

/* Starts the threads once per process: after fork only the calling thread exists, and the mutex
 * may have been held by one that does not. */
static void ensure_started(anepy_pool *pool) {
    if (pool->pid == getpid()) return;
    init_sync(pool);
    pool->pid = getpid();
    pool->started = pool->sleepers = pool->watchers = 0;
    pool->foreground = pool->head = pool->tail = NULL;
    for (int32_t i = 1; i < pool->threads; i++) {
        worker_arg *arg = &pool->workers[i];
        arg->pool = pool;
        arg->worker = i;
        if (anepy_thread_start(&arg->thread, worker_main, arg) != ANEPY_OK)
            break; /* the pool works with fewer */
        pool->started++;
    }
}

/* Waits until no worker is inside the loop. The mutex is held before and after. */
static void await_leavers(anepy_pool *pool, anepy_loop *loop) {
    while (atomic_load(&loop->active) > 0) {
        pthread_mutex_unlock(&pool->mutex);
        double end = anepy_now_ms() + SPIN_MS;
        while (atomic_load_explicit(&loop->active, memory_order_acquire) > 0 &&
               anepy_now_ms() < end)
            anepy_cpu_pause();
        pthread_mutex_lock(&pool->mutex);
        if (atomic_load(&loop->active) == 0) break;
        pool->watchers++;
        pthread_cond_wait(&pool->done, &pool->mutex);
        pool->watchers--;
    }
}

int32_t anepy_pool_create(anepy_pool **out, int32_t threads) {
    if (threads < 0 || threads > MAX_WORKERS)
        return anepy_fail(ANEPY_E_ARGUMENT, "threads must be 1 to %d, not %d", MAX_WORKERS,
                          threads);
    anepy_pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for the thread pool");
    pool->threads = threads > 0 ? threads : anepy_machine_threads();
    *out = pool;
    return ANEPY_OK;
}

void anepy_pool_free(anepy_pool *pool) {
    if (pool == NULL) return;
    if (pool->pid == getpid()) {
        pthread_mutex_lock(&pool->mutex);
        pool->stop = 1;
        publish(pool);
        pthread_mutex_unlock(&pool->mutex);
        for (int32_t i = 1; i <= pool->started; i++) pthread_join(pool->workers[i].thread, NULL);
        pthread_mutex_destroy(&pool->mutex);
        pthread_cond_destroy(&pool->work);
        pthread_cond_destroy(&pool->done);
    }
    free(pool);
}

int32_t anepy_pool_threads(const anepy_pool *pool) { return pool->threads; }

void anepy_pool_run(anepy_pool *pool, int32_t count, anepy_loop_fn fn, void *context) {
    if (count <= 0) return;
    if (count == 1 || pool->threads == 1) {
        for (int32_t i = 0; i < count; i++) fn(context, i, 0);
        return;
    }
    ensure_started(pool);
    anepy_loop loop = {.fn = fn, .context = context, .count = count};
    pthread_mutex_lock(&pool->mutex);
    pool->foreground = &loop;
    atomic_fetch_add(&pool->interrupts, 1);
    publish(pool);
    pthread_mutex_unlock(&pool->mutex);
    keep_apart(pool, 0, NULL);
    take_indices(pool, &loop, 0, 0);
    pthread_mutex_lock(&pool->mutex);
    pool->foreground = NULL;
    await_leavers(pool, &loop);
    pthread_mutex_unlock(&pool->mutex);
}

typedef struct {
    _Alignas(64) _Atomic int32_t next; /* alone in its cache line */
    int32_t end;
} stretch;

typedef struct {
    anepy_loop_fn fn;
    void *context;
    int32_t n;
    stretch at[MAX_WORKERS];
} stretches;

static void take_stretches(void *context, int32_t first, int32_t worker) {
    stretches *all = context;
    for (int32_t i = 0; i < all->n; i++) {
        stretch *s = &all->at[(first + i) % all->n];
        int32_t index;
        while ((index = atomic_fetch_add_explicit(&s->next, 1, memory_order_relaxed)) < s->end)
            all->fn(all->context, index, worker);
    }
}

void anepy_pool_stream(anepy_pool *pool, int32_t count, anepy_loop_fn fn, void *context) {
    stretches all;
    all.fn = fn;
    all.context = context;
    all.n = anepy_min_i32(count, pool->threads);
    for (int32_t i = 0; i < all.n; i++) {
        all.at[i].end = (int32_t)((int64_t)count * (i + 1) / all.n);
        atomic_init(&all.at[i].next, i == 0 ? 0 : all.at[i - 1].end);
    }
    anepy_pool_run(pool, all.n, take_stretches, &all);
}

void anepy_pool_submit(anepy_pool *pool, anepy_loop *loop, int32_t count, anepy_loop_fn fn,
                       void *context, int32_t serial) {
    ensure_started(pool);
    *loop = (anepy_loop){.fn = fn, .context = context, .count = count, .background = 1};
    pthread_mutex_lock(&pool->mutex);
    pool->serial = serial;
    drop_finished(pool);
    if (pool->tail != NULL) pool->tail->link = loop;
    else pool->head = loop;
    pool->tail = loop;
    publish(pool);
    pthread_mutex_unlock(&pool->mutex);
}

/* loop NULL: all of them. */
static void wait_for(anepy_pool *pool, anepy_loop *loop) {
    ensure_started(pool);
    pthread_mutex_lock(&pool->mutex);
    while (loop == NULL || !finished(loop)) {
        if (work_once(pool, 0)) continue;
        drop_finished(pool);
        if (pool->head == NULL) break;
        await_leavers(pool, pool->head);
    }
    pthread_mutex_unlock(&pool->mutex);
}

void anepy_pool_wait(anepy_pool *pool) { wait_for(pool, NULL); }

void anepy_pool_wait_for(anepy_pool *pool, anepy_loop *loop) { wait_for(pool, loop); }

int anepy_pool_finished(anepy_pool *pool, anepy_loop *loop) {
    pthread_mutex_lock(&pool->mutex);
    int done = finished(loop);
    pthread_mutex_unlock(&pool->mutex);
    return done;
}

double anepy_pool_take_busy_ms(anepy_pool *pool) {
    return (double)atomic_exchange(&pool->busy_ns, 0) * 1e-6;
}
