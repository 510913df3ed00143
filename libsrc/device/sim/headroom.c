/* device/sim/headroom.c - how large the sums of each product became: what they may still grow by
 * before they are infinite. One list for the process, kept only while somebody watches. */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "device/sim/interpreter_internal.h"

#define MOST 256
#define NAME 96

static struct {
    char name[NAME];
    float largest;
} notes[MOST];
static int32_t note_n;
static _Atomic int32_t watched;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

void anepy_mil_watch(int32_t on) {
    pthread_mutex_lock(&mutex);
    if (on) note_n = 0;
    pthread_mutex_unlock(&mutex);
    atomic_store(&watched, on);
}

int mil_watched(void) { return atomic_load_explicit(&watched, memory_order_relaxed) != 0; }

const char *anepy_mil_headroom(int32_t index, double *largest) {
    if (index < 0 || index >= note_n) return NULL;
    *largest = (double)notes[index].largest;
    return notes[index].name;
}

void mil_note_sums(const char *program, const char *op, float largest) {
    char name[NAME];
    snprintf(name, sizeof name, "%s %s", program, op);
    pthread_mutex_lock(&mutex);
    int32_t i = 0;
    while (i < note_n && strcmp(notes[i].name, name) != 0) i++;
    if (i == note_n && note_n < MOST) {
        memcpy(notes[note_n].name, name, sizeof name);
        notes[note_n++].largest = 0.0f;
    }
    if (i < MOST && largest > notes[i].largest) notes[i].largest = largest;
    pthread_mutex_unlock(&mutex);
}
