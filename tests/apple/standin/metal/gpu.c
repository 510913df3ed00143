/* gpu.c - computing command buffers on a thread of its own. */
#define _GNU_SOURCE
#include "gpu.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fault.h"

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static pthread_t thread;
static gpu_work *first, *last;
static int queues, stopping;
static uint32_t delay_us = 500;

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static uint64_t checksum(const gpu_matrix *m, size_t rows, size_t columns, uint64_t sum) {
    for (size_t r = 0; r < rows; r++) {
        const char *row = m->data + r * m->row_nbytes;
        for (size_t c = 0; c < columns; c++) {
            uint32_t bits;
            memcpy(&bits, row + c * sizeof bits, sizeof bits);
            sum = (sum ^ bits) * 0x100000001b3u;
        }
    }
    return sum;
}

static uint64_t input_checksum(const gpu_product *p) {
    return checksum(&p->b, p->n, p->k, checksum(&p->a, p->m, p->k, 0xcbf29ce484222325u));
}

static int overlaps(const gpu_matrix *x, const gpu_matrix *y) {
    return x->data < y->data + y->rows * y->row_nbytes &&
           y->data < x->data + x->rows * x->row_nbytes;
}

static void compute(const gpu_product *p) {
    enum { LANES = 16 };
    for (size_t i = 0; i < p->m; i++) {
        const float *a = (const float *)(const void *)(p->a.data + i * p->a.row_nbytes);
        float *c = (float *)(void *)(p->c.data + i * p->c.row_nbytes);
        for (size_t j = 0; j < p->n; j++) {
            const float *b = (const float *)(const void *)(p->b.data + j * p->b.row_nbytes);
            float lanes[LANES] = {0}, sum = 0.0f;
            size_t s = 0;
            for (; s + LANES <= p->k; s += LANES)
                for (size_t l = 0; l < LANES; l++) lanes[l] += a[s + l] * b[s + l];
            for (; s < p->k; s++) sum += a[s] * b[s];
            for (size_t l = 0; l < LANES; l++) sum += lanes[l];
            c[j] = p->alpha * sum + p->beta * c[j];
        }
    }
}

static int run(gpu_work *work) {
    for (size_t i = 0; i < work->n; i++) {
        const gpu_product *p = &work->products[i];
        if (input_checksum(p) != p->inputs)
            gpu_broken("product %zu: what it reads changed after commit", i);
        if (!p->later && checksum(&p->c, p->m, p->n, 1) != p->before)
            gpu_broken("product %zu: its result was written to after commit", i);
        compute(p);
    }
    return gpu_enter("execute") == GPU_WORKS;
}

static void *gpu_main(void *unused) {
    (void)unused;
    pthread_mutex_lock(&mutex);
    for (;;) {
        while (first == NULL && !stopping) pthread_cond_wait(&changed, &mutex);
        if (first == NULL) break;
        gpu_work *work = first;
        pthread_mutex_unlock(&mutex);
        usleep(delay_us);
        work->start = seconds();
        int fine = run(work);
        work->end = seconds();
        pthread_mutex_lock(&mutex);
        first = work->next;
        work->state = fine ? GPU_DONE : GPU_FAILED;
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&mutex);
    return NULL;
}

void gpu_set_delay_us(uint32_t delay) { delay_us = delay; }

void gpu_start(void) {
    if (queues++ > 0) return;
    stopping = 0;
    if (pthread_create(&thread, NULL, gpu_main, NULL) != 0) abort();
}

int gpu_stop(void) {
    if (--queues > 0) return 0;
    pthread_mutex_lock(&mutex);
    int left = first != NULL;
    stopping = 1;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
    pthread_join(thread, NULL);
    return left;
}

gpu_work *gpu_work_make(void) { return calloc(1, sizeof(gpu_work)); }

void gpu_work_add(gpu_work *work, const gpu_product *product) {
    if (work->n == work->cap) {
        work->cap = 2 * work->cap + 4;
        work->products = realloc(work->products, work->cap * sizeof *work->products);
    }
    work->products[work->n++] = *product;
}

/* Does anything that is not done yet write this? The mutex is held. */
static int written_by(const gpu_work *work, size_t n, const gpu_matrix *m) {
    for (size_t i = 0; i < n; i++)
        if (overlaps(&work->products[i].c, m)) return 1;
    return 0;
}

void gpu_work_commit(gpu_work *work) {
    pthread_mutex_lock(&mutex);
    for (size_t i = 0; i < work->n; i++) {
        gpu_product *p = &work->products[i];
        p->later = written_by(work, i, &p->c);
        for (const gpu_work *w = first; w != NULL; w = w->next)
            p->later |= written_by(w, w->n, &p->c);
        p->inputs = input_checksum(p);
        p->before = checksum(&p->c, p->m, p->n, 1);
    }
    work->state = GPU_COMMITTED;
    work->next = NULL;
    if (first == NULL) first = work;
    else last->next = work;
    last = work;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

void gpu_work_wait(gpu_work *work) {
    pthread_mutex_lock(&mutex);
    while (work->state == GPU_COMMITTED) pthread_cond_wait(&changed, &mutex);
    pthread_mutex_unlock(&mutex);
}

void gpu_work_free(gpu_work *work) {
    gpu_work_wait(work);
    free(work->products);
    free(work);
}
