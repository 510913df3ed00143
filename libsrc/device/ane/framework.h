/* device/ane/framework.h - the private classes, and calls into them under a time limit.
 *
 * The protocols let the compiler check every message (docs/neural-engine.md#calls). Objective-C
 * only. */
#ifndef ANEPY_DEVICE_ANE_FRAMEWORK_H
#define ANEPY_DEVICE_ANE_FRAMEWORK_H

#import <Foundation/Foundation.h>
#import <IOSurface/IOSurface.h>

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

#include "device/ane/ane.h"
#include "device/ane/lane.h"

/* Methods of the framework's classes, as protocols with names of our own. */

@protocol AnepyDescriptorClass
+ (id)modelWithMILText:(NSData *)text
               weights:(NSDictionary *)weights
          optionsPlist:(NSData *)options;
@end

@protocol AnepyLoadedModel <NSObject>
- (NSIndexSet *)inputSymbolIndicesForProcedureIndex:(unsigned int)index;
- (NSIndexSet *)outputSymbolIndicesForProcedureIndex:(unsigned int)index;
- (NSDictionary *)modelAttributes;
@end

@protocol AnepyModel <NSObject>
+ (id)inMemoryModelWithDescriptor:(id)descriptor;
- (void)setModelURL:(NSURL *)folder;
- (BOOL)compiledModelExists;
- (void)purgeCompiledModel;
- (BOOL)compileWithQoS:(unsigned int)qos options:(NSDictionary *)options error:(NSError **)error;
- (BOOL)loadWithQoS:(unsigned int)qos options:(NSDictionary *)options error:(NSError **)error;
- (BOOL)unloadWithQoS:(unsigned int)qos error:(NSError **)error;
- (BOOL)evaluateWithQoS:(unsigned int)qos
                options:(NSDictionary *)options
                request:(id)request
                  error:(NSError **)error;
- (id)model;
@end

@protocol AnepyRequestClass
+ (id)requestWithInputs:(NSArray *)inputs
           inputIndices:(NSArray *)inputIndices
                outputs:(NSArray *)outputs
          outputIndices:(NSArray *)outputIndices
          weightsBuffer:(id)weights
              perfStats:(id)statistics
         procedureIndex:(NSNumber *)procedure;
@end

@protocol AnepySurfaceClass
+ (id)objectWithIOSurface:(IOSurfaceRef)surface;
@end

@protocol AnepyDeviceInfoClass
+ (BOOL)hasANE;
+ (NSString *)aneSubType;
@end

typedef struct {
    Class<AnepyDescriptorClass> descriptor;
    Class<AnepyModel> model;
    Class<AnepyRequestClass> request;
    Class<AnepySurfaceClass> surface;
} anepy_classes;

/* Two lanes, so that a compilation does not hold up evaluations. */
typedef struct {
    pthread_mutex_t turn; /* held by the caller whose job runs */
    anepy_lane *lane;     /* made with the first job */
} anepy_slot;

struct anepy_ane {
    _Atomic int32_t users; /* references: the owner, programs, abandoned jobs */
    pid_t pid;             /* the process it works in */
    anepy_ane_limits limits;
    anepy_classes classes;
    anepy_slot work, compile;
    _Atomic int32_t hung;  /* a call has not returned */
    pthread_mutex_t mutex; /* of failure */
    char failure[400];     /* what poisoned the device; "": it works */
};

void anepy_ane_hold(anepy_ane *ane);
void anepy_ane_drop(anepy_ane *ane);

/* Whether this process was forked from the one that opened the device: then nothing works, and
 * nothing may be freed. */
int32_t anepy_ane_forked(const anepy_ane *ane);

/* Runs the job in a slot. After OK the caller reads and drops the job; otherwise the job belongs to
 * its lane, and one that took too long poisons the device. what begins the error sentence. */
int32_t anepy_ane_call(anepy_ane *ane, anepy_slot *slot, anepy_job *job, double seconds,
                       const char *what);

/* "Domain 6: description" on one line, with what a code is known to mean before the description; a
 * failing call may give no NSError (nil). */
const char *anepy_ane_error(NSError *error);

#endif
