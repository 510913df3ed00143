/* runtime/machine.c - cores, affinity, cgroup quota, a cache, AMX.
 *
 * os.cpu_count() is the wrong default in containers: eight threads on a quota of four CPUs are many
 * times slower than four. */
#define _GNU_SOURCE
#include "runtime/machine.h"

#include "runtime/common.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef __APPLE__
#include <sys/sysctl.h>
#else
#include <sched.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#endif

#define MAX_THREADS 256

static pthread_once_t once = PTHREAD_ONCE_INIT;
static int32_t cores_found = 1;
static int32_t threads_found = 1;
static int64_t cache_found;

#ifdef __APPLE__
static int32_t count_cores(void) {
    int32_t n = 0;
    size_t size = sizeof n;
    if (sysctlbyname("hw.perflevel0.physicalcpu", &n, &size, NULL, 0) == 0 && n > 0) return n;
    size = sizeof n;
    if (sysctlbyname("hw.physicalcpu", &n, &size, NULL, 0) == 0 && n > 0) return n;
    return 1;
}

static double cpu_quota(void) { return 0.0; }

static int64_t second_cache(void) { return 0; } /* shared by a cluster of cores there */

int anepy_machine_grants_tiles(void) { return 0; }

int anepy_machine_has_bf16(void) {
    int32_t value = 0;
    size_t size = sizeof value;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &value, &size, NULL, 0) == 0 && value != 0;
}
#else
int anepy_machine_has_bf16(void) {
#if defined(__aarch64__)
    return (getauxval(AT_HWCAP2) & 1u << 14) != 0; /* HWCAP2_BF16, which old headers lack */
#else
    return 0;
#endif
}

int anepy_machine_grants_tiles(void) {
#if defined(__x86_64__) && defined(SYS_arch_prctl)
    const int request_permission = 0x1023, tile_data = 18; /* asm/prctl.h, since Linux 5.16 */
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return 0;
#endif
}

/* Whether this CPU is the first of its SMT siblings; without topology it counts as a core. */
static int is_first_sibling(int cpu) {
    char path[96];
    int first = cpu;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    FILE *file = fopen(path, "re");
    if (file == NULL) return 1;
    if (fscanf(file, "%d", &first) != 1) first = cpu;
    fclose(file);
    return first == cpu;
}

static int32_t count_cores(void) {
    cpu_set_t set;
    int32_t all = 0, first = 0;
    if (sched_getaffinity(0, sizeof set, &set) != 0) {
        long online = sysconf(_SC_NPROCESSORS_ONLN);
        return online > 0 ? (int32_t)online : 1;
    }
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &set)) continue;
        all++;
        first += is_first_sibling(cpu);
    }
    /* A mask that has only second siblings: each is a core. */
    return first > 0 ? first : (all > 0 ? all : 1);
}

/* CPUs granted by "quota period" of one file; 0 = unlimited or unreadable. */
static double read_quota(const char *quota_path, const char *period_path) {
    char quota[32] = "";
    double period = 100000.0;
    FILE *file = fopen(quota_path, "re");
    if (file == NULL) return 0.0;
    int fields = fscanf(file, "%31s %lf", quota, &period);
    fclose(file);
    if (fields < 1) return 0.0;
    if (period_path != NULL && (file = fopen(period_path, "re")) != NULL) {
        if (fscanf(file, "%lf", &period) != 1) period = 100000.0;
        fclose(file);
    }
    double value = strtod(quota, NULL); /* "max" reads as 0, -1 means unlimited */
    return value > 0.0 && period > 0.0 ? value / period : 0.0;
}

/* Whether "cpu" is among the comma-separated controllers of a version 1 hierarchy. */
static int has_cpu(const char *controllers) {
    for (const char *at = controllers; *at != '\0'; at += strcspn(at, ",")) {
        at += *at == ',';
        if (strncmp(at, "cpu", 3) == 0 && (at[3] == ',' || at[3] == '\0')) return 1;
    }
    return 0;
}

/* The lowest limit of our cgroup and its parents, in versions 1 and 2; version 2 names no
 * controllers. */
static double cpu_quota(void) {
    double best = 0.0;
    char line[512], path[640], period[640];
    FILE *file = fopen("/proc/self/cgroup", "re");
    if (file == NULL) return 0.0;
    while (fgets(line, sizeof line, file) != NULL) {
        char *controllers = strchr(line, ':');
        char *group = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
        if (group == NULL) continue;
        *controllers++ = *group++ = '\0';
        group[strcspn(group, "\n")] = '\0';
        int version2 = controllers[0] == '\0';
        if (!version2 && !has_cpu(controllers)) continue;
        for (;;) {
            snprintf(path, sizeof path, "/sys/fs/cgroup%s%s/%s", version2 ? "" : "/cpu", group,
                     version2 ? "cpu.max" : "cpu.cfs_quota_us");
            snprintf(period, sizeof period, "/sys/fs/cgroup/cpu%s/cpu.cfs_period_us", group);
            double quota = read_quota(path, version2 ? NULL : period);
            if (quota > 0.0 && (best == 0.0 || quota < best)) best = quota;
            char *slash = strrchr(group, '/');
            if (slash == NULL) break;
            *slash = '\0';
        }
    }
    fclose(file);
    return best;
}

static int64_t second_cache(void) {
#ifdef _SC_LEVEL2_CACHE_SIZE
    return anepy_max_i64(0, sysconf(_SC_LEVEL2_CACHE_SIZE));
#else
    return 0; /* musl does not know */
#endif
}
#endif

static void find(void) {
    cache_found = second_cache();
    cores_found = count_cores();
    threads_found = cores_found;
    double quota = cpu_quota();
    if (quota > 0.0 && quota < threads_found) threads_found = quota >= 1.0 ? (int32_t)quota : 1;
    const char *wanted = getenv("ANEPY_NUM_THREADS");
    long n = wanted != NULL ? strtol(wanted, NULL, 10) : 0;
    if (n > 0) threads_found = (int32_t)n;
    if (threads_found > MAX_THREADS) threads_found = MAX_THREADS;
}

int32_t anepy_machine_cores(void) {
    pthread_once(&once, find);
    return cores_found;
}

int32_t anepy_machine_threads(void) {
    pthread_once(&once, find);
    return threads_found;
}

int64_t anepy_machine_second_cache(void) {
    pthread_once(&once, find);
    return cache_found;
}
