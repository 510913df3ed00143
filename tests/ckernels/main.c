/* main.c - runs groups of native checks.
 *
 * usage: checks [--list] [--kernels] [--brief] [--isa NAME] [--threads N] [group ...]
 *   --list       print the instruction sets this machine can run, best first, and stop
 *   --kernels    at the end print which functions of the kernel tables the groups called
 *   --isa NAME   the library must have chosen this instruction set (see ANEPY_CPU_MASK)
 *   --brief      fewer combinations, no threads in forked children: for an emulator, or where every
 *                step is watched
 *   --threads N  "0 threads" must mean N (see ANEPY_NUM_THREADS)
 * Without a group, all of them. Exit code 0: no failures; 1: failures; 2: wrong use. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "groups.h"
#include "guard.h"

const int32_t SIZES[] = {0,  1,  2,  3,  4,  5,  7,  8,  9,  11, 13,  15,  16,  17,  23, 31,
                         32, 33, 47, 48, 49, 61, 63, 64, 65, 97, 127, 128, 129, 251, 513};
const int32_t SIZE_N = sizeof SIZES / sizeof SIZES[0];

const char *expected_isa;
int32_t expected_threads;

/* --------------------------------------------------------------- do the checks notice anything? */

/* Runs fn in a child; whether it died of it. */
static int dies(void (*fn)(void)) {
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (freopen("/dev/null", "w", stderr) == NULL) _exit(0);
        fn();
        _exit(0);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child) return 0;
    return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

static volatile float sink;

static void read_behind(void) { sink = ((volatile float *)guard_take(5, GUARD_END))[5]; }
static void read_before(void) { sink = ((volatile float *)guard_take(5, GUARD_START))[-1]; }
static void write_behind(void) { ((volatile float *)guard_take(0, GUARD_END))[0] = 1.0f; }
static void read_inside(void) { sink = ((volatile float *)guard_take(5, GUARD_END))[4]; }

void checks_harness(void) {
    CHECK(dies(read_behind), "reading behind a buffer goes unnoticed");
    CHECK(dies(read_before), "reading before a buffer goes unnoticed");
    CHECK(dies(write_behind), "writing behind an empty buffer goes unnoticed");
    CHECK(!dies(read_inside), "reading inside a buffer is refused");
    guard_reset();
    float *x = guard_take(5, GUARD_START);
    CHECK(guard_intact(), "the pattern around a fresh buffer is not there");
    x[5] = 1.0f;
    CHECK(!guard_intact(), "writing behind a buffer goes unnoticed");
    guard_reset();
    x = guard_take(6, GUARD_SHIFTED);
    x[-1] = 1.0f;
    CHECK(!guard_intact(), "writing before a buffer goes unnoticed");
    guard_reset();
    x = guard_take(span(2, 3, 5), GUARD_END);
    CHECK(gaps_intact(x, 2, 3, 5), "a fresh gap is not intact");
    x[4] = 0.0f;
    CHECK(!gaps_intact(x, 2, 3, 5), "writing into a gap goes unnoticed");
    guard_reset();
    CHECK(!is_close(1.0 + 0x1p-20, 1.0, 2.0, 1.0) && is_close(1.0 + 0x1p-23, 1.0, 2.0, 1.0),
          "closeness has the wrong unit");
    CHECK(!same(0.0f, -0.0f) && !same(1.0f, from_bits(to_bits(1.0f) + 1)), "sameness is too kind");
}

/* ---------------------------------------------------------------------------- kernels called */

#define KERNEL_MAX 64

static const char *kernels[KERNEL_MAX];

void note_kernel(const char *name) {
    int32_t i = 0;
    while (i < KERNEL_MAX && kernels[i] != NULL && strcmp(kernels[i], name) != 0) i++;
    if (i == KERNEL_MAX) abort();
    kernels[i] = name;
}

static void print_kernels(void) {
    printf("kernels:");
    for (int32_t i = 0; i < KERNEL_MAX && kernels[i] != NULL; i++) printf(" %s", kernels[i]);
    printf("\n");
}

/* --------------------------------------------------------------------------------- command line */

static const struct {
    const char *name;
    void (*run)(void);
} GROUPS[] = {
    {"harness", checks_harness},
    {"table", checks_table},
    {"products", checks_products},
    {"elementwise", checks_elementwise},
    {"columns", checks_columns},
    {"exp", checks_exp},
    {"adam", checks_adam},
    {"half", checks_half},
    {"fixed", checks_fixed},
    {"bf16", checks_bf16},
    {"gemm", checks_gemm},
    {"pool", checks_pool},
    {"runtime", checks_runtime},
    {"model", checks_model},
    {"engine", checks_engine},
    {"batch", checks_batch},
    {"masks", checks_masks},
    {"packing", checks_packing},
    {"recompute", checks_recompute},
    {"frozen", checks_frozen},
    {"handles", checks_handles},
    {"weights", checks_weights},
    {"ready", checks_ready},
    {"decoder", checks_decoder},
    {"adapters", checks_adapters},
    {"optimizers", checks_optimizers},
    {"storage", checks_storage},
};
#define GROUP_N (sizeof GROUPS / sizeof GROUPS[0])

static int is_group(const char *name) {
    for (size_t g = 0; g < GROUP_N; g++)
        if (strcmp(GROUPS[g].name, name) == 0) return 1;
    fprintf(stderr, "checks: no group '%s'\n", name);
    return 0;
}

int main(int argc, char **argv) {
    int first = 1, names = 0;
    setvbuf(stdout, NULL, _IOLBF, 0); /* a fork must not print anything twice */
    for (; first < argc && strncmp(argv[first], "--", 2) == 0; first++) {
        if (strcmp(argv[first], "--list") == 0) {
            const anepy_kernels *set;
            for (int32_t i = 0; (set = anepy_kernels_at(i)) != NULL; i++) printf("%s\n", set->isa);
            return 0;
        }
        if (strcmp(argv[first], "--brief") == 0) brief = 1;
        else if (strcmp(argv[first], "--kernels") == 0) names = 1;
        else if (strcmp(argv[first], "--isa") == 0 && first + 1 < argc)
            expected_isa = argv[++first];
        else if (strcmp(argv[first], "--threads") == 0 && first + 1 < argc)
            expected_threads = (int32_t)strtol(argv[++first], NULL, 10);
        else return fprintf(stderr, "checks: unknown option %s\n", argv[first]), 2;
    }
    for (int i = first; i < argc; i++)
        if (!is_group(argv[i])) return 2;
    for (size_t g = 0; g < GROUP_N; g++) {
        int wanted = first == argc;
        for (int i = first; i < argc; i++) wanted |= strcmp(GROUPS[g].name, argv[i]) == 0;
        if (!wanted) continue;
        check_group(GROUPS[g].name);
        random_seed(0x5eed0000u + g);
        GROUPS[g].run();
        guard_reset();
    }
    if (names) print_kernels();
    return check_summary();
}
