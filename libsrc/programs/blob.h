/* programs/blob.h - writes and reads the weight file that MIL programs name.
 *
 * A 64-byte header (count of records, version 2), then per record 64 bytes of description and the
 * data, both starting at multiples of 64; little endian (docs/neural-engine.md#weight-file). An
 * offset is that of the description, as in BLOBFILE. */
#ifndef ANEPY_PROGRAMS_BLOB_H
#define ANEPY_PROGRAMS_BLOB_H

#include "runtime/status.h"

#define ANEPY_BLOB_ALIGN 64
#define ANEPY_BLOB_SENTINEL 0xdeadbeefu
#define ANEPY_BLOB_VERSION 2u

typedef enum {
    ANEPY_BLOB_F16 = 1,
    ANEPY_BLOB_F32 = 2,
    ANEPY_BLOB_U8 = 3,
    ANEPY_BLOB_I8 = 4
} anepy_blob_type;

/* A growing file image. data is written by these functions only; n bytes are in use. */
typedef struct {
    uint8_t *data;
    uint64_t n, capacity;
} anepy_blob;

/* Writes the header into an empty (zeroed) blob. */
int32_t anepy_blob_begin(anepy_blob *blob);

/* Makes room for nbytes in total; up to there adding records neither moves data nor fails. */
int32_t anepy_blob_reserve(anepy_blob *blob, uint64_t nbytes);

/* Appends one record and counts it; data NULL: the payload is zeros, to be filled by the caller at
 * blob->data + *offset + 64. nbytes must be a multiple of the type's size. */
int32_t anepy_blob_add(anepy_blob *blob, anepy_blob_type type, const void *data, uint64_t nbytes,
                       uint64_t *offset);

/* Most bytes that a record with nbytes of data takes in the file. */
static inline uint64_t anepy_blob_record_nbytes(uint64_t nbytes) {
    return ANEPY_BLOB_ALIGN + (nbytes + ANEPY_BLOB_ALIGN - 1) / ANEPY_BLOB_ALIGN * ANEPY_BLOB_ALIGN;
}

void anepy_blob_free(anepy_blob *blob); /* leaves it zeroed; accepts a zeroed blob */

/* The record at offset of a file of n bytes: any bytes are safe to pass. type is the raw number in
 * the file (1 to 15 are defined), *payload points into file. Fails unless header, sentinel,
 * alignment and bounds are right. */
int32_t anepy_blob_read(const uint8_t *file, uint64_t n, uint64_t offset, uint32_t *type,
                        const uint8_t **payload, uint64_t *nbytes);

#endif
