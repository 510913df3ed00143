/* device/traits.c - reads the details behind the colon of a device. */
#include "device/traits.h"

#include <stdlib.h>
#include <string.h>

#include "device/numerics.h"

static int is(const char *word, size_t n, const char *text) {
    return strlen(text) == n && memcmp(word, text, n) == 0;
}

/* Reads "name=value"; returns 0 for another name, or a value that is no number or below lowest. */
static int read_number(const char *word, size_t n, const char *name, int32_t lowest, int32_t *out) {
    size_t length = strlen(name);
    if (n <= length || n > length + 9 || memcmp(word, name, length) != 0) return 0;
    int32_t value = 0;
    for (size_t i = length; i < n; i++) {
        if (word[i] < '0' || word[i] > '9') return 0;
        value = 10 * value + (word[i] - '0');
    }
    *out = value;
    return value >= lowest;
}

static int read_word(anepy_traits *t, const char *word, size_t n) {
    if (n == 2 && word[0] == 'm' && word[1] >= '1' && word[1] <= '6') t->chip = word[1] - '0';
    else if (is(word, n, "dialect=1.3")) t->dialect = 13;
    else if (is(word, n, "dialect=1.0")) t->dialect = 10;
    else if (n > 9 && memcmp(word, "numerics=", 9) == 0)
        return (t->numerics = anepy_numerics_find(word + 9, n - 9)) >= 0;
    else if (is(word, n, "procedures=no")) t->single = 1;
    else if (is(word, n, "reuse=no")) t->fresh = 1;
    else if (is(word, n, "run=no")) t->dry = 1;
    else if (read_number(word, n, "surface=", 64, &t->surface_nbytes))
        return t->surface_nbytes % 64 == 0;
    else if (read_number(word, n, "test-fails=", 1, &t->fails)) return 1;
    else if (read_number(word, n, "timeout=", 1, &t->timeout_ms)) return 1;
    else return read_number(word, n, "budget=", 1, &t->budget);
    return 1;
}

int32_t anepy_traits_parse(anepy_traits *out, const char *detail) {
    memset(out, 0, sizeof *out);
    while (detail != NULL) {
        size_t n = strcspn(detail, ",");
        if (!read_word(out, detail, n))
            return anepy_fail(
                ANEPY_E_NAME,
                "unknown device detail '%.*s': use m1 to m6, dialect=1.3 or 1.0, "
                "budget=N, timeout=N (ms), surface=N (a multiple of 64), procedures=no, reuse=no, "
                "run=no, numerics=fixed, flush, float or exact",
                (int)(n < 40 ? n : 40), detail);
        detail = detail[n] == ',' ? detail + n + 1 : NULL;
    }
    return ANEPY_OK;
}
