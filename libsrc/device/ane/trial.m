/* device/ane/trial.m - runs MIL text by itself, unchanged, so that a probe gets the ANE's own
 * answer.
 *
 * Surfaces go to the symbols in ascending order, so that a probe can see which order that is. */
#include <stdlib.h>
#include <string.h>

#include "device/ane/ane.h"
#include "device/traits.h"

struct anepy_trial {
    anepy_ane *ane;
    anepy_ane_program *program;
};

static void trial_release(anepy_trial *trial) {
    if (trial == NULL) return;
    anepy_ane_program_free(trial->program);
    anepy_ane_close(trial->ane);
    free(trial);
}

static int32_t trial_create(anepy_trial **out, const anepy_trial_source *source, const char *detail,
                            int32_t *compiled) {
    anepy_traits traits;
    anepy_ane_limits limits;
    ANEPY_TRY(anepy_traits_parse(&traits, detail));
    anepy_trial *trial = calloc(1, sizeof *trial);
    if (trial == NULL) return anepy_fail(ANEPY_E_MEMORY, "no memory for a program");
    anepy_ane_limits_set(&limits, traits.timeout_ms);
    int32_t status = anepy_ane_open(&trial->ane, &limits);
    if (status == ANEPY_OK)
        status =
            anepy_ane_compile(trial->ane, &trial->program, source, NULL, 0, traits.fresh, compiled);
    if (status == ANEPY_OK) *out = trial;
    else trial_release(trial);
    return status;
}

static int32_t trial_reload(anepy_trial *trial, const anepy_trial_source *source) {
    return anepy_ane_reload(trial->program, source);
}

/* Copies between host memory and a surface. */
static int32_t copy(anepy_ane_surface *surface, void *host, uint64_t nbytes, int32_t for_writing) {
    void *data;
    ANEPY_TRY(anepy_ane_surface_lock(surface, for_writing, &data));
    if (for_writing) memcpy(data, host, nbytes);
    else memcpy(host, data, nbytes);
    return anepy_ane_surface_unlock(surface, for_writing);
}

static int32_t fill(anepy_ane *ane, anepy_ane_call_surfaces *call, const anepy_trial_surfaces *s) {
    for (int32_t i = 0; i < s->input_n; i++) {
        ANEPY_TRY(anepy_ane_surface_create(ane, &call->surfaces[i], s->input_nbytes[i]));
        /* copy only reads what it is to write to a surface */
        ANEPY_TRY(copy(call->surfaces[i], (void *)(uintptr_t)s->inputs[i], s->input_nbytes[i], 1));
    }
    for (int32_t i = 0; i < s->output_n; i++)
        ANEPY_TRY(
            anepy_ane_surface_create(ane, &call->surfaces[s->input_n + i], s->output_nbytes[i]));
    return ANEPY_OK;
}

static int32_t trial_run(anepy_trial *trial, const anepy_trial_surfaces *s) {
    anepy_ane_call_surfaces call = {s->function, s->input_n, s->output_n, {NULL}};
    if (s->input_n + s->output_n > ANEPY_ANE_PORTS)
        return anepy_fail(ANEPY_E_UNSUPPORTED, "device ane: %d surfaces, %d are the most",
                          s->input_n + s->output_n, ANEPY_ANE_PORTS);
    int32_t status = fill(trial->ane, &call, s);
    if (status == ANEPY_OK) status = anepy_ane_run(trial->program, &call);
    for (int32_t i = 0; i < s->output_n && status == ANEPY_OK; i++)
        status = copy(call.surfaces[s->input_n + i], s->outputs[i], s->output_nbytes[i], 0);
    for (int32_t i = 0; i < ANEPY_ANE_PORTS; i++) anepy_ane_surface_free(call.surfaces[i]);
    return status;
}

const anepy_trial_ops anepy_ane_trial = {
    .create = trial_create,
    .reload = trial_reload,
    .run = trial_run,
    .release = trial_release,
};
