/* accelerate.c - stand-in for Accelerate's sgemm and its per-thread threading mode.
 *
 * blas_accelerate.c is compiled with dlopen, dlsym and dlerror meaning these. A wrong argument, or
 * a call that would start threads of its own, ends the program. STANDIN_ACCELERATE says what is
 * missing: "framework", "sgemm", or "threading" (as before macOS 15). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PATH "/System/Library/Frameworks/Accelerate.framework/Accelerate"

void *accelerate_dlopen(const char *path, int mode);
void *accelerate_dlsym(void *library, const char *name);
char *accelerate_dlerror(void);

static _Thread_local unsigned mode; /* 0: Accelerate decides, 1: single-threaded */

static int lacks(const char *what) {
    const char *text = getenv("STANDIN_ACCELERATE");
    return text != NULL && strcmp(text, what) == 0;
}

static void need(int ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "stand-in Accelerate: %s\n", what);
    _Exit(3);
}

static unsigned get_threading(void) { return mode; }

static int set_threading(unsigned wanted) {
    need(wanted < 2, "no such threading mode");
    mode = wanted;
    return 0;
}

/* The thread that ends the program called products, and has its mode back. */
__attribute__((destructor)) static void check_mode(void) {
    need(mode == 0, "a mode was not given back");
}

static void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k,
                        float alpha, const float *a, int lda, const float *b, int ldb, float beta,
                        float *c, int ldc) {
    int ta = transpose_a == 112, tb = transpose_b == 112;
    need(order == 101, "not row-major");
    need(ta || transpose_a == 111, "transpose_a");
    need(tb || transpose_b == 111, "transpose_b");
    need(m > 0 && n > 0 && k > 0, "an empty product");
    need(lda >= (ta ? m : k) && ldb >= (tb ? k : n) && ldc >= n, "a leading dimension");
    need(alpha == 1.0f && (beta == 0.0f || beta == 1.0f), "a factor");
    need(mode == 1 || lacks("threading"), "a call that may start threads");
    for (int i = 0; i < m; i++) {
        for (int j = 0; j < n; j++) {
            float sum = 0.0f;
            for (int p = 0; p < k; p++)
                sum += (ta ? a[(size_t)p * (size_t)lda + (size_t)i]
                           : a[(size_t)i * (size_t)lda + (size_t)p]) *
                       (tb ? b[(size_t)j * (size_t)ldb + (size_t)p]
                           : b[(size_t)p * (size_t)ldb + (size_t)j]);
            float *at = c + (size_t)i * (size_t)ldc + (size_t)j;
            *at = beta == 0.0f ? sum : sum + *at;
        }
    }
}

void *accelerate_dlopen(const char *path, int how) {
    need(strcmp(path, PATH) == 0 && how != 0, "another path");
    return lacks("framework") ? NULL : &mode;
}

void *accelerate_dlsym(void *library, const char *name) {
    need(library != NULL, "a symbol of nothing");
    if (strcmp(name, "cblas_sgemm") == 0)
        return lacks("sgemm") ? NULL : (void *)(size_t)cblas_sgemm;
    if (lacks("threading")) return NULL;
    if (strcmp(name, "BLASGetThreading") == 0) return (void *)(size_t)get_threading;
    return strcmp(name, "BLASSetThreading") == 0 ? (void *)(size_t)set_threading : NULL;
}

char *accelerate_dlerror(void) {
    static char text[] = "image not found";
    return text;
}
