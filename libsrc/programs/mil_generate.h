/* programs/mil_generate.h - MIL text and weight file of programs, as the ANE compiles them.
 *
 * A function has one packed input "a_in" [1, C, 1, W] and one packed output "z_out", with the
 * channel ranges of the program table, and one more input per live weight, such as "w0_wq". Both
 * dialects mean the same; 1.0 is for old systems. docs/neural-engine.md#wrong-results says what the
 * generator avoids and why. */
#ifndef ANEPY_PROGRAMS_MIL_GENERATE_H
#define ANEPY_PROGRAMS_MIL_GENERATE_H

#include "programs/blob.h"
#include "programs/programs.h"

typedef enum {
    ANEPY_DIALECT_13, /* program(1.3), ios18 */
    ANEPY_DIALECT_10  /* program(1.0), ios16: every scalar a tensor of rank 0 */
} anepy_dialect;

#define ANEPY_MIL_WEIGHT_FILE "@model_path/weights/weight.bin" /* the one file a text names */
#define ANEPY_MIL_LARGEST_EXTENT 16384 /* M1 to M3: spatial extents and contractions */
#define ANEPY_MIL_LARGEST_CHANNELS 65536

/* n does not count the final zero of text. blob.n is 0 if the text names no weights; then the
 * compiler must not get a file. */
typedef struct {
    char *text;
    uint64_t n;
    anepy_blob blob;
} anepy_mil_source;

/* params: the parameter arena; the weights of `layer` are baked. Not used for live weights. */
typedef struct {
    const anepy_program *program;
    const void *params;
    int32_t layer;
} anepy_mil_item;

/* Writes a text with one function per item, "main" for a single item, else procedure000,
 * procedure001, ..., and one weight file in which equal constants are stored once. width is that of
 * the described programs, a multiple of 64, >= seq_len. Fails if an extent exceeds what every chip
 * takes, or a weight does not fit fp16. */
int32_t anepy_mil_generate(anepy_mil_source *out, const anepy_mil_item *items, int32_t count,
                           const anepy_model *model, int32_t width, int32_t seq_len,
                           anepy_dialect dialect);
void anepy_mil_source_free(anepy_mil_source *source); /* leaves it zeroed */

#endif
