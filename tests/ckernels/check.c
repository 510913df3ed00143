/* check.c - counting and comparing. */
#define _GNU_SOURCE
#include "check.h"

#include <float.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "runtime/clock.h"

#define SHOWN 12 /* failures printed per group: the first ones tell what is wrong */

int brief;

int forked_child_may_start_threads(void) {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
    return 0;
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer) || __has_feature(address_sanitizer)
    return 0;
#endif
#endif
    return !brief;
}

int child_succeeds(int32_t child) {
    int status = 0;
    double end = anepy_now_ms() + PATIENCE_MS;
    while (waitpid(child, &status, WNOHANG) == 0) {
        if (anepy_now_ms() > end) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
            return 0;
        }
        usleep(500);
    }
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static const char *group;
static int64_t group_checks, group_failures, checks, failures;

int check_that(int ok, const char *file, int line, const char *format, ...) {
    group_checks++;
    if (ok) return 1;
    if (group_failures++ < SHOWN) {
        const char *slash = strrchr(file, '/');
        va_list args;
        printf("  FAILED %s:%d: ", slash != NULL ? slash + 1 : file, line);
        va_start(args, format);
        vprintf(format, args);
        va_end(args);
        printf("\n");
    }
    return 0;
}

static void finish_group(void) {
    if (group == NULL) return;
    printf("%-12s %8lld checks, %lld failures\n", group, (long long)group_checks,
           (long long)group_failures);
    checks += group_checks;
    failures += group_failures;
}

void check_group(const char *name) {
    finish_group();
    group = name;
    group_checks = group_failures = 0;
}

int check_summary(void) {
    finish_group();
    printf("%lld checks, %lld failures\n", (long long)checks, (long long)failures);
    return failures == 0 && checks > 0 ? 0 : 1;
}

/* -------------------------------------------------------------------------------------- numbers */

static uint64_t state;

void random_seed(uint64_t seed) { state = seed; }

/* splitmix64 (Steele, Lea & Flood 2014). */
uint64_t random_bits(void) {
    uint64_t z = state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

int32_t random_below(int32_t n) { return (int32_t)(random_bits() >> 33) % n; }

float random_float(float low, float high) {
    return low + (high - low) * (float)(random_bits() >> 40) * 0x1p-24f;
}

float random_whole(void) { return (float)(random_below(17) - 8); }

float random_wild(void) {
    static const float wild[] = {0.0f,      -0.0f,     FLT_MAX,    -FLT_MAX, FLT_MIN,   -FLT_MIN,
                                 0x1p-149f, 0x1p-130f, -0x1p-140f, INFINITY, -INFINITY, NAN,
                                 1e20f,     -1e20f,    1e-20f,     1.0f};
    if (random_below(4) != 0) return random_float(-4.0f, 4.0f);
    return wild[random_below((int32_t)(sizeof wild / sizeof wild[0]))];
}

float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

int same(float actual, float expected) {
    return to_bits(actual) == to_bits(expected) || (isnan(actual) && isnan(expected));
}

int all_same(const float *actual, const float *expected, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (!same(actual[i], expected[i])) return 0;
    return 1;
}

int is_close(double actual, double expected, double roundings, double magnitude) {
    if (isnan(expected)) return isnan(actual);
    if (isinf(expected)) return actual == expected;
    return fabs(actual - expected) <= roundings * 0x1p-24 * magnitude + (double)FLT_MIN;
}
