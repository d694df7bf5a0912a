// Exact updates (SPEC 5.6 to 5.9), decoded in place. Returns 0, or -1 where a block is not sound.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef struct { int width, mantissa, mask; } Kind;
typedef struct { const uint8_t *data; int64_t low, high, end; int bad; } Bits;
static int bit(const Bits *b, int64_t at) { return at >= 0 && at < b->end ? b->data[at >> 3] >> (at & 7) & 1 : 0; }
static int64_t unary(Bits *b) {
    int64_t start = b->low;
    while (b->low < b->high && bit(b, b->low)) b->low++;
    if (b->low >= b->high) { b->bad = 1; return 0; }
    return b->low++ - start;
}
static uint64_t ahead(const Bits *b, int k) {
    uint64_t v = 0;
    for (int i = 1; i <= k; i++) v = v << 1 | (uint64_t)bit(b, b->high - i);
    return v;
}
static uint64_t field(Bits *b, int k) {
    uint64_t v = ahead(b, k);
    b->high -= k;
    if (b->high < b->low) b->bad = 1;
    return v;
}
static uint64_t get(const uint8_t *w, int64_t i, int n) { uint64_t v = 0; memcpy(&v, w + i * n, (size_t)n); return v; }
static void put(uint8_t *w, int64_t i, uint64_t v, int n) { memcpy(w + i * n, &v, (size_t)n); }
static uint64_t moved(uint64_t u, int64_t d, int width) {
    uint64_t top = 1ull << (width - 1), all = 2 * top - 1;
    uint64_t o = ((u ^ (u & top ? all : top)) + (uint64_t)d) & all;
    return o ^ (o & top ? top : all);
}
static int gaps(uint8_t *w, int64_t n, const uint8_t *p, int64_t size, Kind k) {
    int bytes = k.width / 8;
    if (size < 4) return -1;
    int64_t moves = (int64_t)get(p, 0, 2), x = (int64_t)get(p, 1, 2), values = 4 + 2 * x, signs = values + x * bytes;
    int64_t at = signs + (moves + 7) / 8, before = -1, place = -1;
    if (at > size || (moves & 7 && p[at - 1] >> (moves & 7))) return -1;
    int wide = moves * 384 < n;
    for (int64_t j = 0; j < moves; j++) {
        int64_t gap = 0;
        if (wide) {
            if (at + 2 > size) return -1;
            memcpy(&gap, p + at, 2);
            at += 2;
        } else {
            do {
                if (at >= size) return -1;
                gap += p[at];
            } while (p[at++] == 255);
        }
        place += gap + 1;
        if (place >= n) return -1;
        put(w, place, moved(get(w, place, bytes), p[signs + j / 8] >> (j & 7) & 1 ? -1 : 1, k.width), bytes);
    }
    for (int64_t j = 0; j < x; j++) {
        int64_t i = (int64_t)get(p + 4, j, 2);
        if (i <= before || i >= n) return -1;
        put(w, before = i, get(p + values, j, bytes), bytes);
    }
    return at == size ? 0 : -1;
}
static int keyed(uint8_t *w, int64_t n, const uint8_t *p, int64_t size, int mode, Kind k, uint32_t *order) {
    Bits b = {p, 0, 8 * size, 8 * size, 0};
    int bytes = k.width / 8, class_of[256];
    int64_t start[17] = {0}, x = unary(&b), before = -1;
    Bits listed = b;
    b.high -= x * (16 + k.width);
    if (b.bad || b.high < b.low) return -1;
    for (int e = 0; e < 256; e++) class_of[e] = e - mode + 1 < 0 ? 0 : e - mode + 1 > 15 ? 15 : e - mode + 1;
#define E(i) ((int)(get(w, i, bytes) >> k.mantissa) & k.mask)
    for (int64_t i = 0; i < n; i++) start[class_of[E(i)] + 1]++;
    for (int c = 0; c < 16; c++) start[c + 1] += start[c];
    int64_t next[16];
    memcpy(next, start, sizeof next);
    for (int64_t i = 0; i < n; i++) order[next[class_of[E(i)]]++] = (uint32_t)i;
    for (int64_t j = 0; j < start[1] && !b.bad; j++) {
        int64_t i = order[j], q = unary(&b);
        int bits = mode - 1 - E(i) < k.mantissa + 1 ? mode - 1 - E(i) : k.mantissa + 1;
        if (q > 8) return -1;
        uint64_t f = field(&b, q == 8 ? k.width : bits), z = (uint64_t)q << bits | f;
        put(w, i, q == 8 ? f : moved(get(w, i, bytes), (int64_t)(z >> 1) ^ -(int64_t)(z & 1), k.width), bytes);
    }
    int64_t v = (unary(&b) << 15) + (int64_t)ahead(&b, 15);
    for (int c = 1; c < 16; c++)
        for (int64_t j = start[c]; j < start[c + 1] && !b.bad; j++) {
            int64_t unit = 1 << (15 - c), i = order[j];
            if (v >= unit) { v -= unit; continue; }
            int down = field(&b, c + 1) & 1;
            put(w, i, moved(get(w, i, bytes), down ? -1 : 1, k.width), bytes);
            v = (unary(&b) << 15) + (int64_t)ahead(&b, 15);
        }
    v -= (int64_t)ahead(&b, 15);
    if (b.bad || v < 0 || v >= 1 << 15 || b.high - b.low >= 8) return -1;
    while (b.low < b.high) if (bit(&b, b.low++)) return -1;
    while (x--) {
        int64_t i = (int64_t)field(&listed, 16);
        if (i <= before || i >= n) return -1;
        put(w, before = i, field(&listed, k.width), bytes);
    }
    return 0;
}
int exact_apply(uint8_t *w, int64_t n, const uint32_t *index, const uint8_t *data, Kind k) {
    int bytes = k.width / 8, bad = 0;
    uint32_t *order = malloc(65536 * sizeof *order);
    if (!order) return -1;
    for (int64_t b = 0; b * 65536 < n && !bad; b++) {
        int64_t count = n - b * 65536 < 65536 ? n - b * 65536 : 65536, size = index[b] >> 8;
        int mode = index[b] & 255;
        uint8_t *part = w + b * 65536 * bytes;
        if (mode == 255) memcpy(part, data, (size_t)(count * bytes));
        else if (mode) bad = keyed(part, count, data, size, mode, k, order);
        else if (size) bad = gaps(part, count, data, size, k);
        data += size;
    }
    free(order);
    return bad;
}
