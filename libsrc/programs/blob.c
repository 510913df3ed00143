/* programs/blob.c - bytes of the weight file, little endian on any host. */
#include "programs/blob.h"

#include <stdlib.h>
#include <string.h>

#define ALIGN ANEPY_BLOB_ALIGN
#define TYPES 15u                   /* type numbers that the format defines */
#define LARGEST ((uint64_t)1 << 40) /* bytes of a file: beyond any memory, far below overflow */

static void put(uint8_t *at, uint64_t value, int32_t bytes) {
    for (int32_t i = 0; i < bytes; i++) at[i] = (uint8_t)(value >> 8 * i);
}

static uint64_t get(const uint8_t *at, int32_t bytes) {
    uint64_t value = 0;
    for (int32_t i = 0; i < bytes; i++) value |= (uint64_t)at[i] << 8 * i;
    return value;
}

/* --------------------------------------------------------------------------------------- write */

int32_t anepy_blob_reserve(anepy_blob *blob, uint64_t nbytes) {
    if (nbytes <= blob->capacity) return ANEPY_OK;
    if (nbytes > LARGEST)
        return anepy_fail(ANEPY_E_ARGUMENT, "a weight file of %llu bytes is too large",
                          (unsigned long long)nbytes);
    uint8_t *data = realloc(blob->data, nbytes);
    if (data == NULL)
        return anepy_fail(ANEPY_E_MEMORY, "no memory for %llu bytes of weights",
                          (unsigned long long)nbytes);
    blob->data = data;
    blob->capacity = nbytes;
    return ANEPY_OK;
}

/* Makes room for `more` bytes; the capacity at least doubles. */
static int32_t grow(anepy_blob *blob, uint64_t more) {
    uint64_t need = blob->n + more;
    if (more > LARGEST || need <= blob->capacity) return anepy_blob_reserve(blob, need);
    return anepy_blob_reserve(blob, need > 2 * blob->capacity ? need : 2 * blob->capacity);
}

int32_t anepy_blob_begin(anepy_blob *blob) {
    blob->n = 0;
    ANEPY_TRY(grow(blob, ALIGN));
    memset(blob->data, 0, ALIGN);
    put(blob->data + 4, ANEPY_BLOB_VERSION, 4);
    blob->n = ALIGN;
    return ANEPY_OK;
}

int32_t anepy_blob_add(anepy_blob *blob, anepy_blob_type type, const void *data, uint64_t nbytes,
                       uint64_t *offset) {
    static const uint8_t SIZES[] = {
        [ANEPY_BLOB_F16] = 2, [ANEPY_BLOB_F32] = 4, [ANEPY_BLOB_U8] = 1, [ANEPY_BLOB_I8] = 1};
    if (type < ANEPY_BLOB_F16 || type > ANEPY_BLOB_I8 || nbytes % SIZES[type] != 0)
        return anepy_fail(ANEPY_E_ARGUMENT, "a weight record of type %d cannot have %llu bytes",
                          (int)type, (unsigned long long)nbytes);
    if (blob->n < ALIGN || nbytes > LARGEST)
        return anepy_fail(ANEPY_E_ARGUMENT, "a weight record of %llu bytes in a file of %llu",
                          (unsigned long long)nbytes, (unsigned long long)blob->n);
    /* The official writer pads before a record, never after the last one. */
    uint64_t start = (blob->n + ALIGN - 1) / ALIGN * ALIGN, end = start + ALIGN + nbytes;
    ANEPY_TRY(grow(blob, end - blob->n));
    uint8_t *record = blob->data + start;
    memset(blob->data + blob->n, 0, start + ALIGN - blob->n);
    put(record, ANEPY_BLOB_SENTINEL, 4);
    put(record + 4, (uint64_t)type, 4);
    put(record + 8, nbytes, 8);
    put(record + 16, start + ALIGN, 8);
    if (data == NULL) memset(record + ALIGN, 0, nbytes);
    else if (nbytes > 0) memcpy(record + ALIGN, data, nbytes);
    put(blob->data, get(blob->data, 4) + 1, 4);
    *offset = start;
    blob->n = end;
    return ANEPY_OK;
}

void anepy_blob_free(anepy_blob *blob) {
    free(blob->data);
    *blob = (anepy_blob){0};
}

/* ---------------------------------------------------------------------------------------- read */

static int32_t bad(uint64_t offset, const char *why) {
    return anepy_fail(ANEPY_E_ARGUMENT, "weight record at offset %llu: %s",
                      (unsigned long long)offset, why);
}

int32_t anepy_blob_read(const uint8_t *file, uint64_t n, uint64_t offset, uint32_t *type,
                        const uint8_t **payload, uint64_t *nbytes) {
    if (n < ALIGN) return bad(offset, "the file is shorter than its header");
    if (get(file + 4, 4) != ANEPY_BLOB_VERSION) return bad(offset, "the file is not of version 2");
    if (get(file, 4) == 0) return bad(offset, "the file says it holds no record");
    if (offset % ALIGN != 0) return bad(offset, "offsets are multiples of 64");
    if (offset < ALIGN) return bad(offset, "that is the file's header; the first record is at 64");
    if (offset > n || n - offset < ALIGN) return bad(offset, "beyond the end of the file");
    const uint8_t *record = file + offset;
    if (get(record, 4) != ANEPY_BLOB_SENTINEL)
        return bad(offset, "no record starts here (the sentinel is missing)");
    uint32_t kind = (uint32_t)get(record + 4, 4);
    uint64_t size = get(record + 8, 8), start = get(record + 16, 8);
    if (kind < 1 || kind > TYPES) return bad(offset, "unknown data type");
    if (start % ALIGN != 0) return bad(offset, "its data is not 64-byte aligned");
    if (start < ALIGN || start > n || size > n - start)
        return bad(offset, "its data lies outside the file");
    if (start < offset + ALIGN && start + size > offset)
        return bad(offset, "its data overlaps its description");
    *type = kind;
    *payload = file + start;
    *nbytes = size;
    return ANEPY_OK;
}
