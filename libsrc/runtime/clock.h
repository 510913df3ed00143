/* runtime/clock.h - monotonic time. */
#ifndef ANEPY_RUNTIME_CLOCK_H
#define ANEPY_RUNTIME_CLOCK_H

double anepy_now_ms(void);

#endif
