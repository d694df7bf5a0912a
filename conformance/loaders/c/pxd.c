/* A loader of PXD 1.0 in one C11 file: decode and apply, strict on every clause of SPEC.md; no dependency beyond libc.
 *
 *     cc -std=c11 -O2 -Wall -Wextra -Werror -o pxd pxd.c
 *     ./pxd caps | decode FILE | apply FILE --base SAFETENSORS --out SAFETENSORS
 *
 * Exit status: 0 accepted, 1 rejected, 2 input or output, 77 unsupported (conformance/README.md, protocol v1).
 * Header and manifest have one spelling each (SPEC 2.16, 3.2), so they are not parsed as JSON: `scan` holds them to
 * patterns that look like SPEC 2 and 3.4. What differs is E122 or E205, whichever clause it breaks besides. The header
 * of a base is JSON in any spelling (SPEC 7.5). All is checked before it is used; memory lives until the end. */
#define _POSIX_C_SOURCE 200809L
#include <ctype.h>
#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

_Static_assert(FLT_EVAL_METHOD == 0 && FLT_MANT_DIG == 24, "SPEC 6 asks for binary32 arithmetic");
#define MAGIC "{\"__metadata__\":{\"format\":\"pxd\",\"pxd\":\""
#define LIMIT ((u64)1 << 53)
#define EACH(i, count) for (u32 i = 0; i < (count); i++)
enum { VALUES_MAX = 1 << 22, ENTRIES_MAX = 1 << 18, BASE_HEADER_MAX = 100000000, BASE_DIMENSIONS_MAX = 64 };
typedef uint8_t u8; typedef uint32_t u32; typedef uint64_t u64;
typedef struct { const u8 *p; size_t n; } text; /* bytes, those of a string among them */

static const char BASE[] = "-4"; /* in the place of a code: the base is malformed (SPEC 7.5) */
static void need(bool holds, const char *code) {
    static const char *const phases[] = {"container", "profile", "payload", "binding"};
    if (holds) return;
    if (code == BASE) puts("{\"ok\":false,\"phase\":null,\"code\":null}");
    else printf("{\"ok\":false,\"phase\":\"%s\",\"code\":\"%s\"}\n", phases[code[1] - '1'], code);
    exit(1);
}
static void io(bool works, const char *what, const char *path) {
    if (works) return;
    fprintf(stderr, "pxd: cannot %s %s: %s\n", what, path, strerror(errno));
    exit(2);
}

static void *allocate(size_t count, size_t size) { /* zeroed; a list keeps every block reachable */
    static void **all;
    void **made = count < SIZE_MAX / 2 / size ? calloc(1, sizeof *made + count * size) : NULL;
    io(made, "allocate", "memory");
    *made = all;
    all = made;
    return made + 1;
}

/* Room for one more item behind `count`, and for zeros behind that. */
static void *grown(void *items, u32 count, size_t size) {
    if (count & (count - 1)) return items; /* it doubles at powers of two */
    void *made = allocate(2 * (size_t)count + 2, size);
    if (count) memcpy(made, items, count * size);
    return made;
}

/* ---- Text ---- */
static int compare(text a, text b) { /* by bytes */
    size_t shorter = a.n < b.n ? a.n : b.n;
    int order = shorter ? memcmp(a.p, b.p, shorter) : 0;
    return order ? order : (a.n > b.n) - (a.n < b.n);
}

static int by_text(const void *a, const void *b) { return compare(*(const text *)a, *(const text *)b); }
static text word(const char *s) { return (text){(const u8 *)s, strlen(s)}; }
static bool is(text a, const char *b) { return !compare(a, word(b)); }
static bool starts(text a, const char *b) { return a.n >= strlen(b) && !memcmp(a.p, b, strlen(b)); }
static bool ends(text a, const char *b) { return a.n >= strlen(b) && !memcmp(a.p + a.n - strlen(b), b, strlen(b)); }
static bool one_of(u8 c, const char *set) { return c && strchr(set, c); }
static u64 little(const u8 *p, int size) { return size ? little(p + 1, size - 1) << 8 | *p : 0; }
static void put_little(FILE *to, u64 value, u32 size) { EACH(i, size) fputc((int)(value >> 8 * i & 255), to); }
static void check_distinct(text *items, u32 count, const char *code) { /* leaves them sorted */
    if (count) qsort(items, count, sizeof *items, by_text);
    for (u32 i = 1; i < count; i++) need(compare(items[i - 1], items[i]), code);
}

static size_t utf8_length(const u8 *p, size_t n) { /* of the code point at p; 0 where there is none */
    size_t length = p[0] < 0x80 ? 1 : p[0] < 0xC2 ? 0 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : p[0] < 0xF5 ? 4 : 0;
    for (size_t i = 1; i < length; i++) if (i == n || (p[i] & 0xC0) != 0x80) return 0;
    bool too_long = (p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xF0 && p[1] < 0x90);
    return too_long || (p[0] == 0xED && p[1] > 0x9F) || (p[0] == 0xF4 && p[1] > 0x8F) ? 0 : length;
}

static void check_utf8(text s, const char *code) {
    for (size_t i = 0, part; i < s.n; i += part) need((part = utf8_length(s.p + i, s.n - i)), code);
}

/* The order of UTF-16 is that of UTF-8, but that U+10000 and more (from 0xF0) stand before U+E000 (from 0xEE). */
static int rank(u8 c) { return c == 0xEE || c == 0xEF ? c + 0x10 : c; }
static bool utf16_less(text a, text b) {
    size_t i = 0;
    while (i < a.n && i < b.n && a.p[i] == b.p[i]) i++;
    return i < a.n && i < b.n ? rank(a.p[i]) < rank(b.p[i]) : a.n < b.n;
}

/* ---- SHA-256 (FIPS 180-4) ---- */
static const u32 SHA_K[] = {0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
    0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152,
    0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138,
    0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70,
    0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5,
    0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa,
    0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
#define TURN(x, n) ((x) >> (n) | (x) << (32 - (n)))
static void sha_block(u32 *h, const u8 *p) {
    u32 w[64], v[8];
    for (int i = 0; i < 64; i++)
        w[i] = i < 16 ? (u32)p[4 * i] << 24 | (u32)p[4 * i + 1] << 16 | (u32)p[4 * i + 2] << 8 | p[4 * i + 3]
                      : w[i - 16] + (TURN(w[i - 15], 7) ^ TURN(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
                        (TURN(w[i - 2], 17) ^ TURN(w[i - 2], 19) ^ w[i - 2] >> 10);
    memcpy(v, h, sizeof v);
    for (int i = 0; i < 64; i++) {
        u32 a = v[0], e = v[4];
        u32 one = v[7] + (TURN(e, 6) ^ TURN(e, 11) ^ TURN(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + SHA_K[i] + w[i];
        u32 two = (TURN(a, 2) ^ TURN(a, 13) ^ TURN(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += one, v[0] = one + two;
    }
    EACH(i, 8) h[i] += v[i];
}

static const char *sha_of(const u8 *p, size_t n) { /* hexadecimal, of the last call */
    static char hex[65];
    u32 h[] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    u8 tail[128] = {0};
    size_t rest = n % 64, padded = rest < 56 ? 64 : 128;
    for (size_t i = 0; i < n / 64; i++) sha_block(h, p + 64 * i);
    if (rest) memcpy(tail, p + n - rest, rest);
    tail[rest] = 0x80;
    EACH(i, 8) tail[padded - 1 - i] = (u8)((u64)n * 8 >> 8 * i);
    for (size_t i = 0; i < padded; i += 64) sha_block(h, tail + i);
    EACH(i, 8) snprintf(hex + 8 * i, 9, "%08" PRIx32, h[i]);
    return hex;
}

/* ---- The file as types ---- */
static const char *const DTYPES[] = {"BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "U16", "I16", "F16", "BF16", "U32",
                                     "I32", "F32", "U64", "I64", "F64", "C64", "F4", "F6_E2M3", "F6_E3M2",
                                     "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", NULL};
static const u8 BITS[] = {8, 8, 8, 8, 8, 16, 16, 16, 16, 32, 32, 32, 64, 64, 64, 64, 4, 6, 6, 8, 8, 8};
static const char *const ENCODINGS[] = {"full", "same", "exact", NULL}; /* `sign` is never written */
static const char *const AXES[] = {"row", "col", "row+col", "tensor", NULL};
static const u8 AXIS_SCALES[] = {1, 2, 3, 4}; /* bit 0: row, 1: col, 2: scalar */
enum { U8_ = 1, F16 = 7, BF16 = 8, U32_ = 9, F32 = 11, FULL = 0, SAME, EXACT, SIGN, BLOCK = 65536 };

typedef struct { u32 count; u64 size[8]; } shape;
typedef struct { text name; int dtype; shape shape; u64 begin, end; const u8 *data; } record;
typedef struct { int axis; int64_t exponent; text mask, scale[3]; } component;
typedef struct {
    text name, sha256, base_sha256, result, json; /* digests as hex; json: from `name` to the end */
    int dtype, base_dtype, encoding;
    bool has_base, has_tail;
    shape shape, base_shape, covered, tail;
    u32 component_count;
    component components[8];
    text exact, index, data; /* index, data: of an `exact` module, and so is what follows */
    u64 size;
    u8 *made;                    /* the new tensor */
    const record *tensor, *base; /* in this file, and in the base */
} module;
typedef struct { text key, value; const record *data; } entry; /* path, digest; name; key, text; module, alias */
typedef struct { text json; entry *items; u32 count; } list;   /* json: as the manifest has it */
typedef struct {
    text file, manifest, base_digest, digests, previous, result; /* digests: hex */
    bool chained;                                               /* SPEC 3.3: the feature `exact` */
    record *records;
    module *modules;
    list assets, dropped, metadata, tied;
    u32 record_count, module_count, next, pads;
} pxd;
static bool is_float(int dtype) { return dtype == F16 || dtype == BF16 || dtype == F32; }
static u64 bytes_of(const record *r) { return r->end - r->begin; }
static u64 width_of(const module *m) { return m->covered.count ? m->covered.size[m->covered.count - 1] : 1; }
static u8 sign_at(const module *m, const component *c, u64 row, u64 j) {
    return c->mask.p[row * ((width_of(m) + 7) / 8) + j / 8] >> j % 8 & 1;
}
static u64 size_of(const shape *s, int dtype) { /* at most LIMIT; and LIMIT where it is no whole number */
    u64 bits = BITS[dtype];
    EACH(i, s->count < 8 ? s->count : 8) /* an empty tensor of a base has a 0 */
        bits = !s->size[i] || bits <= 8 * LIMIT / s->size[i] ? bits * s->size[i] : 8 * LIMIT;
    return bits % 8 ? LIMIT : bits / 8;
}

static bool same_shape(const shape *a, const shape *b, u32 from) {
    for (u32 i = from; i < a->count && i < b->count; i++) if (a->size[i] != b->size[i]) return false;
    return a->count == b->count;
}

/* ---- Text by patterns ---- */
typedef struct { const u8 *p; size_t n, i, values; const char *code; u8 *decoded; } json; /* code: of what differs */
static json open_json(text s, const char *code) { return (json){s.p, s.n, 0, 0, code, allocate(s.n, 1)}; }
static u8 peek(const json *j) { return j->i < j->n ? j->p[j->i] : 0; }
static u8 take_byte(json *j) { return j->i < j->n ? j->p[j->i++] : 0; }
static bool foreign(const json *j) { return j->code == BASE; } /* which other programs write */
static void blank(json *j) { while (foreign(j) && one_of(peek(j), " \t\r\n")) j->i++; }
static void mark(json *j, u8 c) {
    blank(j);
    need(peek(j) == c, j->code);
    j->i++;
    blank(j);
    j->values += c == ',' || (one_of(c, "[{") && !one_of(peek(j), "]}")); /* SPEC 2.11: each element or member */
    need(j->values <= VALUES_MAX, j->code[1] == '1' ? "E117" : foreign(j) ? BASE : "E202");
}
static bool more(json *j, u8 close, u32 index) { /* before each element; takes the comma, or the bracket at the end */
    blank(j);
    bool element = peek(j) != close;
    if (!element || index) mark(j, element ? ',' : close);
    return element;
}

static u8 escape(json *j) { /* what stands behind a backslash */
    static const char from[] = "\"\\bfnrt", to[] = "\"\\\b\f\n\r\t", digits[] = "0123456789abcdef";
    u8 c = take_byte(j);
    if (one_of(c, from)) return (u8)to[strchr(from, c) - from];
    need(c == 'u' && j->n - j->i >= 4 && j->p[j->i] == '0' && j->p[j->i + 1] == '0', j->code);
    need(one_of(j->p[j->i + 2], "01") && one_of(j->p[j->i + 3], digits), j->code);
    u8 value = (u8)((j->p[j->i + 2] - '0') << 4 | (strchr(digits, j->p[j->i + 3]) - digits));
    need(!one_of(value, to), j->code);
    j->i += 4;
    return value;
}

static u32 four_digits(json *j) {
    u32 value = 0;
    EACH(i, 4) {
        u8 c = take_byte(j);
        need(isxdigit(c), j->code);
        value = value << 4 | (u32)(isdigit(c) ? c - '0' : tolower(c) - 'a' + 10);
    }
    return value;
}

static void any_escape(json *j) { /* of any spelling, but no unpaired surrogate (SPEC 7.5) */
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    u8 c = take_byte(j);
    u32 point = one_of(c, from) ? (u8)to[strchr(from, c) - from] : (need(c == 'u', j->code), four_digits(j));
    need(point >> 10 != 0x37, j->code);
    if (point >> 10 == 0x36) {
        need(take_byte(j) == '\\' && take_byte(j) == 'u', j->code);
        u32 low = four_digits(j);
        need(low >> 10 == 0x37, j->code);
        point = 0x10000 + ((point & 0x3FF) << 10 | (low & 0x3FF));
    }
    u32 more = point < 0x80 ? 0 : point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    *j->decoded++ = (u8)("\x00\xC0\xE0\xF0"[more] | point >> 6 * more);
    while (more--) *j->decoded++ = (u8)(0x80 | (point >> 6 * more & 0x3F));
}

static text string(json *j) {
    text made = {j->decoded, 0};
    need(take_byte(j) == '"', j->code);
    for (u8 c; (c = take_byte(j)) != '"';) {
        need(c >= 0x20, j->code);
        if (c == '\\' && foreign(j)) any_escape(j);
        else *j->decoded++ = c == '\\' ? escape(j) : c;
    }
    made.n = (size_t)(j->decoded - made.p);
    return made;
}

static int64_t integer(json *j, int64_t least) { /* SPEC 2.10; zeros or a quotation mark stand behind every text */
    if (foreign(j) && peek(j) == '-' && j->p[j->i + 1] == '0') j->i++; /* -0 */
    const char *start = (const char *)j->p + j->i;
    char spelled[32];
    int64_t value = one_of(peek(j), "-0123456789") ? strtoll(start, NULL, 10) : INT64_MAX;
    int n = snprintf(spelled, sizeof spelled, "%" PRId64, value);
    need(value >= least && value > -(int64_t)LIMIT && value < (int64_t)LIMIT, j->code);
    need(!strncmp(start, spelled, (size_t)n), j->code); /* no other spelling */
    j->i += (size_t)n;
    return value;
}

static text digest(json *j, const char *algorithm) {
    text s = string(j);
    need(starts(s, algorithm) && s.n == strlen(algorithm) + 64, j->code);
    for (size_t i = s.n - 64; i < s.n; i++) need(one_of(s.p[i], "0123456789abcdef"), j->code);
    return s;
}
static int which(json *j, const char *const *words) { /* in a base a dtype may be unknown (SPEC 7) */
    int i = 0;
    for (text s = string(j); words[i] && !is(s, words[i]);) i++;
    need(words[i] || foreign(j), words == DTYPES && j->code[1] == '1' ? "E119" : j->code);
    return i;
}

static shape dimensions(json *j) {
    shape made = {0};
    mark(j, '[');
    for (; more(j, ']', made.count); made.count++) {
        u64 size = (u64)integer(j, 0), *last = &made.size[7];
        bool fits = foreign(j) ? made.count < BASE_DIMENSIONS_MAX : size && made.count < 8;
        need(fits, foreign(j) ? BASE : j->code[1] == '1' ? "E120" : "E208"); /* SPEC 2.14, 3.8, 7.5 */
        if (made.count < 8) made.size[made.count] = size;
        else *last = size && *last > LIMIT / size ? LIMIT : *last * size; /* those beyond count for their bytes alone */
    }
    return made;
}

/* Take what the pattern says, where ' stands for a quotation mark, and after %: s string, h hex digest, d digest,
 * n natural number, i integer, t dtype, e encoding, a axis, l shape; ? before s or d: or null. What stands between
 * < and > takes at most 2^16 bytes (SPEC 3.8). */
static void scan(json *j, const char *pattern, ...) {
    size_t start = 0;
    va_list to;
    va_start(to, pattern);
    for (const char *p = pattern; *p; p++) {
        if (*p == '<') start = j->i;
        else if (*p == '>') need(j->i - start <= 1 << 16, "E208");
        else if (*p != '%') mark(j, *p == '\'' ? '"' : (u8)*p);
        if (*p != '%') continue;
        bool absent = p[1] == '?' && peek(j) == 'n';
        if (absent) scan(j, "null");
        p += p[1] == '?' ? 2 : 1;
        switch (*p) {
        case 's': *va_arg(to, text *) = absent ? (text){0} : string(j); break;
        case 'h': *va_arg(to, text *) = digest(j, ""); break;
        case 'd': *va_arg(to, text *) = absent ? (text){0} : digest(j, "sha256:"); break;
        case 'n': *va_arg(to, u64 *) = (u64)integer(j, 0); break;
        case 'i': *va_arg(to, int64_t *) = integer(j, -(int64_t)LIMIT); break;
        case 'l': *va_arg(to, shape *) = dimensions(j); break;
        default: *va_arg(to, int *) = which(j, *p == 't' ? DTYPES : *p == 'e' ? ENCODINGS : AXES);
        }
    }
    va_end(to);
}

static list read_list(json *j, const char *key, u8 open, const char *pattern) {
    scan(j, key);
    list made = {.json.p = j->p + j->i};
    mark(j, open);
    for (u8 close = open + 2; more(j, close, made.count); made.count++) { /* ] follows [ and } follows { by two */
        need(made.count < ENTRIES_MAX, "E208");                           /* SPEC 3.8 */
        made.items = grown(made.items, made.count, sizeof *made.items);
        scan(j, pattern, &made.items[made.count].key, &made.items[made.count].value);
    }
    made.json.n = (size_t)(j->p + j->i - made.json.p);
    return made;
}

/* ---- Steps 1 to 6: container ---- */
static text read_file(const char *path, const char *irregular) { /* with zeros behind it */
    struct stat about;
    int found = !stat(path, &about);
    need(found || irregular != BASE, BASE);
    io(found, "read", path);
    need(S_ISREG(about.st_mode), irregular);
    need((u64)about.st_size < LIMIT, "E102");
    FILE *stream = fopen(path, "rb");
    io(stream, "read", path);
    u8 *made = allocate((size_t)about.st_size + 16, 1);
    size_t n = fread(made, 1, (size_t)about.st_size, stream);
    io(!ferror(stream) && !fclose(stream), "read", path);
    return (text){made, n};
}

static record read_record(json *j, text name) { /* SPEC 2.12 to 2.15 */
    record r = {.name = name};
    need(name.n <= 1024, "E118");
    need(!is(name, "__metadata__"), "E115");
    scan(j, "{'dtype':%t,'shape':%l,'data_offsets':[%n,%n]}", &r.dtype, &r.shape, &r.begin, &r.end);
    need(size_of(&r.shape, r.dtype) < LIMIT, "E120");
    need(r.end >= r.begin && bytes_of(&r) == size_of(&r.shape, r.dtype), "E121");
    return r;
}

static void read_header(pxd *f) {
    const u8 *file = f->file.p;
    u64 length = little(file, 8), end = 0, held = f->file.n - 8 - length;
    text header = {file + 8, (size_t)length}, *names = NULL;
    need(*file == 0xF8, !f->file.n ? "E103" : file[8] == '{' ? "E112" : "E109");   /* SPEC 2.2; other kinds are E109 */
    need(f->file.n >= 4096, "E103");
    need(length >= 4088 && length <= 1 << 26 && (8 + length) % 4096 == 0, "E110"); /* SPEC 2.3 */
    need(8 + length <= f->file.n, "E111");                                        /* SPEC 2.4 */
    need(starts(header, MAGIC), "E112");                                          /* SPEC 2.5 */
    need(starts(header, MAGIC "1.0\""), "E201");                                  /* SPEC 2.6 */
    check_utf8(header, "E113");                                                   /* SPEC 2.7 */
    json taken = open_json(header, "E122"), *j = &taken;
    scan(j, "{'__metadata__':{'format':'pxd','pxd':'1.0','manifest':%s}", &f->manifest);
    f->records = grown(NULL, 0, sizeof *f->records);
    for (u32 i = 0; more(j, '}', 1); f->record_count = ++i) {
        names = grown(names, i, sizeof *names);
        f->records = grown(f->records, i, sizeof *f->records);
        scan(j, "%s:", &names[i]);
        record *r = &f->records[i];
        *r = read_record(j, names[i]);
        need(r->begin == end, "E123"); /* SPEC 2.17 */
        r->data = header.p + header.n + (r->end <= held ? r->begin : 0);
        end = r->end;
    }
    check_distinct(names, f->record_count, "E115"); /* SPEC 2.9 */
    for (size_t i = j->i; i < j->n; i++) need(header.p[i] == ' ', "E114");
    need(j->n - j->i < 4096, "E122"); /* SPEC 2.16 */
    need(held == end, held < end ? "E124" : "E125"); /* SPEC 2.18 */
}

/* ---- Steps 7 and 8: profile ---- */
static text base64(text s, const char *code) { /* as hex: RFC 4648, section 4, without padding, unused bits 0 */
    static const char set[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    u8 *hex = allocate(s.n * 3 / 2, 1), *p = hex;
    u32 bits = 0, held = 0;
    for (size_t i = 0; i < s.n; i++) {
        need(one_of(s.p[i], set), code);
        bits = bits << 6 | (u32)(strchr(set, s.p[i]) - set);
        for (held += 6; held >= 4; *p++ = (u8)"0123456789abcdef"[bits >> held & 15]) held -= 4;
    }
    text made = {hex, s.n * 6 / 8 * 2};
    need(made.n % 64 == 0 && s.n % 4 != 1 && !(bits & ((1u << s.n * 6 % 8) - 1)), code);
    return made;
}

static bool key(json *j, const char *name) { /* whether the next member has this key, in quotation marks; takes it */
    bool there = starts((text){j->p + j->i, j->n - j->i}, name);
    if (there) j->i += strlen(name);
    return there;
}

static module read_module(json *j) { /* SPEC 3.4: what is usual is left out */
    module m = {.dtype = BF16, .encoding = SIGN, .has_base = true};
    bool like = true, parts;
    scan(j, "{");
    if (key(j, "\"base\":")) {
        like = false, m.has_base = peek(j) != 'n';
        scan(j, m.has_base ? "{'dtype':%t,'shape':%l}," : "null,", &m.base_dtype, &m.base_shape);
    }
    if ((parts = key(j, "\"components\":"))) {
        scan(j, "[");
        for (; more(j, ']', m.component_count); m.component_count++) {
            need(m.component_count < 8, "E208"); /* SPEC 3.8 */
            scan(j, "[%a,%i]", &m.components[m.component_count].axis, &m.components[m.component_count].exponent);
        }
        scan(j, ",");
    }
    if (key(j, "\"dtype\":")) {
        scan(j, "%t,", &m.dtype);
        need(m.dtype != BF16, j->code);
    }
    if (!parts) scan(j, "'encoding':%e,", &m.encoding);
    m.json.p = j->p + j->i;
    scan(j, "'name':%s,'shape':%l", &m.name, &m.shape);
    if (m.encoding == EXACT) scan(j, ",'size':%n", &m.size);
    scan(j, "}");
    m.json.n = (size_t)(j->p + j->i - m.json.p);
    if (like) m.base_dtype = m.dtype, m.base_shape = m.shape;
    else need(!m.has_base || m.base_dtype != m.dtype || !same_shape(&m.base_shape, &m.shape, 0), j->code);
    need(size_of(&m.shape, m.dtype) < LIMIT && size_of(&m.base_shape, m.base_dtype) < LIMIT, "E208");
    return m;
}

static void read_digests(pxd *f) { /* SPEC 3.13 */
    size_t next = 0;
    for (module *m = f->modules; m < f->modules + f->module_count; m++) {
        m->has_tail = m->has_base && m->shape.count && m->base_shape.count && m->shape.size[0] > m->base_shape.size[0];
        bool own = m->encoding != SAME || m->has_tail;
        text *wanted[] = {m->has_base ? &m->base_sha256 : NULL, own ? &m->sha256 : NULL,
                          m->encoding == EXACT ? &m->result : NULL};
        EACH(i, 3) if (wanted[i]) {
            need(next < f->digests.n, "E213");
            *wanted[i] = (text){f->digests.p + next, 64};
            next += 64;
        }
    }
    need(next == f->digests.n, "E213");
}

static void read_manifest(pxd *f) { /* SPEC 3.4 */
    json taken = open_json(f->manifest, "E205"), *j = &taken;
    text other;
    u64 number;
    f->assets = read_list(j, "{'assets':", '[', "{'path':%s,'sha256':%h}");
    scan(j, ",'base':<{'digest':%d,'id':%s,'revision':%?s}>,'calibration':", &f->base_digest, &other, &other);
    scan(j, peek(j) == 'n' ? "null" : "<{'digest':%d,'samples':%n,'seed':%n,'sequence_length':%n,'source':%s}>",
         &other, &number, &number, &number, &other);
    scan(j, ",'digests':%s", &f->digests);
    f->digests = base64(f->digests, j->code);
    f->dropped = read_list(j, ",'dropped':", '[', "%s");
    scan(j, ",'features':[");
    f->chained = key(j, "\"exact\"");
    need(peek(j) != '"' && (!f->chained || peek(j) == ']'), "E204"); /* SPEC 3.3 */
    scan(j, "],'fine_tuned':<{'id':%s,'revision':%?s}>", &other, &other);
    f->metadata = read_list(j, ",'metadata':", '{', "%s:%s");
    need(f->metadata.json.n <= 1 << 24, "E208"); /* SPEC 3.8 */
    for (const entry *it = f->metadata.items; it + 1 < f->metadata.items + f->metadata.count; it++)
        need(utf16_less(it[0].key, it[1].key), compare(it[0].key, it[1].key) ? "E203" : "E202"); /* SPEC 2.9, 3.2 */
    scan(j, ",'modules':[");
    for (; more(j, ']', f->module_count); f->module_count++) {
        need(f->module_count < ENTRIES_MAX, "E208"); /* SPEC 3.8 */
        f->modules = grown(f->modules, f->module_count, sizeof *f->modules);
        f->modules[f->module_count] = read_module(j);
    }
    if (f->chained) scan(j, ",'previous':%?d", &f->previous);
    scan(j, ",'producer':<{'name':%s,'version':%s}>", &other, &other);
    if (f->chained) scan(j, ",'result':%?d", &f->result);
    f->tied = read_list(j, ",'tied':", '[', "[%s,%s]");
    scan(j, "}");
    need(j->i == j->n, peek(j) == ' ' ? "E203" : "E202");
    need(f->module_count, "E208");
    read_digests(f);
}

static text check_name(text s) { /* SPEC 3.5 */
    need(s.n >= 1 && s.n <= 512 && !starts(s, "__"), "E206");
    EACH(i, s.n) need(s.p[i] > 0x20 && s.p[i] < 0x7F && !one_of(s.p[i], "/\\"), "E206");
    return s;
}

static void check_names(const pxd *f) { /* SPEC 3.5 to 3.7 */
    text *names = allocate(f->module_count + f->tied.count + f->dropped.count, sizeof *names);
    const entry *tied = f->tied.items, *dropped = f->dropped.items;
    u32 count = f->module_count;
    EACH(i, count) names[i] = check_name(f->modules[i].name);
    check_distinct(names, count, "E207");
    EACH(i, f->tied.count) {
        need(!i || compare(tied[i - 1].value, tied[i].value) <= 0, "E205");
        check_name(tied[i].key);
        need(bsearch(&tied[i].key, names, f->module_count, sizeof *names, by_text), "E207");
        names[count++] = check_name(tied[i].value);
    }
    EACH(i, f->dropped.count) {
        need(!i || compare(dropped[i - 1].key, dropped[i].key) < 0, "E205");
        names[count++] = check_name(dropped[i].key);
    }
    check_distinct(names, count, "E207");
}

static void check_fit(module *m, bool chained) { /* SPEC 3.9, 3.10 */
    bool floats = is_float(m->dtype) && is_float(m->base_dtype);
    EACH(k, m->component_count) need(m->components[k].exponent >= -64 && m->components[k].exponent <= 63, "E209");
    need(m->encoding != SIGN || m->component_count, "E209");
    m->covered = m->shape;
    if (m->encoding == FULL) return;
    need(m->has_base && same_shape(&m->shape, &m->base_shape, 1), "E209");
    if (m->has_tail) {
        m->tail = m->shape;
        m->tail.size[0] -= m->covered.size[0] = m->base_shape.size[0];
    }
    if (m->encoding == SIGN) need(floats && m->shape.count >= 2, "E209");
    else need(floats || m->dtype == m->base_dtype, "E209");
    if (m->encoding == EXACT) need(chained && floats && m->dtype == m->base_dtype && m->size, "E209");
}

static void print_as_is(const char *before, text s) { printf("%s%.*s", before, (int)s.n, (const char *)s.p); }
static void print_tensor(FILE *to, text name, const char *format, int dtype, const shape *s) {
    EACH(i, name.n) fprintf(to, name.p[i] == '"' ? "\\%c" : "%c", name.p[i]); /* the one character that needs it */
    fprintf(to, format, DTYPES[dtype]);
    EACH(d, s->count) fprintf(to, d ? ",%" PRIu64 : "%" PRIu64, s->size[d]);
}

static text result_of(const module *m) { /* SPEC 3.14: where it is known */
    bool like = m->has_base && m->dtype == m->base_dtype && same_shape(&m->shape, &m->base_shape, 0);
    return m->encoding == FULL ? m->sha256 : m->encoding == SAME && like ? m->base_sha256 : m->result;
}

static const char *digest_of(const pxd *f, bool results) { /* SPEC 3.11, 3.14; NULL: one is not known */
    module *sorted = allocate(f->module_count, sizeof *sorted);
    char *made;
    size_t n;
    bool known = true;
    FILE *to = open_memstream(&made, &n);
    io(to, "allocate", "memory");
    memcpy(sorted, f->modules, f->module_count * sizeof *sorted);
    qsort(sorted, f->module_count, sizeof *sorted, by_text); /* a module begins with its name */
    for (const module *m = sorted; m < sorted + f->module_count; m++) {
        text sum = results ? result_of(m) : m->base_sha256;
        known = known && (sum.p || !results);
        if (!sum.p) continue;
        fputs(ftell(to) ? ",[\"" : "[[\"", to);
        const shape *sizes = results ? &m->shape : &m->base_shape;
        print_tensor(to, m->name, "\",\"%s\",[", results ? m->dtype : m->base_dtype, sizes);
        fprintf(to, "],\"%.64s\"]", (const char *)sum.p);
    }
    fputs(ftell(to) ? "]" : "[]", to);
    fclose(to);
    const char *digest = sha_of((const u8 *)made, n);
    free(made);
    return known ? digest : NULL;
}

static void check_digests(const pxd *f) {
    need(ends(f->base_digest, digest_of(f, false)), "E210");
    const char *result = f->chained ? digest_of(f, true) : NULL;
    need(result ? f->result.p && ends(f->result, result) : !f->result.p, "E214");
}

/* SPEC 3.12: the bytes of the path that name a folder, its slash included; 0: none. */
static size_t folder_of(text path) {
    size_t n = 0;
    while (n < path.n && (isalnum(path.p[n]) || one_of(path.p[n], "_-"))) n++;
    return n && n <= 63 && n < path.n && path.p[n] == '/' && path.p[0] != '-' ? n + 1 : 0;
}

static void check_assets(const pxd *f) { /* SPEC 3.12 */
    static const char *const suffixes[] = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".md"};
    text *lowered = allocate(f->assets.count, sizeof *lowered);
    EACH(i, f->assets.count) {
        text path = f->assets.items[i].key;
        size_t folder = folder_of(path);
        u8 *made = allocate(path.n, 1);
        size_t stem = 0;
        EACH(k, 6) if (ends(path, suffixes[k])) stem = path.n - strlen(suffixes[k]);
        need(stem > folder && stem - folder <= 119 && !ends(path, ".index.json"), "E211");
        need(!one_of(path.p[folder], ".-"), "E211");
        EACH(k, path.n - folder) need(isalnum(path.p[folder + k]) || one_of(path.p[folder + k], "_.-"), "E211");
        EACH(k, path.n) made[k] = (u8)tolower(path.p[k]);
        lowered[i] = (text){made, path.n};
    }
    check_distinct(lowered, f->assets.count, "E211");
}

/* SPEC 4.1, 4.2: the next tensor, behind a pad where one is due. Its name is `name` and the suffix with its number;
 * wanted NULL: any one dimension. */
static const record *take(pxd *f, text name, const char *suffix, u32 number, int dtype, const shape *wanted) {
    u64 end = f->next ? f->records[f->next - 1].end : 0;
    char rest[32];
    if (end % 64 && !starts(word(suffix), "__pad__"))
        take(f, word(""), "__pad__.%" PRIu32, f->pads++, U8_, &(shape){1, {64 - end % 64}});
    const record *r = &f->records[f->next++]; /* behind the last one stand zeros, and no name is empty */
    snprintf(rest, sizeof rest, suffix, number);
    need(r->name.n == name.n + strlen(rest) && ends(r->name, rest) && !memcmp(r->name.p, name.p, name.n), "E212");
    need(r->dtype == dtype && (wanted ? same_shape(&r->shape, wanted, 0) : r->shape.count == 1), "E212");
    return r;
}

static text part(const module *m, u64 *at, int dtype, const shape *s) { /* SPEC 4.2; data NULL: count alone */
    text made = {m->tensor ? m->tensor->data + *at : NULL, size_of(s, dtype)};
    *at += (made.n + 63) / 64 * 64;
    return made;
}

static u64 split_delta(module *m) { /* the parts of a delta; returns its size */
    u32 last = m->covered.count - 1;
    u64 at = 0;
    EACH(k, m->component_count) {
        component *c = &m->components[k];
        shape mask = m->covered, row = mask, col = mask, one = {1, {1}};
        const shape *shapes[] = {&row, &col, &one};
        mask.size[last] = (mask.size[last] + 7) / 8;
        row.count = col.count = last;
        col.size[last - 1] = m->covered.size[last];
        c->mask = part(m, &at, U8_, &mask);
        EACH(s, 3) if (AXIS_SCALES[c->axis] >> s & 1) c->scale[s] = part(m, &at, F16, shapes[s]);
    }
    if (m->encoding == EXACT) {
        m->index = part(m, &at, U32_, &(shape){1, {(size_of(&m->covered, U8_) + BLOCK - 1) / BLOCK}});
        m->data = part(m, &at, U8_, &(shape){1, {m->size}});
    }
    if (m->tail.count) m->exact = part(m, &at, m->dtype, &m->tail);
    return at;
}

static void check_tensors(pxd *f) {
    EACH(i, f->module_count) {
        module *m = &f->modules[i];
        u64 size = m->encoding == FULL ? 0 : split_delta(m);
        if (size) m->tensor = take(f, m->name, ".delta", 0, U8_, &(shape){1, {size}});
        if (size) split_delta(m);
        if (m->encoding != FULL) continue;
        m->tensor = take(f, m->name, ".full", 0, m->dtype, &m->shape);
        m->exact = (text){m->tensor->data, bytes_of(m->tensor)};
    }
    EACH(i, f->assets.count) f->assets.items[i].data = take(f, word(""), "__asset__.%" PRIu32, i, U8_, NULL);
    need(f->next == f->record_count, "E212");
}

/* ---- Steps 9 to 11: payload ---- */
static void check_digest(const record *r, text sha256, const char *code) {
    need(is(sha256, sha_of(r->data, bytes_of(r))), code);
}

static void check_zero(const u8 *from, const u8 *to) { /* SPEC 4.5 */
    while (from < to) need(!*from++, "E304");
}

/* ---- Exact updates: SPEC 5.6 to 5.9. Blocks are checked where `weights` is NULL and applied where it is not. ---- */
typedef struct { const u8 *p; u64 low, high; const char *code; } stream; /* unary numbers from low, fields from high */
typedef struct { u8 *weights; const u8 *p; u64 length, count; u32 size, mantissa, key; } block;

static u64 bit(const stream *b, u64 i) { return b->p[i / 8] >> i % 8 & 1; }
static u64 unary(stream *b) {
    for (u64 n = 0;; n++) {
        need(b->low < b->high, b->code);
        if (!bit(b, b->low++)) return n;
    }
}
static u64 field(stream *b, u64 count) {
    u64 value = 0;
    for (need(b->high - b->low >= count, b->code); count--;) value = value << 1 | bit(b, --b->high);
    return value;
}
static int64_t ahead(const stream *b) {
    int64_t value = 0;
    EACH(i, 15) value = value << 1 | (int64_t)(b->high > i ? bit(b, b->high - 1 - i) : 0);
    return value;
}
static int64_t run_of(stream *b) { return (int64_t)(unary(b) << 15) + ahead(b); }
static void put(const block *b, u64 place, u64 value) { /* a pattern */
    EACH(i, b->size) b->weights[place * b->size + i] = (u8)(value >> 8 * i);
}
static void step(const block *b, u64 place, int64_t by) {
    u64 top = (u64)1 << (8 * b->size - 1), all = 2 * top - 1, at = little(b->weights + place * b->size, (int)b->size);
    at = ((at ^ (at & top ? all : top)) + (u64)by) & all;
    put(b, place, at ^ (at & top ? top : all));
}

static void read_gaps(const block *b) { /* SPEC 5.8 */
    u64 moves = little(b->p, 2), listed = little(b->p + 2, 2), patterns = 4 + 2 * listed, place = 0, other = 0;
    u64 signs = patterns + b->size * listed, rest = signs + (moves + 7) / 8, gap;
    bool wide = moves * 384 < b->count;
    need(rest <= b->length && (!(moves % 8) || !(b->p[rest - 1] >> moves % 8)), "E307");
    for (u64 i = 0; i < moves; i++, place++) {
        bool more = true;
        for (gap = 0; more; rest++) {
            need(rest + wide < b->length, "E307");
            gap += little(b->p + rest, 1 + wide);
            more = !wide && b->p[rest] == 255;
            rest += wide;
        }
        need((place += gap) < b->count, "E307");
        while (other < listed && little(b->p + 4 + 2 * other, 2) < place) other++; /* they ascend: below */
        need(other == listed || little(b->p + 4 + 2 * other, 2) != place, "E307");
        if (b->weights) step(b, place, b->p[signs + i / 8] >> i % 8 & 1 ? -1 : 1);
    }
    need(rest == b->length, "E307");
    for (u64 i = 0, last = 0; i < listed; i++, last = place + 1) {
        place = little(b->p + 4 + 2 * i, 2);
        need(place >= last && place < b->count, "E307");
        if (b->weights) put(b, place, little(b->p + patterns + b->size * i, (int)b->size));
    }
}
static void read_exceptions(const block *b, stream *from, bool store) {
    u64 place, pattern, last = 0;
    for (u64 left = unary(from); left--; last = place + 1) {
        place = field(from, 16);
        pattern = field(from, 8 * b->size);
        need(place >= last && place < b->count, "E307");
        if (store) put(b, place, pattern);
    }
}
static void read_dense(const block *b, stream *from, u64 place, u64 k) { /* class 0 */
    u64 q = unary(from), most = b->mantissa + 1;
    need(q <= 8, "E405");
    if (q == 8) { put(b, place, field(from, 8 * b->size)); return; }
    int64_t z = (int64_t)(k < most ? q << k | field(from, k) : q << most | field(from, most));
    step(b, place, z & 1 ? -(z + 1) / 2 : z / 2);
}

static void read_keyed(const block *b) { /* SPEC 5.9 */
    static u8 classes[BLOCK]; /* by the base's weights, which the block changes */
    stream from = {b->p, 0, 8 * b->length, b->weights ? "E405" : "E307"}, again = from;
    read_exceptions(b, &from, false);
    if (!b->weights) return;
    for (u64 i = 0; i < b->count; i++) {
        u64 e = (little(b->weights + i * b->size, (int)b->size) & (((u64)1 << (8 * b->size - 1)) - 1)) >> b->mantissa;
        classes[i] = (u8)(e < b->key ? 0 : e - b->key + 1 < 15 ? e - b->key + 1 : 15);
        if (!classes[i]) read_dense(b, &from, i, b->key - 1 - e);
    }
    int64_t run = run_of(&from);
    EACH(c, 16) for (u64 i = 0; c && i < b->count; i++) {
        if (classes[i] != c) continue;
        if ((run -= (int64_t)1 << (15 - c)) >= 0) continue;
        step(b, i, field(&from, c + 1) & 1 ? -1 : 1);
        run = run_of(&from);
    }
    need((run -= ahead(&from)) >= 0 && run < 1 << 15 && from.high - from.low < 8, "E405");
    while (from.low < from.high) need(!bit(&from, from.low++), "E405");
    read_exceptions(b, &again, true);
}

static void read_blocks(const module *m, u8 *weights) { /* SPEC 5.6, 5.7 */
    u64 size = BITS[m->dtype] / 8, left = size_of(&m->covered, U8_), at = 0;
    for (u64 i = 0; i < m->index.n / 4; i++, left -= BLOCK) {
        u32 said = (u32)little(m->index.p + 4 * i, 4), mantissa = m->dtype == F32 ? 23 : m->dtype == F16 ? 10 : 7;
        block b = {weights ? weights + i * BLOCK * size : NULL, m->data.p + at, said >> 8, left < BLOCK ? left : BLOCK,
                   (u32)size, mantissa, said & 255};
        bool raw = b.key == 255, fits = b.length < b.count * size && (b.key ? b.length : !b.length || b.length >= 4);
        need(b.length <= m->data.n - at && (raw ? b.length == b.count * size : fits), "E307");
        at += b.length;
        if (raw && weights) memcpy(b.weights, b.p, b.length);
        else if (b.key && !raw) read_keyed(&b);
        else if (b.length && !raw) read_gaps(&b);
    }
    need(at == m->data.n, "E307");
}

static void check_module(const module *m) { /* SPEC 4.5, 5.2, 5.4, 5.7, 5.8 */
    u64 width = width_of(m), stride = (width + 7) / 8;
    const u8 *end = m->tensor->data;
    for (const component *c = m->components; c < m->components + m->component_count; c++) {
        EACH(s, 4) {
            text t = s ? c->scale[s - 1] : c->mask;
            if (t.p) check_zero(end, t.p), end = t.p + t.n;
        }
        for (u64 i = stride - 1; width % 8 && i < c->mask.n; i += stride) need(!(c->mask.p[i] >> width % 8), "E303");
        EACH(s, 3) for (u64 i = 1; i < c->scale[s].n; i += 2)
            need(c->scale[s].p[i] < 0x7C, (c->scale[s].p[i] & 0x7C) == 0x7C ? "E305" : "E306");
    }
    const text rest[] = {m->index, m->data, m->exact};
    EACH(i, 3) if (rest[i].p) check_zero(end, rest[i].p), end = rest[i].p + rest[i].n;
    check_zero(end, m->tensor->data + bytes_of(m->tensor));
    if (m->encoding == EXACT) read_blocks(m, NULL);
}

static pxd load(const char *path) { /* steps 1 to 11 */
    pxd f = {.file = read_file(path, "E101")};
    read_header(&f);
    read_manifest(&f);
    check_names(&f);
    EACH(i, f.module_count) check_fit(&f.modules[i], f.chained);
    check_digests(&f);
    check_assets(&f);
    check_tensors(&f);
    const module *m = f.modules, *end = m + f.module_count;
    const entry *a = f.assets.items;
    for (; m < end; m++) if (m->tensor) check_digest(m->tensor, m->sha256, "E301");
    EACH(i, f.assets.count) check_digest(a[i].data, a[i].value, "E302");
    for (const record *r = f.records; r < f.records + f.record_count; r++)
        if (starts(r->name, "__pad__.")) check_zero(r->data, r->data + bytes_of(r));
    for (m = f.modules; m < end; m++) if (m->tensor) check_module(m);
    return f;
}

/* ---- decode ---- */
static void print_component(const module *m, const component *c) {
    u64 width = width_of(m), count = size_of(&m->covered, U8_), n = 0;
    u8 *signs = allocate(count, 1), *scales = allocate(count, 4); /* at most two F16 a weight */
    for (u64 i = 0; i < count; i++) signs[i] = sign_at(m, c, i / width, i % width);
    EACH(s, 3) for (u64 i = 0; i < c->scale[s].n; i++) scales[n++] = c->scale[s].p[i];
    printf("{\"axis\":\"%s\",\"exponent\":%" PRId64, AXES[c->axis], c->exponent);
    printf(",\"signs_sha256\":\"%s\"", sha_of(signs, count));
    printf(",\"scales_sha256\":\"%s\"}", sha_of(scales, n));
}

static void decode(const char *path) { /* what the manifest says is printed as it says it */
    pxd f = load(path);
    printf("{\"ok\":true,\"content_id\":\"sha256:%s\",\"modules\":[", sha_of(f.manifest.p, f.manifest.n));
    EACH(i, f.module_count) {
        const module *m = &f.modules[i];
        printf("%s{\"encoding\":\"%s\",", i ? "," : "", m->encoding == SIGN ? "sign" : ENCODINGS[m->encoding]);
        printf("\"dtype\":\"%s\",\"components\":[", DTYPES[m->dtype]);
        EACH(k, m->component_count) fputs(k ? "," : "", stdout), print_component(m, &m->components[k]);
        fputs("],", stdout);
        if (m->index.p) printf("\"index_sha256\":\"%s\",", sha_of(m->index.p, m->index.n));
        if (m->index.p) printf("\"data_sha256\":\"%s\",", sha_of(m->data.p, m->data.n));
        if (m->index.p) printf("\"result_sha256\":\"%.64s\",", (const char *)m->result.p);
        if (m->exact.p) printf("\"exact_sha256\":\"%s\",", sha_of(m->exact.p, m->exact.n));
        print_as_is(m->exact.p ? "" : "\"exact_sha256\":null,", m->json);
    }
    printf("],\"assets\":[");
    EACH(i, f.assets.count) {
        const entry *a = &f.assets.items[i];
        printf("%s{\"path\":\"%.*s\",\"sha256\":\"%.64s\",\"size\":%" PRIu64 "}", i ? "," : "", (int)a->key.n,
               (const char *)a->key.p, (const char *)a->value.p, bytes_of(a->data));
    }
    print_as_is("],\"dropped\":", f.dropped.json);
    print_as_is(",\"metadata\":", f.metadata.json);
    print_as_is(",\"tied\":", f.tied.json);
    if (f.previous.p) printf(",\"previous\":\"%.71s\"", (const char *)f.previous.p);
    if (f.result.p) printf(",\"result\":\"%.71s\"", (const char *)f.result.p);
    printf("%s%s}\n", f.previous.p ? "" : ",\"previous\":null", f.result.p ? "" : ",\"result\":null");
}

/* ---- apply: SPEC 6 and 7 ---- */
typedef union { u32 bits; float value; } binary32;
static float from_bits(u64 bits) { return (binary32){.bits = (u32)bits}.value; }

static float widen(const u8 *p, int dtype) {
    u64 bits = little(p, BITS[dtype] / 8), sign = (bits & 0x8000) << 16, magnitude = bits & 0x7FFF;
    if (dtype != F16) return from_bits(dtype == BF16 ? bits << 16 : bits);
    if (magnitude >= 0x7C00) return from_bits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
    float value = magnitude < 0x400 ? (float)magnitude * 0x1p-24f : from_bits((magnitude << 13) + 0x38000000);
    return sign ? -value : value;
}
static u32 halve(u32 bits, int shift) { /* bits / 2^shift, nearest, ties to even */
    u32 kept = bits >> shift, rest = bits & ((1u << shift) - 1), half = 1u << (shift - 1);
    return kept + (rest > half || (rest == half && (kept & 1)));
}

static u32 narrow(float value, int dtype) { /* SPEC 6.1, 6.2 */
    u32 bits = (binary32){.value = value}.bits, sign = bits >> 31 << 15, magnitude = bits & 0x7FFFFFFF;
    int shift = 126 - (int)(magnitude >> 23); /* a subnormal F16 counts in 2^-24 */
    if (magnitude > 0x7F800000) return dtype == F32 ? 0x7FC00000 : dtype == BF16 ? 0x7FC0 : 0x7E00;
    if (dtype == F32) return bits;
    if (dtype == BF16) return sign | halve(magnitude, 16);
    if (magnitude >= 0x47800000) return sign | 0x7C00; /* 65536 and above; 65520 carries into infinity below */
    if (magnitude >= 0x38800000) return sign | (halve(magnitude, 13) - (112 << 10));
    return sign | (shift > 24 ? 0 : halve((magnitude & 0x7FFFFF) | 0x800000, shift));
}

static float term(const module *m, const component *c, u64 row, u64 j) { /* SPEC 5.3 */
    u64 width = width_of(m), index[] = {row, row / m->covered.size[m->covered.count - 2] * width + j, 0};
    double value = 1; /* products of two F16 and powers of two are exact in binary32, and so here */
    EACH(s, 3) if (c->scale[s].p) value *= (double)widen(c->scale[s].p + 2 * index[s], F16);
    value *= (double)from_bits((u64)(127 + c->exponent) << 23);
    return (float)(sign_at(m, c, row, j) ? value : -value);
}

static void write_module(FILE *to, const module *m) {
    if (m->made) { fwrite(m->made, 1, size_of(&m->shape, m->dtype), to); return; }
    u64 size = m->dtype == F32 ? 4 : 2, covered = m->encoding == FULL ? 0 : size_of(&m->covered, m->dtype);
    u64 width = width_of(m);
    if (m->encoding == SAME && m->dtype == m->base_dtype) fwrite(m->base->data, 1, covered, to); /* SPEC 6.3 */
    else for (u64 i = 0; i < covered / size; i++) {
        float a = widen(m->base->data + i * BITS[m->base_dtype] / 8, m->base_dtype);
        EACH(k, m->component_count) a += term(m, &m->components[k], i / width, i % width);
        put_little(to, narrow(a, m->dtype), (u32)size);
    }
    if (m->exact.p) fwrite(m->exact.p, 1, m->exact.n, to); /* SPEC 6.4 */
}

/* ---- A base (SPEC 7.5) ---- */
typedef struct { record *items; u32 count; } records;
static void skip(json *j, u32 depth);
static void members(json *j, u32 depth, void (*each)(json *, text, void *), void *to) {
    text *keys = NULL;
    u32 count = 0;
    need(depth <= 8, BASE); /* SPEC 2.11 */
    mark(j, '{');
    for (; more(j, '}', count); count++) {
        keys = grown(keys, count, sizeof *keys);
        keys[count] = string(j);
        mark(j, ':');
        if (each) each(j, keys[count], to);
        else skip(j, depth + 1);
    }
    check_distinct(keys, count, BASE); /* SPEC 2.9 */
}

static void skip(json *j, u32 depth) { /* any value, which is at this level */
    static const char *const words[] = {"null", "true", "false"};
    u8 c = peek(j);
    if (c == '{') members(j, depth, NULL, NULL);
    else if (c == '"') string(j);
    else if (c == '[') {
        need(depth <= 8, BASE);
        mark(j, '[');
        for (u32 i = 0; more(j, ']', i); i++) skip(j, depth + 1);
    } else if (c == '-' || isdigit(c)) integer(j, -(int64_t)LIMIT);
    else {
        u32 i = 0;
        while (i < 3 && !starts((text){j->p + j->i, j->n - j->i}, words[i])) i++;
        need(i < 3, BASE);
        j->i += strlen(words[i]);
    }
}

static void take_field(json *j, text key, void *to) {
    record *r = to;
    if (is(key, "dtype")) r->dtype = which(j, DTYPES);
    else if (is(key, "shape")) r->shape = dimensions(j);
    else if (is(key, "data_offsets")) scan(j, "[%n,%n]", &r->begin, &r->end);
    else skip(j, 3);
}

static void take_record(json *j, text key, void *to) {
    records *all = to;
    record r = {.name = key, .dtype = -1, .shape.count = UINT32_MAX, .end = LIMIT}; /* which none says */
    if (is(key, "__metadata__")) { skip(j, 2); return; }
    members(j, 2, take_field, &r);
    need(r.dtype >= 0 && r.shape.count != UINT32_MAX && r.begin <= r.end, BASE);
    need(!DTYPES[r.dtype] || bytes_of(&r) == size_of(&r.shape, r.dtype), BASE);
    all->items = grown(all->items, all->count, sizeof r);
    all->items[all->count++] = r;
}

static int by_place(const void *a, const void *b) {
    const record *x = a, *y = b;
    return x->begin != y->begin ? (x->begin > y->begin) - (x->begin < y->begin) : (x->end > y->end) - (x->end < y->end);
}

static records read_base(const char *path) { /* sorted by name */
    text file = read_file(path, BASE);
    u64 length = little(file.p, 8), end = 0;
    need(file.n >= 8 && length <= file.n - 8 && length <= BASE_HEADER_MAX, BASE);
    text header = {file.p + 8, (size_t)length};
    check_utf8(header, BASE);
    json taken = open_json(header, BASE), *j = &taken;
    records made = {.items = grown(NULL, 0, sizeof(record))};
    members(j, 1, take_record, &made);
    need(j->i == j->n, BASE);
    qsort(made.items, made.count, sizeof(record), by_place);
    for (record *r = made.items; r < made.items + made.count; end = r++->end) need(r->begin == end, BASE);
    need(end == file.n - 8 - length, BASE);
    EACH(i, made.count) made.items[i].data = header.p + header.n + made.items[i].begin;
    qsort(made.items, made.count, sizeof(record), by_text); /* a record begins with its name */
    return made;
}

static void make_exact(module *m) { /* SPEC 6.6, 7.4 */
    u64 covered = size_of(&m->covered, m->dtype), whole = size_of(&m->shape, m->dtype);
    m->made = allocate(whole, 1);
    memcpy(m->made, m->base->data, covered);
    read_blocks(m, m->made);
    if (m->exact.p) memcpy(m->made + covered, m->exact.p, m->exact.n);
    need(is(m->result, sha_of(m->made, whole)), "E405");
}

static void bind(pxd *f, const char *path) { /* SPEC 7 */
    u32 wanted = 0, have = 0;
    records base = read_base(path);
    EACH(i, f->module_count) {
        module *m = &f->modules[i];
        m->base = m->has_base ? bsearch(&m->name, base.items, base.count, sizeof(record), by_text) : NULL;
        wanted += m->has_base, have += m->base != NULL;
    }
    need(have == wanted, have ? "E402" : "E401");
    EACH(i, f->module_count) if (f->modules[i].base) {
        const module *m = &f->modules[i];
        need(m->base->dtype == m->base_dtype && same_shape(&m->base->shape, &m->base_shape, 0), "E403");
        check_digest(m->base, m->base_sha256, "E404");
    }
    EACH(i, f->module_count) if (f->modules[i].encoding == EXACT) make_exact(&f->modules[i]);
}

static void apply(const char *path, const char *base_path, const char *out) {
    pxd f = load(path);
    bind(&f, base_path);
    module *all = allocate(f.module_count + f.tied.count, sizeof *all); /* with aliases */
    memcpy(all, f.modules, f.module_count * sizeof *all);
    qsort(all, f.module_count, sizeof *all, by_text);
    EACH(i, f.tied.count) { /* SPEC 6.5 */
        all[f.module_count + i] = *(module *)bsearch(&f.tied.items[i].key, all, f.module_count, sizeof *all, by_text);
        all[f.module_count + i].name = f.tied.items[i].value;
    }
    FILE *to = fopen(out, "wb");
    io(to, "write", out);
    put_little(to, 0, 8);
    const module *last = all + f.module_count + f.tied.count;
    u64 end = 0;
    for (const module *m = all; m < last; m++) {
        fputs(m > all ? ",\"" : "{\"", to);
        print_tensor(to, m->name, "\":{\"dtype\":\"%s\",\"shape\":[", m->dtype, &m->shape);
        fprintf(to, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", end, end + size_of(&m->shape, m->dtype));
        end += size_of(&m->shape, m->dtype);
    }
    fputc('}', to);
    u64 length = (u64)ftell(to) - 8;
    for (const module *m = all; m < last; m++) write_module(to, m);
    rewind(to), put_little(to, length, 8);
    io(!ferror(to) && !fclose(to), "write", out);
    printf("{\"ok\":true}\n");
}

int main(int argc, char **argv) {
    static const char caps[] = "{\"protocol\":1,\"implementation\":\"pxd.c\",\"version\":\"1.0\",\"spec\":[\"1.0\"],"
                               "\"features\":[\"exact\"],\"operations\":[\"decode\",\"apply\"]}";
    text operation = word(argc > 1 ? argv[1] : "");
    if (argc == 2 && is(operation, "caps")) puts(caps);
    else if (argc == 3 && is(operation, "decode")) decode(argv[2]);
    else if (argc == 7 && is(operation, "apply") && !strcmp(argv[3], "--base") && !strcmp(argv[5], "--out"))
        apply(argv[2], argv[4], argv[6]);
    else return 77;
    return fflush(stdout) ? 2 : 0;
}
