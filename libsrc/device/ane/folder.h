/* device/ane/folder.h - the temporary folder from which the compiler reads model.mil and its
 * weights. */
#ifndef ANEPY_DEVICE_ANE_FOLDER_H
#define ANEPY_DEVICE_ANE_FOLDER_H

#include "device/device.h"

/* Makes a folder that only this user can read, with model.mil and the weight files; path[cap] gets
 * its name. A failure leaves nothing behind. Each program has a folder of its own, so that it can
 * be removed while another program with the same text is in use. */
int32_t anepy_folder_create(char *path, size_t cap, const anepy_trial_source *source);
/* Writes the weight files anew. */
int32_t anepy_folder_weights(const char *path, const anepy_trial_source *source);
/* What follows "@model_path/" in the name of a weight file; ANEPY_E_ARGUMENT unless it is a plain
 * name in weights/. */
int32_t anepy_folder_weight_name(const char **name, const char *path);
void anepy_folder_remove(const char *path); /* accepts "" and what is gone already */

/* Removes folders of processes that were killed, or replaced by exec. */
void anepy_folder_sweep(void);

#endif
