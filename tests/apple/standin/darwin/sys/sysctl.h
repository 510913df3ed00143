/* sys/sysctl.h - what runtime/machine.c asks macOS. */
#ifndef STANDIN_DARWIN_SYSCTL_H
#define STANDIN_DARWIN_SYSCTL_H

#include <stddef.h>

int sysctlbyname(const char *name, void *value, size_t *size, void *fresh, size_t fresh_size);

#endif
