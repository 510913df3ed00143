/* device/numerics.c - which rules each named arithmetic has. Marks as in
 * docs/neural-engine.md#sources-and-marks. */
#include "device/numerics.h"

#include <string.h>

static const anepy_numerics ALL[] = {
    /* Sums V on M1 to M6; the rest R, by one study that found M4 and M6 equal. No better report
     * exists of another chip. */
    {.name = "fixed", .fixed = 1, .away = 1, .tables = 1},
    /* C: ANEForge and ane-train see subnormal numbers become zero, on M1, M2 and M5. */
    {.name = "flush", .fixed = 1, .away = 1, .flush = 1, .tables = 1},
    /* C: ane-guide calls the sums of M1 fp32-like. */
    {.name = "float", .away = 1, .tables = 1},
    /* No report: plain fp16, to tell what the hardware does to a result. */
    {.name = "exact"},
};

#define N ((int32_t)(sizeof ALL / sizeof *ALL))

const anepy_numerics *anepy_numerics_at(int32_t index) {
    return index >= 0 && index < N ? &ALL[index] : NULL;
}

int32_t anepy_numerics_find(const char *name, size_t n) {
    for (int32_t i = 0; i < N; i++)
        if (strlen(ALL[i].name) == n && memcmp(ALL[i].name, name, n) == 0) return i;
    return -1;
}
