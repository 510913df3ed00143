/* runtime.c - mappings, counted heap calls, error sentences, thread counts, floating-point mode. */
#define _GNU_SOURCE
#include <errno.h>
#include <float.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "groups.h"
#include "runtime/clock.h"
#include "runtime/fpmode.h"
#include "runtime/machine.h"
#include "runtime/memory.h"

/* --------------------------------------------------------------------------------------- memory */

static int all_zero(const char *memory, uint64_t nbytes) {
    for (uint64_t i = 0; i < nbytes; i++)
        if (memory[i] != 0) return 0;
    return 1;
}

static int is_mapped(void *memory) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return msync((void *)((uintptr_t)memory / page * page), page, MS_ASYNC) == 0 || errno != ENOMEM;
}

static void check_map(uint64_t nbytes) {
    char *memory = anepy_map(nbytes);
    if (!CHECK(memory != NULL, "no map of %llu bytes", (unsigned long long)nbytes)) return;
    uintptr_t align = nbytes >= (uint64_t)2 << 20 ? (uintptr_t)2 << 20 : 64;
    CHECK((uintptr_t)memory % align == 0, "a map of %llu bytes at %p", (unsigned long long)nbytes,
          (void *)memory);
    CHECK(all_zero(memory, nbytes), "a map of %llu bytes is not zero", (unsigned long long)nbytes);
    memset(memory, 0x5a, nbytes);
    anepy_unmap(memory, nbytes);
    CHECK(!is_mapped(memory) && !is_mapped(memory + nbytes - 1), "%llu bytes are still mapped",
          (unsigned long long)nbytes);
}

/* Pages of address space this process has. */
static long mapped_pages(void) {
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (file == NULL) return 0;
    if (fscanf(file, "%ld", &pages) != 1) pages = 0;
    fclose(file);
    return pages;
}

static void check_memory(void) {
    static const uint64_t sizes[] = {
        1, 63, 64, 4096, 16384, 16385, 1 << 20, (2 << 20) - 1, 2 << 20, (2 << 20) + 1, 5000000};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) check_map(sizes[i]);
    CHECK(anepy_map(0) == NULL, "a map of no bytes");
    CHECK(anepy_map((uint64_t)1 << 47) == NULL && anepy_map(UINT64_MAX) == NULL, "an absurd map");
    anepy_unmap(NULL, 4096);
    long before = mapped_pages();
    for (int i = 0; i < 300; i++) {
        uint64_t nbytes = (uint64_t)1 << (10 + i % 14);
        anepy_unmap(anepy_map(nbytes + 1), nbytes + 1);
    }
    long grown = mapped_pages() - before;
    CHECK(grown < 2048, "300 maps given back leave %ld pages", grown);

    int64_t operations = anepy_heap_operations();
    for (uint64_t n = 0; n < 200; n += 7) {
        char *memory = anepy_heap_alloc(n);
        CHECK(memory != NULL && (uintptr_t)memory % 64 == 0, "heap: %llu bytes at %p",
              (unsigned long long)n, (void *)memory);
        if (memory != NULL) memset(memory, 1, n);
        anepy_heap_free(memory);
    }
    anepy_heap_free(NULL);
    CHECK(anepy_heap_operations() - operations == 29, "29 heap operations count as %lld",
          (long long)(anepy_heap_operations() - operations));

    void *memory = NULL;
    CHECK(anepy_memory_alloc(&memory, 1000) == ANEPY_OK && memory != NULL &&
              (uintptr_t)memory % 64 == 0,
          "memory_alloc");
    anepy_memory_free(memory, 1000);
    anepy_memory_free(NULL, 1000);
    memory = &memory;
    CHECK(anepy_memory_alloc(&memory, UINT64_MAX) == ANEPY_E_MEMORY && memory == NULL,
          "memory_alloc of everything");
}

/* ------------------------------------------------------------------------------------ sentences */

static void *fail_elsewhere(void *argument) {
    char text[64];
    (void)argument;
    int empty = anepy_last_error(text, sizeof text) == 0;
    for (int i = 0; i < 2000; i++) anepy_fail(ANEPY_E_DEVICE, "elsewhere %d", i);
    anepy_last_error(text, sizeof text);
    return empty && strcmp(text, "elsewhere 1999") == 0 ? argument : NULL;
}

static void check_status(void) {
    char text[600];
    pthread_t thread;
    void *result = NULL;
    CHECK(anepy_fail(ANEPY_E_STATE, "%s %d", "here", 7) == ANEPY_E_STATE,
          "fail returns another code");
    CHECK(pthread_create(&thread, NULL, fail_elsewhere, text) == 0, "no thread");
    for (int i = 0; i < 2000; i++) anepy_fail(ANEPY_E_STATE, "%s %d", "here", 7);
    pthread_join(thread, &result);
    CHECK(result == text, "a new thread has an error, or loses its own");
    CHECK(anepy_last_error(text, sizeof text) == 6 && strcmp(text, "here 7") == 0, "says '%s'",
          text);
    memset(text, 'x', sizeof text);
    CHECK(anepy_last_error(text, 4) == 6 && strcmp(text, "her") == 0 && text[4] == 'x', "cut: '%s'",
          text);
    CHECK(anepy_last_error(text, 1) == 6 && text[0] == '\0' && text[1] == 'e', "one byte");
    CHECK(anepy_last_error(text, 0) == 6 && anepy_last_error(NULL, 0) == 6, "only the length");
    char longer[700];
    memset(longer, 'y', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    anepy_fail(ANEPY_E_STATE, "%s", longer);
    CHECK(anepy_last_error(text, sizeof text) == 511 && strlen(text) == 511, "a long sentence");

    static const int32_t codes[] = {0,   -10, -11, -12, -13, -20, -30, -31,
                                    -40, -41, -50, -60, 1,   -1,  -999};
    for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
        const char *name = anepy_status_name(codes[i]);
        int known = codes[i] == 0 || (codes[i] <= -10 && codes[i] >= -60);
        CHECK(name != NULL && (strcmp(name, "unknown") != 0) == known, "status %d is %s", codes[i],
              name);
        for (size_t j = 0; j < i && known; j++)
            CHECK(strcmp(name, anepy_status_name(codes[j])) != 0, "%d and %d have one name",
                  codes[i], codes[j]);
    }
    int32_t sizes = 0;
    while (anepy_struct_size(sizes) > 0) sizes++;
    CHECK(sizes >= 9 && anepy_struct_size(-1) == -1 && anepy_struct_size(99) == -1, "%d structs",
          sizes);
    CHECK(anepy_abi_version() == ANEPY_ABI_VERSION && anepy_build_id()[0] != '\0',
          "ABI or build id");
}

/* ---------------------------------------------------------------------- machine, clock, fp mode */

static void check_machine(void) {
    int32_t cores = anepy_machine_cores(), threads = anepy_machine_threads();
    CHECK(cores >= 1 && cores <= sysconf(_SC_NPROCESSORS_CONF), "%d cores", cores);
    CHECK(threads >= 1 && threads <= 256, "%d threads", threads);
    if (expected_threads != 0)
        CHECK(threads == expected_threads, "%d threads, not %d", threads, expected_threads);
    else CHECK(threads <= cores, "%d threads on %d cores", threads, cores);
    double start = anepy_now_ms(), last = start;
    for (int i = 0; i < 1000; i++) {
        double now = anepy_now_ms();
        CHECK(now >= last, "time runs backwards");
        last = now;
    }
    usleep(2000);
    CHECK(anepy_now_ms() - start >= 2.0, "2 ms take less");
}

static void check_fpmode(void) {
    volatile float small = FLT_MIN, half = 0.5f;
    CHECK(small * half > 0.0f, "subnormals are flushed before anything happened");
    uint64_t outer = anepy_fpmode_enter();
#if defined(__x86_64__) || defined(__aarch64__)
    CHECK(small * half == 0.0f, "subnormals are not flushed inside");
#endif
    uint64_t inner = anepy_fpmode_enter();
    anepy_fpmode_leave(inner);
#if defined(__x86_64__) || defined(__aarch64__)
    CHECK(small * half == 0.0f, "the inner leave ends the outer mode");
#endif
    anepy_fpmode_leave(outer);
    CHECK(small * half > 0.0f, "the mode is not given back");
}

void checks_runtime(void) {
    check_memory();
    check_status();
    check_machine();
    check_fpmode();
}
