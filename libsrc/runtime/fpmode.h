/* runtime/fpmode.h - flush subnormals inside our own computations, and only there.
 *
 * Subnormal operands cost a hundred cycles on x86; Adam's second moments decay into them. The mode
 * is per thread: workers set it for good, API calls set it and give the caller's back. */
#ifndef ANEPY_RUNTIME_FPMODE_H
#define ANEPY_RUNTIME_FPMODE_H

#include <stdint.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
static inline uint64_t anepy_fpmode_enter(void) {
    uint32_t saved = _mm_getcsr();
    _mm_setcsr(saved | 0x8040); /* FTZ | DAZ */
    return saved;
}
static inline void anepy_fpmode_leave(uint64_t saved) {
    _mm_setcsr(/* mutate: fpmode-given-back */ (uint32_t)saved);
}
#elif defined(__aarch64__)
static inline uint64_t anepy_fpmode_enter(void) {
    uint64_t saved;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" : : "r"(saved | (UINT64_C(1) << 24))); /* FZ */
    return saved;
}
static inline void anepy_fpmode_leave(uint64_t saved) {
    __asm__ volatile("msr fpcr, %0" : : "r"(saved));
}
#else
static inline uint64_t anepy_fpmode_enter(void) { return 0; }
static inline void anepy_fpmode_leave(uint64_t saved) { (void)saved; }
#endif

#endif
