/* device/ane/folder.h - where model.mil and its weights lie while the compiler reads them. */
#ifndef ANEPY_DEVICE_ANE_FOLDER_H
#define ANEPY_DEVICE_ANE_FOLDER_H

#include "device/device.h"

/* A new folder that only this user can read, with model.mil and the weight files; path[cap] gets
 * its name. Nothing is left behind on failure. Each program has its own, so one can go while
 * another with the same text stays. */
int32_t anepy_folder_create(char *path, size_t cap, const anepy_trial_source *source);
/* Writes the weight files anew. */
int32_t anepy_folder_weights(const char *path, const anepy_trial_source *source);
/* What follows "@model_path/" in the name of a weight file; ANEPY_E_ARGUMENT unless it is a plain
 * name in weights/. */
int32_t anepy_folder_weight_name(const char **name, const char *path);
void anepy_folder_remove(const char *path); /* accepts "" and what is gone already */

/* Removes the folders of processes that were killed, or went on as another program. */
void anepy_folder_sweep(void);

#endif
