/* device/sim/memory.c - memory that lives as long as a program, bounded by its limit. */
#include "device/sim/interpreter_internal.h"

#include <string.h>

#include "runtime/memory.h"

#define ALLOCATION ((uint64_t)64 << 10)
#define LARGE ((uint64_t)2 << 20) /* from here on weights profit from large pages */
#define HEAD ((uint64_t)64)

static mil_block *new_block(anepy_mil *mil, uint64_t nbytes) {
    if (mil->memory_nbytes + nbytes > mil->options.memory_nbytes) return NULL;
    int32_t mapped = nbytes >= LARGE;
    mil_block *block = mapped ? anepy_map(nbytes) : anepy_heap_alloc(nbytes);
    if (block == NULL) return NULL;
    if (!mapped) memset(block, 0, nbytes);
    block->nbytes = nbytes;
    block->used = HEAD;
    block->mapped = mapped;
    mil->memory_nbytes += nbytes;
    MIL_GUARD((char *)block + HEAD, nbytes - HEAD);
    return block;
}

void *mil_alloc(anepy_mil *mil, uint64_t nbytes) {
    if (nbytes > (uint64_t)1 << 46) return NULL;
    uint64_t asked = nbytes;
    nbytes = (nbytes + 63) / 64 * 64 + MIL_REDZONE;
    mil_block *block = mil->blocks;
    if (block == NULL || block->nbytes - block->used < nbytes) {
        int own = nbytes > ALLOCATION / 4;
        block = new_block(mil, own ? nbytes + HEAD : ALLOCATION);
        if (block == NULL) return NULL;
        /* A block for one large piece goes behind the first, which still has room. */
        if (own && mil->blocks != NULL) {
            block->next = mil->blocks->next;
            mil->blocks->next = block;
        } else {
            block->next = mil->blocks;
            mil->blocks = block;
        }
    }
    void *memory = (char *)block + block->used;
    block->used += nbytes;
    MIL_UNGUARD(memory, asked);
    return memory;
}

int mil_append(anepy_mil *mil, void ***array, int32_t *n, int32_t *cap, void *item) {
    if (*n == *cap) {
        int32_t grown = *cap > 0 ? *cap * 2 : 8;
        void **copy = mil_alloc(mil, (uint64_t)grown * sizeof *copy);
        if (copy == NULL) return 0;
        if (*n > 0) memcpy(copy, *array, (size_t)*n * sizeof *copy);
        *array = copy;
        *cap = grown;
    }
    (*array)[(*n)++] = item;
    return 1;
}

void mil_free_blocks(anepy_mil *mil) {
    mil_block *next;
    for (mil_block *block = mil->blocks; block != NULL; block = next) {
        next = block->next;
        MIL_UNGUARD(block, block->nbytes);
        if (block->mapped) anepy_unmap(block, block->nbytes);
        else anepy_heap_free(block);
    }
    mil->blocks = NULL;
}
