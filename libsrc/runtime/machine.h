/* runtime/machine.h - facts that only the operating system knows: cores, threads, a cache, two
 * processor features. */
#ifndef ANEPY_RUNTIME_MACHINE_H
#define ANEPY_RUNTIME_MACHINE_H

#include <stdint.h>

/* Physical cores this process may run on: affinity mask, SMT siblings counted once; on Apple
 * silicon the performance cores. At least 1. */
int32_t anepy_machine_cores(void);

/* The default thread count: min(cores, cgroup CPU quota rounded down), or ANEPY_NUM_THREADS. */
int32_t anepy_machine_threads(void);

/* Bytes of a core's own second cache; 0 where the system does not say, or cores share it. */
int64_t anepy_machine_second_cache(void);

/* On AArch64 whether the system reports FEAT_BF16 (on Apple silicon M2 and later); 0 elsewhere. */
int anepy_machine_has_bf16(void);

/* Asks Linux on x86-64 to let this process use the registers of AMX, which it does not save
 * otherwise; 0 if it refuses, and elsewhere. */
int anepy_machine_grants_tiles(void);

#endif
