/* train/compile.c - the weights that programs hold: read in place, passed through surfaces
 * (dynamic_weights), or baked and compiled anew after each update.
 *
 * With background_compile the next set compiles on a thread while steps go on with the old one.
 * Programs and host compute with one and the same set at any time: a copy of the parameters, made
 * before its compilation starts, which changes hands only between steps. So the gradients of an
 * update belong to the weights of the update before it: one update stale. */
#include "train/compile.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runtime/fpmode.h"
#include "runtime/memory.h"
#include "runtime/threads.h"
#include "train/wiring.h"

struct anepy_compiler {
    const anepy_engine *engine;
    anepy_room *room;
    float *sets[2]; /* copies of the parameters: in use, and being compiled */
    int32_t used;   /* which one is in use */
    uint64_t nbytes;
    pthread_t thread;
    pid_t pid;       /* the process it runs in */
    int32_t running; /* it was started and not yet joined */
    anepy_instance *instances;
    anepy_executable **executables;
    int32_t n;
    int32_t status;
    char error[512];
};

static int baked(const anepy_node *node) {
    return node->program.weight_n > 0 && !node->program.live;
}

/* Whether what is trained is passed through surfaces: all that is baked beside an adapter is frozen.
 */
static int compiles_once(const anepy_engine *e) {
    return anepy_on(e, ANEPY_DYNAMIC_WEIGHTS) || e->adapter != NULL;
}

/* What has to be compiled: at first everything, later what has weights. */
static int32_t list(const anepy_room *room, anepy_instance *instances) {
    int32_t n = 0;
    for (int32_t i = 0; i < room->node_n; i++) {
        const anepy_node *node = &room->nodes[i];
        if (node->executable == NULL || baked(node))
            instances[n++] = (anepy_instance){&node->program, node->layer};
    }
    return n;
}

/* Takes over the executables of the list. The new set is complete before the old one goes. */
static int32_t install(anepy_engine *e, anepy_executable *const *executables) {
    anepy_room *room = e->room;
    for (int32_t i = 0; i < room->node_n; i++) {
        anepy_node *node = &room->nodes[i];
        if (node->executable != NULL && !baked(node)) continue;
        if (node->executable != NULL) room->device->ops->release(node->executable);
        node->executable = *executables++;
    }
    for (int32_t i = 0; i < room->node_n; i++) ANEPY_TRY(anepy_bind(e, &room->nodes[i]));
    return ANEPY_OK;
}

static int32_t compile_now(anepy_engine *e, const void *weights) {
    anepy_device *device = e->room->device;
    anepy_instance *instances = calloc((size_t)e->room->node_n, sizeof *instances);
    anepy_executable **executables = calloc((size_t)e->room->node_n, sizeof *executables);
    int32_t status;
    if (instances == NULL || executables == NULL) {
        status = anepy_fail(ANEPY_E_MEMORY, "no memory for the program list");
    } else {
        int32_t n = list(e->room, instances);
        status = device->ops->compile(device, instances, n, weights, executables);
        if (status == ANEPY_OK) status = install(e, executables);
    }
    free(instances);
    free(executables);
    return status;
}

/* ----------------------------------------------------------------------------- in the background
 */

static void copy_piece(void *context, int32_t index, int32_t worker) {
    (void)worker;
    const anepy_compiler *c = context;
    const uint64_t piece = 1 << 20;
    uint64_t first = (uint64_t)index * piece, left = c->nbytes - first;
    memcpy((char *)c->sets[!c->used] + first, (const char *)c->engine->params + first,
           left < piece ? left : piece);
}

/* The parameters as they are now, into the set that is not in use. */
static void copy_parameters(anepy_compiler *c) {
    anepy_pool_run(c->engine->pool, (int32_t)((c->nbytes + (1 << 20) - 1) >> 20), copy_piece, c);
}

static void change_sets(anepy_compiler *c) {
    c->used = !c->used;
    c->room->effective = c->sets[c->used];
}

static int32_t create(anepy_engine *e) {
    anepy_compiler *c = calloc(1, sizeof *c);
    if (c == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for the background compiler");
    e->room->compiler = c;
    c->engine = e;
    c->room = e->room;
    c->nbytes = (uint64_t)e->model->params_nbytes;
    c->sets[0] = anepy_map(c->nbytes);
    c->sets[1] = anepy_map(c->nbytes);
    c->instances = calloc((size_t)e->room->node_n, sizeof *c->instances);
    c->executables = calloc((size_t)e->room->node_n, sizeof *c->executables);
    if (c->sets[0] == NULL || c->sets[1] == NULL || c->instances == NULL || c->executables == NULL)
        return anepy_fail(ANEPY_E_MEMORY, "no memory for two copies of the weights, %llu bytes",
                          (unsigned long long)(2 * c->nbytes));
    copy_parameters(c);
    change_sets(c);
    return ANEPY_OK;
}

static void *compile_main(void *context) {
    anepy_compiler *c = context;
    anepy_device *device = c->room->device;
    anepy_fpmode_enter();
    c->status = device->ops->compile(device, c->instances, c->n, c->sets[!c->used], c->executables);
    if (c->status != ANEPY_OK) anepy_last_error(c->error, sizeof c->error);
    return NULL;
}

static int32_t start(anepy_compiler *c) {
    copy_parameters(c);
    c->n = list(c->room, c->instances);
    c->pid = getpid();
    ANEPY_TRY(anepy_thread_start(&c->thread, compile_main, c));
    c->running = 1;
    return ANEPY_OK;
}

/* Waits for the thread; its status. After fork it does not exist: its work is done here. */
static int32_t finish(anepy_compiler *c) {
    c->running = 0;
    if (c->pid == getpid()) pthread_join(c->thread, NULL);
    else compile_main(c);
    return c->status;
}

/* ------------------------------------------------------------------------------- for the engine */

int32_t anepy_compile_open(anepy_engine *e) {
    e->room->effective = e->params;
    e->room->stale = 1;
    int background = anepy_on(e, ANEPY_BACKGROUND_COMPILE) && !compiles_once(e);
    return background ? create(e) : ANEPY_OK;
}

int32_t anepy_compile_settle(anepy_engine *e) {
    anepy_compiler *c = e->room->compiler;
    if (c == NULL || !c->running) return ANEPY_OK;
    int32_t status = finish(c);
    if (status == ANEPY_E_BUDGET) {
        e->room->stale = 1; /* the error is told when the next step needs programs */
        return ANEPY_OK;
    }
    if (status != ANEPY_OK)
        return anepy_fail(status,
                          "compiling the new weights in the background failed, the older set stays "
                          "in use: %s",
                          c->error);
    change_sets(c);
    return install(e, c->executables);
}

int32_t anepy_compile(anepy_engine *e) {
    anepy_room *room = e->room;
    anepy_compiler *c = room->compiler;
    anepy_device *device = room->device;
    if (c != NULL) {
        if (c->running && finish(c) == ANEPY_OK) /* what it made is out of date */
            for (int32_t i = 0; i < c->n; i++) device->ops->release(c->executables[i]);
        copy_parameters(c);
    }
    if (compiles_once(e) && room->nodes[0].executable != NULL)
        ANEPY_TRY(device->ops->load_weights(device, e->params));
    else ANEPY_TRY(compile_now(e, c != NULL ? c->sets[!c->used] : e->params));
    if (c != NULL) change_sets(c);
    room->stale = 0;
    return ANEPY_OK;
}

void anepy_recompile(anepy_engine *e, int at_once) {
    anepy_room *room = e->room;
    if (anepy_can(e, ANEPY_LIVE_WEIGHTS)) return;
    if (room->compiler != NULL && !at_once && !room->stale && start(room->compiler) == ANEPY_OK)
        return;
    room->stale = 1; /* whatever happens now, the old programs are not to be used */
    (void)anepy_compile(e);
}

uint64_t anepy_compile_nbytes(const anepy_room *room) {
    return room->compiler != NULL ? 2 * room->compiler->nbytes : 0;
}

void anepy_compile_close(anepy_room *room) {
    anepy_compiler *c = room->compiler;
    if (c == NULL) return;
    if (c->running && c->pid == getpid()) finish(c);
    anepy_unmap(c->sets[0], c->nbytes);
    anepy_unmap(c->sets[1], c->nbytes);
    free(c->instances);
    free(c->executables);
    free(c);
    room->compiler = NULL;
}
