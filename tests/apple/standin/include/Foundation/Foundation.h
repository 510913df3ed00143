/* GNUstep's Foundation, and what it lacks of Apple's that anepy uses. */
#ifndef STANDIN_FOUNDATION_H
#define STANDIN_FOUNDATION_H

#include_next <Foundation/Foundation.h>

typedef enum { NSDataReadingMappedIfSafe = 1 } NSDataReadingOptions;

@interface NSData (Standin)
+ (id)dataWithContentsOfFile:(NSString *)path
                     options:(NSDataReadingOptions)options
                       error:(NSError **)error;
@end

#endif
