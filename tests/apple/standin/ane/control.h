/* control.h - how a test tells the stand-ins what to do, and asks what they have seen.
 *
 * Every private call enters by its name ("loadWithQoS:options:error:", "IOSurfaceLock"). A test may
 * make the nth one fail in one of several ways, count calls, and read the first rule that was
 * broken: a rule is what the hardware would silently get wrong, or crash over. */
#ifndef STANDIN_CONTROL_H
#define STANDIN_CONTROL_H

#include <stdint.h>

#define STANDIN_API __attribute__((visibility("default")))

typedef enum {
    STANDIN_NONE,
    STANDIN_NIL,    /* nil, NULL or nothing */
    STANDIN_REFUSE, /* NO with an NSError, or an error code */
    STANDIN_SILENT, /* NO without an NSError */
    STANDIN_THROW,  /* an exception */
    STANDIN_HANG,   /* does not return until standin_free_hung */
    STANDIN_LIE,    /* claims what is not so: call by call */
    STANDIN_MISSING /* the class or selector is not there */
} standin_fault_kind;

/* The nth call from now, counted from 1; 0: every one. One fault at a time. */
STANDIN_API void standin_fault(const char *call, int64_t nth, int32_t kind);
STANDIN_API int64_t standin_fault_hits(void); /* how often it has struck */
/* No fault, all counters zero, no broken rule, options at their defaults, nothing compiled. */
STANDIN_API void standin_reset(void);
STANDIN_API int64_t standin_calls(const char *call);      /* how often it was called */
STANDIN_API const char *standin_call_name(int32_t index); /* NULL beyond the last */
STANDIN_API const char *standin_broken_rule(void);        /* "" if none was */
STANDIN_API int64_t standin_live(void);                   /* objects and surfaces that exist */
STANDIN_API int64_t standin_objects(void); /* objects of any class, since the first call */
STANDIN_API int64_t standin_loaded(void);  /* programs that are loaded */
STANDIN_API void standin_free_hung(void);  /* lets hung calls return, waits until they have */

/* Options by name: "family" (13 to 17), "engine" (0: none), "framework" (0: does not open),
 * "reverse" (1: symbols in descending order), "shuffle" (1: procedures in descending order),
 * "suffix" (1: output symbols end with @output), "procedures" (0: several functions are refused),
 * "dialect" (10: only 1.0 is taken), "rename" (1: symbols have other names, 2: functions, 3:
 * functions end with @default), "stride" (1: padded rows), "attributes" (0: none), "equal" (1:
 * surfaces of one side must have one size), "wide" (1: surfaces need twice the bytes), "loads"
 * (programs that may be loaded). */
STANDIN_API void standin_set(const char *option, int64_t value);

/* For the stand-ins. */
int64_t standin_get(const char *option);
/* Counts the call; throws or hangs if it is to; else what it is to do. */
standin_fault_kind standin_enter(const char *call);
int standin_missing(const char *call);
int standin_hung(void); /* a call hangs */
void standin_break_rule(const char *format, ...) __attribute__((format(printf, 1, 2)));
void standin_born(void);
void standin_dead(void);
void standin_count_loaded(int64_t change);
void standin_forget_compiled(void); /* engine.m */

#endif
