/* device/traits.h - the details behind the colon of a device: "m1", "dialect=1.0,budget=60".
 *
 * They say what is known about the hardware. `anepy probe` finds them out, anepy/engine/adapt.py
 * turns its findings into details, and a user may give details instead. */
#ifndef ANEPY_DEVICE_TRAITS_H
#define ANEPY_DEVICE_TRAITS_H

#include "runtime/status.h"

/* Zero: not stated, the device decides. */
typedef struct {
    int32_t chip;           /* m1 to m6: 1 to 6; for the simulator */
    int32_t numerics;       /* numerics=NAME: the index of device/numerics.h; for the simulator */
    int32_t dialect;        /* dialect=1.3 or 1.0: 13 or 10 */
    int32_t budget;         /* budget=N: texts a process may compile, the one in work included */
    int32_t fails;          /* test-fails=N, for tests: the simulator compiles only N texts */
    int32_t surface_nbytes; /* surface=N: surfaces are multiples of it; a multiple of 64 */
    int32_t single;         /* procedures=no: one program per text */
    int32_t fresh;          /* reuse=no: nothing that an earlier run compiled is loaded */
    int32_t dry;            /* run=no: the simulator counts evaluations and computes nothing */
    int32_t timeout_ms;     /* timeout=N: a call that takes longer counts as never returning */
} anepy_traits;

/* detail: NULL or words separated by commas. ANEPY_E_NAME with a sentence otherwise. */
int32_t anepy_traits_parse(anepy_traits *out, const char *detail);

#endif
