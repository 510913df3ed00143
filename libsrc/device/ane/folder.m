/* device/ane/folder.m - temporary folders: unique, private, removed after success and failure. */
#import <Foundation/Foundation.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "device/ane/ane.h"
#include "device/ane/folder.h"

#define PREFIX "anepy-" /* followed by the process number and six random characters */

static _Atomic int32_t used; /* 1: this process made a folder since exec */

/* NSTemporaryDirectory, which on macOS is the user's own. */
static int32_t temporary(char *path, size_t cap) {
    size_t n = 0;
    @autoreleasepool {
        const char *name = [NSTemporaryDirectory() fileSystemRepresentation];
        if (name != NULL && strlen(name) < cap) n = (size_t)snprintf(path, cap, "%s", name);
    }
    while (n > 1 && path[n - 1] == '/') path[--n] = '\0';
    return n > 0 ? ANEPY_OK
                 : anepy_fail(ANEPY_E_SYSTEM, "device ane: there is no temporary folder");
}

static int32_t write_file(const char *path, const void *data, uint64_t n) {
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    const char *p = data;
    int error = file < 0 ? errno : 0;
    while (error == 0 && n > 0) {
        ssize_t written = write(file, p, n < (1u << 30) ? (size_t)n : 1u << 30);
        if (written < 0 && errno == EINTR) continue;
        if (written < 0) error = errno;
        else p += written, n -= (uint64_t)written;
    }
    if (file >= 0 && close(file) != 0 && error == 0) error = errno;
    if (error == 0) return ANEPY_OK;
    return anepy_fail(ANEPY_E_SYSTEM, "device ane: cannot write %.300s: %s", path, strerror(error));
}

void anepy_folder_remove(const char *path) {
    if (path[0] == '\0') return;
    @autoreleasepool {
        NSString *name = [NSString stringWithUTF8String:path];
        [[NSFileManager defaultManager] removeItemAtPath:name error:NULL];
    }
}

int32_t anepy_folder_weight_name(const char **name, const char *path) {
    static const char START[] = "@model_path/weights/";
    const char *file = path + strlen(START);
    if (strncmp(path, START, strlen(START)) != 0 || *file == '\0' || *file == '.' ||
        strchr(file, '/') != NULL)
        return anepy_fail(ANEPY_E_ARGUMENT, "device ane: weight file '%.200s' is not %sNAME", path,
                          START);
    *name = path + strlen("@model_path/");
    return ANEPY_OK;
}

int32_t anepy_folder_weights(const char *path, const anepy_trial_source *source) {
    char name[2 * PATH_MAX];
    const char *file;
    for (int32_t i = 0; i < source->file_n; i++) {
        ANEPY_TRY(anepy_folder_weight_name(&file, source->paths[i]));
        snprintf(name, sizeof name, "%s/%s", path, file);
        ANEPY_TRY(write_file(name, source->files[i], source->file_nbytes[i]));
    }
    return ANEPY_OK;
}

static int32_t fill(const char *path, const anepy_trial_source *source) {
    char name[PATH_MAX + 32];
    snprintf(name, sizeof name, "%s/model.mil", path);
    ANEPY_TRY(write_file(name, source->text, source->text_n));
    snprintf(name, sizeof name, "%s/weights", path);
    if (source->file_n > 0 && mkdir(name, 0700) != 0)
        return anepy_fail(ANEPY_E_SYSTEM, "device ane: cannot create %.300s: %s", name,
                          strerror(errno));
    return anepy_folder_weights(path, source);
}

int32_t anepy_folder_create(char *path, size_t cap, const anepy_trial_source *source) {
    char root[PATH_MAX];
    path[0] = '\0';
    ANEPY_TRY(temporary(root, sizeof root));
    if (snprintf(path, cap, "%s/" PREFIX "%ld-XXXXXX", root, (long)getpid()) >= (int)cap ||
        mkdtemp(path) == NULL) {
        path[0] = '\0';
        return anepy_fail(ANEPY_E_SYSTEM, "device ane: cannot create a folder in %.300s: %s", root,
                          strerror(errno));
    }
    atomic_store(&used, 1);
    int32_t status = fill(path, source);
    if (status == ANEPY_OK) return ANEPY_OK;
    anepy_folder_remove(path);
    path[0] = '\0';
    return status;
}

/* Whether the process that made a folder is gone: killed, or replaced by exec, which keeps its
 * number. */
static int left_behind(long pid) {
    if (pid == getpid()) return !atomic_load(&used);
    return kill((pid_t)pid, 0) != 0 && errno == ESRCH;
}

void anepy_folder_sweep(void) {
    char root[PATH_MAX], path[2 * PATH_MAX];
    DIR *folder = temporary(root, sizeof root) == ANEPY_OK ? opendir(root) : NULL;
    if (folder == NULL) return;
    struct dirent *entry;
    while ((entry = readdir(folder)) != NULL) {
        char *end = NULL;
        if (strncmp(entry->d_name, PREFIX, strlen(PREFIX)) != 0) continue;
        long pid = strtol(entry->d_name + strlen(PREFIX), &end, 10);
        if (pid <= 0 || *end != '-' || strlen(end) != 7) continue;
        if (!left_behind(pid)) continue;
        snprintf(path, sizeof path, "%s/%s", root, entry->d_name);
        anepy_folder_remove(path);
    }
    closedir(folder);
}

int32_t anepy_ane_keep(const char *text, uint64_t text_n, char *path, uint64_t path_cap) {
    char root[PATH_MAX], name[PATH_MAX + 64];
    ANEPY_TRY(temporary(root, sizeof root));
    snprintf(name, sizeof name, "%s/anepy-refused-%ld.mil", root, (long)getpid());
    ANEPY_TRY(write_file(name, text, text_n));
    snprintf(path, path_cap, "%s", name);
    return ANEPY_OK;
}
