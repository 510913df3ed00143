/* tests/ckernels/fuzz/fuzz_mil.c - feeds broken MIL text and weight files to the simulator.
 *
 * usage: fuzz_mil SEED FIRST COUNT TEXT.mil...      (a weight file is TEXT.bin beside it, if there)
 *
 * Linked with a libanepy built by `build_lib.sh --asan --ubsan`. Input number i depends on SEED and
 * i alone, so a failure is repeated by its number, which is printed when a sanitizer stops the
 * program. An input is a valid program with one to six mutations of text or weight file, or noise;
 * what is accepted is run. Fails if an error has no sentence or a position outside the text, or if
 * one input takes longer than SLOW_MS. Prints one line of figures as JSON.
 *
 * With -DANEPY_LIBFUZZER and clang's -fsanitize=fuzzer: fuzz_mil TEXT.mil... OPTIONS FOLDER... */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "anepy.h"

#define MOST_TEXT (1 << 16)
#define MOST_FILE (1 << 18)
#define MOST_SEEDS 512
#define MEMORY ((uint64_t)48 << 20) /* of a program */
#define WORK ((uint64_t)1 << 21)    /* of a run */
#define SLOW_MS 5000.0              /* generous: sanitized, on a shared machine */
#define PATH "@model_path/weights/weight.bin"

typedef struct {
    char *text, *file;
    size_t text_n, file_n;
} sample;

static sample seeds[MOST_SEEDS];
static int seed_n;
static char text[MOST_TEXT];
static uint8_t file[MOST_FILE];
static size_t text_n, file_n;
static uint64_t state, current;
static struct {
    uint64_t accepted, rejected, ran, run_failed;
    double slowest_ms;
} figures;

void __sanitizer_set_death_callback(void (*callback)(void));

static void on_death(void) {
    fprintf(stderr, "fuzz_mil: input %llu\n", (unsigned long long)current);
    FILE *out = fopen("fuzz_mil.crash", "wb");
    if (out == NULL) return;
    fwrite(text, 1, text_n, out);
    fclose(out);
}

static void die(const char *why) {
    fprintf(stderr, "fuzz_mil: %s\n", why);
    on_death();
    exit(1);
}

/* Of this process: one that is stopped, or waits for a processor, takes no time. */
static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* splitmix64 (Steele, Lea & Flood 2014) */
static uint64_t next(void) {
    uint64_t z = state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}
static size_t below(size_t n) { return n > 0 ? (size_t)(next() % n) : 0; }

/* ------------------------------------------------------------------------------------- mutations
 */

/* Replaces text[at, at + n) by m bytes; nothing happens if that would be too long. */
static void splice(size_t at, size_t n, const char *with, size_t m) {
    char copy[4096];
    if (text_n - n + m > sizeof text || m > sizeof copy) return;
    memcpy(copy, with, m); /* it may point into the text */
    memmove(text + at + m, text + at + n, text_n - at - n);
    memcpy(text + at, copy, m);
    text_n = text_n - n + m;
}

static int is_word(char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' ||
           c == '.';
}

/* A random token of some text: a word, a number, or one other byte. */
static void token_in(const char *p, size_t n, size_t *at, size_t *length) {
    size_t i = below(n), end;
    while (i > 0 && is_word(p[i]) && is_word(p[i - 1])) i--;
    end = i;
    while (end < n && is_word(p[end])) end++;
    *at = i;
    *length = end > i ? end - i : n > 0;
}

/* The token after a random place that begins with a digit. */
static int number_in_text(size_t *at, size_t *length) {
    size_t i = below(text_n);
    while (i < text_n && !(text[i] >= '0' && text[i] <= '9' && (i == 0 || !is_word(text[i - 1]))))
        i++;
    *at = i;
    while (i < text_n && is_word(text[i])) i++;
    *length = i - *at;
    return *length > 0;
}

static long long value_at(size_t at, size_t n) {
    long long value = 0;
    for (size_t i = at; i < at + n && i < at + 10 && text[i] >= '0' && text[i] <= '9'; i++)
        value = value * 10 + (text[i] - '0');
    return value;
}

static void tweak_number(void) {
    static const char *const NUMBERS[] = {"0",
                                          "1",
                                          "2",
                                          "3",
                                          "5",
                                          "7",
                                          "8",
                                          "15",
                                          "16",
                                          "17",
                                          "31",
                                          "32",
                                          "63",
                                          "64",
                                          "65",
                                          "127",
                                          "128",
                                          "255",
                                          "256",
                                          "-1",
                                          "-2",
                                          "-64",
                                          "512",
                                          "1000",
                                          "4096",
                                          "16384",
                                          "16385",
                                          "65536",
                                          "65537",
                                          "2147483647",
                                          "2147483648",
                                          "-2147483648",
                                          "4294967296",
                                          "999999999999999999",
                                          "9223372036854775807",
                                          "99999999999999999999",
                                          "1e9",
                                          "0x1p-24",
                                          "1e-5",
                                          "65504",
                                          "65520",
                                          "1e300",
                                          "-0.0",
                                          "0x1.8p+3",
                                          "1e99999",
                                          "0x",
                                          "1.2.3",
                                          "inf",
                                          "nan",
                                          "-"};
    size_t at, n;
    char word[32];
    if (!number_in_text(&at, &n)) return;
    if (next() % 3 == 0 && n < 10) {
        long long value = value_at(at, n);
        static const int DELTAS[] = {-64, -16, -1, 1, 16, 64};
        value = next() % 2 ? value * 2 : value + DELTAS[below(6)];
        snprintf(word, sizeof word, "%lld", value);
    } else {
        snprintf(word, sizeof word, "%s", NUMBERS[below(sizeof NUMBERS / sizeof NUMBERS[0])]);
    }
    splice(at, n, word, strlen(word));
}

/* An entry of a list of values becomes a sum, difference or half of numbers that occur: offsets and
 * sizes just inside and just outside what fits. */
static void tweak_entry(void) {
    size_t at = below(text_n), a, an, b, bn;
    char word[32];
    while (at + 2 < text_n && memcmp(text + at, "([", 2) != 0) at++;
    size_t end = at + 2;
    while (end < text_n && text[end] != ']') end++;
    if (end >= text_n) return;
    at += 2 + below(end - at - 2);
    while (at > 0 && is_word(text[at - 1])) at--;
    while (at < end && !is_word(text[at])) at++;
    size_t n = 0;
    while (at + n < end && is_word(text[at + n])) n++;
    if (n == 0 || !number_in_text(&a, &an) || !number_in_text(&b, &bn)) return;
    long long x = value_at(a, an), y = value_at(b, bn), value = x;
    switch (next() % 5) {
    case 0: value = x + y; break;
    case 1: value = x - y; break;
    case 2: value = x / 2; break;
    case 3: value = x - 1; break;
    default: break;
    }
    snprintf(word, sizeof word, "%lld", value);
    splice(at, n, word, strlen(word));
}

/* The same number everywhere becomes another one: shapes stay consistent, so checks get further. */
static void change_number_everywhere(void) {
    static const char *const NUMBERS[] = {"1",  "2",  "3",   "7",   "16",  "24",  "31",   "48",
                                          "65", "80", "100", "128", "200", "513", "1000", "4096"};
    const char *with = NUMBERS[below(sizeof NUMBERS / sizeof NUMBERS[0])];
    size_t at, n;
    char word[16];
    if (!number_in_text(&at, &n) || n >= sizeof word) return;
    memcpy(word, text + at, n);
    for (size_t i = 0; i + n <= text_n; i++) {
        int apart = (i == 0 || !is_word(text[i - 1])) && (i + n == text_n || !is_word(text[i + n]));
        if (!apart || memcmp(text + i, word, n) != 0) continue;
        splice(i, n, with, strlen(with));
        i += strlen(with);
    }
}

static void swap_tokens(void) {
    size_t a, an, b, bn;
    char word[64];
    token_in(text, text_n, &a, &an);
    token_in(text, text_n, &b, &bn);
    if (a == b || an > sizeof word || bn > sizeof word) return;
    if (a > b) {
        size_t t = a;
        a = b;
        b = t;
        t = an;
        an = bn;
        bn = t;
    }
    if (a + an > b) return;
    memcpy(word, text + b, bn);
    splice(b, bn, text + a, an);
    splice(a, an, word, bn);
}

static void line_in_text(size_t *at, size_t *n) {
    size_t i = below(text_n), end = i;
    while (i > 0 && text[i - 1] != '\n') i--;
    while (end < text_n && text[end] != '\n') end++;
    *at = i;
    *n = end - i + (end < text_n);
}

static void mutate_text(void) {
    static const char *const WORDS[] = {"tensor<fp16, [1, 16, 1, 64]>",
                                        "tensor<fp16, []>(1.5)",
                                        "fp32",
                                        "int8",
                                        "bool(true)",
                                        "BLOBFILE(path=string(\"" PATH "\"), offset=uint64(64))",
                                        "[[1,2],[3,4]]",
                                        "((((",
                                        "[[[[[[[[",
                                        "string(\"same\")",
                                        "string(\"custom\")",
                                        "conv",
                                        "matmul",
                                        "softmax",
                                        "reduce_sum",
                                        "transpose",
                                        "concat",
                                        "split",
                                        "tile",
                                        "slice_by_index",
                                        "layer_norm",
                                        "quantize",
                                        "scaled_dot_product_attention",
                                        "(a, b, c)",
                                        "->",
                                        "func",
                                        "const",
                                        "\"",
                                        "dict<",
                                        "\0"};
    size_t at, n, from, m;
    const sample *other = &seeds[below((size_t)seed_n)];
    char byte;
    if (text_n == 0) return;
    switch (next() % 14) {
    case 0: text_n = below(text_n); break;
    case 1:
        for (size_t i = 1 + below(4); i > 0; i--) text[below(text_n)] = (char)next();
        break;
    case 2:
        token_in(text, text_n, &at, &n);
        splice(at, n, "", 0);
        break;
    case 3:
        token_in(text, text_n, &at, &n);
        splice(at, 0, text + at, n);
        break;
    case 4: swap_tokens(); break;
    case 5: /* a token of another program */
        token_in(text, text_n, &at, &n);
        token_in(other->text, other->text_n, &from, &m);
        splice(at, n, other->text + from, m);
        break;
    case 6:
        line_in_text(&at, &n);
        splice(at, n, "", 0);
        break;
    case 7:
        line_in_text(&at, &n);
        splice(below(text_n), 0, text + at, n);
        break;
    case 8: /* the beginning of this and the end of another */
        at = below(text_n);
        from = below(other->text_n);
        m = other->text_n - from;
        if (m > 4096) m = 4096;
        splice(at, text_n - at, other->text + from, m);
        break;
    case 9:
        byte = (char)next();
        splice(below(text_n), 0, &byte, 1);
        break;
    case 10: {
        const char *word = WORDS[below(sizeof WORDS / sizeof WORDS[0])];
        token_in(text, text_n, &at, &n);
        splice(at, next() % 2 ? n : 0, word, strlen(word) + (*word == '\0'));
        break;
    }
    default: tweak_number(); break;
    }
}

static void mutate_file(void) {
    static const uint64_t VALUES[] = {
        0,          1,   2, 64, 128, 63, 65, 0x7fffffff, 0xffffffff, UINT64_MAX, (uint64_t)1 << 63,
        0xdeadbeef, 4096};
    if (file_n == 0) return;
    uint64_t value = VALUES[below(sizeof VALUES / sizeof VALUES[0])];
    size_t at = below(file_n), word = next() % 2 ? at & ~(size_t)7 : below(3) * 8 + 64;
    switch (next() % 4) {
    case 0: file_n = below(file_n); break;
    case 1: file[at] = (uint8_t)next(); break;
    default:
        if (word + sizeof value <= file_n) memcpy(file + word, &value, sizeof value);
        break;
    }
}

/* Mostly one: further ones hide what the first would have reached. */
static void mutate(void) {
    for (size_t i = next() % 3 ? 1 : 1 + below(6); i > 0; i--) {
        uint64_t kind = next() % 16;
        if (kind < 2) mutate_file();
        else if (kind < 6) tweak_number();
        else if (kind < 8) change_number_everywhere();
        else if (kind < 11) tweak_entry();
        else mutate_text();
    }
}

static void make_input(void) {
    const sample *seed = &seeds[below((size_t)seed_n)];
    text_n = seed->text_n;
    file_n = seed->file_n;
    memcpy(text, seed->text, text_n);
    if (file_n > 0) memcpy(file, seed->file, file_n);
    if (next() % 64 == 0) { /* noise */
        text_n = below(512);
        int printable = next() % 2;
        for (size_t i = 0; i < text_n; i++)
            text[i] = printable ? "()[]{}<>,=;:\"program1.3 func\n"[below(29)] : (char)next();
        return;
    }
    mutate();
}

/* ------------------------------------------------------------------------------------------- run
 */

static void check_error(int32_t status, const int32_t where[2]) {
    char sentence[512];
    int32_t lines = 1;
    if (anepy_last_error(sentence, sizeof sentence) < 10) die("an error without a sentence");
    if (strchr(sentence, '\n') != NULL) die("an error of several lines");
    for (size_t i = 0; i < text_n; i++) lines += text[i] == '\n';
    if (where[0] < 0 || where[0] > lines || where[1] < 0 || (where[0] == 0) != (where[1] == 0))
        die("an error at a position outside the text");
    if (status == ANEPY_E_PROGRAM && where[0] > 0 && strncmp(sentence, "line ", 5) != 0)
        die("an error whose sentence does not say where");
    if (status != ANEPY_E_PROGRAM && status != ANEPY_E_MEMORY) die(sentence);
}

/* Random fp16 bits are mostly ordinary numbers, with infinities and NaN among them. */
static void fill(uint8_t *p, uint64_t n) {
    for (uint64_t i = 0; i + 8 <= n; i += 8) {
        uint64_t bits = next();
        memcpy(p + i, &bits, 8);
    }
}

static void run_function(anepy_sim *sim, int32_t function) {
    void *surfaces[2][16] = {{NULL}};
    uint64_t nbytes[2][16] = {{0}}, total = 0;
    int32_t where[2] = {0, 0}, n[2] = {0, 0};
    for (int32_t side = 0; side < 2; side++) {
        anepy_sim_tensor t = {.struct_size = sizeof t};
        while (anepy_sim_get_tensor(sim, &t, function, side, n[side]) == ANEPY_OK) {
            if (n[side]++ == 16) goto done;
            nbytes[side][t.slot] = t.nbytes;
            total += t.nbytes;
        }
    }
    if (total > (uint64_t)8 << 20) goto done;
    for (int32_t side = 0; side < 2; side++) {
        for (int32_t i = 0; i < n[side]; i++) {
            /* Exactly as large as declared: one byte more is an error the sanitizer sees. Now and
             * then too small, which is a rule and may be switched off. */
            if (next() % 16 == 0) nbytes[side][i] = below(nbytes[side][i]);
            surfaces[side][i] = malloc(nbytes[side][i] > 0 ? nbytes[side][i] : 1);
            if (surfaces[side][i] == NULL) die("no memory");
            if (side == 0) fill(surfaces[side][i], nbytes[side][i]);
        }
    }
    int32_t status = anepy_sim_run(sim, function, (const void *const *)surfaces[0], nbytes[0],
                                   surfaces[1], nbytes[1], where);
    if (status != ANEPY_OK) {
        check_error(status, where);
        figures.run_failed++;
    } else {
        figures.ran++;
    }
done:
    for (int32_t side = 0; side < 2; side++)
        for (int32_t i = 0; i < 16; i++) free(surfaces[side][i]);
}

static void try_input(void) {
    static uint8_t actions[64];
    /* Copies of the exact size, so that reading beyond the end is seen. */
    char *exact_text = malloc(text_n > 0 ? text_n : 1);
    uint8_t *exact_file = malloc(file_n > 0 ? file_n : 1);
    const char *path = PATH;
    const void *data = exact_file;
    uint64_t nbytes = file_n;
    int32_t where[2], rules = 0;
    anepy_sim *sim = NULL;
    if (exact_text == NULL || exact_file == NULL) die("no memory");
    memcpy(exact_text, text, text_n);
    memcpy(exact_file, file, file_n);
    while (anepy_sim_rule_name(rules) != NULL) rules++;
    /* All default, all off (what a rule would have refused then runs), all reported, or mixed. */
    static const uint8_t ACTIONS[] = {255, 0, 1, 2};
    uint64_t mode = next() % 4;
    for (size_t i = 0; i < sizeof actions; i++) actions[i] = ACTIONS[mode < 3 ? mode : next() % 4];
    anepy_sim_options options = {.struct_size = sizeof options,
                                 .text = exact_text,
                                 .text_n = text_n,
                                 .paths = &path,
                                 .files = &data,
                                 .file_nbytes = &nbytes,
                                 .actions = actions,
                                 .file_n = 1,
                                 .action_n = rules,
                                 .memory_nbytes = MEMORY,
                                 .work = WORK,
                                 .chip = 1 + (int32_t)below(5),
                                 .threads = 1};
    int32_t status = anepy_sim_create(&sim, &options, where);
    free(exact_text);
    free(exact_file);
    if (status != ANEPY_OK) {
        check_error(status, where);
        figures.rejected++;
        return;
    }
    figures.accepted++;
    for (int32_t f = 0; f < 4 && anepy_sim_function_name(sim, f) != NULL; f++) run_function(sim, f);
    anepy_sim_free(sim);
}

/* ------------------------------------------------------------------------------------------ main
 */

static char *read_all(const char *path, size_t most, size_t *n) {
    FILE *in = fopen(path, "rb");
    char *data = malloc(most + 1);
    *n = 0;
    if (in == NULL || data == NULL) {
        free(data);
        if (in != NULL) fclose(in);
        return NULL;
    }
    *n = fread(data, 1, most + 1, in);
    fclose(in);
    if (*n > most) die("a seed is too large");
    return data;
}

static void read_seed(const char *path) {
    char beside[4096];
    sample *s = &seeds[seed_n++];
    s->text = read_all(path, MOST_TEXT - 8192, &s->text_n);
    if (s->text == NULL || s->text_n == 0) die(path);
    snprintf(beside, sizeof beside, "%.*s.bin", (int)strlen(path) - 4, path);
    s->file = read_all(beside, MOST_FILE, &s->file_n);
}

#ifdef ANEPY_LIBFUZZER
/* The same for libFuzzer (clang -fsanitize=fuzzer), which looks for inputs that reach new code: a
 * text, a zero, a weight file. Half of the mutations are its own, half those that know programs. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t n, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t n, size_t most, unsigned seed);
int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    int kept = 0;
    for (int i = 0; i < *argc; i++) {
        size_t n = strlen((*argv)[i]);
        if (n > 4 && strcmp((*argv)[i] + n - 4, ".mil") == 0 && seed_n < MOST_SEEDS)
            read_seed((*argv)[i]);
        else (*argv)[kept++] = (*argv)[i];
    }
    *argc = kept;
    return 0;
}

static void take(const uint8_t *data, size_t n) {
    const uint8_t *end = n > 0 ? memchr(data, 0, n) : NULL;
    text_n = end != NULL ? (size_t)(end - data) : n;
    file_n = end != NULL ? n - text_n - 1 : 0;
    if (text_n > MOST_TEXT - 8192) text_n = MOST_TEXT - 8192;
    if (file_n > MOST_FILE) file_n = MOST_FILE;
    if (text_n > 0) memcpy(text, data, text_n);
    if (file_n > 0) memcpy(file, end + 1, file_n);
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t n, size_t most, unsigned seed) {
    state = seed;
    if (next() % 2) return LLVMFuzzerMutate(data, n, most);
    take(data, n);
    if (text_n == 0 || next() % 64 == 0) make_input();
    else mutate();
    if (text_n + 1 + file_n > most) return n;
    memcpy(data, text, text_n);
    data[text_n] = 0;
    memcpy(data + text_n + 1, file, file_n);
    return text_n + 1 + file_n;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    double start = now_ms();
    take(data, n);
    state = n;
    for (size_t i = 0; i < n; i++) state = (state ^ data[i]) * UINT64_C(0x100000001b3); /* FNV-1a */
    try_input();
    if (now_ms() - start > SLOW_MS) die("an input takes too long");
    return 0;
}
#else
int main(int argc, char **argv) {
    if (argc < 5) die("usage: fuzz_mil SEED FIRST COUNT TEXT.mil...");
    __sanitizer_set_death_callback(on_death);
    uint64_t seed = strtoull(argv[1], NULL, 10), first = strtoull(argv[2], NULL, 10);
    uint64_t count = strtoull(argv[3], NULL, 10);
    for (int i = 4; i < argc && seed_n < MOST_SEEDS; i++) read_seed(argv[i]);
    double begin = now_ms();
    for (current = first; current < first + count; current++) {
        double start = now_ms();
        state = seed;
        state = next() ^ current * UINT64_C(0x2545f4914f6cdd1d);
        make_input();
        try_input();
        double ms = now_ms() - start;
        if (ms > figures.slowest_ms) figures.slowest_ms = ms;
        if (ms > SLOW_MS) die("an input takes too long");
    }
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf(
        "{\"inputs\": %llu, \"seeds\": %d, \"rejected\": %llu, \"accepted\": %llu, \"ran\": %llu, "
        "\"run_failed\": %llu, \"slowest_ms\": %.1f, \"seconds\": %.1f, \"max_rss\": %lld}\n",
        (unsigned long long)count, seed_n, (unsigned long long)figures.rejected,
        (unsigned long long)figures.accepted, (unsigned long long)figures.ran,
        (unsigned long long)figures.run_failed, figures.slowest_ms, (now_ms() - begin) / 1e3,
        (long long)usage.ru_maxrss);
    return 0;
}
#endif
