/* device/sim/lex.c - words, numbers, strings and marks of MIL text, with their positions. */
#include "device/sim/interpreter_internal.h"

#include <math.h>
#include <string.h>

static int is_digit(char c) { return c >= '0' && c <= '9'; }
static int is_letter(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}
static int hex_digit(char c) {
    if (is_digit(c)) return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

static void skip_space(mil_lexer *lexer) {
    for (; lexer->p < lexer->end; lexer->p++) {
        char c = *lexer->p;
        if (c == '\n') {
            lexer->line++;
            lexer->line_start = lexer->p + 1;
        } else if (c != ' ' && c != '\t' && c != '\r') {
            return;
        }
    }
}

/* Takes every character that a number could have; whoever uses the token checks whether it is one.
 */
static const char *number_end(const char *p, const char *end) {
    int hexadecimal = 0;
    if (p < end && (*p == '-' || *p == '+')) p++;
    for (; p < end; p++) {
        char c = *p;
        if (c == 'x' || c == 'X') hexadecimal = 1;
        int exponent = hexadecimal ? c == 'p' || c == 'P' : c == 'e' || c == 'E';
        if (exponent && p + 1 < end && (p[1] == '-' || p[1] == '+')) p++;
        else if (!is_digit(c) && !is_letter(c) && c != '.') break;
    }
    return p;
}

static int32_t read_string(anepy_mil *mil, mil_lexer *lexer, mil_token *out) {
    const char *p = ++lexer->p;
    while (p < lexer->end && *p != '"' && *p != '\n' && *p != '\\' && *p != '\0') p++;
    if (p >= lexer->end || *p != '"') {
        int32_t n = (int32_t)(p - out->at.p > 40 ? 40 : p - out->at.p);
        out->at.n = n;
        return mil_error(mil, out->at,
                         p < lexer->end && *p == '\\' ? "escapes are not allowed in a string"
                                                      : "the string has no end on its line");
    }
    out->at.p = lexer->p;
    out->at.n = (int32_t)(p - lexer->p);
    lexer->p = p + 1;
    return ANEPY_OK;
}

int32_t mil_next_token(anepy_mil *mil, mil_lexer *lexer, mil_token *out) {
    skip_space(lexer);
    const char *p = lexer->p;
    out->at = (mil_span){p, 0, lexer->line, (int32_t)(p - lexer->line_start) + 1};
    if (p >= lexer->end) {
        out->kind = MIL_EOF;
        return ANEPY_OK;
    }
    if (*p == '"') {
        out->kind = MIL_QUOTED;
        return read_string(mil, lexer, out);
    }
    if (p[0] == '-' && p + 1 < lexer->end && p[1] == '>') {
        out->kind = MIL_ARROW;
        lexer->p += 2;
    } else if (is_letter(*p)) {
        out->kind = MIL_WORD;
        while (lexer->p < lexer->end && (is_letter(*lexer->p) || is_digit(*lexer->p))) lexer->p++;
    } else if (is_digit(*p) || *p == '-' || *p == '+' || *p == '.') {
        out->kind = MIL_NUMBER;
        lexer->p = number_end(p, lexer->end);
        if (lexer->p == p) lexer->p++;
    } else {
        out->kind = MIL_MARK;
        lexer->p++;
        out->at.n = 1;
        if (*p == '\0' || strchr("()[]{}<>,=;:", *p) == NULL)
            return mil_error(mil, out->at, "this character does not occur in MIL text");
    }
    out->at.n = (int32_t)(lexer->p - p);
    return ANEPY_OK;
}

int mil_parse_int(mil_span text, int64_t *out) {
    const char *p = text.p, *end = text.p + text.n;
    int negative = p < end && *p == '-';
    if (p < end && (*p == '-' || *p == '+')) p++;
    if (p >= end || end - p > 18) return 0; /* 18 digits always fit */
    int64_t value = 0;
    for (; p < end; p++) {
        if (!is_digit(*p)) return 0;
        value = value * 10 + (*p - '0');
    }
    *out = negative ? -value : value;
    return 1;
}

/* Reads digits in a base, with a point, as mantissa * base^exponent; digits beyond the precision of
 * double only move the point. */
static const char *read_mantissa(const char *p, const char *end, int base, double *mantissa,
                                 int32_t *exponent) {
    const char *begin = p;
    uint64_t value = 0;
    int point = 0, digits = 0;
    for (; p < end; p++) {
        int digit = base == 16 ? hex_digit(*p) : is_digit(*p) ? *p - '0' : -1;
        if (*p == '.' && !point) {
            point = 1;
            continue;
        }
        if (digit < 0) break;
        digits++;
        if (value < (UINT64_C(1) << 58)) {
            value = value * (uint64_t)base + (uint64_t)digit;
            *exponent -= point;
        } else {
            *exponent += !point;
        }
        if (digits > 4096) return begin; /* keeps the exponent in range */
    }
    *mantissa = (double)value;
    return digits > 0 ? p : begin;
}

static int read_exponent(const char *p, const char *end, int32_t *out) {
    int negative = p < end && *p == '-';
    int32_t value = 0;
    if (p < end && (*p == '-' || *p == '+')) p++;
    if (p >= end) return 0;
    for (; p < end; p++) {
        if (!is_digit(*p)) return 0;
        if (value < 100000) value = value * 10 + (*p - '0');
    }
    *out = negative ? -value : value;
    return 1;
}

/* strtod would take the decimal point from the locale of the process. */
int mil_parse_float(mil_span text, double *out) {
    const char *p = text.p, *end = text.p + text.n;
    double sign = p < end && *p == '-' ? -1.0 : 1.0, mantissa = 0.0;
    int32_t exponent = 0, written = 0;
    if (p < end && (*p == '-' || *p == '+')) p++;
    mil_span rest = {p, (int32_t)(end - p), 0, 0};
    if (mil_span_is(rest, "inf") || mil_span_is(rest, "infinity")) {
        *out = sign * INFINITY;
        return 1;
    }
    if (mil_span_is(rest, "nan")) {
        *out = NAN;
        return 1;
    }
    int hexadecimal = end - p > 2 && p[0] == '0' && (p[1] == 'x' || p[1] == 'X');
    if (hexadecimal) p += 2;
    const char *digits = p;
    p = read_mantissa(p, end, hexadecimal ? 16 : 10, &mantissa, &exponent);
    if (p == digits) return 0;
    if (p < end && (hexadecimal ? *p == 'p' || *p == 'P' : *p == 'e' || *p == 'E')) {
        if (!read_exponent(p + 1, end, &written)) return 0;
        p = end;
    }
    if (p != end) return 0;
    if (hexadecimal) *out = sign * ldexp(mantissa, exponent * 4 + written);
    else if (mantissa == 0.0) *out = sign * 0.0;
    else if (exponent + written < -300) *out = sign * 0.0; /* far below every type */
    else if (exponent + written > 300) *out = sign * INFINITY;
    else if (exponent + written < 0) *out = sign * (mantissa / pow(10.0, -(exponent + written)));
    else *out = sign * (mantissa * pow(10.0, exponent + written));
    return 1;
}
