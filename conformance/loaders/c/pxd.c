/* A loader of PXD 1.0 in one C11 file: decode and apply, strict on every clause of SPEC.md; no dependency beyond libc.
 *
 *     cc -std=c11 -O2 -Wall -Wextra -Werror -o pxd pxd.c -lm
 *     ./pxd caps | decode FILE | apply FILE --base SAFETENSORS --out SAFETENSORS
 *
 * Exit status: 0 accepted, 1 rejected, 2 input or output, 77 unsupported (conformance/README.md, protocol v1).
 * Everything is read once and checked before it is used; memory lives until the process ends. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

_Static_assert(FLT_EVAL_METHOD == 0 && FLT_MANT_DIG == 24, "SPEC 6 asks for binary32 arithmetic");
#define MAGIC "{\"__metadata__\":{\"format\":\"pxd\",\"pxd\":\""
#define LIMIT ((u64)1 << 53)
#define VALUES (1 << 20)
#define EACH(i, count) for (u32 i = 0; i < (count); i++)
typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;
typedef struct { const u8 *p; size_t n; } text;

static void need(bool holds, const char *code) {
    static const char *const phases[] = {"container", "profile", "payload", "binding"};
    if (holds) return;
    printf("{\"ok\":false,\"phase\":\"%s\",\"code\":\"%s\"}\n", phases[code[1] - '1'], code);
    exit(1);
}

static void io(bool works, const char *what, const char *path) {
    if (works) return;
    fprintf(stderr, "pxd: cannot %s %s: %s\n", what, path, strerror(errno));
    exit(2);
}

static void *allocate(size_t count, size_t size) { /* zeroed; a list keeps every block reachable */
    static void **all;
    io(count < SIZE_MAX / 2 / size, "allocate", "memory");
    void **made = calloc(1, sizeof *made + count * size);
    io(made, "allocate", "memory");
    *made = all;
    all = made;
    return made + 1;
}

/* ---- Text ---- */

static text word(const char *s) { return (text){(const u8 *)s, strlen(s)}; }

static int compare(text a, text b) { /* by bytes */
    size_t shorter = a.n < b.n ? a.n : b.n;
    int order = shorter ? memcmp(a.p, b.p, shorter) : 0;
    return order ? order : (a.n > b.n) - (a.n < b.n);
}

static int by_text(const void *a, const void *b) { return compare(*(const text *)a, *(const text *)b); }
static bool is(text a, const char *b) { return !compare(a, word(b)); }
static bool starts(text a, const char *b) { return a.n >= strlen(b) && !memcmp(a.p, b, strlen(b)); }
static bool ends(text a, const char *b) { return a.n >= strlen(b) && !memcmp(a.p + a.n - strlen(b), b, strlen(b)); }
static bool one_of(u8 c, const char *set) { return c && strchr(set, c); }
static u8 lower(u8 c) { return c >= 'A' && c <= 'Z' ? (u8)(c + 32) : c; }
static bool among(text a, const text *sorted, u32 count) { return bsearch(&a, sorted, count, sizeof a, by_text); }

/* One code point of UTF-8 and its length; false where there is none. */
static bool scalar_value(const u8 *p, size_t n, size_t *length, u32 *value) {
    u8 c = p[0];
    *length = c < 0x80 ? 1 : c < 0xC2 ? 0 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF5 ? 4 : 0;
    if (*length == 0 || *length > n) return false;
    *value = *length == 1 ? c : c & (0xFFu >> (*length + 1));
    for (size_t i = 1; i < *length; i++) {
        if ((p[i] & 0xC0) != 0x80) return false;
        *value = *value << 6 | (p[i] & 0x3F);
    }
    u32 least = *length == 3 ? 0x800 : *length == 4 ? 0x10000 : 0;
    return *value >= least && *value <= 0x10FFFF && (*value < 0xD800 || *value >= 0xE000);
}

static bool utf16_less(text a, text b) {
    u32 x, y;
    for (size_t i = 0, length; i < a.n && i < b.n; i += length) {
        if (!scalar_value(a.p + i, a.n - i, &length, &x) || !scalar_value(b.p + i, b.n - i, &length, &y)) return false;
        if (x != y) return (x < 0x10000) == (y < 0x10000) ? x < y : x < 0x10000 ? x < 0xD800 : y >= 0xE000;
    }
    return a.n < b.n;
}

/* ---- SHA-256 (FIPS 180-4) ---- */

typedef struct { u32 h[8]; u64 length; u8 block[64]; } sha;
static const sha SHA = {.h = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}};

static u32 turn(u32 x, int a, int b, int c) { /* three rotations to the right; the third one a shift where negative */
    u32 third = c < 0 ? x >> -c : x >> c | x << (32 - c);
    return (x >> a | x << (32 - a)) ^ (x >> b | x << (32 - b)) ^ third;
}

static void sha_block(sha *s, const u8 *p) {
    static const u32 k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
        0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
        0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
        0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
        0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
        0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    u32 w[64], v[8];
    for (int i = 0; i < 64; i++)
        w[i] = i < 16 ? (u32)p[4 * i] << 24 | (u32)p[4 * i + 1] << 16 | (u32)p[4 * i + 2] << 8 | p[4 * i + 3]
                      : w[i - 16] + turn(w[i - 15], 7, 18, -3) + w[i - 7] + turn(w[i - 2], 17, 19, -10);
    memcpy(v, s->h, sizeof v);
    for (int i = 0; i < 64; i++) {
        u32 one = v[7] + turn(v[4], 6, 11, 25) + ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
        u32 two = turn(v[0], 2, 13, 22) + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += one;
        v[0] = one + two;
    }
    for (int i = 0; i < 8; i++) s->h[i] += v[i];
}

static void sha_add(sha *s, const void *data, size_t n) {
    for (const u8 *p = data; n;) {
        size_t at = s->length % 64, part = 64 - at < n ? 64 - at : n;
        memcpy(s->block + at, p, part);
        s->length += part, p += part, n -= part;
        if (s->length % 64 == 0) sha_block(s, s->block);
    }
}

static void sha_print(sha *s, const char *format, ...) {
    char made[64];
    va_list values;
    va_start(values, format);
    sha_add(s, made, (size_t)vsnprintf(made, sizeof made, format, values));
    va_end(values);
}

static const char *sha_hex(sha s) { /* of the last call */
    static char hex[65];
    u64 bits = s.length * 8;
    sha_add(&s, "\x80", 1);
    while (s.length % 64 != 56) sha_add(&s, "", 1);
    for (int i = 56; i >= 0; i -= 8) sha_add(&s, &(u8){(u8)(bits >> i)}, 1);
    for (int i = 0; i < 8; i++) snprintf(hex + 8 * i, 9, "%08" PRIx32, s.h[i]);
    return hex;
}

static const char *sha_of(const void *data, size_t n) {
    sha s = SHA;
    sha_add(&s, data, n);
    return sha_hex(s);
}

/* ---- Strict JSON (SPEC 2.7 to 2.11): a tree of nodes; node 0 is the object, and 0 ends a list of children ---- */

enum { NUL, BOOLEAN, INTEGER, STRING, ARRAY, OBJECT };
typedef struct { u8 type; u32 first, next, count, size; text key; union { text string; int64_t number; } is; } node;
typedef struct {
    const u8 *p;
    size_t n, i;
    node *nodes;
    u32 used;
    u8 *decoded;             /* where the next string goes */
    bool canonical, sorted;  /* RFC 8785 so far: spelling; order of keys */
    const char *const *codes; /* syntax, duplicate key, number, depth */
} json;
static const char *const HEADER_CODES[] = {"E114", "E115", "E116", "E117"};
static const char *const MANIFEST_CODES[] = {"E202", "E202", "E202", "E202"};
#define CHILDREN(j, parent, id) for (u32 id = (j)->nodes[parent].first; id; id = (j)->nodes[id].next)

static u8 peek(const json *j) { return j->i < j->n ? j->p[j->i] : 0; }

static bool skip(json *j, u8 c) {
    bool there = peek(j) == c;
    j->i += there;
    return there;
}

static void space(json *j) { for (; one_of(peek(j), " \t\r\n"); j->i++) j->canonical = false; }

static u32 four_digits(json *j) {
    u32 value = 0;
    EACH(i, 4) {
        u8 c = peek(j), digit = lower(c);
        need(one_of(digit, "0123456789abcdef"), j->codes[0]);
        if (c != digit) j->canonical = false;
        value = value << 4 | (u32)(digit < 'a' ? digit - '0' : digit - 'a' + 10);
        j->i++;
    }
    return value;
}

static void put_scalar(json *j, u32 c) { /* of a lone surrogate come bytes that are no UTF-8 */
    static const u8 lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
    int length = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = length - 1; i > 0; i--, c >>= 6) j->decoded[i] = 0x80 | (c & 63);
    j->decoded[0] = (u8)(lead[length] | c);
    j->decoded += length;
}

static void parse_escape(json *j) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    u8 c = peek(j);
    j->i++;
    if (one_of(c, from)) {
        if (c == '/') j->canonical = false;
        put_scalar(j, (u8)to[strchr(from, c) - from]);
        return;
    }
    need(c == 'u', j->codes[0]);
    u32 value = four_digits(j), low = 0;
    if (value >= 0x20 || one_of((u8)value, to)) j->canonical = false;
    size_t back = j->i;
    if (value >= 0xD800 && value < 0xDC00 && skip(j, '\\') && skip(j, 'u')) low = four_digits(j);
    if (low >= 0xDC00 && low < 0xE000) value = 0x10000 + ((value - 0xD800) << 10) + (low - 0xDC00);
    else j->i = back;
    put_scalar(j, value);
}

static text parse_string(json *j) {
    text made = {j->decoded, 0};
    need(skip(j, '"'), j->codes[0]);
    while (!skip(j, '"')) {
        need(peek(j) >= 0x20, j->codes[0]);
        if (skip(j, '\\')) parse_escape(j);
        else *j->decoded++ = j->p[j->i++];
    }
    made.n = (size_t)(j->decoded - made.p);
    return made;
}

static size_t digits(json *j) {
    size_t start = j->i;
    while (one_of(peek(j), "0123456789")) j->i++;
    return j->i - start;
}

static int64_t parse_number(json *j) {
    bool negative = skip(j, '-'), whole = true;
    size_t start = j->i, count = digits(j);
    int64_t value = 0;
    need(count == 1 || (count && j->p[start] != '0'), j->codes[0]);
    if (skip(j, '.')) whole = false, need(digits(j), j->codes[0]);
    if (skip(j, 'e') || skip(j, 'E')) {
        if (!skip(j, '+')) skip(j, '-');
        whole = false, need(digits(j), j->codes[0]);
    }
    need(whole && count <= 16, j->codes[2]); /* SPEC 2.10 */
    for (size_t i = 0; i < count; i++) value = value * 10 + (j->p[start + i] - '0');
    need(value < (int64_t)LIMIT, j->codes[2]);
    if (negative && !value) j->canonical = false;
    return negative ? -value : value;
}

static void check_keys(json *j, const node *object) { /* SPEC 2.9, and the order of 3.2 */
    text *keys = allocate(object->count, sizeof *keys);
    u32 id = object->first;
    EACH(i, object->count) {
        keys[i] = j->nodes[id].key;
        if (i && !utf16_less(keys[i - 1], keys[i])) j->sorted = false;
        id = j->nodes[id].next;
    }
    qsort(keys, object->count, sizeof *keys, by_text);
    for (u32 i = 1; i < object->count; i++) need(compare(keys[i - 1], keys[i]), j->codes[1]);
}

static u32 parse_value(json *j, int depth) {
    static const char *const words[] = {"null", "false", "true"};
    u32 id = j->used++, *link = &j->nodes[id].first;
    node *to = &j->nodes[id];
    size_t start = j->i;
    need(id <= VALUES, j->codes[3]); /* SPEC 2.11: node 0 is none of its elements */
    u8 c = peek(j), close = c + 2; /* ] follows [ and } follows { by two */
    if (c == '"') {
        to->type = STRING, to->is.string = parse_string(j);
    } else if (c == '[' || c == '{') {
        need(depth < 8, j->codes[3]); /* SPEC 2.11 */
        to->type = c == '[' ? ARRAY : OBJECT;
        j->i++, space(j);
        while (!skip(j, close)) {
            text key = {0};
            if (to->count++) need(skip(j, ','), j->codes[0]), space(j);
            if (c == '{') key = parse_string(j), space(j), need(skip(j, ':'), j->codes[0]), space(j);
            *link = parse_value(j, depth + 1);
            j->nodes[*link].key = key;
            link = &j->nodes[*link].next;
            space(j);
        }
        if (c == '{' && to->count > 1) check_keys(j, to);
    } else if (one_of(c, "nft")) {
        int which = c == 'n' ? 0 : c == 'f' ? 1 : 2;
        need(starts((text){j->p + j->i, j->n - j->i}, words[which]), j->codes[0]);
        j->i += strlen(words[which]);
        to->type = which ? BOOLEAN : NUL;
    } else { to->type = INTEGER, to->is.number = parse_number(j); }
    to->size = (u32)(j->i - start);
    return id;
}

static json *parse(const u8 *p, size_t n, const char *const *codes) { /* `i` is left at the end of the object */
    json *j = allocate(1, sizeof *j);
    size_t nodes = 2; /* counted before they are allocated */
    for (size_t i = 0; i < n; i++) nodes += one_of(p[i], ",[{");
    if (nodes > VALUES + 2) nodes = VALUES + 2;
    *j = (json){.p = p, .n = n, .canonical = true, .sorted = true, .codes = codes};
    j->nodes = allocate(nodes, sizeof *j->nodes);
    j->decoded = allocate(n + 4, 1);
    space(j);
    parse_value(j, 0);
    size_t end = j->i;
    while (skip(j, ' ')) {}
    need(j->i == n && j->nodes[0].type == OBJECT, codes[0]); /* SPEC 2.8 */
    j->i = end;
    return j;
}

/* ---- The file as types ---- */

static const struct { const char *name; u8 size; } DTYPES[] = {{"BOOL", 1}, {"U8", 1}, {"I8", 1}, {"F8_E4M3", 1},
    {"F8_E5M2", 1}, {"U16", 2}, {"I16", 2}, {"F16", 2}, {"BF16", 2}, {"U32", 4}, {"I32", 4}, {"F32", 4}, {"U64", 8},
    {"I64", 8}, {"F64", 8}};
static const char *const ENCODINGS[] = {"sign", "full", "same"}, *const AXES[] = {"row", "col", "row+col", "tensor"};
static const char *const SCALES[] = {"row", "col", "scalar"};
static const u8 AXIS_SCALES[] = {1, 2, 3, 4}; /* bit i: SCALES[i] */
enum { U8_ = 1, F16 = 7, BF16 = 8, F32 = 11, DTYPE_COUNT = 15, SIGN = 0, FULL, SAME };

typedef struct { u32 count; u64 size[8]; } shape;
typedef struct { text name; int dtype; shape shape; u64 begin, end; const u8 *data; } record;
typedef struct { int axis, exponent; const record *mask, *scale[3]; } component;
typedef struct {
    text name, sha256, base_sha256; /* a digest that is null has no bytes */
    int dtype, base_dtype, encoding;
    bool has_base;
    shape shape, base_shape, covered, tail;
    u32 component_count;
    component components[8];
    const record *first, *last, *exact;
} module;
typedef struct { text name, sha256; const record *data; } named;
typedef struct {
    text file, manifest, base_digest;
    json *tree;
    record *records, *next, *end;
    module *modules;
    named *assets;
    text *tied, *dropped; /* tied: module, alias, module, alias */
    u32 module_count, asset_count, tied_count, dropped_count, metadata, pads;
} pxd;

static bool is_float(int dtype) { return dtype == F16 || dtype == BF16 || dtype == F32; }
static u64 bytes_of(const record *r) { return r->end - r->begin; }
static u64 size_of(const shape *s, int dtype) { /* at most LIMIT */
    u64 size = DTYPES[dtype].size;
    EACH(i, s->count) size = size <= LIMIT / s->size[i] ? size * s->size[i] : LIMIT;
    return size;
}

static int find(text s, const char *const *words, int count) {
    while (count-- && !is(s, words[count])) {}
    return count;
}

static int dtype_of(text name) {
    int i = DTYPE_COUNT;
    while (i-- && !is(name, DTYPES[i].name)) {}
    return i;
}

static bool same_shape(const shape *a, const shape *b, u32 from) {
    for (u32 i = from; i < a->count && i < b->count; i++) if (a->size[i] != b->size[i]) return false;
    return a->count == b->count;
}

static shape read_shape(const json *j, u32 array, const char *code) {
    shape made = {0};
    need(j->nodes[array].count <= 8, code);
    CHILDREN(j, array, id) {
        need(j->nodes[id].is.number >= 1, code);
        made.size[made.count++] = (u64)j->nodes[id].is.number;
    }
    return made;
}

/* ---- Steps 1 to 3: kind of file, N, magic, version ---- */

static text read_file(const char *path, bool regular) {
    struct stat about;
    io(!stat(path, &about), "read", path);
    need(!regular || S_ISREG(about.st_mode), "E101"); need(!regular || (u64)about.st_size < LIMIT, "E102");
    FILE *stream = fopen(path, "rb");
    io(stream, "read", path);
    u8 *made = allocate((size_t)about.st_size + 8, 1);
    size_t n = fread(made, 1, (size_t)about.st_size, stream);
    io(!ferror(stream), "read", path);
    fclose(stream);
    return (text){made, n};
}

static u64 little(const u8 *p, int size) {
    u64 value = 0;
    while (size--) value = value << 8 | p[size];
    return value;
}

static void check_kind(text file) { /* SPEC 2.2 */
    u8 start[64] = {0};
    size_t blank = 0, zeros = 0;
    need(file.n, "E103");
    while (blank < file.n && one_of(file.p[blank], " \t\r\n\f\v")) blank++;
    for (size_t i = 0; i < 63 && blank + i < file.n; i++) start[i] = lower(file.p[blank + i]);
    need(!starts(file, "version https://git-lfs"), "E104");
    need(!starts((text){start, 63}, "<!doctype") && !starts((text){start, 63}, "<html"), "E105");
    need(!starts(file, "PK"), "E106");
    need(!(file.n > 1 && file.p[0] == 0x80 && file.p[1] >= 2 && file.p[1] <= 5), "E107");
    while (zeros < file.n && zeros < 8 && !file.p[zeros]) zeros++;
    need(zeros < (file.n < 8 ? file.n : 8), "E108");
    need(file.p[0] == 0xF8, file.n > 8 && file.p[8] == '{' ? "E112" : "E109");
    need(file.n >= 4096, "E103");
}

static text header_of(text file) {
    check_kind(file);
    u64 length = little(file.p, 8);
    text header = {file.p + 8, (size_t)length};
    need(length >= 4088 && length <= 1 << 24 && (8 + length) % 4096 == 0, "E110"); /* SPEC 2.3 */
    need(8 + length <= file.n, "E111");                                           /* SPEC 2.4 */
    need(starts(header, MAGIC), "E112");                                          /* SPEC 2.5 */
    need(starts(header, MAGIC "1.0\""), "E201");                                  /* SPEC 2.6 */
    u32 value;
    for (size_t i = 0, part; i < header.n; i += part) need(scalar_value(header.p + i, header.n - i, &part, &value), "E113");
    return header;
}

/* ---- Steps 4 to 6: header ---- */

static bool all_integers(const json *j, u32 array) {
    bool all = j->nodes[array].type == ARRAY;
    CHILDREN(j, array, id) all = all && j->nodes[id].type == INTEGER;
    return all;
}

static record read_record(json *j, u32 id) { /* SPEC 2.12 to 2.15; another order of fields is not canonical */
    static const char *const keys[] = {"dtype", "shape", "data_offsets"};
    u32 field[3] = {0}, at = 0;
    need(j->nodes[id].type == OBJECT && j->nodes[id].count == 3 && j->nodes[id].key.n <= 1024, "E118");
    CHILDREN(j, id, child) {
        int key = find(j->nodes[child].key, keys, 3);
        need(key >= 0, "E118");
        field[key] = child;
        if (key != (int)at++) j->canonical = false;
    }
    const node *dtype = &j->nodes[field[0]], *span = &j->nodes[field[2]], *begin = &j->nodes[span->first];
    need(dtype->type == STRING && all_integers(j, field[1]) && all_integers(j, field[2]) && span->count == 2, "E118");
    record made = {.name = j->nodes[id].key, .dtype = dtype_of(dtype->is.string)};
    need(made.dtype >= 0, "E119");
    made.shape = read_shape(j, field[1], "E120");
    u64 size = size_of(&made.shape, made.dtype);
    need(size < LIMIT, "E120"); /* SPEC 2.14 */
    int64_t first = begin->is.number, last = j->nodes[begin->next].is.number;
    need(first >= 0 && last - first == (int64_t)size, "E121");
    made.begin = (u64)first, made.end = (u64)last;
    return made;
}

static void read_header(pxd *f) {
    text header = header_of(f->file);
    u64 end = 0, held = f->file.n - 8 - header.n;
    json *j = parse(header.p, header.n, HEADER_CODES);
    u32 metadata = j->nodes[0].first, manifest = 0;
    CHILDREN(j, metadata, id) manifest = id; /* the magic fixes the first two of three */
    need(j->nodes[metadata].count == 3 && is(j->nodes[manifest].key, "manifest"), "E118");
    need(j->nodes[manifest].type == STRING, "E118");
    f->manifest = j->nodes[manifest].is.string;
    f->next = f->end = f->records = allocate(j->nodes[0].count, sizeof *f->records);
    for (u32 id = j->nodes[metadata].next; id; id = j->nodes[id].next) *f->end++ = read_record(j, id);
    need(j->canonical && header.n - j->i < 4096, "E122"); /* SPEC 2.16 */
    for (record *r = f->records; r < f->end; end = r++->end) {
        need(r->begin == end, "E123"); /* SPEC 2.17 */
        r->data = header.p + header.n + (r->end <= held ? r->begin : 0);
    }
    need(held >= end, "E124"); /* SPEC 2.18 */
    need(held == end, "E125");
}

/* ---- Step 7: manifest ---- */

/* SPEC 3.4 as a pattern: s text, h hex digest, d digest, n natural number, i integer, t dtype, e encoding, a axis; `?`
 * null or; `[x]` an array of x; `(x)` a pair of x; `{*x}` any keys; `{key:x,...}` exactly these, which stand sorted. */
static const char SCHEMA[] = "{assets:[{path:s,sha256:h}],base:{digest:d,id:s,revision:?s},calibration:?{digest:d,samples:n,"
    "seed:n,sequence_length:n,source:s},dropped:[s],features:[s],fine_tuned:{id:s,revision:?s},metadata:{*s},modules:["
    "{base:?{dtype:t,sha256:h,shape:[n]},components:[{axis:a,exponent:i}],dtype:t,encoding:e,name:s,sha256:?h,shape:[n]}],"
    "producer:{name:s,version:s},tied:[(s)]}";

static bool is_hex(text s) {
    EACH(i, s.n) if (!one_of(s.p[i], "0123456789abcdef")) return false;
    return s.n == 64;
}

static bool matches(const node *it, char kind) {
    text s = it->type == STRING ? it->is.string : (text){0};
    if (kind == 'n' || kind == 'i') return it->type == INTEGER && (kind == 'i' || it->is.number >= 0);
    if (it->type != STRING || kind == 's') return it->type == STRING;
    if (kind == 'd') return starts(s, "sha256:") && is_hex((text){s.p + 7, s.n - 7});
    return kind == 'h' ? is_hex(s) : kind == 't' ? dtype_of(s) >= 0 : find(s, kind == 'e' ? ENCODINGS : AXES, kind == 'e' ? 3 : 4) >= 0;
}

static const char *after(const char *p) { /* the end of one pattern */
    int depth = 0;
    if (*p == '?') p++;
    do depth += one_of((u8)*p, "{[(") ? 1 : one_of((u8)*p, "}])") ? -1 : 0, p++;
    while (depth);
    return p;
}

static void check_schema(const json *j, u32 id, const char *p) {
    const node *it = &j->nodes[id];
    if (*p == '?' && it->type == NUL) return;
    if (*p == '?') p++;
    if (!one_of((u8)*p, "{[(")) {
        need(matches(it, *p), "E205");
        return;
    }
    need(it->type == (*p == '{' ? OBJECT : ARRAY) && (*p != '(' || it->count == 2), "E205");
    bool keyed = p[0] == '{' && p[1] != '*';
    p += p[1] == '*' ? 2 : 1;
    CHILDREN(j, id, child) {
        if (keyed) {
            text key = j->nodes[child].key;
            need(strlen(p) > key.n && !memcmp(p, key.p, key.n) && p[key.n] == ':', "E205");
            p += key.n + 1;
        }
        check_schema(j, child, p);
        if (keyed) p = after(p), p += *p == ',';
    }
    need(!keyed || *p == '}', "E205");
}

static u32 at(const json *j, u32 parent, u32 index) {
    u32 id = j->nodes[parent].first;
    while (index--) id = j->nodes[id].next;
    return id;
}

static text string_at(const json *j, u32 parent, u32 index) {
    const node *it = &j->nodes[at(j, parent, index)];
    return it->type == STRING ? it->is.string : (text){0};
}

static module read_module(const json *j, u32 id) { /* base components dtype encoding name sha256 shape */
    u32 base = at(j, id, 0), parts = at(j, id, 1);
    module m = {.name = string_at(j, id, 4), .sha256 = string_at(j, id, 5), .has_base = j->nodes[base].type == OBJECT};
    m.dtype = dtype_of(string_at(j, id, 2)); m.encoding = find(string_at(j, id, 3), ENCODINGS, 3);
    m.shape = read_shape(j, at(j, id, 6), "E208"); /* SPEC 3.8 */
    if (m.has_base) {
        m.base_dtype = dtype_of(string_at(j, base, 0)); m.base_sha256 = string_at(j, base, 1);
        m.base_shape = read_shape(j, at(j, base, 2), "E208");
        need(size_of(&m.base_shape, m.base_dtype) < LIMIT, "E208");
    }
    need(size_of(&m.shape, m.dtype) < LIMIT && j->nodes[parts].count <= 8, "E208");
    CHILDREN(j, parts, part) {
        int64_t e = j->nodes[at(j, part, 1)].is.number;
        need(e >= -64 && e <= 63, "E209"); /* SPEC 3.9 */
        m.components[m.component_count++] = (component){.axis = find(string_at(j, part, 0), AXES, 4), .exponent = (int)e};
    }
    return m;
}

static void read_manifest(pxd *f) {
    json *j = f->tree = parse(f->manifest.p, f->manifest.n, MANIFEST_CODES);
    need(j->canonical && j->sorted && j->i == f->manifest.n, "E203"); /* SPEC 3.2 */
    CHILDREN(j, 0, id) {
        if (!is(j->nodes[id].key, "features")) continue; /* SPEC 3.3: before the schema */
        check_schema(j, id, "[s]");
        need(!j->nodes[id].count, "E204");
    }
    check_schema(j, 0, SCHEMA);
    CHILDREN(j, 0, id) { /* SPEC 3.8; the members stand in the order of SCHEMA */
        text key = j->nodes[id].key;
        if (is(key, "assets") || is(key, "dropped") || is(key, "metadata") || is(key, "modules") || is(key, "tied"))
            need(j->nodes[id].count <= 65536, "E208");
        else need(j->nodes[id].size <= 1 << 16, "E208");
        need(!is(key, "metadata") || j->nodes[id].size <= 1 << 22, "E208");
    }
    u32 assets = at(j, 0, 0), dropped = at(j, 0, 3), modules = at(j, 0, 7), tied = at(j, 0, 9), count = 0;
    f->base_digest = string_at(j, at(j, 0, 1), 0); f->metadata = at(j, 0, 6);
    f->assets = allocate(j->nodes[assets].count, sizeof *f->assets);
    f->dropped = allocate(j->nodes[dropped].count, sizeof *f->dropped);
    f->tied = allocate(j->nodes[tied].count, 2 * sizeof *f->tied);
    need(j->nodes[modules].count, "E208");
    f->modules = allocate(j->nodes[modules].count, sizeof *f->modules);
    CHILDREN(j, assets, id) f->assets[f->asset_count++] = (named){string_at(j, id, 0), string_at(j, id, 1), NULL};
    CHILDREN(j, dropped, id) f->dropped[f->dropped_count++] = j->nodes[id].is.string;
    CHILDREN(j, tied, id) f->tied[count++] = string_at(j, id, 0), f->tied[count++] = string_at(j, id, 1);
    CHILDREN(j, modules, id) f->modules[f->module_count++] = read_module(j, id);
    f->tied_count = count / 2;
}

/* ---- Step 8: names, encodings, base digest, assets, tensors ---- */

static void check_name(text s) { /* SPEC 3.5 */
    need(s.n >= 1 && s.n <= 512 && !starts(s, "__"), "E206");
    EACH(i, s.n) need(s.p[i] > 0x20 && s.p[i] < 0x7F && !one_of(s.p[i], "/\\"), "E206");
}

static void check_names(const pxd *f) { /* SPEC 3.5 to 3.7 */
    text *names = allocate(f->module_count, sizeof *names), *aliases = allocate(f->tied_count, sizeof *aliases);
    EACH(i, f->module_count) check_name(names[i] = f->modules[i].name);
    EACH(i, 2 * f->tied_count) check_name(f->tied[i]);
    EACH(i, f->dropped_count) check_name(f->dropped[i]);
    EACH(i, f->tied_count) aliases[i] = f->tied[2 * i + 1], need(!i || compare(aliases[i - 1], aliases[i]) <= 0, "E205");
    EACH(i, f->dropped_count) need(!i || compare(f->dropped[i - 1], f->dropped[i]) < 0, "E205");
    qsort(names, f->module_count, sizeof *names, by_text);
    EACH(i, f->module_count) need(!i || compare(names[i - 1], names[i]), "E207");
    EACH(i, f->tied_count) {
        need(among(f->tied[2 * i], names, f->module_count) && !among(aliases[i], names, f->module_count), "E207");
        need(!i || compare(aliases[i - 1], aliases[i]), "E207");
    }
    EACH(i, f->dropped_count) need(!among(f->dropped[i], names, f->module_count), "E207");
    EACH(i, f->dropped_count) need(!among(f->dropped[i], aliases, f->tied_count), "E207");
}

static void check_fit(module *m) { /* SPEC 3.9, 3.10 */
    bool floats = is_float(m->dtype) && is_float(m->base_dtype), digest = m->sha256.p;
    m->covered = m->shape;
    need((m->encoding == SIGN) == (m->component_count > 0), "E209"); need(m->encoding != FULL || digest, "E209");
    if (m->encoding == FULL) return;
    need(m->has_base && same_shape(&m->shape, &m->base_shape, 1), "E209");
    if (m->shape.count && m->shape.size[0] > m->base_shape.size[0]) {
        m->tail = m->shape;
        m->tail.size[0] -= m->covered.size[0] = m->base_shape.size[0];
    }
    if (m->encoding == SIGN) need(floats && digest && m->shape.count >= 2, "E209");
    else need((floats || m->dtype == m->base_dtype) && digest == (m->tail.count > 0), "E209");
}

static int by_module(const void *a, const void *b) { return compare((*(module *const *)a)->name, (*(module *const *)b)->name); }

static void check_base_digest(const pxd *f) { /* SPEC 3.11 */
    module **sorted = allocate(f->module_count, sizeof *sorted);
    const char *comma = "";
    sha s = SHA;
    EACH(i, f->module_count) sorted[i] = &f->modules[i];
    qsort(sorted, f->module_count, sizeof *sorted, by_module);
    sha_print(&s, "[");
    EACH(i, f->module_count) {
        const module *m = sorted[i];
        if (!m->has_base) continue;
        sha_print(&s, "%s[\"", comma);
        EACH(k, m->name.n) sha_print(&s, m->name.p[k] == '"' ? "\\%c" : "%c", m->name.p[k]);
        sha_print(&s, "\",\"%s\",[", DTYPES[m->base_dtype].name);
        EACH(d, m->base_shape.count) sha_print(&s, d ? ",%" PRIu64 : "%" PRIu64, m->base_shape.size[d]);
        sha_print(&s, "],\""), sha_add(&s, m->base_sha256.p, 64), sha_print(&s, "\"]");
        comma = ",";
    }
    sha_print(&s, "]");
    need(is((text){f->base_digest.p + 7, 64}, sha_hex(s)), "E210");
}

static void check_assets(const pxd *f) { /* SPEC 3.12 */
    static const char *const suffixes[] = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".md"};
    text *lowered = allocate(f->asset_count, sizeof *lowered);
    EACH(i, f->asset_count) {
        text path = f->assets[i].name;
        u8 *made = allocate(path.n, 1);
        size_t stem = 0;
        EACH(k, 6) if (ends(path, suffixes[k])) stem = path.n - strlen(suffixes[k]);
        need(stem >= 1 && stem <= 119 && !one_of(path.p[0], ".-") && !ends(path, ".index.json"), "E211");
        EACH(k, path.n) need(one_of(made[k] = lower(path.p[k]), "abcdefghijklmnopqrstuvwxyz0123456789_.-"), "E211");
        lowered[i] = (text){made, path.n};
    }
    qsort(lowered, f->asset_count, sizeof *lowered, by_text);
    EACH(i, f->asset_count) need(!i || compare(lowered[i - 1], lowered[i]), "E211");
}

/* SPEC 4.1, 4.2: the next record, after a pad where one is due. wanted NULL: any one dimension. */
static const record *take(pxd *f, text name, int dtype, const shape *wanted, const char *format, ...) {
    u64 end = f->next > f->records ? f->next[-1].end : 0;
    char suffix[32];
    va_list values;
    if (end % 64) {
        const record *pad = f->next++;
        snprintf(suffix, sizeof suffix, "__pad__.%" PRIu32, f->pads++);
        need(pad < f->end && is(pad->name, suffix) && pad->dtype == U8_, "E212");
        need(pad->shape.count == 1 && pad->shape.size[0] == 64 - end % 64, "E212");
    }
    const record *r = f->next++;
    va_start(values, format);
    vsnprintf(suffix, sizeof suffix, format, values);
    va_end(values);
    need(r < f->end && r->dtype == dtype && r->name.n > name.n && !compare((text){r->name.p, name.n}, name), "E212");
    need(is((text){r->name.p + name.n, r->name.n - name.n}, suffix), "E212");
    need(wanted ? same_shape(&r->shape, wanted, 0) : r->shape.count == 1, "E212");
    return r;
}

static void check_tensors(pxd *f) {
    EACH(i, f->module_count) {
        module *m = &f->modules[i];
        shape mask = m->covered, rows = mask, cols = mask, one = {1, {1}};
        u64 width = mask.count ? mask.size[mask.count - 1] : 0;
        if (m->encoding == SIGN) mask.size[mask.count - 1] = (width + 7) / 8, cols.size[--cols.count - 1] = width, rows.count--;
        const shape *shapes[] = {&rows, &cols, &one};
        EACH(k, m->component_count) {
            component *c = &m->components[k];
            c->mask = m->last = take(f, m->name, U8_, &mask, ".%" PRIu32 ".mask", k);
            if (!k) m->first = c->mask;
            EACH(s, 3) if (AXIS_SCALES[c->axis] >> s & 1)
                c->scale[s] = m->last = take(f, m->name, F16, shapes[s], ".%" PRIu32 ".%s", k, SCALES[s]);
        }
        if (m->encoding == FULL) m->exact = take(f, m->name, m->dtype, &m->shape, ".full");
        else if (m->tail.count) m->exact = take(f, m->name, m->dtype, &m->tail, ".tail");
        if (m->exact) m->last = m->exact;
        if (!m->first) m->first = m->exact;
    }
    EACH(i, f->asset_count) f->assets[i].data = take(f, word(""), U8_, NULL, "__asset__.%" PRIu32, i);
    need(f->next == f->end, "E212");
}

/* ---- Steps 9 to 11: payload ---- */

static void check_digest(const record *first, const record *last, text sha256, const char *code) {
    if (first) need(is(sha256, sha_of(first->data, last->end - first->begin)), code);
}

static void check_component(const module *m, const component *c) {
    u64 width = m->covered.size[m->covered.count - 1], stride = (width + 7) / 8;
    for (u64 at_ = stride - 1; width % 8 && at_ < bytes_of(c->mask); at_ += stride) need(!(c->mask->data[at_] >> width % 8), "E303");
    EACH(s, 3) for (u64 i = 1; c->scale[s] && i < bytes_of(c->scale[s]); i += 2) { /* SPEC 5.4 */
        need((c->scale[s]->data[i] & 0x7C) != 0x7C, "E305"); need(!(c->scale[s]->data[i] & 0x80), "E306");
    }
}

static pxd load(const char *path) { /* steps 1 to 11 */
    pxd f = {.file = read_file(path, true)};
    read_header(&f);
    read_manifest(&f);
    check_names(&f);
    EACH(i, f.module_count) check_fit(&f.modules[i]);
    check_base_digest(&f);
    check_assets(&f);
    check_tensors(&f);
    EACH(i, f.module_count) check_digest(f.modules[i].first, f.modules[i].last, f.modules[i].sha256, "E301"); /* SPEC 4.3 */
    EACH(i, f.asset_count) check_digest(f.assets[i].data, f.assets[i].data, f.assets[i].sha256, "E302");      /* SPEC 4.4 */
    for (const record *r = f.records; r < f.end; r++) /* SPEC 4.5 */
        for (u64 i = 0; starts(r->name, "__pad__.") && i < bytes_of(r); i++) need(!r->data[i], "E304");
    EACH(i, f.module_count) EACH(k, f.modules[i].component_count) check_component(&f.modules[i], &f.modules[i].components[k]);
    return f;
}

/* ---- decode ---- */

static int sign_at(const record *mask, u64 stride, u64 row, u64 j) { return mask->data[row * stride + j / 8] >> j % 8 & 1; }

static void print_text(const char *before, text s) {
    printf("%s\"", before);
    EACH(i, s.n) printf(s.p[i] < 0x20 || one_of(s.p[i], "\"\\") ? "\\u%04x" : "%c", s.p[i]);
    putchar('"');
}

static void print_shape(FILE *to, const shape *s) {
    EACH(d, s->count) fprintf(to, d ? ",%" PRIu64 : "%" PRIu64, s->size[d]);
}

static void print_component(const module *m, u32 k) {
    const component *c = &m->components[k];
    u64 width = m->covered.size[m->covered.count - 1], stride = (width + 7) / 8;
    sha signs = SHA, scales = SHA;
    printf("%s{\"axis\":\"%s\",\"exponent\":%d", k ? "," : "", AXES[c->axis], c->exponent);
    for (u64 i = 0; i < bytes_of(c->mask) / stride * width; i++) sha_add(&signs, sign_at(c->mask, stride, i / width, i % width) ? "\1" : "", 1);
    EACH(s, 3) if (c->scale[s]) sha_add(&scales, c->scale[s]->data, bytes_of(c->scale[s]));
    printf(",\"signs_sha256\":\"%s\"", sha_hex(signs)); printf(",\"scales_sha256\":\"%s\"}", sha_hex(scales));
}

static void decode(const char *path) {
    pxd f = load(path);
    printf("{\"ok\":true,\"content_id\":\"sha256:%s\",\"modules\":[", sha_of(f.manifest.p, f.manifest.n));
    EACH(i, f.module_count) {
        const module *m = &f.modules[i];
        print_text(i ? ",{\"name\":" : "{\"name\":", m->name);
        printf(",\"dtype\":\"%s\",\"encoding\":\"%s\",\"shape\":[", DTYPES[m->dtype].name, ENCODINGS[m->encoding]);
        print_shape(stdout, &m->shape);
        printf("],\"components\":[");
        EACH(k, m->component_count) print_component(m, k);
        if (m->exact) printf("],\"exact_sha256\":\"%s\"}", sha_of(m->exact->data, bytes_of(m->exact)));
        else printf("],\"exact_sha256\":null}");
    }
    printf("],\"tied\":[");
    EACH(i, 2 * f.tied_count) print_text(i % 2 ? "," : i ? ",[" : "[", f.tied[i]), printf(i % 2 ? "]" : "");
    printf("],\"dropped\":[");
    EACH(i, f.dropped_count) print_text(i ? "," : "", f.dropped[i]);
    printf("],\"assets\":[");
    EACH(i, f.asset_count) {
        print_text(i ? ",{\"path\":" : "{\"path\":", f.assets[i].name);
        printf(",\"size\":%" PRIu64 ",\"sha256\":\"%.64s\"}", bytes_of(f.assets[i].data), (const char *)f.assets[i].sha256.p);
    }
    const char *comma = "],\"metadata\":{";
    if (!f.tree->nodes[f.metadata].count) printf("%s", comma);
    CHILDREN(f.tree, f.metadata, id) print_text(comma, f.tree->nodes[id].key), print_text(":", f.tree->nodes[id].is.string), comma = ",";
    printf("}}\n");
}

/* ---- apply: SPEC 6 and 7 ---- */

static float from_bits(u64 bits) {
    float value;
    memcpy(&value, &(u32){(u32)bits}, sizeof value);
    return value;
}

static float from_f16(u64 h) {
    u64 sign = (h & 0x8000) << 16, magnitude = h & 0x7FFF;
    if (magnitude >= 0x7C00) return from_bits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
    float value = magnitude < 0x400 ? (float)magnitude * 0x1p-24f : from_bits((magnitude << 13) + 0x38000000);
    return sign ? -value : value;
}

static u32 halve(u32 bits, int shift) { /* bits / 2^shift, nearest, ties to even */
    u32 kept = bits >> shift, rest = bits & ((1u << shift) - 1), half = 1u << (shift - 1);
    return kept + (rest > half || (rest == half && (kept & 1)));
}

static u32 narrow(float value, int dtype) { /* SPEC 6.1, 6.2 */
    u32 bits;
    memcpy(&bits, &value, sizeof bits);
    u32 sign = bits >> 31 << (dtype == F32 ? 31 : 15), magnitude = bits & 0x7FFFFFFF;
    int shift = 126 - (int)(magnitude >> 23); /* a subnormal F16 counts in 2^-24 */
    if (magnitude > 0x7F800000) return dtype == F32 ? 0x7FC00000 : dtype == BF16 ? 0x7FC0 : 0x7E00;
    if (dtype == F32) return bits;
    if (dtype == BF16) return sign | halve(magnitude, 16);
    if (magnitude >= 0x47800000) return sign | 0x7C00; /* 65536 and above; 65520 carries into infinity below */
    if (magnitude >= 0x38800000) return sign | (halve(magnitude, 13) - (112 << 10));
    return sign | (shift > 24 ? 0 : halve((magnitude & 0x7FFFFF) | 0x800000, shift));
}

static float term(const module *m, const component *c, u64 row, u64 j) { /* SPEC 5.3 */
    u64 width = m->covered.size[m->covered.count - 1], height = m->covered.size[m->covered.count - 2];
    u64 index[] = {row, row / height * width + j, 0};
    double value = 1; /* products of two F16 and powers of two are exact in binary32, and so here */
    EACH(s, 3) if (c->scale[s]) value *= (double)from_f16(little(c->scale[s]->data + 2 * index[s], 2));
    value = ldexp(value, c->exponent);
    return (float)(sign_at(c->mask, (width + 7) / 8, row, j) ? value : -value);
}

static void write_module(FILE *to, const module *m, const u8 *base) {
    u64 size = DTYPES[m->dtype].size, from = DTYPES[m->base_dtype].size, covered = size_of(&m->covered, m->dtype);
    u64 width = m->covered.count ? m->covered.size[m->covered.count - 1] : 1;
    if (m->encoding == SAME && m->dtype == m->base_dtype) fwrite(base, 1, covered, to); /* SPEC 6.3 */
    else for (u64 i = 0; m->encoding != FULL && i < covered / size; i++) {
        u64 bits = little(base + i * from, (int)from);
        float a = m->base_dtype == F16 ? from_f16(bits) : from_bits(m->base_dtype == BF16 ? bits << 16 : bits);
        EACH(k, m->component_count) a += term(m, &m->components[k], i / width, i % width);
        for (u64 result = narrow(a, m->dtype), k = 0; k < size; k++) fputc((int)(result >> 8 * k & 255), to);
    }
    if (m->exact) fwrite(m->exact->data, 1, bytes_of(m->exact), to); /* SPEC 6.4 */
}

static int by_record(const void *a, const void *b) { return compare(((const record *)a)->name, ((const record *)b)->name); }

static record *read_base(const char *path, u32 *count) {
    text file = read_file(path, false);
    u64 length = little(file.p, 8);
    errno = EINVAL;
    io(file.n >= 8 && length <= file.n - 8, "read safetensors", path);
    json *j = parse(file.p + 8, length, MANIFEST_CODES);
    record *made = allocate(j->nodes[0].count, sizeof *made);
    CHILDREN(j, 0, id) {
        if (is(j->nodes[id].key, "__metadata__")) continue;
        record *r = &made[(*count)++];
        *r = read_record(j, id);
        io(r->end <= file.n - 8 - length, "read safetensors", path);
        r->data = file.p + 8 + length + r->begin;
    }
    qsort(made, *count, sizeof *made, by_record);
    return made;
}

static const u8 **bind(const pxd *f, const char *path) { /* SPEC 7; the base tensor of each module that has one */
    u32 count = 0, wanted = 0, have = 0;
    record *base = read_base(path, &count);
    const record **found = allocate(f->module_count, sizeof *found);
    const u8 **data = allocate(f->module_count, sizeof *data);
    EACH(i, f->module_count) {
        if (!f->modules[i].has_base) continue;
        found[i] = bsearch(&(record){.name = f->modules[i].name}, base, count, sizeof *base, by_record);
        wanted++, have += found[i] != NULL;
    }
    need(have || !wanted, "E401"); need(have == wanted, "E402");
    EACH(i, f->module_count) if (found[i])
        need(found[i]->dtype == f->modules[i].base_dtype && same_shape(&found[i]->shape, &f->modules[i].base_shape, 0), "E403");
    EACH(i, f->module_count) if (found[i]) {
        check_digest(found[i], found[i], f->modules[i].base_sha256, "E404");
        data[i] = found[i]->data;
    }
    return data;
}

static void apply(const char *path, const char *base_path, const char *out) {
    pxd f = load(path);
    const u8 **data = bind(&f, base_path);
    u32 count = f.module_count + f.tied_count, *source = allocate(count, sizeof *source);
    u64 end = 0;
    FILE *to = fopen(out, "wb");
    io(to, "write", out);
    fwrite((u8[8]){0}, 1, 8, to);
    EACH(i, count) { /* modules, then aliases (SPEC 6.5) */
        text name = i < f.module_count ? f.modules[i].name : f.tied[2 * (i - f.module_count) + 1];
        while (i >= f.module_count && compare(f.modules[source[i]].name, f.tied[2 * (i - f.module_count)])) source[i]++;
        if (i < f.module_count) source[i] = i;
        const module *m = &f.modules[source[i]];
        fputs(i ? ",\"" : "{\"", to);
        EACH(k, name.n) fprintf(to, name.p[k] == '"' ? "\\%c" : "%c", name.p[k]);
        fprintf(to, "\":{\"dtype\":\"%s\",\"shape\":[", DTYPES[m->dtype].name);
        print_shape(to, &m->shape);
        fprintf(to, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", end, end + size_of(&m->shape, m->dtype));
        end += size_of(&m->shape, m->dtype);
    }
    fputc('}', to);
    u64 length = (u64)ftell(to) - 8;
    EACH(i, count) write_module(to, &f.modules[source[i]], data[source[i]]);
    rewind(to);
    EACH(i, 8) fputc((int)(length >> 8 * i & 255), to);
    io(!ferror(to) && !fclose(to), "write", out);
    printf("{\"ok\":true}\n");
}

int main(int argc, char **argv) {
    const char *operation = argc > 1 ? argv[1] : "";
    if (argc == 2 && !strcmp(operation, "caps"))
        printf("{\"protocol\":1,\"implementation\":\"pxd.c\",\"version\":\"1.0\",\"spec\":[\"1.0\"],\"features\":[],"
               "\"operations\":[\"decode\",\"apply\"]}\n");
    else if (argc == 3 && !strcmp(operation, "decode")) decode(argv[2]);
    else if (argc == 7 && !strcmp(operation, "apply") && !strcmp(argv[3], "--base") && !strcmp(argv[5], "--out"))
        apply(argv[2], argv[4], argv[6]);
    else return 77;
    return fflush(stdout) ? 2 : 0;
}
