/* engine.h - the stand-in Neural Engine behind the private classes: compiled texts, evaluation. */
#ifndef STANDIN_ENGINE_H
#define STANDIN_ENGINE_H

#import <Foundation/Foundation.h>

#include "device/sim/interpreter.h"

/* Parses what lies in the folder, which must be what the descriptor was given; NULL with *reason.
 */
anepy_mil *standin_compile(NSString *folder, NSData *text, NSDictionary *weights,
                           NSString **reason);
/* What has been compiled under this name, each time anew; NULL if nothing has. */
anepy_mil *standin_instance(NSString *name);
int standin_compiled(NSString *name);
void standin_keep_compiled(NSString *name, NSData *text, NSDictionary *weights, anepy_mil *mil);
void standin_purge(NSString *name);

/* fp16 inputs and outputs by ascending name; NO on failure. */
BOOL standin_run(anepy_mil *mil, int32_t function, const void *const *inputs,
                 const uint64_t *input_nbytes, void *const *outputs, const uint64_t *output_nbytes);

#endif
