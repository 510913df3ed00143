/* framework.m - AppleNeuralEngine.framework for Linux: the private classes, as strict as the real
 * ones are known to be (docs/neural-engine.md#calls), and stricter where those fail silently. */
#import <Foundation/Foundation.h>
#import <IOSurface/IOSurface.h>

#include <objc/runtime.h>
#include <stdlib.h>
#include <string.h>

#include "control.h"
#include "engine.h"
#include "surface.h"

#define SMALLEST 49152 /* surfaces below this fail on some chips */
#define PORTS 128
#define ENTER(selector) standin_fault_kind fault = standin_enter(selector)

/* Objects that are counted, and whose selectors a test can take away. */
@interface StandinObject : NSObject
@end

@implementation StandinObject
+ (id)allocWithZone:(NSZone *)zone {
    standin_born();
    return [super allocWithZone:zone];
}
- (void)dealloc {
    standin_dead();
    [super dealloc];
}
+ (BOOL)respondsToSelector:(SEL)selector {
    return !standin_missing(sel_getName(selector)) && [super respondsToSelector:selector];
}
+ (BOOL)instancesRespondToSelector:(SEL)selector {
    return !standin_missing(sel_getName(selector)) && [super instancesRespondToSelector:selector];
}
@end

static NSError *error_of(NSString *domain, int code, NSString *text) {
    return [NSError errorWithDomain:domain
                               code:code
                           userInfo:[NSDictionary dictionaryWithObject:text
                                                                forKey:NSLocalizedDescriptionKey]];
}

/* NO, with an error unless a test wants none. */
static BOOL refuse(NSError **error, standin_fault_kind fault, NSString *domain, int code,
                   NSString *text) {
    if (error == NULL) standin_break_rule("an NSError was not asked for");
    else if (fault != STANDIN_SILENT) *error = error_of(domain, code, text);
    return NO;
}

/* --------------------------------------------------------------------------------- small classes
 */

@interface _ANEDeviceInfo : StandinObject
@end

@implementation _ANEDeviceInfo
+ (BOOL)hasANE {
    ENTER("hasANE");
    return fault == STANDIN_NONE && standin_get("engine") != 0;
}
+ (NSString *)aneSubType {
    ENTER("aneSubType");
    return fault == STANDIN_NIL ? nil
                                : [NSString stringWithFormat:@"h%d", (int)standin_get("family")];
}
@end

@interface _ANEIOSurfaceObject : StandinObject {
  @public
    IOSurfaceRef surface;
}
@end

@implementation _ANEIOSurfaceObject
+ (id)objectWithIOSurface:(IOSurfaceRef)surface {
    ENTER("objectWithIOSurface:");
    if (fault == STANDIN_NIL) return nil;
    _ANEIOSurfaceObject *object = [[[self alloc] init] autorelease];
    object->surface = (IOSurfaceRef)CFRetain(surface);
    return object;
}
- (void)dealloc {
    CFRelease(surface);
    [super dealloc];
}
@end

@interface _ANERequest : StandinObject {
  @public
    NSArray *surfaces[2], *indices[2];
    NSNumber *procedure;
}
@end

@implementation _ANERequest
+ (id)requestWithInputs:(NSArray *)inputs
           inputIndices:(NSArray *)inputIndices
                outputs:(NSArray *)outputs
          outputIndices:(NSArray *)outputIndices
          weightsBuffer:(id)weights
              perfStats:(id)statistics
         procedureIndex:(NSNumber *)procedure {
    ENTER("requestWithInputs:inputIndices:outputs:outputIndices:weightsBuffer:perfStats:"
          "procedureIndex:");
    if (weights != nil || statistics != nil || procedure == nil ||
        [inputs count] != [inputIndices count] || [outputs count] != [outputIndices count])
        standin_break_rule("a request is malformed");
    if (fault == STANDIN_NIL) return nil;
    _ANERequest *request = [[[self alloc] init] autorelease];
    request->surfaces[0] = [inputs copy];
    request->surfaces[1] = [outputs copy];
    request->indices[0] = [inputIndices copy];
    request->indices[1] = [outputIndices copy];
    request->procedure = [procedure retain];
    return request;
}
- (void)dealloc {
    for (int side = 0; side < 2; side++) {
        [surfaces[side] release];
        [indices[side] release];
    }
    [procedure release];
    [super dealloc];
}
@end

@interface _ANEInMemoryModelDescriptor : StandinObject {
  @public
    NSData *text;
    NSDictionary *weights;
}
- (NSString *)name;
@end

@implementation _ANEInMemoryModelDescriptor
+ (id)modelWithMILText:(NSData *)text
               weights:(NSDictionary *)weights
          optionsPlist:(NSData *)options {
    ENTER("modelWithMILText:weights:optionsPlist:");
    if (fault == STANDIN_NIL) return nil;
    if (![text isKindOfClass:[NSData class]] || ![weights isKindOfClass:[NSDictionary class]] ||
        options != nil)
        return nil;
    _ANEInMemoryModelDescriptor *descriptor = [[[self alloc] init] autorelease];
    descriptor->text = [text retain];
    descriptor->weights = [weights retain];
    return descriptor;
}
- (void)dealloc {
    [text release];
    [weights release];
    [super dealloc];
}
static uint64_t hash(uint64_t h, const void *data, size_t n) {
    const uint8_t *p = data;
    for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}
- (NSString *)name {
    uint64_t h = hash(0xcbf29ce484222325u, [text bytes], [text length]);
    NSArray *paths = [[weights allKeys] sortedArrayUsingSelector:@selector(compare:)];
    for (NSString *path in paths) {
        NSData *data = [[weights objectForKey:path] objectForKey:@"data"];
        h = hash(h, [path UTF8String], strlen([path UTF8String]));
        h = hash(h, [data bytes], [data length]);
    }
    return [NSString
        stringWithFormat:@"%016llx_%lu", (unsigned long long)h, (unsigned long)[text length]];
}
@end

/* -------------------------------------------------------------------------------- loaded program
 */

static const anepy_mil_value_info *tensor(anepy_mil *mil, int32_t f, int32_t side, int32_t k) {
    return side == 0 ? anepy_mil_input(mil, f, k, 1) : anepy_mil_output(mil, f, k, 1);
}

static int32_t tensor_n(anepy_mil *mil, int32_t f, int32_t side) {
    return side == 0 ? anepy_mil_input_n(mil, f) : anepy_mil_output_n(mil, f);
}

@interface _ANEModel : StandinObject {
  @public
    anepy_mil *mil;
    BOOL reverse, shuffle;
}
- (id)initWithProgram:(anepy_mil *)program;
- (NSDictionary *)attributes;
- (int32_t)functionOfProcedure:(NSUInteger)procedure;
- (NSIndexSet *)symbolsOf:(int32_t)side procedure:(NSUInteger)procedure;
@end

@implementation _ANEModel
- (id)initWithProgram:(anepy_mil *)program {
    self = [super init];
    mil = program;
    reverse = standin_get("reverse") != 0;
    shuffle = standin_get("shuffle") != 0;
    standin_count_loaded(1);
    return self;
}
- (void)dealloc {
    if (mil != NULL) standin_break_rule("a program was given back without unloading it");
    anepy_mil_free(mil);
    if (mil != NULL) standin_count_loaded(-1);
    [super dealloc];
}
- (int32_t)functionOfProcedure:(NSUInteger)procedure {
    int32_t n = anepy_mil_function_n(mil), p = (int32_t)procedure;
    return shuffle ? n - 1 - p : p;
}
- (NSIndexSet *)symbolsOf:(int32_t)side procedure:(NSUInteger)procedure {
    NSUInteger first = 0;
    if (mil == NULL || procedure >= (NSUInteger)anepy_mil_function_n(mil))
        return [NSIndexSet indexSet];
    for (NSUInteger p = 0; p < procedure; p++)
        first += (NSUInteger)tensor_n(mil, [self functionOfProcedure:p], side);
    int32_t n = tensor_n(mil, [self functionOfProcedure:procedure], side);
    return [NSIndexSet indexSetWithIndexesInRange:NSMakeRange(first, (NSUInteger)n)];
}
- (NSIndexSet *)inputSymbolIndicesForProcedureIndex:(unsigned int)index {
    ENTER("inputSymbolIndicesForProcedureIndex:");
    if (fault == STANDIN_LIE) return [NSIndexSet indexSetWithIndex:7000];
    return fault == STANDIN_NIL ? nil : [self symbolsOf:0 procedure:index];
}
- (NSIndexSet *)outputSymbolIndicesForProcedureIndex:(unsigned int)index {
    ENTER("outputSymbolIndicesForProcedureIndex:");
    if (fault == STANDIN_LIE) return [NSIndexSet indexSetWithIndex:7000];
    return fault == STANDIN_NIL ? nil : [self symbolsOf:1 procedure:index];
}

static NSDictionary *layout(const anepy_mil_value_info *info, NSString *symbol) {
    int64_t row = 2 * info->dims[info->rank - 1], rows = (int64_t)info->nbytes / row;
    if (standin_get("stride")) row *= 2;
    return [NSDictionary
        dictionaryWithObjectsAndKeys:symbol, @"Symbol", [NSNumber numberWithLongLong:1], @"Batches",
                                     [NSNumber numberWithLongLong:rows], @"Channels",
                                     [NSNumber numberWithLongLong:row], @"RowStride",
                                     [NSNumber numberWithLongLong:row], @"PlaneStride",
                                     [NSNumber
                                         numberWithLongLong:row * rows * (1 + standin_get("wide"))],
                                     @"BatchStride", nil];
}

/* Adds the symbols of a procedure, and how they are laid out. */
- (void)add:(int32_t)side
         of:(int32_t)function
    symbols:(NSMutableArray *)symbols
    layouts:(NSMutableArray *)layouts {
    int32_t n = tensor_n(mil, function, side);
    for (int32_t i = 0; i < n; i++) {
        const anepy_mil_value_info *info = tensor(mil, function, side, reverse ? n - 1 - i : i);
        NSString *symbol = [NSString
            stringWithFormat:@"%s%s%s", standin_get("rename") == 1 ? "other_" : "", info->name,
                             side == 1 && standin_get("suffix") ? "@output" : ""];
        [symbols addObject:symbol];
        [layouts addObject:layout(info, symbol)];
    }
}
- (NSDictionary *)attributes {
    NSMutableArray *symbols[2] = {[NSMutableArray array], [NSMutableArray array]};
    NSMutableArray *statuses = [NSMutableArray array];
    NSMutableDictionary *ids = [NSMutableDictionary dictionary];
    int32_t n = anepy_mil_function_n(mil);
    for (int32_t p = 0; p < n; p++) {
        int32_t f = [self functionOfProcedure:(NSUInteger)p];
        NSMutableArray *layouts[2] = {[NSMutableArray array], [NSMutableArray array]};
        for (int32_t side = 0; side < 2; side++)
            [self add:side of:f symbols:symbols[side] layouts:layouts[side]];
        [ids setObject:[NSNumber numberWithInt:p]
                forKey:[NSString stringWithFormat:@"%s%s%s", standin_get("rename") == 2 ? "f" : "",
                                                  anepy_mil_function_name(mil, f),
                                                  standin_get("rename") == 3 ? "@default" : ""]];
        [statuses addObject:[NSDictionary dictionaryWithObjectsAndKeys:layouts[0], @"LiveInputList",
                                                                       layouts[1],
                                                                       @"LiveOutputList", nil]];
    }
    NSDictionary *description =
        [NSDictionary dictionaryWithObjectsAndKeys:symbols[0], @"kANEFModelInputSymbolsArrayKey",
                                                   symbols[1], @"kANEFModelOutputSymbolsArrayKey",
                                                   ids, @"kANEFModelProcedureNameToIDMapKey", nil];
    return [NSDictionary dictionaryWithObjectsAndKeys:description, @"ANEFModelDescription",
                                                      statuses, @"NetworkStatusList", nil];
}
- (NSDictionary *)modelAttributes {
    ENTER("modelAttributes");
    if (fault == STANDIN_LIE)
        return [NSDictionary dictionaryWithObject:@"text" forKey:@"ANEFModelDescription"];
    return fault == STANDIN_NIL || !standin_get("attributes") ? nil : [self attributes];
}
@end

/* ----------------------------------------------------------------------------------------- model
 */

@interface _ANEInMemoryModel : StandinObject {
    _ANEInMemoryModelDescriptor *descriptor;
    NSString *name;
    NSURL *folder;
    _ANEModel *loaded;
}
@end

@implementation _ANEInMemoryModel
+ (id)inMemoryModelWithDescriptor:(id)descriptor {
    ENTER("inMemoryModelWithDescriptor:");
    if (fault == STANDIN_NIL || descriptor == nil) return nil;
    _ANEInMemoryModel *model = [[[self alloc] init] autorelease];
    model->descriptor = [descriptor retain];
    model->name = [[descriptor name] retain];
    return model;
}
- (void)dealloc {
    [descriptor release];
    [name release];
    [folder release];
    [loaded release];
    [super dealloc];
}
- (void)setModelURL:(NSURL *)url {
    standin_enter("setModelURL:");
    [folder release];
    folder = [url retain];
}
- (BOOL)compiledModelExists {
    ENTER("compiledModelExists");
    return fault == STANDIN_LIE || (fault == STANDIN_NONE && standin_compiled(name));
}
- (void)purgeCompiledModel {
    standin_enter("purgeCompiledModel");
    standin_purge(name);
}
- (BOOL)compileWithQoS:(unsigned int)qos options:(NSDictionary *)options error:(NSError **)error {
    ENTER("compileWithQoS:options:error:");
    NSString *domain = @"com.apple.appleneuralengine.compiler", *reason = @"as told";
    if (qos > 63 || options == nil) standin_break_rule("compile: qos %u", qos);
    anepy_mil *mil = NULL;
    if (fault == STANDIN_NONE && folder == nil) reason = @"there are no files";
    else if (fault == STANDIN_NONE)
        mil = standin_compile([folder path], descriptor -> text, descriptor -> weights, &reason);
    if (mil == NULL)
        return refuse(error, fault, domain, 1,
                      [NSString stringWithFormat:@"ANECCompile() FAILED\n%@", reason]);
    standin_keep_compiled(name, descriptor->text, descriptor->weights, mil);
    return YES;
}
- (BOOL)loadWithQoS:(unsigned int)qos options:(NSDictionary *)options error:(NSError **)error {
    ENTER("loadWithQoS:options:error:");
    if (qos > 63 || options == nil) standin_break_rule("load: qos %u", qos);
    if (loaded != nil) standin_break_rule("a program was loaded twice");
    if (fault == STANDIN_LIE) return YES;
    anepy_mil *mil = NULL;
    if (fault == STANDIN_NONE && (int64_t)[descriptor->weights count] > standin_get("files"))
        return refuse(error, fault, @"com.apple.appleneuralengine", 10,
                      @"verifyBundleAtPath: invalid model");
    if (fault == STANDIN_NONE && standin_loaded() < standin_get("loads"))
        mil = standin_instance(name);
    if (mil == NULL)
        return refuse(error, fault, @"com.apple.appleneuralengine", 6,
                      @"createProgramInstanceForModel 0x20004");
    loaded = [[_ANEModel alloc] initWithProgram:mil];
    return YES;
}
- (BOOL)unloadWithQoS:(unsigned int)qos error:(NSError **)error {
    ENTER("unloadWithQoS:error:");
    if (qos > 63) standin_break_rule("unload: qos %u", qos);
    if (loaded != nil) {
        anepy_mil_free(loaded->mil);
        loaded->mil = NULL;
        standin_count_loaded(-1);
    }
    [loaded release];
    loaded = nil;
    if (fault == STANDIN_NONE) return YES;
    return refuse(error, fault, @"com.apple.appleneuralengine", 9, @"unload: as told");
}
- (NSDictionary *)modelAttributes {
    standin_break_rule("attributes were asked of the wrapper, which may raise");
    return nil;
}
- (id)model {
    ENTER("model");
    return fault == STANDIN_NIL ? nil : loaded;
}

/* The memory of one side of a request by ascending name, or why not. */
- (NSString *)take:(int32_t)side
                of:(_ANERequest *)request
            memory:(void **)memory
            nbytes:(uint64_t *)nbytes {
    NSUInteger procedure = [request->procedure unsignedIntegerValue];
    NSIndexSet *symbols = [loaded symbolsOf:side procedure:procedure];
    int32_t function = [loaded functionOfProcedure:procedure], n;
    NSArray *surfaces = request->surfaces[side];
    n = tensor_n(loaded->mil, function, side);
    if ([surfaces count] != (NSUInteger)n) return @"number of surfaces";
    uint64_t all = 0;
    for (NSUInteger i = 0; i < [surfaces count]; i++) {
        NSUInteger index = [[request->indices[side] objectAtIndex:i] unsignedIntegerValue];
        if (![symbols containsIndex:index]) return @"symbol index";
        int32_t k = (int32_t)(index - [symbols firstIndex]);
        if (loaded->reverse) k = n - 1 - k;
        IOSurfaceRef surface = ((_ANEIOSurfaceObject *)[surfaces objectAtIndex:i])->surface;
        size_t size;
        void *data = standin_surface_memory(surface, &size);
        if (standin_surface_locked(surface))
            standin_break_rule("a surface is locked during evaluation");
        if (memory[k] != NULL) return @"symbol index twice";
        if (size < SMALLEST || size < tensor(loaded->mil, function, side, k)->nbytes)
            return @"size of a surface";
        if (i > 0 && size != all && standin_get("equal")) return @"sizes of surfaces differ";
        all = size;
        memory[k] = data;
        nbytes[k] = size;
    }
    return nil;
}
- (BOOL)evaluateWithQoS:(unsigned int)qos
                options:(NSDictionary *)options
                request:(id)object
                  error:(NSError **)error {
    ENTER("evaluateWithQoS:options:request:error:");
    _ANERequest *request = object;
    void *memory[2][PORTS] = {{NULL}};
    uint64_t nbytes[2][PORTS];
    NSString *reason = fault != STANDIN_NONE ? @"as told" : nil;
    if (qos > 63 || options == nil) standin_break_rule("evaluate: qos %u", qos);
    if (reason == nil && loaded == nil) reason = @"not loaded";
    for (int32_t side = 0; side < 2 && reason == nil; side++)
        reason = [self take:side of:request memory:memory[side] nbytes:nbytes[side]];
    if (reason == nil &&
        !standin_run(loaded->mil,
                     [loaded functionOfProcedure:[request->procedure unsignedIntegerValue]],
                     (const void *const *)memory[0], nbytes[0], memory[1], nbytes[1]))
        reason = @"run";
    if (reason == nil && standin_get("padded"))
        return refuse(error, fault, @"com.apple.appleneuralengine", 42, @"no room for rows");
    if (reason == nil) return YES;
    return refuse(error, fault, @"com.apple.appleneuralengine", 8,
                  [NSString stringWithFormat:@"ANEProgramProcessRequestDirect() Failed with "
                                             @"status=0x1d : statusType=0x9: %@",
                                             reason]);
}
@end
