/* fixture.h - a small model with random weights and its four arenas, for checks of whole engines.
 */
#ifndef FIXTURE_H
#define FIXTURE_H

#include "anepy.h"

typedef struct {
    anepy_config config;
    anepy_model *model;
    int64_t n;             /* parameters */
    const char *precision; /* on device cpu; NULL: fp32 */
    float *params, *grads, *adam_m, *adam_v;
    int32_t *tokens, *targets; /* config.seq_len each */
} fixture;

/* 0: grouped-query attention, tied; 1: one head per KV head, separate classifier, odd sizes; 2: one
 * head of two channels, one layer. FIXTURE_LONG: sequences of many blocks. */
#define FIXTURE_N 3
#define FIXTURE_LONG FIXTURE_N
fixture fixture_make(int which);
void fixture_free(fixture *f);

/* An engine over the arenas, on the cpu unless said otherwise; NULL after a failed check. */
anepy_engine *fixture_engine(fixture *f, const char *variant, int32_t threads);
anepy_engine *fixture_engine_on(fixture *f, const char *device, const char *variant,
                                int32_t threads);
anepy_engine_options fixture_options(const fixture *f);

/* As after so many steps since the last of so many updates. */
int32_t fixture_restore(anepy_engine *engine, int64_t accumulated, int64_t updates);

/* Gradients, moments and weights as fixture_make leaves them. */
void fixture_reset(fixture *f);

/* An arena by itself: zeroed, exactly as long as the library may read, so that sanitizers see a
 * step beyond. */
float *fixture_exact(int64_t n);

/* Largest difference of a * factor and b, relative to the largest of b; infinity if one is NaN. */
double fixture_difference(const float *a, const float *b, int64_t n, double factor);

#endif
