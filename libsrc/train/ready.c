/* train/ready.c - how far the gradients of the running step are final.
 *
 * The step's own thread notes it where it comes by: workers tell nobody, and who asks touches one
 * number only. That holds both counts, so that they are of one moment. */
#include "train/ready.h"

#include <stdatomic.h>

#include "train/dw.h"

#define STEP 65536 /* more than any model has buckets */

static int64_t now(const anepy_engine *e) {
    return atomic_load_explicit(&e->ready, memory_order_acquire);
}

/* What was written to gradients before is visible to whoever sees this. */
static void note(anepy_engine *e, int64_t steps, int32_t buckets) {
    atomic_store_explicit(&e->ready, steps * STEP + buckets, memory_order_release);
}

void anepy_ready_begin(anepy_engine *e) { note(e, now(e) / STEP + 1, 0); }

void anepy_ready_last(anepy_engine *e) {
    if (/* mutate: ready-last-group */ anepy_last_group(e)) note(e, now(e) / STEP, 1);
}

void anepy_ready_layers(anepy_engine *e, int32_t l) {
    int32_t layers = e->model->config.n_layers, before = (int32_t)(now(e) % STEP);
    int32_t buckets = before;
    while (buckets > 0 && layers - buckets >= l &&
           /* mutate: ready-done */ anepy_dw_layer_done(e, layers - buckets))
        buckets++;
    if (buckets > before) note(e, now(e) / STEP, buckets);
}

void anepy_ready_all(anepy_engine *e) { note(e, now(e) / STEP, e->model->config.n_layers + 2); }

static int32_t bucket_of(const anepy_engine *e, const anepy_tensor *tensor) {
    int32_t layers = e->model->config.n_layers;
    if (tensor->layer >= 0) return layers - tensor->layer;
    return tensor->role == ANEPY_EMBEDDING ? layers + 1 : 0;
}

/* How many of the first so many buckets have a gradient. */
static int32_t with_gradients(const anepy_engine *e, int32_t buckets) {
    int32_t n = 0, last = -1;
    for (int32_t i = e->model->tensor_n - 1; i >= 0; i--) {
        const anepy_tensor *t = &e->model->tensors[i];
        int32_t bucket = bucket_of(e, t);
        if (bucket >= buckets || bucket == last || anepy_gradient(e, t) == NULL) continue;
        last = bucket;
        n++;
    }
    return n;
}

int32_t anepy_ready_get(const anepy_engine *e, int64_t *steps) {
    int64_t both = now(e);
    *steps = both / STEP;
    return with_gradients(e, (int32_t)(both % STEP));
}
