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
#define LIMIT ((uint64_t)1 << 53)
#define NONE UINT32_MAX
typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;
typedef struct { const u8 *p; u32 n; } text;

static _Noreturn void reject(const char *code) {
    const char *phases[] = {"container", "profile", "payload", "binding"};
    printf("{\"ok\":false,\"phase\":\"%s\",\"code\":\"%s\"}\n", phases[code[1] - '1'], code);
    exit(1);
}

static _Noreturn void trouble(const char *what, const char *path) {
    fprintf(stderr, "pxd: %s: %s: %s\n", what, path, strerror(errno));
    exit(2);
}

static void need(bool holds, const char *code) {
    if (!holds) reject(code);
}

static void *allocate(size_t count, size_t size) { /* zeroed, never given back: it lives as long as the process */
    static void *all;
    if (count > SIZE_MAX / 2 / size) trouble("allocate", "memory");
    void **made = calloc(1, sizeof *made + count * size);
    if (!made) trouble("allocate", "memory");
    *made = all;
    all = made;
    return made + 1;
}

/* ---- SHA-256 (FIPS 180-4) ---- */

typedef struct { u32 h[8]; u64 length; u8 block[64]; } sha;

static u32 rotate(u32 x, int n) { return x >> n | x << (32 - n); }

static void sha_block(sha *s, const u8 *p) {
    static const u32 k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
        0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
        0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
        0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
        0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
        0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    u32 w[64], v[8];
    for (int i = 0; i < 16; i++) w[i] = (u32)p[4 * i] << 24 | (u32)p[4 * i + 1] << 16 | (u32)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        u32 a = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        u32 b = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + a + w[i - 7] + b;
    }
    memcpy(v, s->h, sizeof v);
    for (int i = 0; i < 64; i++) {
        u32 e = v[4], a = v[0];
        u32 t = v[7] + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + k[i] + w[i];
        u32 t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += t;
        v[0] = t + t2;
    }
    for (int i = 0; i < 8; i++) s->h[i] += v[i];
}

static sha sha_new(void) {
    return (sha){.h = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}};
}

static void sha_add(sha *s, const void *data, size_t n) {
    const u8 *p = data;
    while (n) {
        size_t at = s->length % 64, part = 64 - at < n ? 64 - at : n;
        memcpy(s->block + at, p, part);
        s->length += part;
        p += part;
        n -= part;
        if (s->length % 64 == 0) sha_block(s, s->block);
    }
}

static const char *sha_hex(sha s, char hex[65]) {
    u64 bits = s.length * 8;
    u8 end[8];
    sha_add(&s, "\x80", 1);
    while (s.length % 64 != 56) sha_add(&s, "", 1);
    for (int i = 0; i < 8; i++) end[i] = (u8)(bits >> (56 - 8 * i));
    sha_add(&s, end, 8);
    for (int i = 0; i < 8; i++) snprintf(hex + 8 * i, 9, "%08" PRIx32, s.h[i]);
    return hex;
}

static bool sha_is(const u8 *p, size_t n, text hex) {
    char made[65];
    sha s = sha_new();
    sha_add(&s, p, n);
    return hex.n == 64 && !memcmp(sha_hex(s, made), hex.p, 64);
}

/* ---- Strict JSON (SPEC 2.7 to 2.11): a tree of nodes, strings decoded into one buffer ---- */

enum { NUL, BOOLEAN, INTEGER, STRING, ARRAY, OBJECT };
typedef struct {
    u8 type;
    u32 key, key_length, first, next, count;
    union { int64_t number; struct { u32 at, length; } string; } is;
} node;
typedef struct {
    const u8 *p;
    size_t n, i;
    node *nodes;
    u32 used, decoded;
    u8 *buffer;
    bool canonical;       /* RFC 8785 so far, but for the order of keys */
    bool sorted;          /* the order of keys */
    const char *codes[4]; /* syntax, duplicate key, number, depth */
} json;

static text text_of(const json *j, u32 id) { return (text){j->buffer + j->nodes[id].is.string.at, j->nodes[id].is.string.length}; }
static text key_of(const json *j, u32 id) { return (text){j->buffer + j->nodes[id].key, j->nodes[id].key_length}; }
static bool equal(text a, const char *b) { return a.n == strlen(b) && !memcmp(a.p, b, a.n); }

static int compare(text a, text b) { /* by bytes */
    int order = memcmp(a.p, b.p, a.n < b.n ? a.n : b.n);
    return order ? order : (a.n > b.n) - (a.n < b.n);
}

static int by_text(const void *a, const void *b) { return compare(*(const text *)a, *(const text *)b); }

static u32 scalar_value(const u8 *p, size_t n, size_t *length) { /* one code point of UTF-8, or NONE */
    u8 c = p[0];
    *length = c < 0x80 ? 1 : c < 0xC2 ? 0 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF5 ? 4 : 0;
    if (*length == 0 || *length > n) return NONE;
    u32 value = *length == 1 ? c : c & (0xFFu >> (*length + 1));
    for (size_t i = 1; i < *length; i++) {
        if ((p[i] & 0xC0) != 0x80) return NONE;
        value = value << 6 | (p[i] & 0x3F);
    }
    bool small = (*length == 3 && value < 0x800) || (*length == 4 && value < 0x10000);
    return small || value > 0x10FFFF || (value >= 0xD800 && value < 0xE000) ? NONE : value;
}

static void check_utf8(const u8 *p, size_t n, const char *code) {
    for (size_t i = 0, length; i < n; i += length) need(scalar_value(p + i, n - i, &length) != NONE, code);
}

static u8 peek(const json *j) { return j->i < j->n ? j->p[j->i] : 0; }

static void skip_space(json *j) {
    for (; peek(j) && strchr(" \t\r\n", peek(j)); j->i++) j->canonical = false;
}

static u32 four_digits(json *j) {
    static const char digits_[] = "0123456789abcdef0123456789ABCDEF";
    u32 value = 0;
    for (int i = 0; i < 4; i++, j->i++) {
        const char *found = peek(j) ? strchr(digits_, peek(j)) : NULL;
        need(found, j->codes[0]);
        if (peek(j) >= 'A' && peek(j) <= 'F') found = strchr(digits_ + 16, peek(j)), j->canonical = false;
        value = value << 4 | (u32)(found - digits_) % 16;
    }
    return value;
}

static void put_scalar(json *j, u32 c) { /* of a lone surrogate come bytes that no UTF-8 holds */
    static const u8 lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
    int length = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = length - 1; i > 0; i--, c >>= 6) j->buffer[j->decoded + (u32)i] = 0x80 | (c & 63);
    j->buffer[j->decoded] = (u8)(lead[length] | c);
    j->decoded += (u32)length;
}

static void parse_escape(json *j) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    u8 c = peek(j);
    const char *found = c ? strchr(from, c) : NULL;
    j->i++;
    if (c == '/') j->canonical = false;
    if (found) {
        put_scalar(j, (u8)to[found - from]);
        return;
    }
    need(c == 'u', j->codes[0]);
    u32 value = four_digits(j);
    if (value >= 0x20 || (value && strchr(to, (int)value))) j->canonical = false;
    if (value >= 0xD800 && value < 0xDC00 && j->i + 6 <= j->n && j->p[j->i] == '\\' && j->p[j->i + 1] == 'u') {
        size_t back = j->i;
        j->i += 2;
        u32 low = four_digits(j);
        if (low >= 0xDC00 && low < 0xE000) value = 0x10000 + ((value - 0xD800) << 10) + (low - 0xDC00);
        else j->i = back;
    }
    put_scalar(j, value);
}

static void parse_string(json *j, u32 *at, u32 *length) {
    need(peek(j) == '"', j->codes[0]);
    *at = j->decoded;
    for (j->i++; peek(j) != '"'; ) {
        need(j->i < j->n && j->p[j->i] >= 0x20, j->codes[0]);
        if (j->p[j->i] == '\\') j->i++, parse_escape(j);
        else j->buffer[j->decoded++] = j->p[j->i++];
    }
    j->i++;
    *length = j->decoded - *at;
}

static size_t digits(json *j) {
    size_t start = j->i;
    while (peek(j) >= '0' && peek(j) <= '9') j->i++;
    return j->i - start;
}

static void parse_number(json *j, node *to) {
    bool negative = peek(j) == '-', whole = true;
    j->i += negative;
    size_t start = j->i, count = digits(j);
    need(count == 1 || (count && j->p[start] != '0'), j->codes[0]);
    if (peek(j) == '.') j->i++, whole = false, need(digits(j), j->codes[0]);
    if (peek(j) == 'e' || peek(j) == 'E') {
        j->i++, whole = false;
        j->i += peek(j) == '+' || peek(j) == '-';
        need(digits(j), j->codes[0]);
    }
    need(whole && count <= 16, j->codes[2]); /* SPEC 2.10 */
    int64_t value = 0;
    for (size_t i = 0; i < count; i++) value = value * 10 + (j->p[start + i] - '0');
    need(value < (int64_t)LIMIT, j->codes[2]);
    if (negative && !value) j->canonical = false;
    to->type = INTEGER;
    to->is.number = negative ? -value : value;
}

static u32 unit(u32 c) { return c < 0x10000 ? c : 0xD800 + ((c - 0x10000) >> 10); }

static bool utf16_less(text a, text b) {
    for (size_t i = 0, length; i < a.n && i < b.n; i += length) {
        size_t other;
        u32 x = scalar_value(a.p + i, a.n - i, &length), y = scalar_value(b.p + i, b.n - i, &other);
        if (x == NONE || y == NONE) return false; /* a lone surrogate: not canonical anyway */
        if (x != y) return unit(x) != unit(y) ? unit(x) < unit(y) : x < y;
    }
    return a.n < b.n;
}

static void check_unique(json *j, const node *object) { /* SPEC 2.9 */
    if (object->count < 2) return;
    text *keys = allocate(object->count, sizeof *keys);
    u32 id = object->first;
    for (u32 i = 0; i < object->count; i++, id = j->nodes[id].next) {
        keys[i] = key_of(j, id);
        if (i && !utf16_less(keys[i - 1], keys[i])) j->sorted = false;
    }
    qsort(keys, object->count, sizeof *keys, by_text);
    for (u32 i = 1; i < object->count; i++) need(compare(keys[i - 1], keys[i]), j->codes[1]);
}

static u32 parse_value(json *j, int depth) {
    static const char *words[] = {"null", "false", "true"};
    u32 id = j->used++;
    node *to = &j->nodes[id];
    u8 c = peek(j);
    if (c == '"') {
        to->type = STRING;
        parse_string(j, &to->is.string.at, &to->is.string.length);
    } else if (c == '-' || (c >= '0' && c <= '9')) {
        parse_number(j, to);
    } else if (c == '[' || c == '{') {
        u8 close = c + 2;
        u32 *link = &to->first;
        need(depth < 8, j->codes[3]); /* SPEC 2.11 */
        to->type = c == '[' ? ARRAY : OBJECT;
        j->i++;
        skip_space(j);
        while (peek(j) != close || to->count) {
            u32 key = 0, length = 0;
            if (c == '{') {
                parse_string(j, &key, &length);
                skip_space(j);
                need(peek(j) == ':', j->codes[0]);
                j->i++;
                skip_space(j);
            }
            *link = parse_value(j, depth + 1);
            j->nodes[*link].key = key;
            j->nodes[*link].key_length = length;
            link = &j->nodes[*link].next;
            to->count++;
            skip_space(j);
            if (peek(j) == close) break;
            need(peek(j) == ',', j->codes[0]);
            j->i++;
            skip_space(j);
        }
        j->i++;
        if (c == '{') check_unique(j, to);
    } else {
        int word = c == 'n' ? 0 : c == 'f' ? 1 : 2;
        size_t length = strlen(words[word]);
        need(j->n - j->i >= length && !memcmp(j->p + j->i, words[word], length), j->codes[0]);
        j->i += length;
        to->type = word ? BOOLEAN : NUL;
        to->is.number = word == 2;
    }
    return id;
}

/* Node 0 of the result is the object. Nodes are counted before they are allocated. */
static json parse_json(const u8 *p, size_t n, const char *syntax, const char *twice, const char *number, const char *depth) {
    size_t nodes = 2;
    for (size_t i = 0; i < n; i++) nodes += p[i] == ',' || p[i] == '[' || p[i] == '{';
    json j = {.p = p, .n = n, .canonical = true, .sorted = true, .codes = {syntax, twice, number, depth}};
    j.nodes = allocate(nodes, sizeof *j.nodes);
    j.buffer = allocate(n + 1, 1);
    skip_space(&j);
    parse_value(&j, 0);
    size_t end = j.i;
    while (peek(&j) == ' ') j.i++;
    need(j.i == n && j.nodes[0].type == OBJECT, syntax); /* SPEC 2.8 */
    j.i = end;
    return j;
}

/* ---- The file as types ---- */

static const struct { const char *name; u8 size; } DTYPES[] = {{"BOOL", 1}, {"U8", 1}, {"I8", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1},
    {"U16", 2}, {"I16", 2}, {"F16", 2}, {"BF16", 2}, {"U32", 4}, {"I32", 4}, {"F32", 4}, {"U64", 8}, {"I64", 8}, {"F64", 8}};
enum { U8_ = 1, F16 = 7, BF16 = 8, F32 = 11, DTYPE_COUNT = 15 };
enum { SIGN, FULL, SAME };
enum { ROW = 1, COL = 2, TENSOR = 4 };

typedef struct { u32 count; u64 size[8]; } shape;
typedef struct { text name; int dtype; shape shape; u64 begin, end; } record;
typedef struct { u8 axis; int exponent; const char *axis_name; u32 mask, row, col, scalar; } component;
typedef struct {
    text name, sha256, base_sha256;
    int dtype, base_dtype, encoding;
    bool has_base, has_sha256;
    shape shape, base_shape, covered;
    u32 component_count, first, last; /* records [first, last) */
    component components[8];
} module;
typedef struct {
    const u8 *file, *data;
    u64 size;
    record *records;
    u32 record_count, module_count, tied_count, dropped_count, asset_count, next, pads;
    module *modules;
    text *tied, *dropped, *asset_paths, *asset_sha256, manifest, base_digest; /* tied: module, alias, module, alias */
    json tree;
    u32 metadata;
} pxd;

static bool is_float(int dtype) { return dtype == F16 || dtype == BF16 || dtype == F32; }

static int dtype_of(text name) {
    for (int i = 0; i < DTYPE_COUNT; i++) if (equal(name, DTYPES[i].name)) return i;
    return -1;
}

static u64 elements(const shape *s) { /* at most 2^53: NONE of the callers needs more */
    u64 product = 1;
    for (u32 i = 0; i < s->count; i++) product = s->size[i] && product <= LIMIT / s->size[i] ? product * s->size[i] : LIMIT;
    return product;
}

static bool same_shape(const shape *a, const shape *b, u32 from) {
    for (u32 i = from; i < a->count && i < b->count; i++) if (a->size[i] != b->size[i]) return false;
    return a->count == b->count;
}

/* ---- Steps 1 to 3: kind of file, N, magic, version ---- */

static u8 *read_file(const char *path, u64 *size, bool regular) {
    struct stat about;
    if (stat(path, &about)) trouble("read", path);
    if (regular) need(S_ISREG(about.st_mode), "E101");
    if (regular) need((u64)about.st_size < LIMIT, "E102");
    FILE *stream = fopen(path, "rb");
    if (!stream) trouble("read", path);
    u8 *made = allocate((size_t)about.st_size + 1, 1);
    *size = fread(made, 1, (size_t)about.st_size, stream);
    if (ferror(stream)) trouble("read", path);
    fclose(stream);
    return made;
}

static bool begins(const u8 *p, u64 n, const char *word) { /* word in lower case */
    u64 i = 0;
    for (; word[i] && i < n; i++) if ((p[i] >= 'A' && p[i] <= 'Z' ? p[i] + 32 : p[i]) != (u8)word[i]) return false;
    return !word[i];
}

static void check_kind(const u8 *p, u64 n) { /* SPEC 2.2 */
    u64 space = 0, zeros = 0;
    need(n, "E103");
    need(n < 23 || memcmp(p, "version https://git-lfs", 23), "E104");
    while (space < n && p[space] && strchr(" \t\r\n\f\v", p[space])) space++;
    need(!begins(p + space, n - space, "<!doctype") && !begins(p + space, n - space, "<html"), "E105");
    need(n < 2 || memcmp(p, "PK", 2), "E106");
    need(!(n > 1 && p[0] == 0x80 && p[1] >= 2 && p[1] <= 5), "E107");
    while (zeros < n && zeros < 8 && !p[zeros]) zeros++;
    need(zeros < (n < 8 ? n : 8), "E108");
    need(p[0] == 0xF8, "E109");
    need(n >= 4096, "E103");
}

static u64 check_start(const u8 *p, u64 n) { /* returns N */
    u64 length = 0;
    check_kind(p, n);
    for (int i = 7; i >= 0; i--) length = length << 8 | p[i];
    need(length >= 4088 && length <= 1 << 24 && (8 + length) % 4096 == 0, "E110"); /* SPEC 2.3 */
    need(8 + length <= n, "E111");                                                /* SPEC 2.4 */
    need(!memcmp(p + 8, MAGIC, strlen(MAGIC)), "E112");                           /* SPEC 2.5 */
    need(!memcmp(p + 8 + strlen(MAGIC), "1.0\"", 4), "E201");                     /* SPEC 2.6 */
    return length;
}

/* ---- Steps 4 to 6: header ---- */

static void read_shape(const json *j, u32 id, shape *to, const char *type, const char *limit) {
    need(j->nodes[id].type == ARRAY, type);
    u32 item = j->nodes[id].first;
    for (u32 i = 0; i < j->nodes[id].count; i++, item = j->nodes[item].next) need(j->nodes[item].type == INTEGER, type);
    need(j->nodes[id].count <= 8, limit);
    to->count = j->nodes[id].count;
    item = j->nodes[id].first;
    for (u32 i = 0; i < to->count; i++, item = j->nodes[item].next) {
        need(j->nodes[item].is.number >= 1, limit);
        to->size[i] = (u64)j->nodes[item].is.number;
    }
}

static bool read_record(const json *j, u32 id, record *to) { /* SPEC 2.12 to 2.15 */
    const node *it = &j->nodes[id];
    bool ordered = true;
    u32 dtype = NONE, dims = NONE, offsets = NONE, field = it->first;
    need(it->type == OBJECT && it->count == 3, "E118");
    for (int i = 0; i < 3; i++, field = j->nodes[field].next) {
        text key = key_of(j, field);
        *(equal(key, "dtype") ? &dtype : equal(key, "shape") ? &dims : &offsets) = field;
        need(equal(key, "dtype") || equal(key, "shape") || equal(key, "data_offsets"), "E118");
    }
    const node *begin = &j->nodes[j->nodes[offsets].first], *end = &j->nodes[begin->next];
    need(j->nodes[dtype].type == STRING && j->nodes[offsets].type == ARRAY && j->nodes[offsets].count == 2, "E118");
    need(begin->type == INTEGER && end->type == INTEGER, "E118");
    to->name = key_of(j, id);
    to->dtype = dtype_of(text_of(j, dtype));
    need(j->nodes[dims].type == ARRAY, "E118");
    need(to->dtype >= 0, "E119");
    if (dtype != it->first || dims != j->nodes[dtype].next) ordered = false; /* SPEC 2.16 */
    read_shape(j, dims, &to->shape, "E118", "E120");
    u64 count = elements(&to->shape), size = DTYPES[to->dtype].size;
    need(count < LIMIT / size, "E120"); /* SPEC 2.14 */
    need(begin->is.number >= 0 && end->is.number - begin->is.number == (int64_t)(count * size), "E121");
    to->begin = (u64)begin->is.number;
    to->end = (u64)end->is.number;
    return ordered;
}

static void read_header(pxd *f) {
    u64 length = check_start(f->file, f->size), end = 0;
    check_utf8(f->file + 8, length, "E113");
    json *j = allocate(1, sizeof *j);
    *j = parse_json(f->file + 8, length, "E114", "E115", "E116", "E117");
    const node *metadata = &j->nodes[j->nodes[0].first];
    u32 version = j->nodes[metadata->first].next, manifest = j->nodes[version].next;
    need(metadata->count == 3 && equal(key_of(j, manifest), "manifest") && j->nodes[manifest].type == STRING, "E118");
    f->manifest = text_of(j, manifest);
    f->record_count = j->nodes[0].count - 1;
    f->records = allocate(f->record_count, sizeof *f->records);
    u32 item = metadata->next;
    for (u32 i = 0; i < f->record_count; i++, item = j->nodes[item].next)
        if (!read_record(j, item, &f->records[i])) j->canonical = false;
    need(j->canonical && length - j->i < 4096, "E122"); /* SPEC 2.16 */
    for (u32 i = 0; i < f->record_count; end = f->records[i++].end) need(f->records[i].begin == end, "E123"); /* SPEC 2.17 */
    need(f->size - 8 - length >= end, "E124"); /* SPEC 2.18 */
    need(f->size - 8 - length == end, "E125");
    f->data = f->file + 8 + length;
}

/* ---- Step 7: manifest ---- */

/* The children of an object that has exactly these keys; they stand sorted, since the text is canonical. */
static void fields(const json *j, u32 id, u32 *to, u32 count, ...) {
    va_list names;
    va_start(names, count);
    need(j->nodes[id].type == OBJECT && j->nodes[id].count == count, "E205");
    u32 child = j->nodes[id].first;
    for (u32 i = 0; i < count; i++, child = j->nodes[child].next) {
        need(equal(key_of(j, child), va_arg(names, const char *)), "E205");
        to[i] = child;
    }
    va_end(names);
}

static text string(const json *j, u32 id) {
    need(j->nodes[id].type == STRING, "E205");
    return text_of(j, id);
}

static text hex_digest(const json *j, u32 id, const char *prefix) {
    text s = string(j, id);
    size_t skip = strlen(prefix);
    need(s.n == skip + 64 && !memcmp(s.p, prefix, skip), "E205");
    for (u32 i = (u32)skip; i < s.n; i++) need((s.p[i] >= '0' && s.p[i] <= '9') || (s.p[i] >= 'a' && s.p[i] <= 'f'), "E205");
    return (text){s.p + skip, 64};
}

static u32 array(const json *j, u32 id, u32 *first) {
    need(j->nodes[id].type == ARRAY, "E205");
    *first = j->nodes[id].first;
    return j->nodes[id].count;
}

static void text_or_null(const json *j, u32 id) { need(j->nodes[id].type == NUL || j->nodes[id].type == STRING, "E205"); }
static void count_(const json *j, u32 id) { need(j->nodes[id].type == INTEGER && j->nodes[id].is.number >= 0, "E205"); }

static int word(const json *j, u32 id, const char *const *words, int count) {
    text s = string(j, id);
    for (int i = 0; i < count; i++) if (equal(s, words[i])) return i;
    reject("E205");
}

/* Sizes below 1 or more than 8 of them break a limit (step 8); anything but natural numbers breaks the schema. */
static void manifest_shape(const json *j, u32 id, shape *to) {
    u32 item, count = array(j, id, &item);
    for (u32 i = 0; i < count; i++, item = j->nodes[item].next) count_(j, item);
    read_shape(j, id, to, "E205", "E208");
}

static void read_module(const json *j, u32 id, module *m) {
    static const char *const encodings[] = {"sign", "full", "same"}, *const axes[] = {"row", "col", "row+col", "tensor"};
    static const u8 bits[] = {ROW, COL, ROW | COL, TENSOR};
    u32 at[7], part[3], item;
    fields(j, id, at, 7, "base", "components", "dtype", "encoding", "name", "sha256", "shape");
    m->has_base = j->nodes[at[0]].type != NUL;
    if (m->has_base) {
        fields(j, at[0], part, 3, "dtype", "sha256", "shape");
        need((m->base_dtype = dtype_of(string(j, part[0]))) >= 0, "E205");
        m->base_sha256 = hex_digest(j, part[1], "");
        manifest_shape(j, part[2], &m->base_shape);
    }
    need((m->dtype = dtype_of(string(j, at[2]))) >= 0, "E205");
    m->encoding = word(j, at[3], encodings, 3);
    m->name = string(j, at[4]);
    m->has_sha256 = j->nodes[at[5]].type != NUL;
    if (m->has_sha256) m->sha256 = hex_digest(j, at[5], "");
    manifest_shape(j, at[6], &m->shape);
    u32 count = array(j, at[1], &item);
    for (u32 k = 0; k < count; k++, item = j->nodes[item].next) {
        fields(j, item, part, 2, "axis", "exponent");
        int axis = word(j, part[0], axes, 4);
        need(j->nodes[part[1]].type == INTEGER, "E205");
        int64_t e = j->nodes[part[1]].is.number;
        need(k < 8, "E208");                 /* SPEC 3.8 */
        need(e >= -64 && e <= 63, "E209"); /* SPEC 3.9 */
        m->components[k] = (component){.axis = bits[axis], .exponent = (int)e, .axis_name = axes[axis]};
    }
    m->component_count = count;
}

static void check_features(const json *j) { /* SPEC 3.3, before the schema */
    u32 child = j->nodes[0].first, item;
    for (u32 i = 0; i < j->nodes[0].count; i++, child = j->nodes[child].next) {
        if (!equal(key_of(j, child), "features")) continue;
        u32 count = array(j, child, &item);
        for (u32 k = 0; k < count; k++, item = j->nodes[item].next) string(j, item);
        need(!count, "E204");
    }
}

static void read_manifest(pxd *f) {
    f->tree = parse_json(f->manifest.p, f->manifest.n, "E202", "E202", "E202", "E202");
    const json *j = &f->tree;
    u32 at[10], part[5], item;
    need(j->canonical && j->sorted && j->i == f->manifest.n, "E203"); /* SPEC 3.2 */
    check_features(j);
    fields(j, 0, at, 10, "assets", "base", "calibration", "dropped", "features", "fine_tuned", "metadata", "modules", "producer", "tied");
    f->asset_count = array(j, at[0], &item);
    f->asset_paths = allocate(f->asset_count, sizeof(text));
    f->asset_sha256 = allocate(f->asset_count, sizeof(text));
    for (u32 i = 0; i < f->asset_count; i++, item = j->nodes[item].next) {
        fields(j, item, part, 2, "path", "sha256");
        f->asset_paths[i] = string(j, part[0]);
        f->asset_sha256[i] = hex_digest(j, part[1], "");
    }
    if (j->nodes[at[2]].type != NUL) {
        fields(j, at[2], part, 5, "digest", "samples", "seed", "sequence_length", "source");
        hex_digest(j, part[0], "sha256:");
        for (int i = 1; i < 4; i++) count_(j, part[i]);
        string(j, part[4]);
    }
    f->dropped_count = array(j, at[3], &item);
    f->dropped = allocate(f->dropped_count, sizeof(text));
    for (u32 i = 0; i < f->dropped_count; i++, item = j->nodes[item].next) f->dropped[i] = string(j, item);
    fields(j, at[5], part, 2, "id", "revision");
    string(j, part[0]), text_or_null(j, part[1]);
    f->metadata = at[6];
    need(j->nodes[at[6]].type == OBJECT, "E205");
    item = j->nodes[at[6]].first;
    for (u32 i = 0; i < j->nodes[at[6]].count; i++, item = j->nodes[item].next) string(j, item);
    fields(j, at[8], part, 2, "name", "version");
    string(j, part[0]), string(j, part[1]);
    f->tied_count = array(j, at[9], &item);
    f->tied = allocate(f->tied_count, 2 * sizeof(text));
    for (u32 i = 0; i < f->tied_count; i++, item = j->nodes[item].next) {
        need(j->nodes[item].type == ARRAY && j->nodes[item].count == 2, "E205");
        f->tied[2 * i] = string(j, j->nodes[item].first);
        f->tied[2 * i + 1] = string(j, j->nodes[j->nodes[item].first].next);
    }
    fields(j, at[1], part, 3, "digest", "id", "revision");
    string(j, part[1]), text_or_null(j, part[2]);
    f->base_digest = hex_digest(j, part[0], "sha256:");
    f->module_count = array(j, at[7], &item);
    need(f->module_count >= 1 && f->module_count <= 65536, "E208"); /* SPEC 3.8 */
    f->modules = allocate(f->module_count, sizeof *f->modules);
    for (u32 i = 0; i < f->module_count; i++, item = j->nodes[item].next) read_module(j, item, &f->modules[i]);
}

/* ---- Step 8: names, encodings, base digest, assets, tensors ---- */

static void check_name(text s) { /* SPEC 3.5 */
    need(s.n >= 1 && s.n <= 512 && !(s.n > 1 && !memcmp(s.p, "__", 2)), "E206");
    for (u32 i = 0; i < s.n; i++) need(s.p[i] > 0x20 && s.p[i] < 0x7F && s.p[i] != '/' && s.p[i] != '\\', "E206");
}

static bool among(text name, const text *sorted, u32 count) { return bsearch(&name, sorted, count, sizeof name, by_text) != NULL; }

static void check_names(const pxd *f) { /* SPEC 3.5 to 3.7 */
    text *names = allocate(f->module_count, sizeof *names), *aliases = allocate(f->tied_count, sizeof *aliases);
    for (u32 i = 0; i < f->module_count; i++) check_name(names[i] = f->modules[i].name);
    for (u32 i = 0; i < 2 * f->tied_count; i++) check_name(f->tied[i]);
    for (u32 i = 0; i < f->dropped_count; i++) check_name(f->dropped[i]);
    for (u32 i = 0; i < f->tied_count; i++) aliases[i] = f->tied[2 * i + 1];
    for (u32 i = 1; i < f->tied_count; i++) need(compare(aliases[i - 1], aliases[i]) <= 0, "E205");
    for (u32 i = 1; i < f->dropped_count; i++) need(compare(f->dropped[i - 1], f->dropped[i]) < 0, "E205");
    qsort(names, f->module_count, sizeof *names, by_text);
    for (u32 i = 1; i < f->module_count; i++) need(compare(names[i - 1], names[i]), "E207");
    for (u32 i = 0; i < f->tied_count; i++) {
        need(among(f->tied[2 * i], names, f->module_count) && !among(aliases[i], names, f->module_count), "E207");
        need(!i || compare(aliases[i - 1], aliases[i]), "E207");
    }
    for (u32 i = 0; i < f->dropped_count; i++)
        need(!among(f->dropped[i], names, f->module_count) && !among(f->dropped[i], aliases, f->tied_count), "E207");
}

static void check_fit(module *m) { /* SPEC 3.9, 3.10 */
    m->covered = m->shape;
    if (m->encoding == FULL) {
        need(!m->component_count && m->has_sha256, "E209");
        return;
    }
    need(m->has_base && same_shape(&m->shape, &m->base_shape, 1), "E209");
    bool floats = is_float(m->dtype) && is_float(m->base_dtype), tail = m->shape.count && m->shape.size[0] > m->base_shape.size[0];
    if (tail) m->covered.size[0] = m->base_shape.size[0];
    if (m->encoding == SIGN) need(floats && m->component_count && m->has_sha256 && m->shape.count >= 2, "E209");
    else need(!m->component_count && (floats || m->dtype == m->base_dtype) && m->has_sha256 == tail, "E209");
}

static int by_module_name(const void *a, const void *b) {
    return compare((*(module *const *)a)->name, (*(module *const *)b)->name);
}

static void sha_print(sha *s, const char *format, ...) {
    char made[64];
    va_list values;
    va_start(values, format);
    sha_add(s, made, (size_t)vsnprintf(made, sizeof made, format, values));
    va_end(values);
}

static void check_base_digest(const pxd *f) { /* SPEC 3.11 */
    module **sorted = allocate(f->module_count, sizeof *sorted);
    char hex[65];
    sha s = sha_new();
    const char *comma = "[";
    for (u32 i = 0; i < f->module_count; i++) sorted[i] = &f->modules[i];
    qsort(sorted, f->module_count, sizeof *sorted, by_module_name);
    for (u32 i = 0; i < f->module_count; i++) {
        const module *m = sorted[i];
        if (!m->has_base) continue;
        sha_print(&s, "%s[\"", comma);
        for (u32 k = 0; k < m->name.n; k++) sha_print(&s, m->name.p[k] == '"' ? "\\%c" : "%c", m->name.p[k]);
        sha_print(&s, "\",\"%s\",[", DTYPES[m->base_dtype].name);
        for (u32 d = 0; d < m->base_shape.count; d++) sha_print(&s, d ? ",%" PRIu64 : "%" PRIu64, m->base_shape.size[d]);
        sha_print(&s, "],\"");
        sha_add(&s, m->base_sha256.p, 64);
        sha_print(&s, "\"]");
        comma = ",";
    }
    sha_print(&s, *comma == '[' ? "[]" : "]");
    need(!memcmp(sha_hex(s, hex), f->base_digest.p, 64), "E210");
}

static bool ends(text s, const char *end) { return s.n >= strlen(end) && !memcmp(s.p + s.n - strlen(end), end, strlen(end)); }

static u8 lower(u8 c) { return c >= 'A' && c <= 'Z' ? (u8)(c + 32) : c; }

static void check_asset(text s) { /* SPEC 3.12 */
    static const char *const suffixes[] = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".md"};
    u32 stem = 0;
    for (int i = 0; i < 6; i++) if (ends(s, suffixes[i])) stem = s.n - (u32)strlen(suffixes[i]);
    need(stem >= 1 && stem <= 119 && s.p[0] != '.' && s.p[0] != '-' && !ends(s, ".index.json"), "E211");
    for (u32 i = 0; i < s.n; i++) {
        u8 c = lower(s.p[i]);
        need((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '.' || c == '-', "E211");
    }
}

static void check_assets(const pxd *f) {
    text *paths = allocate(f->asset_count, sizeof *paths);
    for (u32 i = 0; i < f->asset_count; i++) {
        check_asset(f->asset_paths[i]);
        u8 *made = allocate(f->asset_paths[i].n, 1);
        for (u32 k = 0; k < f->asset_paths[i].n; k++) made[k] = lower(f->asset_paths[i].p[k]);
        paths[i] = (text){made, f->asset_paths[i].n};
    }
    qsort(paths, f->asset_count, sizeof *paths, by_text);
    for (u32 i = 1; i < f->asset_count; i++) need(compare(paths[i - 1], paths[i]), "E211");
}

/* SPEC 4.1, 4.2: the next record, after a pad where one is due. shape NULL: any one dimension. Returns its index. */
static u32 take(pxd *f, text name, const char *suffix, int dtype, const shape *wanted) {
    u64 end = f->next ? f->records[f->next - 1].end : 0;
    char pad[32];
    if (end % 64) {
        const record *r = &f->records[f->next];
        snprintf(pad, sizeof pad, "__pad__.%" PRIu32, f->pads++);
        need(f->next < f->record_count && equal(r->name, pad) && r->dtype == U8_, "E212");
        need(r->shape.count == 1 && r->shape.size[0] == 64 - end % 64, "E212");
        f->next++;
    }
    need(f->next < f->record_count, "E212");
    const record *r = &f->records[f->next];
    text rest = {r->name.p + name.n, r->name.n - name.n};
    need(r->name.n > name.n && !memcmp(r->name.p, name.p, name.n) && equal(rest, suffix) && r->dtype == dtype, "E212");
    need(wanted ? same_shape(&r->shape, wanted, 0) : r->shape.count == 1, "E212");
    return f->next++;
}

static shape without(const shape *s, u32 axis) { /* axis counted from the end, 1 or 2 */
    shape made = *s;
    if (axis == 2) made.size[s->count - 2] = made.size[s->count - 1];
    made.count--;
    return made;
}

static void check_tensors(pxd *f) {
    for (u32 i = 0; i < f->module_count; i++) {
        module *m = &f->modules[i];
        char suffix[32];
        m->first = NONE;
        for (u32 k = 0; k < m->component_count; k++) {
            component *c = &m->components[k];
            shape mask = m->covered, row = without(&mask, 1), col = without(&mask, 2), one = {1, {1}};
            mask.size[mask.count - 1] = (mask.size[mask.count - 1] + 7) / 8;
            snprintf(suffix, sizeof suffix, ".%" PRIu32 ".mask", k), c->mask = take(f, m->name, suffix, U8_, &mask);
            if (c->axis & ROW) snprintf(suffix, sizeof suffix, ".%" PRIu32 ".row", k), c->row = take(f, m->name, suffix, F16, &row);
            if (c->axis & COL) snprintf(suffix, sizeof suffix, ".%" PRIu32 ".col", k), c->col = take(f, m->name, suffix, F16, &col);
            if (c->axis & TENSOR) snprintf(suffix, sizeof suffix, ".%" PRIu32 ".scalar", k), c->scalar = take(f, m->name, suffix, F16, &one);
            if (!k) m->first = c->mask;
        }
        shape tail = m->shape;
        if (tail.count) tail.size[0] -= m->covered.size[0];
        bool exact = m->encoding == FULL || (tail.count && tail.size[0]);
        u32 last = exact ? take(f, m->name, m->encoding == FULL ? ".full" : ".tail", m->dtype, m->encoding == FULL ? &m->shape : &tail) : NONE;
        if (m->first == NONE) m->first = exact ? last : f->next;
        m->last = f->next;
    }
    for (u32 i = 0; i < f->asset_count; i++) {
        char name[32];
        snprintf(name, sizeof name, "__asset__.%" PRIu32, i);
        take(f, (text){(const u8 *)"", 0}, name, U8_, NULL);
    }
    need(f->next == f->record_count, "E212");
}

/* ---- Steps 9 to 11: payload ---- */

static const u8 *bytes(const pxd *f, u32 id) { return f->data + f->records[id].begin; }
static u64 length_of(const pxd *f, u32 id) { return f->records[id].end - f->records[id].begin; }
static u32 asset_record(const pxd *f, u32 index) { /* assets are the last records, pads between them */
    u32 id = f->record_count;
    for (u32 left = f->asset_count - index; left; ) left -= f->records[--id].name.p[2] == 'a';
    return id;
}

static void check_scales(const pxd *f, u32 id) { /* SPEC 5.4 */
    for (u64 i = 0; i < length_of(f, id); i += 2) {
        need((bytes(f, id)[i + 1] & 0x7C) != 0x7C, "E305");
        need(!(bytes(f, id)[i + 1] & 0x80), "E306");
    }
}

static void check_payload(const pxd *f) {
    for (u32 i = 0; i < f->module_count; i++) {
        const module *m = &f->modules[i];
        if (m->first < m->last) need(sha_is(bytes(f, m->first), f->records[m->last - 1].end - f->records[m->first].begin, m->sha256), "E301");
    }
    for (u32 i = 0; i < f->asset_count; i++) need(sha_is(bytes(f, asset_record(f, i)), length_of(f, asset_record(f, i)), f->asset_sha256[i]), "E302");
    for (u32 id = 0; id < f->record_count; id++)
        if (f->records[id].name.n > 8 && !memcmp(f->records[id].name.p, "__pad__.", 8))
            for (u64 i = 0; i < length_of(f, id); i++) need(!bytes(f, id)[i], "E304");
    for (u32 i = 0; i < f->module_count; i++)
        for (u32 k = 0; k < f->modules[i].component_count; k++) {
            const component *c = &f->modules[i].components[k];
            u64 width = f->modules[i].covered.size[f->modules[i].covered.count - 1], stride = (width + 7) / 8;
            for (u64 at = stride - 1; width % 8 && at < length_of(f, c->mask); at += stride) need(!(bytes(f, c->mask)[at] >> width % 8), "E303");
            if (c->axis & ROW) check_scales(f, c->row);
            if (c->axis & COL) check_scales(f, c->col);
            if (c->axis & TENSOR) check_scales(f, c->scalar);
        }
}

static pxd load(const char *path) { /* steps 1 to 11 */
    pxd f = {0};
    f.file = read_file(path, &f.size, true);
    read_header(&f);
    read_manifest(&f);
    check_names(&f);
    for (u32 i = 0; i < f.module_count; i++) check_fit(&f.modules[i]);
    check_base_digest(&f);
    check_assets(&f);
    check_tensors(&f);
    check_payload(&f);
    return f;
}

/* ---- decode ---- */

static void print_string(text s) {
    putchar('"');
    for (u32 i = 0; i < s.n; i++) {
        if (s.p[i] < 0x20 || s.p[i] == '"' || s.p[i] == '\\') printf("\\u%04x", s.p[i]);
        else putchar(s.p[i]);
    }
    putchar('"');
}

static void print_strings(const char *key, const text *items, u32 count, bool pairs) {
    printf(",\"%s\":[", key);
    for (u32 i = 0; i < count; i++) {
        printf(i ? "," : "");
        if (pairs) putchar('['), print_string(items[2 * i]), putchar(','), print_string(items[2 * i + 1]), putchar(']');
        else print_string(items[i]);
    }
    putchar(']');
}

static int sign_at(const u8 *mask, u64 stride, u64 row, u64 j) { return mask[row * stride + j / 8] >> j % 8 & 1; } /* SPEC 5.1 */

static void print_digest(const char *key, sha s) {
    char hex[65];
    printf(",\"%s\":\"%s\"", key, sha_hex(s, hex));
}

static void print_component(const pxd *f, const module *m, u32 k) {
    const component *c = &m->components[k];
    u64 width = m->covered.size[m->covered.count - 1], stride = (width + 7) / 8, rows = length_of(f, c->mask) / stride;
    u32 scales[] = {c->row, c->col, c->scalar};
    sha signs = sha_new(), values = sha_new();
    printf("%s{\"axis\":\"%s\",\"exponent\":%d", k ? "," : "", c->axis_name, c->exponent);
    for (u64 row = 0; row < rows; row++)
        for (u64 j = 0; j < width; j++) sha_add(&signs, sign_at(bytes(f, c->mask), stride, row, j) ? "\1" : "", 1);
    for (int i = 0; i < 3; i++)
        if (c->axis >> i & 1) sha_add(&values, bytes(f, scales[i]), length_of(f, scales[i]));
    print_digest("signs_sha256", signs);
    print_digest("scales_sha256", values);
    putchar('}');
}

static bool has_exact(const module *m) { return m->encoding == FULL || (m->shape.count && m->shape.size[0] > m->covered.size[0]); }

static void decode(const char *path) {
    static const char *const encodings[] = {"sign", "full", "same"};
    pxd f = load(path);
    char hex[65];
    sha s = sha_new();
    sha_add(&s, f.manifest.p, f.manifest.n);
    printf("{\"ok\":true,\"content_id\":\"sha256:%s\",\"modules\":[", sha_hex(s, hex));
    for (u32 i = 0; i < f.module_count; i++) {
        const module *m = &f.modules[i];
        printf(i ? ",{\"name\":" : "{\"name\":");
        print_string(m->name);
        printf(",\"dtype\":\"%s\",\"encoding\":\"%s\",\"shape\":[", DTYPES[m->dtype].name, encodings[m->encoding]);
        for (u32 d = 0; d < m->shape.count; d++) printf(d ? ",%" PRIu64 : "%" PRIu64, m->shape.size[d]);
        printf("],\"components\":[");
        for (u32 k = 0; k < m->component_count; k++) print_component(&f, m, k);
        putchar(']');
        if (has_exact(m)) {
            sha exact = sha_new();
            sha_add(&exact, bytes(&f, m->last - 1), length_of(&f, m->last - 1));
            print_digest("exact_sha256", exact);
        } else {
            printf(",\"exact_sha256\":null");
        }
        putchar('}');
    }
    putchar(']');
    print_strings("tied", f.tied, f.tied_count, true);
    print_strings("dropped", f.dropped, f.dropped_count, false);
    printf(",\"assets\":[");
    for (u32 i = 0; i < f.asset_count; i++) {
        printf(i ? ",{\"path\":" : "{\"path\":");
        print_string(f.asset_paths[i]);
        printf(",\"size\":%" PRIu64 ",\"sha256\":\"%.64s\"}", length_of(&f, asset_record(&f, i)), (const char *)f.asset_sha256[i].p);
    }
    printf("],\"metadata\":{");
    u32 item = f.tree.nodes[f.metadata].first;
    for (u32 i = 0; i < f.tree.nodes[f.metadata].count; i++, item = f.tree.nodes[item].next) {
        printf(i ? "," : "");
        print_string(key_of(&f.tree, item)), putchar(':'), print_string(text_of(&f.tree, item));
    }
    printf("}}\n");
}

/* ---- apply: SPEC 6 and 7 ---- */

static float from_bits(u32 bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float from_f16(u32 h) {
    u32 sign = (h & 0x8000) << 16, magnitude = h & 0x7FFF;
    if (magnitude >= 0x7C00) return from_bits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
    float value = magnitude < 0x400 ? (float)magnitude * 0x1p-24f : from_bits((magnitude << 13) + 0x38000000);
    return sign ? -value : value;
}

static u32 little(const u8 *p, int size) { return size == 2 ? (u32)p[0] | (u32)p[1] << 8 : (u32)p[0] | (u32)p[1] << 8 | (u32)p[2] << 16 | (u32)p[3] << 24; }

static float widen(const u8 *p, int dtype) {
    return dtype == F32 ? from_bits(little(p, 4)) : dtype == BF16 ? from_bits(little(p, 2) << 16) : from_f16(little(p, 2));
}

static u32 halve(u32 bits, int shift) { /* bits / 2^shift, nearest, ties to even */
    u32 kept = bits >> shift, rest = bits & ((1u << shift) - 1), half = 1u << (shift - 1);
    return kept + (rest > half || (rest == half && (kept & 1)));
}

static u32 narrow(float value, int dtype) { /* SPEC 6.1, 6.2 */
    u32 bits, sign;
    memcpy(&bits, &value, sizeof bits);
    sign = bits >> 31;
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return dtype == F32 ? 0x7FC00000 : dtype == BF16 ? 0x7FC0 : 0x7E00;
    if (dtype == F32) return sign << 31 | bits;
    if (dtype == BF16) return sign << 15 | halve(bits, 16);
    if (bits >= 0x47800000) return sign << 15 | 0x7C00; /* 65536 and above; 65520 carries into infinity below */
    if (bits >= 0x38800000) return sign << 15 | (halve(bits, 13) - (112 << 10));
    int shift = 126 - (int)(bits >> 23); /* a subnormal F16 counts in 2^-24 */
    return sign << 15 | (shift > 24 ? 0 : halve((bits & 0x7FFFFF) | 0x800000, shift));
}

static void store(u8 *p, u32 bits, int size) {
    for (int i = 0; i < size; i++) p[i] = (u8)(bits >> 8 * i);
}

static float term(const pxd *f, const module *m, const component *c, u64 row, u64 j) { /* SPEC 5.3 */
    u64 width = m->covered.size[m->covered.count - 1], height = m->covered.size[m->covered.count - 2];
    double value = 1; /* products of two F16 and powers of two are exact in binary32, and so here */
    if (c->axis & ROW) value *= (double)from_f16(little(bytes(f, c->row) + 2 * row, 2));
    if (c->axis & COL) value *= (double)from_f16(little(bytes(f, c->col) + 2 * (row / height * width + j), 2));
    if (c->axis & TENSOR) value *= (double)from_f16(little(bytes(f, c->scalar), 2));
    value = ldexp(value, c->exponent);
    return (float)(sign_at(bytes(f, c->mask), (width + 7) / 8, row, j) ? value : -value);
}

/* The bytes of a module before its tail. base: the base tensor's bytes. */
static u8 *rebuild(const pxd *f, const module *m, const u8 *base, u64 *size) {
    u64 count = elements(&m->covered), width = m->covered.count ? m->covered.size[m->covered.count - 1] : 1;
    u8 to_size = DTYPES[m->dtype].size, from = DTYPES[m->base_dtype].size;
    *size = count * to_size;
    u8 *made = allocate(*size, 1);
    if (m->encoding == SAME && m->dtype == m->base_dtype) { /* SPEC 6.3 */
        memcpy(made, base, *size);
        return made;
    }
    for (u64 i = 0; i < count; i++) {
        float a = widen(base + i * from, m->base_dtype);
        for (u32 k = 0; k < m->component_count; k++) a += term(f, m, &m->components[k], i / width, i % width);
        store(made + i * to_size, narrow(a, m->dtype), to_size);
    }
    return made;
}

typedef struct { record *records; const u8 *data; u32 count; } checkpoint;

static int by_record_name(const void *a, const void *b) { return compare(((const record *)a)->name, ((const record *)b)->name); }

static checkpoint read_base(const char *path) {
    u64 size, length = 0;
    u8 *file = read_file(path, &size, false);
    for (int i = 7; i >= 0; i--) length = length << 8 | (size >= 8 ? file[i] : 0);
    errno = EINVAL;
    if (size < 8 || length > size - 8) trouble("read safetensors", path);
    json *j = allocate(1, sizeof *j);
    *j = parse_json(file + 8, length, "E402", "E402", "E402", "E402");
    checkpoint base = {allocate(j->nodes[0].count, sizeof(record)), file + 8 + length, 0};
    u32 item = j->nodes[0].first;
    for (u32 i = 0; i < j->nodes[0].count; i++, item = j->nodes[item].next) {
        if (equal(key_of(j, item), "__metadata__")) continue;
        read_record(j, item, &base.records[base.count]);
        if (base.records[base.count++].end > size - 8 - length) trouble("read safetensors", path);
    }
    qsort(base.records, base.count, sizeof(record), by_record_name);
    return base;
}

/* SPEC 7; the base tensor of each module, NULL where it needs none. */
static const u8 **bind(const pxd *f, const checkpoint *base) {
    const record **found = allocate(f->module_count, sizeof *found);
    const u8 **data = allocate(f->module_count, sizeof *data);
    u32 wanted = 0, have = 0;
    for (u32 i = 0; i < f->module_count; i++) {
        record key = {.name = f->modules[i].name};
        if (!f->modules[i].has_base) continue;
        found[i] = bsearch(&key, base->records, base->count, sizeof key, by_record_name);
        wanted++, have += found[i] != NULL;
    }
    need(have || !wanted, "E401");
    need(have == wanted, "E402");
    for (u32 i = 0; i < f->module_count; i++)
        if (found[i]) need(found[i]->dtype == f->modules[i].base_dtype && same_shape(&found[i]->shape, &f->modules[i].base_shape, 0), "E403");
    for (u32 i = 0; i < f->module_count; i++) {
        if (!found[i]) continue;
        data[i] = base->data + found[i]->begin;
        need(sha_is(data[i], found[i]->end - found[i]->begin, f->modules[i].base_sha256), "E404");
    }
    return data;
}

static void write_tensor_record(FILE *to, text name, const module *m, u64 *end, bool first) {
    u64 size = elements(&m->shape) * DTYPES[m->dtype].size;
    fputs(first ? "{\"" : ",\"", to);
    for (u32 i = 0; i < name.n; i++) fprintf(to, name.p[i] == '"' ? "\\%c" : "%c", name.p[i]);
    fprintf(to, "\":{\"dtype\":\"%s\",\"shape\":[", DTYPES[m->dtype].name);
    for (u32 d = 0; d < m->shape.count; d++) fprintf(to, d ? ",%" PRIu64 : "%" PRIu64, m->shape.size[d]);
    fprintf(to, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", *end, *end + size);
    *end += size;
}

static const module *named(const pxd *f, text name) {
    for (u32 i = 0; i < f->module_count; i++) if (!compare(f->modules[i].name, name)) return &f->modules[i];
    return NULL;
}

static void write_module(FILE *to, const pxd *f, const module *m, const u8 *base) {
    if (m->encoding != FULL) {
        u64 size;
        u8 *made = rebuild(f, m, base, &size);
        fwrite(made, 1, size, to);
    }
    if (has_exact(m)) fwrite(bytes(f, m->last - 1), 1, length_of(f, m->last - 1), to); /* SPEC 6.4 */
}

static void apply(const char *path, const char *base_path, const char *out) {
    pxd f = load(path);
    checkpoint base = read_base(base_path);
    const u8 **data = bind(&f, &base);
    FILE *to = fopen(out, "wb");
    if (!to) trouble("write", out);
    u64 end = 0;
    fwrite("\0\0\0\0\0\0\0", 1, 8, to);
    for (u32 i = 0; i < f.module_count; i++) write_tensor_record(to, f.modules[i].name, &f.modules[i], &end, !i);
    for (u32 i = 0; i < f.tied_count; i++) write_tensor_record(to, f.tied[2 * i + 1], named(&f, f.tied[2 * i]), &end, false);
    fputc('}', to);
    u64 length = (u64)ftell(to) - 8;
    u8 start[8];
    for (int i = 0; i < 8; i++) start[i] = (u8)(length >> 8 * i);
    for (u32 i = 0; i < f.module_count; i++) write_module(to, &f, &f.modules[i], data[i]);
    for (u32 i = 0; i < f.tied_count; i++) { /* SPEC 6.5 */
        const module *m = named(&f, f.tied[2 * i]);
        write_module(to, &f, m, data[m - f.modules]);
    }
    if (fseek(to, 0, SEEK_SET) || fwrite(start, 1, 8, to) != 8 || ferror(to) || fclose(to)) trouble("write", out);
    printf("{\"ok\":true}\n");
}

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "caps"))
        printf("{\"protocol\":1,\"implementation\":\"pxd.c\",\"version\":\"1.0\",\"spec\":[\"1.0\"],\"features\":[],"
               "\"operations\":[\"decode\",\"apply\"]}\n");
    else if (argc == 3 && !strcmp(argv[1], "decode")) decode(argv[2]);
    else if (argc == 7 && !strcmp(argv[1], "apply") && !strcmp(argv[3], "--base") && !strcmp(argv[5], "--out")) apply(argv[2], argv[4], argv[6]);
    else return 77;
    return fflush(stdout) ? 2 : 0;
}
