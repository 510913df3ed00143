/* system.m - the few calls of macOS itself, and the look-ups by name that a test may make fail. The
 * linker turns the library's calls of these functions into __wrap_ ones. */
#import <Foundation/Foundation.h>

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <time.h>

#include "control.h"

#define FRAMEWORKS "/System/Library/"

void *__real_dlopen(const char *path, int mode);
void *__wrap_dlopen(const char *path, int mode);
char *__real_dlerror(void);
char *__wrap_dlerror(void);
Class __real_NSClassFromString(NSString *name);
Class __wrap_NSClassFromString(NSString *name);
NSString *__real_NSTemporaryDirectory(void);
NSString *__wrap_NSTemporaryDirectory(void);

static _Thread_local const char *failure;

/* The frameworks are in this library already. */
void *__wrap_dlopen(const char *path, int mode) {
    failure = NULL;
    if (path == NULL || strncmp(path, FRAMEWORKS, strlen(FRAMEWORKS)) != 0)
        return __real_dlopen(path, mode);
    if (standin_enter("dlopen") != STANDIN_NIL && standin_get("framework"))
        return __real_dlopen(NULL, mode);
    failure = "image not found";
    return NULL;
}

char *__wrap_dlerror(void) {
    char *text = failure != NULL ? (char *)failure : __real_dlerror();
    failure = NULL;
    return text;
}

/* A class of another macOS, where a selector of the same name takes something else. */
@interface StandinOtherModel : NSObject
@end

@implementation StandinOtherModel
- (NSDictionary *)modelAttributes {
    return nil;
}
- (NSIndexSet *)inputSymbolIndicesForProcedureIndex:(NSNumber *)index {
    standin_break_rule("a selector with other arguments was called");
    return nil;
}
@end

Class __wrap_NSClassFromString(NSString *name) {
    if (standin_get("types") && [name isEqualToString:@"_ANEModel"])
        name = @"StandinOtherModel";
    return standin_missing([name UTF8String]) ? Nil : __real_NSClassFromString(name);
}

/* GNUstep makes a folder of its own in it; macOS does not. */
NSString *__wrap_NSTemporaryDirectory(void) {
    if (standin_enter("NSTemporaryDirectory") == STANDIN_NIL) return nil;
    const char *folder = getenv("TMPDIR");
    return [NSString stringWithFormat:@"%s/", folder != NULL ? folder : "/tmp"];
}

int pthread_set_qos_class_self_np(unsigned int qos, int relative) {
    (void)qos, (void)relative;
    return 0;
}

/* Time is up when a call hangs, and only then: no test depends on how fast the machine is. */
int pthread_cond_timedwait_relative_np(pthread_cond_t *condition, pthread_mutex_t *mutex,
                                       const struct timespec *wait) {
    (void)wait;
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_nsec += 1000000;
    if (end.tv_nsec >= 1000000000) end.tv_sec++, end.tv_nsec -= 1000000000;
    int result = pthread_cond_timedwait(condition, mutex, &end);
    return result == ETIMEDOUT && !standin_hung() ? 0 : result;
}

@implementation NSData (Standin)
+ (id)dataWithContentsOfFile:(NSString *)path
                     options:(NSDataReadingOptions)options
                       error:(NSError **)error {
    standin_fault_kind fault = standin_enter("dataWithContentsOfFile:options:error:");
    id data = fault != STANDIN_NONE                 ? nil
              : options & NSDataReadingMappedIfSafe ? [self dataWithContentsOfMappedFile:path]
                                                    : [self dataWithContentsOfFile:path];
    if (data == nil && fault != STANDIN_SILENT)
        *error = [NSError errorWithDomain:NSPOSIXErrorDomain code:ENOENT userInfo:nil];
    return data;
}
@end
