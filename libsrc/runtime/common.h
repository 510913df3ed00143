/* runtime/common.h - compiler differences and small helpers shared by every file. */
#ifndef ANEPY_RUNTIME_COMMON_H
#define ANEPY_RUNTIME_COMMON_H

#include <stddef.h>
#include <stdint.h>

#define ANEPY_INLINE static inline __attribute__((always_inline))
#define ANEPY_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))

/* Unrolling must happen before scalar replacement, or accumulator arrays stay in memory. */
#if defined(__clang__)
#define ANEPY_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ANEPY_UNROLL _Pragma("GCC unroll 24")
#endif

ANEPY_INLINE int64_t anepy_round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

/* Pieces of `size` that cover n. */
ANEPY_INLINE int32_t anepy_pieces(int64_t n, int64_t size) {
    return (int32_t)((n + size - 1) / size);
}

ANEPY_INLINE int32_t anepy_min_i32(int32_t a, int32_t b) { return a < b ? a : b; }
ANEPY_INLINE int32_t anepy_max_i32(int32_t a, int32_t b) { return a > b ? a : b; }
ANEPY_INLINE int64_t anepy_min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
ANEPY_INLINE int64_t anepy_max_i64(int64_t a, int64_t b) { return a > b ? a : b; }

#endif
