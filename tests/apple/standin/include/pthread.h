/* The system's threads, and what only macOS has. */
#ifndef STANDIN_PTHREAD_H
#define STANDIN_PTHREAD_H

#include_next <pthread.h>

enum { QOS_CLASS_USER_INITIATED = 0x19 };

int pthread_set_qos_class_self_np(unsigned int qos, int relative);
int pthread_cond_timedwait_relative_np(pthread_cond_t *condition, pthread_mutex_t *mutex,
                                       const struct timespec *wait);

#endif
