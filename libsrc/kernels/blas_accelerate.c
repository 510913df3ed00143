/* kernels/blas_accelerate.c - Apple's Accelerate, opened when it is first needed.
 *
 * Accelerate would use threads of its own inside each call. From macOS 15 a thread can switch that
 * off for its calls; each of our calls does, and restores the setting for the caller's numpy.
 * Before macOS 15 only VECLIB_MAXIMUM_THREADS=1 in the environment does it; without it our calls
 * are right, but compete with each other for cores. */
#include "kernels/blas.h"

#ifdef __APPLE__
#include <dlfcn.h>
#include <pthread.h>

#define PATH "/System/Library/Frameworks/Accelerate.framework/Accelerate"

/* Values of Accelerate's cblas.h and thread_api.h, whose names differ between SDKs. */
enum { ROW_MAJOR = 101, AS_IT_IS = 111, TRANSPOSED = 112 };
enum { SINGLE_THREADED = 1 };
typedef void (*sgemm_fn)(int order, int transpose_a, int transpose_b, int m, int n, int k,
                         float alpha, const float *a, int lda, const float *b, int ldb, float beta,
                         float *c, int ldc);

static pthread_once_t once = PTHREAD_ONCE_INIT;
static sgemm_fn cblas_sgemm_found;
static unsigned (*get_threading)(void);
static int (*set_threading)(unsigned threading);
static char sentence[256];

static void find(void) {
    void *library = dlopen(PATH, RTLD_LAZY | RTLD_LOCAL);
    if (library != NULL) cblas_sgemm_found = (sgemm_fn)dlsym(library, "cblas_sgemm");
    if (cblas_sgemm_found == NULL) {
        anepy_fail(ANEPY_E_UNAVAILABLE, "ANEPY_BLAS=accelerate: %s",
                   library != NULL ? "Accelerate has no cblas_sgemm" : dlerror());
        anepy_last_error(sentence, sizeof sentence);
        return;
    }
    get_threading = (unsigned (*)(void))dlsym(library, "BLASGetThreading");
    set_threading = (int (*)(unsigned))dlsym(library, "BLASSetThreading");
}

static void sgemm(int transpose_a, int transpose_b, int m, int n, int k, const float *a, int lda,
                  const float *b, int ldb, float beta, float *c, int ldc) {
    int can = get_threading != NULL && set_threading != NULL;
    unsigned before = can ? get_threading() : SINGLE_THREADED;
    if (/* mutate: blas-one-thread */ before != SINGLE_THREADED) set_threading(SINGLE_THREADED);
    cblas_sgemm_found(ROW_MAJOR, transpose_a ? TRANSPOSED : AS_IT_IS,
                      /* mutate: blas-transposed-b */ transpose_b ? TRANSPOSED : AS_IT_IS, m, n, k,
                      1.0f, a, lda, b, ldb, beta, c, ldc);
    if (/* mutate: blas-threads-given-back */ before != SINGLE_THREADED) set_threading(before);
}

static const anepy_blas ACCELERATE = {"Accelerate sgemm", sgemm};

const anepy_blas *anepy_blas_accelerate(void) {
    pthread_once(&once, find);
    if (cblas_sgemm_found != NULL) return &ACCELERATE;
    anepy_fail(ANEPY_E_UNAVAILABLE, "%s", sentence);
    return NULL;
}
#else
const anepy_blas *anepy_blas_accelerate(void) {
    anepy_fail(ANEPY_E_UNAVAILABLE,
               "ANEPY_BLAS=accelerate: this build has no Accelerate (it needs macOS)");
    return NULL;
}
#endif
