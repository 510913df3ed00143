/* kernels/blas.c - which library multiplies. */
#include "kernels/blas.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static const anepy_blas *chosen;
static int32_t status;
static char sentence[256];

static void choose(void) {
    const char *name = getenv("ANEPY_BLAS");
    if (name == NULL || name[0] == '\0') { /* no choice: use it if it is there */
        chosen = anepy_blas_accelerate();
        return;
    }
    if (strcmp(name, "accelerate") == 0) {
        chosen = anepy_blas_accelerate();
        status = chosen != NULL ? ANEPY_OK : ANEPY_E_UNAVAILABLE;
    } else if (strcmp(name, "own") != 0) {
        status =
            anepy_fail(ANEPY_E_NAME, "ANEPY_BLAS=%.32s is unknown: use own or accelerate", name);
    }
    if (status != ANEPY_OK) anepy_last_error(sentence, sizeof sentence);
}

int32_t anepy_blas_get(const anepy_blas **out) {
    pthread_once(&once, choose);
    *out = chosen;
    return status == ANEPY_OK ? ANEPY_OK : anepy_fail(status, "%s", sentence);
}
