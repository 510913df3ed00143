/* runtime/machine.h - what only the operating system tells: how many threads this process should
 * use, and a feature of the processor. */
#ifndef ANEPY_RUNTIME_MACHINE_H
#define ANEPY_RUNTIME_MACHINE_H

#include <stdint.h>

/* Physical cores this process may run on: affinity mask, SMT siblings counted once; on Apple
 * silicon the performance cores. At least 1. */
int32_t anepy_machine_cores(void);

/* The default thread count: min(cores, cgroup CPU quota rounded down), or ANEPY_NUM_THREADS. */
int32_t anepy_machine_threads(void);

/* AArch64: does the system report FEAT_BF16 (Apple: M2 and later)? 0 on other processors. */
int anepy_machine_has_bf16(void);

#endif
