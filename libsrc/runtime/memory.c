/* runtime/memory.c - mappings on large pages; counted heap calls. */
#define _GNU_SOURCE
#include "runtime/memory.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#define LARGE_PAGE ((uint64_t)2 << 20)

static _Atomic int64_t heap_operations;

#define ANY_PAGE ((uint64_t)65536) /* a multiple of every page size of processors and GPUs */

/* Rounded to whole pages, so that memory before and behind an aligned mapping can be unmapped. */
static uint64_t mapped_size(uint64_t nbytes) {
    return (nbytes + ANY_PAGE - 1) / ANY_PAGE * ANY_PAGE;
}

void *anepy_map(uint64_t nbytes) {
    if (nbytes == 0 || nbytes > (uint64_t)1 << 46) return NULL;
    uint64_t size = mapped_size(nbytes);
    uint64_t align = size >= LARGE_PAGE ? LARGE_PAGE : ANY_PAGE;
    char *base = mmap(NULL, size + align, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (base == MAP_FAILED) return NULL;
    uint64_t skip = (align - (uintptr_t)base % align) % align;
    if (skip > 0) munmap(base, skip);
    if (align > skip) munmap(base + skip + size, align - skip);
#ifdef MADV_HUGEPAGE
    madvise(base + skip, size, MADV_HUGEPAGE); /* a hint: refusal costs speed only */
#endif
    return base + skip;
}

void anepy_unmap(void *memory, uint64_t nbytes) {
    if (memory != NULL) munmap(memory, mapped_size(nbytes));
}

void *anepy_heap_alloc(uint64_t nbytes) {
    void *memory = NULL;
    atomic_fetch_add_explicit(&heap_operations, 1, memory_order_relaxed);
    return posix_memalign(&memory, 64, nbytes > 0 ? nbytes : 1) == 0 ? memory : NULL;
}

void anepy_heap_free(void *memory) { free(memory); }

int64_t anepy_heap_operations(void) {
    return atomic_load_explicit(&heap_operations, memory_order_relaxed);
}
