/* device/ane/framework.h - the private classes, described so that the compiler checks every message
 * (docs/neural-engine.md#calls), and the calls into them under a time limit. Objective-C only. */
#ifndef ANEPY_DEVICE_ANE_FRAMEWORK_H
#define ANEPY_DEVICE_ANE_FRAMEWORK_H

#import <Foundation/Foundation.h>
#import <IOSurface/IOSurface.h>

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

#include "device/ane/ane.h"
#include "device/ane/lane.h"

/* The framework's classes, under names of ours. None is implemented here. */

@protocol AnepyDescriptorClass
+ (id)modelWithMILText:(NSData *)text
               weights:(NSDictionary *)weights
          optionsPlist:(NSData *)options;
@end

@protocol AnepyLoadedModel <NSObject>
- (NSIndexSet *)inputSymbolIndicesForProcedureIndex:(unsigned int)index;
- (NSIndexSet *)outputSymbolIndicesForProcedureIndex:(unsigned int)index;
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
- (NSDictionary *)modelAttributes;
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
    pthread_mutex_t turn; /* held by the caller whose job it is */
    anepy_lane *lane;     /* NULL until needed */
} anepy_slot;

struct anepy_ane {
    _Atomic int32_t users; /* the owner, programs, and jobs that nobody waits for */
    pid_t pid;             /* the process it works in */
    anepy_ane_limits limits;
    anepy_classes classes;
    anepy_slot work, compile;
    _Atomic int32_t hung;  /* a call has not returned */
    pthread_mutex_t mutex; /* of failure */
    char failure[400];     /* why nothing is asked of the device any more; "": it works */
};

void anepy_ane_hold(anepy_ane *ane);
void anepy_ane_drop(anepy_ane *ane);

/* In a process that was forked from the one that opened the device: nothing works here, and nothing
 * is to be freed. */
int32_t anepy_ane_forked(const anepy_ane *ane);

/* Runs the job in a slot. OK: the caller reads and drops it. Else it is no longer the caller's; one
 * that took longer poisons the device. what: the beginning of the error sentence. */
int32_t anepy_ane_call(anepy_ane *ane, anepy_slot *slot, anepy_job *job, double seconds,
                       const char *what);

/* "Domain 6: description", on one line. A failing call may well give no NSError. */
const char *anepy_ane_error(NSError *error);

#endif
