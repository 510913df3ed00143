/* check.c - runtime/machine.c and runtime/threads.c as macOS compiles them.
 *
 * usage: check [NAME=VALUE ...]   what sysctl knows
 * Prints cores, threads, whether there is bf16, how many workers besides the caller took part in a
 * loop, how many of them at user-initiated QoS, and the caller's QoS. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysctl.h>

#include "runtime/machine.h"
#include "runtime/threads.h"

static char **known;
static _Thread_local int qos;

int sysctlbyname(const char *name, void *value, size_t *size, void *fresh, size_t fresh_size) {
    size_t n = strlen(name);
    if (*size != sizeof(int) || fresh != NULL || fresh_size != 0) abort();
    for (char **at = known; *at != NULL; at++) {
        if (strncmp(*at, name, n) != 0 || (*at)[n] != '=') continue;
        int number = atoi(*at + n + 1);
        memcpy(value, &number, sizeof number);
        return 0;
    }
    return -1;
}

int pthread_set_qos_class_self_np(qos_class_t wanted, int relative_priority) {
    if (relative_priority != 0) abort();
    qos = (int)wanted;
    return 0;
}

static _Atomic int arrived, raised;

/* Every thread takes one index, so that all of them are there. */
static void meet(void *context, int32_t index, int32_t worker) {
    int threads = *(int *)context;
    (void)index;
    if (worker > 0 && qos == QOS_CLASS_USER_INITIATED) atomic_fetch_add(&raised, 1);
    atomic_fetch_add(&arrived, 1);
    while (atomic_load(&arrived) < threads) {
    }
}

int main(int argc, char **argv) {
    anepy_pool *pool = NULL;
    known = argv + (argc > 0);
    int threads = anepy_machine_threads();
    if (anepy_pool_create(&pool, 0) != 0 || anepy_pool_threads(pool) != threads) return 1;
    anepy_pool_run(pool, threads, meet, &threads);
    printf("%d %d %d %d %d %d\n", anepy_machine_cores(), threads, anepy_machine_has_bf16(),
           threads - 1, atomic_load(&raised), qos);
    anepy_pool_free(pool);
    return 0;
}
