/* kernels/kernels.c - the table of kernel sets, and the choice among them, made once per process.
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
#if !defined(ANEPY_NO_AMX) /* both set by build_lib.sh for compilers without these instructions */
    {&anepy_kernels_amx_set, ANEPY_CPU_AVX512 | ANEPY_CPU_AVX512_BF16 | ANEPY_CPU_AMX_BF16},
#endif
#if !defined(ANEPY_NO_BF16)
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
static const anepy_kernels *allowed[SET_N]; /* best first, then NULL */
static char unknown_mask[32];

/* ANEPY_CPU_MASK can only take away: a set that the machine lacks is skipped, never forced. */
static void choose(void) {
    uint32_t features = anepy_cpu_features();
    const char *mask = getenv("ANEPY_CPU_MASK");
    int32_t first = 0, n = 0;
    if (mask != NULL && mask[0] != '\0') {
        while (first < SET_N && strcmp(SETS[first].set->isa, mask) != 0) first++;
        if (first == SET_N) strncpy(unknown_mask, mask, sizeof unknown_mask - 1);
    }
    for (int32_t i = first; i < SET_N; i++)
        if ((features & SETS[i].needs) == SETS[i].needs) allowed[n++] = SETS[i].set;
}

const anepy_kernels *anepy_kernels_at(int32_t index) {
    pthread_once(&once, choose);
    return index >= 0 && index < SET_N ? allowed[index] : NULL;
}

const anepy_kernels *anepy_kernels_get(void) {
    const anepy_kernels *best = anepy_kernels_at(0);
    if (best == NULL) {
        char names[96] = "";
        for (int32_t i = 0; i < SET_N; i++) {
            strcat(names, i > 0 ? ", " : "");
            strcat(names, SETS[i].set->isa);
        }
        anepy_fail(ANEPY_E_NAME, "ANEPY_CPU_MASK=%s is unknown: use one of %s", unknown_mask,
                   names);
    }
    return best;
}

const anepy_kernels *anepy_kernels_scalar(void) { return &anepy_kernels_scalar_set; }

int32_t anepy_kernels_named(const anepy_kernels **out, const char *isa) {
    char names[96] = "";
    *out = anepy_kernels_get();
    if (*out == NULL) return ANEPY_E_NAME;
    if (isa == NULL) return ANEPY_OK;
    for (int32_t i = 0; (*out = anepy_kernels_at(i)) != NULL; i++) {
        if (strcmp((*out)->isa, isa) == 0) return ANEPY_OK;
        strcat(names, i > 0 ? ", " : "");
        strcat(names, (*out)->isa);
    }
    return anepy_fail(ANEPY_E_NAME, "instruction set '%.20s' cannot run here: use one of %s", isa,
                      names);
}
