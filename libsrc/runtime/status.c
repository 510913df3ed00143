/* runtime/status.c - status names and the per-thread error sentence. */
#include "runtime/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char last_error[512];

int32_t anepy_fail(int32_t status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof last_error, format, args);
    va_end(args);
    return status;
}

int32_t anepy_last_error(char *buf, uint64_t cap) {
    size_t length = strlen(last_error);
    if (buf != NULL && cap > 0) {
        size_t n = length < cap - 1 ? length : (size_t)cap - 1;
        memcpy(buf, last_error, n);
        buf[n] = '\0';
    }
    return (int32_t)length;
}

const char *anepy_status_name(int32_t status) {
    switch (status) {
    case ANEPY_OK: return "ok";
    case ANEPY_E_ARGUMENT: return "argument";
    case ANEPY_E_NAME: return "name";
    case ANEPY_E_TOKEN: return "token";
    case ANEPY_E_PROGRAM: return "program";
    case ANEPY_E_MEMORY: return "memory";
    case ANEPY_E_BUSY: return "busy";
    case ANEPY_E_STATE: return "state";
    case ANEPY_E_DEVICE: return "device";
    case ANEPY_E_UNAVAILABLE: return "unavailable";
    case ANEPY_E_BUDGET: return "budget";
    case ANEPY_E_UNSUPPORTED: return "unsupported";
    case ANEPY_E_SYSTEM: return "system";
    default: return "unknown";
    }
}
