/* runtime/machine.h - how many threads this process should use. */
#ifndef ANEPY_RUNTIME_MACHINE_H
#define ANEPY_RUNTIME_MACHINE_H

#include <stdint.h>

/* Physical cores this process may run on: affinity mask, SMT siblings counted once; on Apple
 * silicon the performance cores. At least 1. */
int32_t anepy_machine_cores(void);

/* The default thread count: min(cores, cgroup CPU quota rounded down), or ANEPY_NUM_THREADS. */
int32_t anepy_machine_threads(void);

#endif
