/* check.h - the frame of the native checks: counting, failing loudly, numbers to compare.
 *
 * A check is one property of one case (a kernel at one size, say), not one element. Failures are
 * printed with file and line; the exit code of the program says whether there were any. Checks are
 * made by the main thread only. */
#ifndef CHECK_H
#define CHECK_H

#include "runtime/common.h"

/* Set by --brief: the program runs slowly, in an emulator or watched for races. */
extern int brief;

/* ThreadSanitizer and emulators in user mode take the threads of a forked child for the parent's;
 * AddressSanitizer deadlocks if one of the parent's threads was allocating just then. */
int forked_child_may_start_threads(void);

/* Whether a forked child exits with 0 before patience ends. */
int child_succeeds(int32_t child);

/* CHECK(condition, "what was being tried: %d", n) */
#define CHECK(ok, ...) check_that((ok) ? 1 : 0, __FILE__, __LINE__, __VA_ARGS__)

#define PATIENCE_MS 20000.0 /* longer than anything here waits for, even under a sanitizer */

int check_that(int ok, const char *file, int line, const char *format, ...) ANEPY_PRINTF(4, 5);

/* Starts a group; its line is printed when the next one starts or check_summary is called. */
void check_group(const char *name);

/* Prints the totals; returns the exit code. */
int check_summary(void);

/* -------------------------------------------------------------------------------------- numbers */

/* The same numbers in every run: a group seeds the generator with its own constant. */
void random_seed(uint64_t seed);
uint64_t random_bits(void);
int32_t random_below(int32_t n);
float random_float(float low, float high);
/* Whole numbers in [-8, 8]: sums of up to 2^17 products are exact in float32 in any order. */
float random_whole(void);
/* Like random_float(-4, 4), but one in four is a zero, an extreme, a subnormal, inf or NaN. */
float random_wild(void);

float from_bits(uint32_t bits);
uint32_t to_bits(float x);

/* Bit for bit, except that any NaN equals any NaN. */
int same(float actual, float expected);
int all_same(const float *actual, const float *expected, int64_t n);

/* |actual - expected| <= roundings * 2^-24 * magnitude, or below the smallest normal number; two
 * NaN are close, infinities must be equal. magnitude: of the largest intermediate, >= |expected|.
 */
int is_close(double actual, double expected, double roundings, double magnitude);

#endif
