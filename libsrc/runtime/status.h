/* runtime/status.h - how functions report failure: a code for programs, a sentence for people. */
#ifndef ANEPY_RUNTIME_STATUS_H
#define ANEPY_RUNTIME_STATUS_H

#include "anepy.h"
#include "runtime/common.h"

/* Stores the sentence for this thread and returns status, so that callers write
 * `return anepy_fail(ANEPY_E_ARGUMENT, "...")`. */
int32_t anepy_fail(int32_t status, const char *format, ...) ANEPY_PRINTF(2, 3);

#define ANEPY_TRY(call)                                                                            \
    do {                                                                                           \
        int32_t try_status_ = (call);                                                              \
        if (try_status_ != ANEPY_OK) return try_status_;                                           \
    } while (0)

#endif
