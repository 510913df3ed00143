/* pool.c - the thread pool: every index exactly once, background loops beside foreground ones,
 * fork, many pools. Also what ThreadSanitizer is run on. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "groups.h"
#include "runtime/clock.h"
#include "runtime/threads.h"

#define LARGEST 5000
#define LOOPS 24

/* ----------------------------------------------------------------------- loops and their counts */

/* Plain memory on purpose: the pool itself must order these accesses. */
typedef struct {
    int32_t count, threads;
    int32_t hits[LARGEST];
    int32_t workers[LARGEST];
    int32_t *inputs; /* NULL, or one number per index that the caller wrote before */
    int spin;
} work;

static void burn(int rounds) {
    volatile float x = 1.0f;
    for (int i = 0; i < rounds; i++) x = x * 0.999f + 0.001f;
}

static void hit(void *context, int32_t index, int32_t worker) {
    work *w = context;
    w->hits[index] += w->inputs != NULL ? w->inputs[index] : 1;
    w->workers[index] = worker;
    burn(w->spin);
}

static void start(work *w, int32_t count, int32_t threads, int spin) {
    memset(w, 0, sizeof *w);
    *w = (work){.count = count, .threads = threads, .spin = spin};
}

/* Every index once, by a worker the pool has, and nothing beyond. */
static int complete(const work *w) {
    for (int32_t i = 0; i < LARGEST; i++)
        if (w->hits[i] != (i < w->count) || w->workers[i] < 0 || w->workers[i] >= w->threads)
            return 0;
    return 1;
}

static anepy_pool *make(int32_t threads) {
    anepy_pool *pool = NULL;
    CHECK(anepy_pool_create(&pool, threads) == ANEPY_OK && pool != NULL, "no pool of %d", threads);
    CHECK(anepy_pool_threads(pool) == threads, "%d threads, not %d", anepy_pool_threads(pool),
          threads);
    return pool;
}

typedef void (*run_fn)(anepy_pool *pool, int32_t count, anepy_loop_fn fn, void *context);

static void check_foreground(run_fn run, int32_t threads) {
    static const int32_t counts[] = {0, 1, 2, 3, 4, 5, 7, 8, 16, 63, 64, 65, 1000, LARGEST};
    static work w;
    anepy_pool *pool = make(threads);
    for (int round = 0; round < 20; round++) {
        for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
            start(&w, counts[c], threads, round % 2 * 100);
            run(pool, counts[c], hit, &w);
            CHECK(complete(&w), "run of %d on %d threads", counts[c], threads);
        }
    }
    start(&w, 0, threads, 0);
    run(pool, -3, hit, &w);
    CHECK(complete(&w), "a negative count runs something");
    anepy_pool_free(pool);
}

/* What one loop wrote, the next one reads, whoever computes which index. */
static void check_chain(int32_t threads) {
    static work first, second;
    anepy_pool *pool = make(threads);
    for (int round = 0; round < 200; round++) {
        int32_t count = 1 + random_below(40);
        start(&first, count, threads, 20);
        start(&second, count, threads, 20);
        second.inputs = first.hits;
        anepy_pool_run(pool, count, hit, &first);
        anepy_pool_run(pool, count, hit, &second);
        CHECK(complete(&second), "a loop of %d does not see the one before", count);
    }
    anepy_pool_free(pool);
}

/* Indices that wait for the one before write in its order, and see what it wrote. */
typedef struct {
    _Atomic int32_t turn;
    int32_t written, inside; /* by one thread at a time */
    int32_t wrong;
} turns;

static void write_in_turn(void *context, int32_t index, int32_t worker) {
    turns *q = context;
    (void)worker;
    anepy_pool_await(&q->turn, index);
    q->wrong += q->written != index || q->inside;
    q->inside = 1;
    q->written = index + 1;
    q->inside = 0;
    atomic_store_explicit(&q->turn, index + 1, memory_order_release);
}

static void check_await(int32_t threads) {
    anepy_pool *pool = make(threads);
    for (int round = 0; round < 50; round++) {
        turns q = {0};
        int32_t count = 1 + random_below(200);
        anepy_pool_run(pool, count, write_in_turn, &q);
        CHECK(q.wrong == 0 && q.written == count, "%d of %d in turn, %d threads", q.written, count,
              threads);
    }
    anepy_pool_free(pool);
}

/* ----------------------------------------------------------------------------------- background */

typedef struct {
    work w;
    anepy_loop loop;
    _Atomic int32_t *finished; /* indices finished over all loops of a queue */
    int32_t before;            /* indices in the loops before this one */
    _Atomic int32_t early;     /* a serial loop began before those were finished */
} queued;

static void hit_queued(void *context, int32_t index, int32_t worker) {
    queued *q = context;
    if (atomic_load(q->finished) < q->before) atomic_store(&q->early, 1);
    hit(&q->w, index, worker);
    atomic_fetch_add(q->finished, 1);
}

/* Loops of all sizes in the queue, foreground loops between them, then a wait. */
static void check_background(int32_t threads, int32_t serial, int foreground, int spin) {
    static queued queue[LOOPS];
    static work front;
    static _Atomic int32_t finished;
    anepy_pool *pool = make(threads);
    for (int round = 0; round < 6; round++) {
        int32_t total = 0, right = 1, ordered = 1;
        atomic_store(&finished, 0);
        for (int l = 0; l < LOOPS; l++) {
            queued *q = &queue[l];
            int32_t count = l % 6 == 5 ? 0 : 1 + random_below(l % 2 ? 4 : 60);
            start(&q->w, count, threads, spin);
            q->finished = &finished;
            q->before = serial ? total : 0;
            atomic_store(&q->early, 0);
            total += count;
            anepy_pool_submit(pool, &q->loop, count, hit_queued, q, serial);
            if (l % 8 == 7) {
                queued *wanted = &queue[l - random_below(8)];
                anepy_pool_wait_for(pool, &wanted->loop);
                CHECK(anepy_pool_finished(pool, &wanted->loop) && complete(&wanted->w),
                      "a loop that was waited for: threads %d, serial %d", threads, serial);
            }
            for (int f = 0; f < foreground; f++) {
                int32_t n = 1 + random_below(30);
                start(&front, n, threads, spin / 4);
                anepy_pool_run(pool, n, hit, &front);
                CHECK(complete(&front), "a foreground loop of %d beside background loops", n);
            }
        }
        for (int l = 0; l < LOOPS; l++)
            CHECK(!anepy_pool_finished(pool, &queue[l].loop) || complete(&queue[l].w),
                  "a finished loop is not complete: threads %d, serial %d", threads, serial);
        anepy_pool_wait(pool);
        for (int l = 0; l < LOOPS; l++) {
            right &= complete(&queue[l].w);
            ordered &= atomic_load(&queue[l].early) == 0;
        }
        CHECK(right && atomic_load(&finished) == total, "background loops: threads %d, serial %d",
              threads, serial);
        CHECK(ordered, "a serial loop began too early: threads %d", threads);
        anepy_pool_wait(pool); /* nothing left: returns */
    }
    double busy = anepy_pool_take_busy_ms(pool);
    CHECK(busy >= 0.0 && (spin == 0 || busy > 0.0), "busy for %g ms", busy);
    CHECK(anepy_pool_take_busy_ms(pool) == 0.0, "the busy time is not taken");
    anepy_pool_free(pool);
}

/* Busy time is that of background loops only, and of all of them. */
static void check_busy(int32_t threads) {
    static queued q;
    static _Atomic int32_t finished;
    static work front;
    anepy_pool *pool = make(threads);
    double begin = anepy_now_ms();
    start(&front, 40, threads, 2000);
    anepy_pool_run(pool, 40, hit, &front);
    CHECK(anepy_pool_take_busy_ms(pool) == 0.0, "foreground loops count as busy");
    start(&q.w, 40, threads, 20000);
    q.finished = &finished;
    anepy_pool_submit(pool, &q.loop, 40, hit_queued, &q, 0);
    anepy_pool_wait(pool);
    double passed = anepy_now_ms() - begin, busy = anepy_pool_take_busy_ms(pool);
    CHECK(busy > 0.0 && busy <= passed * threads + 1.0, "busy for %g ms of %g on %d threads", busy,
          passed, threads);
    anepy_pool_free(pool);
}

/* --------------------------------------------------------------------- who takes part, and when */

typedef struct {
    _Atomic int32_t inside, most;
    int32_t want; /* an index leaves when so many have been inside at once, or patience ends */
    double patience;
} meeting;

static void meet(void *context, int32_t index, int32_t worker) {
    meeting *m = context;
    (void)index, (void)worker;
    int32_t now = atomic_fetch_add(&m->inside, 1) + 1, most = atomic_load(&m->most);
    while (now > most && !atomic_compare_exchange_weak(&m->most, &most, now)) {
    }
    double end = anepy_now_ms() + m->patience;
    while (atomic_load(&m->most) < m->want && anepy_now_ms() < end) usleep(50);
    atomic_fetch_sub(&m->inside, 1);
}

/* All threads of a pool take part in a foreground loop, asleep or not before it. */
static void check_together(int32_t threads) {
    anepy_pool *pool = make(threads);
    for (int round = 0; round < 5; round++) {
        meeting m = {.want = threads, .patience = PATIENCE_MS};
        if (round > 2) usleep(20000); /* they sleep by now */
        anepy_pool_run(pool, threads, meet, &m);
        CHECK(atomic_load(&m.most) == threads, "%d of %d threads took part", atomic_load(&m.most),
              threads);
    }
    anepy_pool_free(pool);
}

#define STREAM 100

typedef struct {
    int32_t held;
    _Atomic int32_t done;
} holding;

/* One index takes until all others are done. */
static void hold(void *context, int32_t index, int32_t worker) {
    holding *h = context;
    (void)worker;
    double end = anepy_now_ms() + PATIENCE_MS;
    while (index == h->held && atomic_load(&h->done) < STREAM - 1 && anepy_now_ms() < end)
        usleep(50);
    atomic_fetch_add(&h->done, 1);
}

/* A worker of a stream that is held up keeps no index but the one it is in. */
static void check_help(int32_t threads) {
    anepy_pool *pool = make(threads);
    for (int32_t held = 0; held < STREAM && threads > 1; held += 33) {
        holding h = {.held = held};
        double begin = anepy_now_ms();
        anepy_pool_stream(pool, STREAM, hold, &h);
        CHECK(atomic_load(&h.done) == STREAM && anepy_now_ms() - begin < PATIENCE_MS,
              "%d threads wait for index %d of a stream", threads, held);
    }
    anepy_pool_free(pool);
}

static void nap(void *context, int32_t index, int32_t worker) {
    (void)context, (void)worker;
    usleep(index == 0 ? 40000 : 100);
}

/* Workers that found nothing to do while a serial loop was being finished must come back when the
 * next one starts. The caller takes no part: it is what a step does between two loops. */
static void check_serial_together(void) {
    anepy_pool *pool = make(3);
    anepy_loop first, second;
    meeting m = {.want = 2, .patience = 3000.0};
    anepy_pool_submit(pool, &first, 2, nap, NULL, 1);
    anepy_pool_submit(pool, &second, 2, meet, &m, 1);
    double end = anepy_now_ms() + PATIENCE_MS;
    while ((atomic_load(&second.next) < 2 || atomic_load(&second.active) > 0) &&
           anepy_now_ms() < end)
        usleep(1000);
    CHECK(atomic_load(&m.most) == 2, "%d of 2 workers computed a serial loop that became free",
          atomic_load(&m.most));
    anepy_pool_wait(pool);
    anepy_pool_free(pool);
}

/* ------------------------------------------------------------------------- many pools, and fork */

static void *use_own_pool(void *argument) {
    static _Thread_local work w;
    int32_t threads = (int32_t)(intptr_t)argument, right = 1;
    anepy_pool *pool = NULL;
    if (anepy_pool_create(&pool, threads) != ANEPY_OK) return NULL;
    for (int round = 0; round < 150; round++) {
        start(&w, 1 + round % 50, threads, 50);
        anepy_pool_run(pool, w.count, hit, &w);
        right &= complete(&w);
    }
    anepy_pool_free(pool);
    return right ? argument : NULL;
}

static void check_two_pools(void) {
    pthread_t threads[2];
    void *result;
    for (intptr_t i = 0; i < 2; i++)
        if (pthread_create(&threads[i], NULL, use_own_pool, (void *)(i + 2)) != 0) abort();
    for (intptr_t i = 0; i < 2; i++) {
        pthread_join(threads[i], &result);
        CHECK(result == (void *)(i + 2), "two pools at once disturb each other");
    }
}

static void check_cycles(void) {
    static work w;
    static queued q;
    static _Atomic int32_t finished;
    for (int i = 0; i < 150; i++) {
        int32_t threads = 1 + i % 4;
        anepy_pool *pool = NULL;
        int32_t status = anepy_pool_create(&pool, threads);
        start(&w, i % 9, threads, 0);
        start(&q.w, i % 5, threads, 0);
        q.finished = &finished;
        if (i % 3 != 0) anepy_pool_run(pool, w.count, hit, &w);
        if (i % 3 == 2) {
            anepy_pool_submit(pool, &q.loop, q.w.count, hit_queued, &q, i % 2);
            anepy_pool_wait(pool);
        }
        anepy_pool_free(pool); /* never used, used, used and asleep */
        CHECK(status == ANEPY_OK && (i % 3 == 0 || complete(&w)) && (i % 3 != 2 || complete(&q.w)),
              "cycle %d", i);
    }
}

/* In the child: the pool, whose threads are gone, runs as if new. */
static int works_after_fork(anepy_pool *pool, int32_t threads) {
    static work w;
    static queued q;
    static _Atomic int32_t finished;
    int right = 1;
    for (int round = 0; round < 20; round++) {
        start(&w, 100, threads, 50);
        start(&q.w, 30, threads, 50);
        q.finished = &finished;
        anepy_pool_submit(pool, &q.loop, 30, hit_queued, &q, round % 2);
        anepy_pool_run(pool, 100, hit, &w);
        anepy_pool_wait(pool);
        right &= complete(&w) && complete(&q.w);
    }
    return right;
}

/* What a child does with the pool it was born with, to its exit code. */
static int use_in_child(anepy_pool *pool, int32_t threads) {
    int right = works_after_fork(pool, threads);
    pid_t grandchild = fork();
    if (grandchild == 0) _exit(works_after_fork(pool, threads) ? 0 : 1);
    right &= child_succeeds(grandchild);
    anepy_pool_free(pool);
    return right ? 0 : 1;
}

/* used: the pool has threads when the process forks; asleep: they wait, else they still spin. */
static void check_fork(int32_t threads, int used, int asleep) {
    anepy_pool *pool = make(threads);
    if (used && !works_after_fork(pool, threads)) CHECK(0, "does not even work before fork");
    if (asleep) usleep(5000);
    pid_t child = fork();
    if (child == 0) {
        anepy_pool_free(pool); /* threads that are not there are not waited for */
        _exit(0);
    }
    CHECK(child > 0 && child_succeeds(child), "a child that frees, %d threads", threads);
    child = fork();
    if (child == 0) _exit(forked_child_may_start_threads() ? use_in_child(pool, threads) : 0);
    CHECK(works_after_fork(pool, threads), "the parent's pool after fork, %d threads", threads);
    CHECK(child > 0 && child_succeeds(child), "the child's pool after fork, %d threads, used %d",
          threads, used);
    anepy_pool_free(pool);
}

static void check_arguments(void) {
    anepy_pool *pool = NULL;
    char text[128];
    CHECK(anepy_pool_create(&pool, -1) == ANEPY_E_ARGUMENT && pool == NULL, "-1 threads");
    CHECK(anepy_pool_create(&pool, 257) == ANEPY_E_ARGUMENT && pool == NULL, "257 threads");
    CHECK(anepy_last_error(text, sizeof text) > 0 && strstr(text, "257") != NULL, "says '%s'",
          text);
    CHECK(anepy_pool_create(&pool, 256) == ANEPY_OK, "256 threads");
    anepy_pool_free(pool);
    CHECK(anepy_pool_create(&pool, 0) == ANEPY_OK && anepy_pool_threads(pool) >= 1,
          "default threads");
    anepy_pool_free(pool);
    anepy_pool_free(NULL);
}

void checks_pool(void) {
    check_arguments();
    for (int32_t threads = 1; threads <= 5; threads++) {
        check_foreground(anepy_pool_run, threads);
        check_foreground(anepy_pool_stream, threads);
        check_help(threads);
        check_chain(threads);
        check_await(threads);
        check_together(threads);
        check_busy(threads);
        for (int serial = 0; serial < 2; serial++) {
            check_background(threads, serial, 0, 0);
            check_background(threads, serial, 0, 300);
            check_background(threads, serial, 2, 300);
        }
    }
    check_serial_together();
    check_two_pools();
    check_cycles();
    check_fork(1, 1, 0);
    check_fork(3, 0, 0);
    check_fork(3, 1, 0);
    check_fork(3, 1, 1);
}
