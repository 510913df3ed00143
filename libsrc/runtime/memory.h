/* runtime/memory.h - large zeroed mappings, and heap calls that are counted.
 *
 * The step engine reports its heap operations per step, so everything it allocates while a step
 * runs goes through anepy_heap_*; start-up memory comes from anepy_map. */
#ifndef ANEPY_RUNTIME_MEMORY_H
#define ANEPY_RUNTIME_MEMORY_H

#include "runtime/status.h"

/* Zeroed; 64 KiB aligned, 2 MiB where large pages are in use; NULL if refused. */
void *anepy_map(uint64_t nbytes);
void anepy_unmap(void *memory, uint64_t nbytes); /* accepts NULL */

/* 64-byte aligned, uninitialised; NULL if refused. */
void *anepy_heap_alloc(uint64_t nbytes);
void anepy_heap_free(void *memory);  /* accepts NULL */
int64_t anepy_heap_operations(void); /* allocations so far in this process */

#endif
