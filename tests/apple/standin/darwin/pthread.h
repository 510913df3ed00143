/* pthread.h - the system's, and what macOS adds to it. */
#ifndef STANDIN_DARWIN_PTHREAD_H
#define STANDIN_DARWIN_PTHREAD_H

#include_next <pthread.h>

typedef enum { QOS_CLASS_USER_INITIATED = 0x19 } qos_class_t;

int pthread_set_qos_class_self_np(qos_class_t qos, int relative_priority);

#endif
