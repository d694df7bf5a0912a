"""Triton kernels that serve many variants over one base.

    single    one row:             y = x (W + terms)^T + bias, base and masks in one pass, bound by memory
    decode    few rows a variant:  y += sum over k of row_k o ((x o col_k) B_k^T), on top of the base's product
    reduce    what decode leaves where K is split over programs
    prefill   more rows:           y = x W_v^T + bias with W_v rebuilt a tile at a time, the bits of the merged weights
    merge     many rows:           W_v as a matrix for a dense product, rebuilt once instead of for every tile of rows

Rows of x are sorted by variant and cut into tiles of one variant each:
    order   int32 [M], row of x in sorted order           tiles   int32 [tiles, 3]: variant, first, count
    terms   int64 [variants, TERMS, 3]: addresses of mask (U8 [N, ceil(K/8)]; 0: no such component), row (F32 [N], 2^e
            folded in), col (F32 [K]; 0: ones)
K is a constant of the weights, so loops over it are plain pipelined loops. Values that change with a batch are not
constants, so nothing is compiled while serving. ALIGNED: masks begin at multiples of 16.

Signs are the left operand of a tensor core. The 32 +-1 of BF16 are made from a word of a mask two at a time: one shift
moves bits t and t + 16 to the two sign bits of a register:

    pair(t) = ((word << (15 - t)) & 0x80008000) ^ 0xBF80BF80          t = 0, ..., 15

The two numbers are arguments (`signs`, `ones`), because the compiler would use two instructions for constants. Each 128
columns are multiplied in the order of pairs, [t, word, half], so the thread with a word also has the signs that the
tensor core needs from it. Then only words move between threads, and x has to be in that order too (launch.py). The
total is 1.7 instructions per weight for any number of rows of a tile (seen in sm_90 code). x in BF16 is exact; x o col
(and F16) is two BF16, which have 14 bits of it.

If K is not a multiple of 128, or a mask does not begin at a multiple of 16, bytes replace words: with the byte and a
copy of it 15 bits higher, one shift moves bits l and l + 1. That is slower (benchmarks/serve.py), because signs move
between threads through shared memory. Rejected: a tensor [N, K/8, 8] of shifted bytes, reshaped: 8 to 12 instructions.
Tables of the sums of four columns, looked up by shuffles: 2.1, but only for one row; of eight columns: 5.3.
"""

# Triton reads the annotations of a kernel: constants have one, other arguments must have none.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import Final

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from peraxis_format.ops.rebuild.triton import BF16, F32, flip, narrow, widen

__all__ = ["ONES", "SIGNS", "decode_kernel", "merge_kernel", "prefill_kernel", "reduce_kernel", "single_kernel"]

SIGNS: Final = 0x80008000 - (1 << 32)  # as signed 32-bit arguments
ONES: Final = 0xBF80BF80 - (1 << 32)

_BF16 = tl.constexpr(BF16)
_F32 = tl.constexpr(F32)


@triton.jit
def _term(terms, variant, t: tl.constexpr, TERMS: tl.constexpr):
    """Addresses of mask, row and col."""
    at = terms + (variant * TERMS + t) * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def _vector(address, index, inside):
    """A row or col vector, F32."""
    return tl.load(address.to(tl.pointer_type(tl.float32)) + index, mask=inside, other=0.0)


@triton.jit
def _bytes(mask_at, n, g, N, K: tl.constexpr):
    """uint32 [n, g]: bytes of a mask, 0 outside of it."""
    WIDTH: tl.constexpr = (K + 7) // 8
    at = mask_at.to(tl.pointer_type(tl.uint8))
    inside = (n < N)[:, None] & (g < WIDTH)[None, :]
    return tl.load(at + n[:, None].to(tl.int64) * WIDTH + g[None, :], mask=inside, other=0).to(tl.uint32)


@triton.jit
def _pair(word, signs, ones, L: tl.constexpr):
    """[a, b] -> [a, b, 2] bits of +-1: lanes L and L + 1."""
    pair = ((word << (15 - L)) & signs) ^ ones
    return tl.join((pair & 0xFFFF).to(tl.uint16), (pair >> 16).to(tl.uint16))


@triton.jit
def _signs(byte, signs, ones, ROWS_: tl.constexpr, COLUMNS_: tl.constexpr):
    """uint32 bytes [a, b] -> the bits of +-1 in BF16, uint16 [a, 8 b]."""
    word = byte | (byte << 15)
    low = tl.join(_pair(word, signs, ones, 0), _pair(word, signs, ones, 4))  # [a, b, lane & 1, lane >> 2]
    high = tl.join(_pair(word, signs, ones, 2), _pair(word, signs, ones, 6))
    eight = tl.permute(tl.join(low, high), (0, 1, 3, 4, 2))  # [a, b, lane >> 2, lane >> 1 & 1, lane & 1]
    return tl.reshape(eight, (ROWS_, COLUMNS_))


@triton.jit
def _words(mask_at, n, w, N, K: tl.constexpr):
    """uint32 [n, w]: words of a mask that begins at a multiple of 16, 0 outside of it."""
    WIDTH: tl.constexpr = K // 32
    at = tl.multiple_of(mask_at.to(tl.pointer_type(tl.uint32)), 16)
    inside = (n < N)[:, None] & (w < WIDTH)[None, :]
    return tl.load(at + n[:, None].to(tl.int64) * WIDTH + w[None, :], mask=inside, other=0)


@triton.jit
def _signs_of_words(word, signs, ones, ROWS_: tl.constexpr, COLUMNS_: tl.constexpr):
    """uint32 words [a, b] -> the bits of +-1 in BF16, uint16 [a, 32 b], columns in the order of pairs."""
    shift = 15 - tl.arange(0, 16)[None, None, :].to(tl.uint32)
    pair = ((word[:, :, None] << shift) & signs) ^ ones
    halves = tl.join((pair & 0xFFFF).to(tl.uint16), (pair >> 16).to(tl.uint16))  # [a, b, t, half]
    blocks = tl.reshape(halves, (ROWS_, COLUMNS_ // 128, 4, 16, 2))
    return tl.reshape(tl.permute(blocks, (0, 1, 3, 2, 4)), (ROWS_, COLUMNS_))


@triton.jit
def _unpaired(place):
    """The column at a place in the order of pairs."""
    return place // 128 * 128 + place // 2 % 4 * 32 + place % 2 * 16 + place % 128 // 8


@triton.jit
def _eight(g, K: tl.constexpr):
    """The columns of groups, [1, g, 8], and whether they are inside; by whole groups if possible, for wide accesses."""
    k = g[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    inside = tl.broadcast_to((g < K // 8)[None, :, None], k.shape) if K % 8 == 0 else k < K
    return k, inside


@triton.jit
def _inputs(x, row, k, inside, K: tl.constexpr):
    """Bits of x^T [k, rows]."""
    return tl.load(x + row[None, :] * K + k[:, None], mask=inside[None, :] & (k < K)[:, None], other=0)


@triton.jit
def _product(left, right, total, KIND: tl.constexpr, UPCAST: tl.constexpr):
    """total + left right, both given as bits. UPCAST: in binary32, with the same products."""
    if UPCAST:
        out = tl.dot(widen(left, KIND), widen(right, KIND), total, input_precision="ieee")
    elif KIND == _BF16:
        out = tl.dot(left.to(tl.bfloat16, bitcast=True), right.to(tl.bfloat16, bitcast=True), total)
    else:
        out = tl.dot(left.to(tl.float16, bitcast=True), right.to(tl.float16, bitcast=True), total)
    return out


@triton.jit
def _weighted(values, col_at, k, K: tl.constexpr, KIND: tl.constexpr):
    """x^T o col, F32; k: the columns of its rows."""
    weighted = widen(values, KIND)
    if col_at != 0:
        weighted *= _vector(col_at, k, k < K)[:, None]
    return weighted


@triton.jit
def _signed_product(
    values, col_at, k, sign, total, K: tl.constexpr, KIND: tl.constexpr, PLAIN: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """total [n, rows] + B (x o col)^T for one block of columns; values, sign: bits. PLAIN: BF16 without col."""
    if PLAIN:
        out = _product(sign, values, total, _BF16, UPCAST)
    else:
        weighted = _weighted(values, col_at, k, K, KIND)
        bits = weighted.to(tl.uint32, bitcast=True)
        rest = weighted - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)  # exact
        out = _product(sign, (bits >> 16).to(tl.uint16), total, _BF16, UPCAST)
        out = _product(sign, (rest.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16), out, _BF16, UPCAST)
    return out


@triton.jit(do_not_specialize=["rows"])
def decode_kernel(
    y, stride, x, order, tiles, terms, partial, rows, N, signs, ones,
    K: tl.constexpr, TERMS: tl.constexpr, KIND: tl.constexpr, PLAIN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BG: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of rows, BN outputs, and one of SPLIT parts of the columns; y: [M, N] bits, rows `stride` apart.

    ALIGNED (not for F32): K is a multiple of 128, masks begin at multiples of 16, and x is in the order of pairs.
    SPLIT 1: added to y, rounded once. More: written to partial, F32 [SPLIT, rows, N], for reduce_kernel.
    """
    STEP: tl.constexpr = (((K + 7) // 8 + SPLIT - 1) // SPLIT + BG - 1) // BG * BG
    tile = tiles + tl.program_id(1) * 3
    variant, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    member = tl.arange(0, BM)
    row = tl.load(order + first + member, mask=member < count, other=0).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    signs, ones = signs.to(tl.uint32, bitcast=True), ones.to(tl.uint32, bitcast=True)
    total = tl.zeros((BN, BM), tl.float32)
    for t in tl.static_range(TERMS):
        mask_at, row_at, col_at = _term(terms, variant, t, TERMS)
        if mask_at != 0:
            part = tl.zeros((BN, BM), tl.float32)
            for start in range(0, STEP, BG):
                group = tl.program_id(2) * STEP + start
                k = group * 8 + tl.arange(0, BG * 8)
                values = _inputs(x, row, k, member < count, K)
                if KIND == _F32:
                    byte = _bytes(mask_at, n, group + tl.arange(0, BG), N, K)
                    sign = (tl.reshape(flip(byte), (BN, BG * 8)) | 0x3F800000).to(tl.float32, bitcast=True)
                    weighted = _weighted(values, col_at, k, K, KIND)
                    part = tl.dot(sign, weighted, part, input_precision="ieee")
                elif ALIGNED:
                    word = _words(mask_at, n, group // 4 + tl.arange(0, BG // 4), N, K)
                    sign = _signs_of_words(word, signs, ones, BN, BG * 8)
                    part = _signed_product(values, col_at, _unpaired(k), sign, part, K, KIND, PLAIN, UPCAST)
                else:
                    byte = _bytes(mask_at, n, group + tl.arange(0, BG), N, K)
                    sign = _signs(byte, signs, ones, BN, BG * 8)
                    part = _signed_product(values, col_at, k, sign, part, K, KIND, PLAIN, UPCAST)
            total += part * _vector(row_at, n, n < N)[:, None]
    written = (n < N)[:, None] & (member < count)[None, :]
    if SPLIT == 1:
        at = y + row[None, :] * stride + n[:, None]
        before = widen(tl.load(at, mask=written, other=0), KIND)
        tl.store(at, narrow(before + total, KIND), mask=written)
    else:
        place = (tl.program_id(2) * rows + first + member).to(tl.int64)
        tl.store(partial + place[None, :] * N + n[:, None], total, mask=written)


@triton.jit(do_not_specialize=["rows"])
def reduce_kernel(
    y, stride, partial, order, rows, N, KIND: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """y += the parts of decode_kernel, in their order, rounded once: one row of `order` and BN outputs."""
    position = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    at = y + tl.load(order + position).to(tl.int64) * stride + n
    total = tl.zeros((BN,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(partial + (part * rows + position).to(tl.int64) * N + n, mask=n < N, other=0.0)
    tl.store(at, narrow(widen(tl.load(at, mask=n < N, other=0), KIND) + total, KIND), mask=n < N)


@triton.jit(do_not_specialize=["variant"])
def single_kernel(
    y, x, weight, bias, variant, terms, N,
    K: tl.constexpr, TERMS: tl.constexpr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr,
    BG: tl.constexpr,
):  # fmt: skip
    """BN outputs of one row: y [N] = x [K] (W + terms)^T + bias, rounded once.

    Sums are binary32: eight columns in a thread, then over the blocks of columns, then over threads.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BN, BG), tl.float32)
    for start in range(0, (K + 7) // 8, BG):
        k, inside = _eight(start + tl.arange(0, BG), K)
        values = widen(tl.load(x + k, mask=inside, other=0), KIND)
        at = weight + n[:, None, None].to(tl.int64) * K + k
        base = widen(tl.load(at, mask=(n < N)[:, None, None] & inside, other=0), KIND)
        total += tl.sum(base * values, axis=2)
    out = tl.sum(total, axis=1)
    for t in tl.static_range(TERMS):
        mask_at, row_at, col_at = _term(terms, variant, t, TERMS)
        if mask_at != 0:
            part = tl.zeros((BN, BG), tl.float32)
            for start in range(0, (K + 7) // 8, BG):
                g = start + tl.arange(0, BG)
                k, inside = _eight(g, K)
                values = widen(tl.load(x + k, mask=inside, other=0), KIND)
                if col_at != 0:
                    values *= _vector(col_at, k, inside)
                signed = values.to(tl.uint32, bitcast=True) ^ flip(_bytes(mask_at, n, g, N, K))
                part += tl.sum(signed.to(tl.float32, bitcast=True), axis=2)
            out += tl.sum(part, axis=1) * _vector(row_at, n, n < N)
    if HAS_BIAS:
        out += widen(tl.load(bias + n, mask=n < N, other=0), KIND)
    tl.store(y + n, narrow(out, KIND), mask=n < N)


@triton.jit
def _rebuilt(
    weight, terms, variant, n, first, N, K: tl.constexpr, TERMS: tl.constexpr, KIND: tl.constexpr, BN: tl.constexpr,
    BG: tl.constexpr,
):  # fmt: skip
    """The merged weights before they are rounded: W + terms (SPEC 6.1), F32 [BN, 8 BG], from group `first` on."""
    k = first * 8 + tl.arange(0, BG * 8)
    inside = (n < N)[:, None] & (k < K)[None, :]
    total = widen(tl.load(weight + n[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0), KIND)
    for t in tl.static_range(TERMS):
        mask_at, row_at, col_at = _term(terms, variant, t, TERMS)
        # A branch between the loads and the product would prevent pipelining, so a missing component adds a zero, which
        # at most turns a -0 of the base into +0.
        row, col = row_at.to(tl.pointer_type(tl.float32)), col_at.to(tl.pointer_type(tl.float32))
        scale = tl.load(row + n, mask=(n < N) & (mask_at != 0), other=0.0)
        column = tl.load(col + k, mask=(k < K) & (col_at != 0), other=1.0)
        byte = _bytes(mask_at, n, first + tl.arange(0, BG), tl.where(mask_at != 0, N, 0), K)
        size = (scale[:, None] * column[None, :]).to(tl.uint32, bitcast=True)
        total += (size ^ tl.reshape(flip(byte), (BN, BG * 8))).to(tl.float32, bitcast=True)
    return total


@triton.jit
def prefill_kernel(
    y, stride, x, weight, bias, order, tiles, terms, N,
    K: tl.constexpr, TERMS: tl.constexpr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BG: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y = x W_v^T + bias for one tile of rows and BN outputs.

    UPCAST: multiply in binary32 (the interpreter has no BF16 product; F32 weights); products are the same.
    """
    tile = tiles + tl.program_id(1) * 3
    variant, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    member = tl.arange(0, BM)
    row = tl.load(order + first + member, mask=member < count, other=0).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN, BM), tl.float32)
    for start in range(0, (K + 7) // 8, BG):
        values = _inputs(x, row, start * 8 + tl.arange(0, BG * 8), member < count, K)
        total = _rebuilt(weight, terms, variant, n, start, N, K, TERMS, KIND, BN, BG)
        if UPCAST:
            bits = narrow(total, KIND)
        elif KIND == _BF16:
            bits = total.to(tl.bfloat16).to(tl.uint16, bitcast=True)  # as narrow, but for the payload of a NaN
        else:
            bits = total.to(tl.float16).to(tl.uint16, bitcast=True)
        acc = _product(bits, values, acc, KIND, UPCAST)
    if HAS_BIAS:
        acc += widen(tl.load(bias + n, mask=n < N, other=0), KIND)[:, None]
    at = y + row[None, :] * stride + n[:, None]
    tl.store(at, narrow(acc, KIND), mask=(n < N)[:, None] & (member < count)[None, :])


@triton.jit(do_not_specialize=["variant"])
def merge_kernel(
    out, weight, terms, variant, N,
    K: tl.constexpr, TERMS: tl.constexpr, KIND: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """out [N, K] = the merged weights of a variant, as bits; one tile [BN, 8 BG] per program."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1) * BG
    total = _rebuilt(weight, terms, variant, n, first, N, K, TERMS, KIND, BN, BG)
    k = first * 8 + tl.arange(0, BG * 8)
    at = out + n[:, None].to(tl.int64) * K + k[None, :]
    tl.store(at, narrow(total, KIND), mask=(n < N)[:, None] & (k < K)[None, :])
