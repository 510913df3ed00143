/* device/ane/binding.m - finds out from the loaded program which surface is which tensor.
 *
 * Symbols are numbered over all procedures; a procedure lists its own by number, and the attributes
 * name each number (docs/neural-engine.md#order-of-surfaces). The wrong order would give wrong
 * numbers without an error, so a program that does not name its symbols is refused unless there is
 * only one possible order. */
#include <stdlib.h>
#include <string.h>

#include "device/ane/program.h"

static const char *const SIDE[2] = {"input", "output"};

/* object if it is of this class, else nil: the framework may return something else. */
static id kind(id object, Class class) { return [object isKindOfClass:class] ? object : nil; }

static NSDictionary *dictionary(NSDictionary *in, NSString *key) {
    return kind([in objectForKey:key], [NSDictionary class]);
}

static NSArray *array(NSDictionary *in, NSString *key) {
    return kind([in objectForKey:key], [NSArray class]);
}

static int64_t number(NSDictionary *in, NSString *key) {
    NSNumber *value = kind([in objectForKey:key], [NSNumber class]);
    return value != nil ? [value longLongValue] : -1;
}

/* Whether a symbol is this name; the program may call "z_out" "z_out@output". */
static int named(id symbol, const char *name) {
    const char *text = [kind(symbol, [NSString class]) UTF8String];
    size_t n = strlen(name);
    return text != NULL && strncmp(text, name, n) == 0 && (text[n] == '\0' || text[n] == '@');
}

static NSIndexSet *symbols(anepy_ane_program *program, int32_t side, unsigned int procedure) {
    id<AnepyLoadedModel> loaded = [program->model model];
    NSIndexSet *set = side == 0 ? [loaded inputSymbolIndicesForProcedureIndex:procedure]
                                : [loaded outputSymbolIndicesForProcedureIndex:procedure];
    return kind(set, [NSIndexSet class]);
}

/* Fills indices[side] with n symbols: those of the procedure, or 0 to n - 1 where a single program
 * names none. */
static int32_t take_indices(anepy_ane_program *program, anepy_bound *bound, int32_t side,
                            int32_t n) {
    NSIndexSet *set = symbols(program, side, [bound->procedure unsignedIntValue]);
    NSUInteger count = [set count];
    if (count == 0 && program->function_n <= 1)
        set = [NSIndexSet indexSetWithIndexesInRange:NSMakeRange(0, (NSUInteger)n)];
    else if (count != (NSUInteger)n)
        return anepy_fail(ANEPY_E_UNSUPPORTED, "the loaded program has %lu %ss where %d were built",
                          (unsigned long)count, SIDE[side], n);
    NSMutableArray *indices = [NSMutableArray arrayWithCapacity:(NSUInteger)n];
    for (NSUInteger i = [set firstIndex]; i != NSNotFound; i = [set indexGreaterThanIndex:i])
        [indices addObject:[NSNumber numberWithUnsignedInteger:i]];
    bound->indices[side] = [indices retain];
    return ANEPY_OK;
}

static int32_t port_n(const anepy_bound *bound, int32_t side) {
    return side == 0 ? bound->function.input_n : bound->function.output_n;
}

static anepy_ane_port *port_at(anepy_bound *bound, int32_t side, int32_t index) {
    return &bound->function.ports[index + (side == 0 ? 0 : bound->function.input_n)];
}

/* Finds the port that symbol number k of a side belongs to. */
static int32_t match(anepy_bound *bound, int32_t side, NSArray *names, int32_t k) {
    NSUInteger index = [[bound->indices[side] objectAtIndex:(NSUInteger)k] unsignedIntegerValue];
    id symbol = index < [names count] ? [names objectAtIndex:index] : nil;
    for (int32_t i = 0; i < port_n(bound, side); i++) {
        if (!named(symbol, port_at(bound, side, i)->name)) continue;
        for (int32_t before = 0; before < k; before++)
            if (bound->order[side][before] == i) symbol = nil;
        if (symbol == nil) break;
        bound->order[side][k] = i;
        return ANEPY_OK;
    }
    return anepy_fail(ANEPY_E_UNSUPPORTED, "%s %s: %s %d of the loaded program is not one of its",
                      bound->function.name, SIDE[side], SIDE[side], k);
}

/* Takes the size of a port from the program and checks its rows, as far as the program says them.
 */
static int32_t check_port(anepy_ane_port *port, NSDictionary *tensor) {
    int64_t plane = number(tensor, @"PlaneStride"), batch = number(tensor, @"BatchStride");
    int64_t batches = number(tensor, @"Batches");
    if (plane > 0 && (uint64_t)plane != port->row_nbytes)
        return anepy_fail(ANEPY_E_UNSUPPORTED,
                          "the loaded program has %lld bytes between channels of %s, not %llu",
                          (long long)plane, port->name, (unsigned long long)port->row_nbytes);
    if (batches > 1) batch *= batches;
    if (batch > 0 && (uint64_t)batch > port->nbytes) port->nbytes = (uint64_t)batch;
    return ANEPY_OK;
}

static int32_t check_layout(anepy_bound *bound, int32_t side, NSDictionary *status) {
    NSArray *list = array(status, side == 0 ? @"LiveInputList" : @"LiveOutputList");
    for (NSUInteger k = 0; k < [list count]; k++) {
        NSDictionary *tensor = kind([list objectAtIndex:k], [NSDictionary class]);
        id symbol = [tensor objectForKey:@"Symbol"];
        if (symbol == nil) symbol = [tensor objectForKey:@"Name"];
        for (int32_t i = 0; i < port_n(bound, side); i++)
            if (named(symbol, port_at(bound, side, i)->name))
                ANEPY_TRY(check_port(port_at(bound, side, i), tensor));
    }
    return ANEPY_OK;
}

static int32_t bind_side(anepy_ane_program *program, anepy_bound *bound, int32_t side,
                         NSArray *names) {
    int32_t n = port_n(bound, side);
    ANEPY_TRY(take_indices(program, bound, side, n));
    if (names == nil && n == 1) return ANEPY_OK; /* order[side][0] is 0 */
    if (names == nil)
        return anepy_fail(ANEPY_E_UNSUPPORTED, "%s: the loaded program does not name its %ss",
                          bound->function.name, SIDE[side]);
    for (int32_t k = 0; k < n; k++) ANEPY_TRY(match(bound, side, names, k));
    return ANEPY_OK;
}

/* The number of the procedure with this name; its position in the text if the program has no names.
 */
static int32_t find_procedure(anepy_ane_program *program, anepy_bound *bound, NSDictionary *ids,
                              int32_t position) {
    int64_t procedure = position;
    if (program->function_n > 1 && ids != nil) {
        procedure = -1;
        for (id name in ids)
            if (named(name, bound->function.name)) procedure = number(ids, name);
    }
    if (procedure < 0)
        return anepy_fail(ANEPY_E_UNSUPPORTED, "the loaded program has no function %s",
                          bound->function.name);
    bound->procedure = [[NSNumber numberWithUnsignedInt:(unsigned int)procedure] retain];
    return ANEPY_OK;
}

int32_t anepy_bind_functions(anepy_ane_program *program) {
    id<AnepyLoadedModel> loaded = [program->model model]; /* to ask the wrapper may raise */
    NSDictionary *attributes = kind([loaded modelAttributes], [NSDictionary class]);
    NSDictionary *description = dictionary(attributes, @"ANEFModelDescription");
    NSDictionary *ids = dictionary(description, @"kANEFModelProcedureNameToIDMapKey");
    NSArray *names[2] = {array(description, @"kANEFModelInputSymbolsArrayKey"),
                         array(description, @"kANEFModelOutputSymbolsArrayKey")};
    NSArray *statuses = array(attributes, @"NetworkStatusList");
    for (int32_t f = 0; f < program->function_n; f++) {
        anepy_bound *bound = &program->bound[f];
        ANEPY_TRY(find_procedure(program, bound, ids, f));
        NSUInteger procedure = [bound->procedure unsignedIntegerValue];
        id status = procedure < [statuses count] ? [statuses objectAtIndex:procedure] : nil;
        for (int32_t side = 0; side < 2; side++) {
            ANEPY_TRY(bind_side(program, bound, side, names[side]));
            ANEPY_TRY(check_layout(bound, side, kind(status, [NSDictionary class])));
        }
    }
    return ANEPY_OK;
}

int32_t anepy_bind_raw(anepy_ane_program *program, anepy_bound *bound, int32_t procedure,
                       int32_t input_n, int32_t output_n) {
    bound->procedure = [[NSNumber numberWithInt:procedure] retain];
    for (int32_t k = 0; k < ANEPY_ANE_PORTS; k++) bound->order[0][k] = bound->order[1][k] = k;
    bound->function.input_n = input_n;
    bound->function.output_n = output_n;
    ANEPY_TRY(take_indices(program, bound, 0, input_n));
    return take_indices(program, bound, 1, output_n);
}

void anepy_unbind(anepy_bound *bound) {
    while (bound->requests != NULL) {
        anepy_request *request = bound->requests;
        bound->requests = request->next;
        [request->request release];
        free(request);
    }
    [bound->procedure release];
    [bound->indices[0] release];
    [bound->indices[1] release];
    bound->procedure = nil;
    bound->indices[0] = bound->indices[1] = nil;
}

/* -------------------------------------------------------------------------------------- requests
 */

/* The surfaces of a side, wrapped, in the order of its symbols; nil with an error sentence. */
static NSArray *wrap(anepy_ane_program *program, const anepy_bound *bound, const anepy_run_job *job,
                     int32_t side) {
    int32_t first = side == 0 ? 0 : job->input_n, n = port_n(bound, side);
    NSMutableArray *wrapped = [NSMutableArray arrayWithCapacity:(NSUInteger)n];
    for (int32_t k = 0; k < n; k++) {
        IOSurfaceRef surface = job->surfaces[first + bound->order[side][k]];
        id object = [program->ane->classes.surface objectWithIOSurface:surface];
        if (object == nil) {
            anepy_fail(ANEPY_E_DEVICE, "the framework takes no surface");
            return nil;
        }
        [wrapped addObject:object];
    }
    return wrapped;
}

int32_t anepy_request_find(anepy_ane_program *program, anepy_bound *bound, const anepy_run_job *job,
                           id *out) {
    size_t nbytes = (size_t)job->port_n * sizeof job->ids[0];
    for (anepy_request *r = bound->requests; r != NULL; r = r->next) {
        if (memcmp(r->ids, job->ids, nbytes) != 0) continue;
        *out = r->request;
        return ANEPY_OK;
    }
    NSArray *inputs = wrap(program, bound, job, 0);
    NSArray *outputs = inputs != nil ? wrap(program, bound, job, 1) : nil;
    if (outputs == nil) return ANEPY_E_DEVICE;
    id request = [program->ane->classes.request requestWithInputs:inputs
                                                     inputIndices:bound->indices[0]
                                                          outputs:outputs
                                                    outputIndices:bound->indices[1]
                                                    weightsBuffer:nil
                                                        perfStats:nil
                                                   procedureIndex:bound->procedure];
    if (request == nil) return anepy_fail(ANEPY_E_DEVICE, "the framework makes no request");
    anepy_request *entry = calloc(1, sizeof *entry);
    if (entry == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for a request");
    entry->request = [request retain];
    memcpy(entry->ids, job->ids, nbytes);
    entry->next = bound->requests;
    bound->requests = entry;
    *out = request;
    return ANEPY_OK;
}
