/* kernels/features.c - detects instruction sets by CPUID and by XCR0, which says what the system
 * saves.
 *
 * Compiled without instruction-set flags, so that it runs everywhere. Model numbers are not used.
 */
#include "kernels/features.h"

#include "runtime/machine.h"

#if defined(__x86_64__)
#include <cpuid.h>

static uint64_t read_xcr0(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static int all(uint32_t value, uint32_t bits) { return (value & bits) == bits; }

uint32_t anepy_cpu_features(void) {
    uint32_t a, b, c, d, found = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const uint32_t osxsave = 1u << 27, avx = 1u << 28, fma = 1u << 12, f16c = 1u << 29;
    if (!all(c, osxsave | avx | fma | f16c)) return 0;
    uint64_t state = read_xcr0();
    if ((state & 0x6) != 0x6) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (b & 1u << 5) found |= ANEPY_CPU_AVX2;
    const uint32_t amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    int tiles = all(d, amx_bf16 | amx_tile) && (state & 0x60000) == 0x60000;
    const uint32_t f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
    /* macOS on Intel enables zmm state lazily, so XCR0 hides AVX-512 there; AVX2 is used instead.
     */
    if (found != 0 && all(b, f | dq | bw | vl) && (state & 0xe6) == 0xe6) found |= ANEPY_CPU_AVX512;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return found;
    if (found & ANEPY_CPU_AVX512 && a & 1u << 5) found |= ANEPY_CPU_AVX512_BF16;
    if (found & ANEPY_CPU_AVX512_BF16 && tiles && anepy_machine_grants_tiles())
        found |= ANEPY_CPU_AMX_BF16;
    return found;
}
#elif defined(__aarch64__)
uint32_t anepy_cpu_features(void) { /* NEON is part of the base architecture */
    return ANEPY_CPU_NEON | (anepy_machine_has_bf16() ? ANEPY_CPU_NEON_BF16 : 0);
}
#else
uint32_t anepy_cpu_features(void) { return 0; }
#endif
