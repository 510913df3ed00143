/* kernels/kernels.c - which kernel set runs: the table of sets, and the one decision per process.
 */
#include "kernels/kernels.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/features.h"

/* Best first. */
static const struct {
    const anepy_kernels *set;
    uint32_t needs;
} SETS[] = {
#if defined(__x86_64__)
#if !defined(ANEPY_NO_BF16) /* a compiler that does not know the instructions: build_lib.sh */
    {&anepy_kernels_avx512bf16_set, ANEPY_CPU_AVX512 | ANEPY_CPU_AVX512_BF16},
#endif
    {&anepy_kernels_avx512_set, ANEPY_CPU_AVX512},
    {&anepy_kernels_avx2_set, ANEPY_CPU_AVX2},
#elif defined(__aarch64__)
#if !defined(ANEPY_NO_BF16)
    {&anepy_kernels_neonbf16_set, ANEPY_CPU_NEON | ANEPY_CPU_NEON_BF16},
#endif
    {&anepy_kernels_neon_set, ANEPY_CPU_NEON},
#endif
    {&anepy_kernels_scalar_set, 0},
};
#define SET_N ((int32_t)(sizeof SETS / sizeof SETS[0]))

static pthread_once_t once = PTHREAD_ONCE_INIT;
static const anepy_kernels *chosen;
static char unknown_mask[32];

/* The mask can only lower: a set above what the machine has is skipped, never forced. */
static void choose(void) {
    uint32_t features = anepy_cpu_features();
    const char *mask = getenv("ANEPY_CPU_MASK");
    int32_t first = 0;
    if (mask != NULL && mask[0] != '\0') {
        while (first < SET_N && strcmp(SETS[first].set->isa, mask) != 0) first++;
        if (first == SET_N) {
            strncpy(unknown_mask, mask, sizeof unknown_mask - 1);
            return;
        }
    }
    for (int32_t i = first; i < SET_N && chosen == NULL; i++)
        if ((features & SETS[i].needs) == SETS[i].needs) chosen = SETS[i].set;
}

const anepy_kernels *anepy_kernels_get(void) {
    pthread_once(&once, choose);
    if (chosen == NULL) {
        char names[96] = "";
        for (int32_t i = 0; i < SET_N; i++) {
            strcat(names, i > 0 ? ", " : "");
            strcat(names, SETS[i].set->isa);
        }
        anepy_fail(ANEPY_E_NAME, "ANEPY_CPU_MASK=%s is unknown: use one of %s", unknown_mask,
                   names);
    }
    return chosen;
}

const anepy_kernels *anepy_kernels_scalar(void) { return &anepy_kernels_scalar_set; }

const anepy_kernels *anepy_kernels_at(int32_t index) {
    uint32_t features = anepy_cpu_features();
    for (int32_t i = 0; i < SET_N; i++)
        if ((features & SETS[i].needs) == SETS[i].needs && index-- == 0) return SETS[i].set;
    return NULL;
}

int32_t anepy_kernels_named(const anepy_kernels **out, const char *isa) {
    char names[96] = "";
    if (isa == NULL) return (*out = anepy_kernels_get()) != NULL ? ANEPY_OK : ANEPY_E_NAME;
    for (int32_t i = 0; (*out = anepy_kernels_at(i)) != NULL; i++) {
        if (strcmp((*out)->isa, isa) == 0) return ANEPY_OK;
        strcat(names, i > 0 ? ", " : "");
        strcat(names, (*out)->isa);
    }
    return anepy_fail(ANEPY_E_NAME, "instruction set '%.20s' cannot run here: use one of %s", isa,
                      names);
}
