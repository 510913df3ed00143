/* runtime/machine.h - facts that only the operating system knows: cores, threads, one processor
 * feature. */
#ifndef ANEPY_RUNTIME_MACHINE_H
#define ANEPY_RUNTIME_MACHINE_H

#include <stdint.h>

/* Physical cores this process may run on: affinity mask, SMT siblings counted once; on Apple
 * silicon the performance cores. At least 1. */
int32_t anepy_machine_cores(void);

/* The default thread count: min(cores, cgroup CPU quota rounded down), or ANEPY_NUM_THREADS. */
int32_t anepy_machine_threads(void);

/* On AArch64 whether the system reports FEAT_BF16 (on Apple silicon M2 and later); 0 elsewhere. */
int anepy_machine_has_bf16(void);

#endif
