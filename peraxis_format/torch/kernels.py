"""Triton kernels: apply (base + masks -> weights), decode and prefill (many variants over one base).

A byte of a mask holds the signs of eight columns, so tiles are [rows, groups, 8]: a thread has 16 bytes of BF16 and one
byte of mask, and neither is loaded twice.

    sign        ((byte >> lane) & 1) ^ 1, moved to bit 31, xor into the scale
    F32 -> BF16 (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, NaN selected: integers only, since Triton's interpreter
                truncates in its cast; the same code is exact on both

Nothing depends on fused multiply-adds: size = row * col * 2^e is exact in binary32 (SPEC 6.1).

Records are int64 rows in device memory, so that one launch covers every module of a transfer:
    record   base address, out address, d_out, d_in, first tile, first term, terms, 0
    term     mask offset, row offset or -1, row stride (0: a scalar), col offset or -1, bits of 2^e
Offsets count from the transfer's buffer; addresses are those of live storage, which never moves.
"""

# Triton reads the annotations of a kernel: constants have one, the rest must have none.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

from typing import Final

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

__all__ = [
    "BF16", "COLUMNS", "F16", "F32", "RECORD", "ROWS", "TERM", "apply_kernel", "decode_kernel", "prefill_kernel",
]  # fmt: skip

RECORD: Final = 8
TERM: Final = 5
ROWS: Final = 8  # of a tile of the apply kernel
COLUMNS: Final = 1024
BF16: Final = 0
F16: Final = 1
F32: Final = 2

_BF16 = tl.constexpr(BF16)
_F16 = tl.constexpr(F16)
_F32 = tl.constexpr(F32)


@triton.jit
def _widen(values, KIND: tl.constexpr):
    """Storage bits -> binary32, exactly."""
    if KIND == _BF16:
        wide = (values.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif KIND == _F16:
        wide = values.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        wide = values.to(tl.float32, bitcast=True)
    return wide


@triton.jit
def _narrow(total, KIND: tl.constexpr):
    """binary32 -> storage bits, nearest-even; NaN becomes canonical (SPEC 6.1, 6.2)."""
    bits = total.to(tl.uint32, bitcast=True)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if KIND == _BF16:
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        stored = tl.where(nan, 0x7FC0, rounded).to(tl.uint16)
    elif KIND == _F16:
        half = total.to(tl.float16).to(tl.uint16, bitcast=True)
        stored = tl.where(nan, 0x7E00, half.to(tl.uint32)).to(tl.uint16)
    else:
        stored = tl.where(nan, 0x7FC00000, bits).to(tl.uint32)
    return stored


@triton.jit
def _flip(mask):
    """Bytes [a, b] -> [a, b, 8] uint32: the sign bit where the weight's sign is -1."""
    lane = tl.arange(0, 8)[None, None, :].to(tl.uint32)
    return (((mask[:, :, None].to(tl.uint32) >> lane) & 1) ^ 1) << 31


@triton.jit
def _add_term(
    total, buffer, term, rows, groups, d_out, d_in,
    GROUPS: tl.constexpr, ROWS_: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """total [rows, groups, 8] + one component (SPEC 5.3)."""
    width = (d_in + 7) // 8
    columns = groups[:, None] * 8 + tl.arange(0, 8)[None, :]
    mask_at = buffer + tl.load(term)
    if ALIGNED:
        mask_at = tl.multiple_of(mask_at, 16)
    mask = tl.load(
        mask_at + rows[:, None].to(tl.int64) * width + groups[None, :],
        mask=(rows[:, None] < d_out) & (groups[None, :] < width),
        other=0,
    )
    row_at, row_stride, col_at = tl.load(term + 1), tl.load(term + 2), tl.load(term + 3)
    scale = tl.zeros((ROWS_,), tl.float32) + tl.load(term + 4).to(tl.int32).to(tl.float32, bitcast=True)
    if row_at >= 0:
        at = (buffer + row_at).to(tl.pointer_type(tl.float16))
        scale *= tl.load(at + rows * row_stride, mask=rows < d_out, other=0).to(tl.float32)
    column = tl.full((GROUPS, 8), 1.0, tl.float32)
    if col_at >= 0:
        at = (buffer + col_at).to(tl.pointer_type(tl.float16))
        column = tl.load(at + columns, mask=columns < d_in, other=0).to(tl.float32)
    size = (scale[:, None, None] * column[None, :, :]).to(tl.uint32, bitcast=True)
    return total + (size ^ _flip(mask)).to(tl.float32, bitcast=True)


@triton.jit
def apply_kernel(
    tiles, records, terms, buffer,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, ROWS_: tl.constexpr, COLUMNS_: tl.constexpr,
):  # fmt: skip
    """One tile [ROWS, COLUMNS] of one module: out = round(base + sum of terms) (SPEC 6.1).

    tiles: int32 [programs], the record of each program. ALIGNED: d_in of every record is a multiple of 8, and base and
    out begin at multiples of 16.
    """
    GROUPS: tl.constexpr = COLUMNS_ // 8
    program = tl.program_id(0)
    record = records + tl.load(tiles + program).to(tl.int64) * 8
    base_at, out_at = tl.load(record), tl.load(record + 1)
    d_out, d_in = tl.load(record + 2).to(tl.int32), tl.load(record + 3).to(tl.int32)
    if KIND != _F32:
        base, out = base_at.to(tl.pointer_type(tl.uint16)), out_at.to(tl.pointer_type(tl.uint16))
    else:
        base, out = base_at.to(tl.pointer_type(tl.uint32)), out_at.to(tl.pointer_type(tl.uint32))
    if ALIGNED:
        base, out = tl.multiple_of(base, 16), tl.multiple_of(out, 16)
        d_in = tl.multiple_of(d_in, 8)
    tile = program - tl.load(record + 4).to(tl.int32)
    across = tl.cdiv(d_in, COLUMNS_)
    rows = (tile // across) * ROWS_ + tl.arange(0, ROWS_)
    groups = (tile % across) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * 8 + tl.arange(0, 8)[None, :]
    if ALIGNED:
        # The eight columns of a group are inside together: one predicate for one 16-byte access.
        inside = (rows < d_out)[:, None, None] & (groups < d_in // 8)[None, :, None]
        inside = tl.broadcast_to(inside, (ROWS_, GROUPS, 8))
    else:
        inside = (rows < d_out)[:, None, None] & (columns < d_in)[None, :, :]
    at = (rows.to(tl.int64) * d_in)[:, None, None] + columns[None, :, :]
    total = _widen(tl.load(base + at, mask=inside, other=0), KIND)
    # A `while`: the interpreter's range() does not take loaded numbers.
    term = terms + tl.load(record + 5) * 5
    left = tl.load(record + 6)
    while left > 0:
        total = _add_term(total, buffer, term, rows, groups, d_out, d_in, GROUPS, ROWS_, ALIGNED)
        term += 5
        left -= 1
    tl.store(out + at, _narrow(total, KIND), mask=inside)


# --- many variants over one base -----------------------------------------------------------------------
#
# Rows of x are sorted by variant and cut into tiles of one variant each:
#     order    int32 [M], row of x in sorted order          tiles   int32 [tiles, 3]: variant (-1: base), first, count
#     heads    int32 [variants + 1]: a variant's terms are heads[v] .. heads[v + 1], at most TERMS
#     terms    int64 [terms, 3]: addresses of mask (U8 [N, ceil(K/8)]), row (F32 [N], 2^e folded in), col (F32 [K])
# K is a constant of the weights, so that the loop over it is a plain pipelined loop; M never is.


@triton.jit
def _mask_bytes(term, n, byte, active, N, K: tl.constexpr):
    """uint8 [n, byte] of one component's mask."""
    WIDTH: tl.constexpr = (K + 7) // 8
    at = tl.load(term, mask=active, other=0).to(tl.pointer_type(tl.uint8))
    inside = (n < N)[:, None] & (byte < WIDTH)[None, :] & active
    return tl.load(at + n[:, None].to(tl.int64) * WIDTH + byte[None, :], mask=inside, other=0)


@triton.jit
def _vector(term, index, inside, active):
    """A row or col vector of one component, F32; zeros where the component is not there."""
    at = tl.load(term, mask=active, other=0).to(tl.pointer_type(tl.float32))
    return tl.load(at + index, mask=inside & active, other=0.0)


@triton.jit
def decode_kernel(
    y, stride, x, order, tiles, heads, terms, N,
    K: tl.constexpr, TERMS: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y += sum over k of row_k o ((x o col_k) B_k^T) for one tile of rows and BN outputs; y: [M, N] bits, rows
    `stride` apart; x: [M, K] bits.

    The sum is binary32, rounded once onto y. With PRECISION tf32, x o col keeps 11 bits; signs are exact.
    """
    tile = tiles + tl.program_id(1) * 3
    variant, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    member = tl.arange(0, BM)
    row = tl.load(order + first + member, mask=member < count, other=0).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    begin, end = tl.load(heads + variant), tl.load(heads + variant + 1)
    total = tl.zeros((BM, BN), tl.float32)
    for t in tl.static_range(TERMS):
        active = begin + t < end
        term = terms + (begin + t) * 3
        part = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            inside = (member < count)[:, None] & (k < K)[None, :] & active
            values = _widen(tl.load(x + row[:, None] * K + k[None, :], mask=inside, other=0), KIND)
            weighted = values * _vector(term + 2, k, k < K, active)[None, :]
            mask = _mask_bytes(term, n, start // 8 + tl.arange(0, BK // 8), active, N, K)
            # 1.0 with the sign bit of the mask: columns beyond K meet a zero of x.
            signs = (_flip(mask) | 0x3F800000).to(tl.float32, bitcast=True)
            part = tl.dot(weighted, tl.trans(tl.reshape(signs, (BN, BK))), part, input_precision=PRECISION)
        total += part * _vector(term + 1, n, n < N, active)[None, :]
    at = row[:, None] * stride + n[None, :]
    written = (member < count)[:, None] & (n < N)[None, :]
    before = _widen(tl.load(y + at, mask=written, other=0), KIND)
    tl.store(y + at, _narrow(before + total, KIND), mask=written)


@triton.jit
def prefill_kernel(
    y, stride, x, weight, bias, order, tiles, heads, terms, N,
    K: tl.constexpr, TERMS: tl.constexpr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y = x W_v^T + bias with W_v = round(W + terms) rebuilt tile by tile: the values of the merged weights.

    UPCAST: multiply in binary32 (the interpreter has no BF16 product; F32 weights); products are the same.
    """
    tile = tiles + tl.program_id(1) * 3
    variant, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    begin = tl.load(heads + variant, mask=variant >= 0, other=0)
    end = tl.load(heads + variant + 1, mask=variant >= 0, other=0)
    member = tl.arange(0, BM)
    row = tl.load(order + first + member, mask=member < count, other=0).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        values = tl.load(x + row[:, None] * K + k[None, :], mask=(member < count)[:, None] & (k < K)[None, :], other=0)
        at = weight + n[:, None].to(tl.int64) * K + k[None, :]
        rebuilt = _widen(tl.load(at, mask=(n < N)[:, None] & (k < K)[None, :], other=0), KIND)
        for t in tl.static_range(TERMS):
            active = begin + t < end
            term = terms + (begin + t) * 3
            mask = _mask_bytes(term, n, start // 8 + tl.arange(0, BK // 8), active, N, K)
            scale, column = _vector(term + 1, n, n < N, active), _vector(term + 2, k, k < K, active)
            # A component that is not there adds a zero, which at most turns a -0 of the base into +0.
            size = (scale[:, None] * column[None, :]).to(tl.uint32, bitcast=True)
            rebuilt += (size ^ tl.reshape(_flip(mask), (BN, BK))).to(tl.float32, bitcast=True)
        bits = _narrow(rebuilt, KIND)
        if UPCAST:
            acc = tl.dot(_widen(values, KIND), tl.trans(_widen(bits, KIND)), acc, input_precision="ieee")
        elif KIND == _BF16:
            acc = tl.dot(values.to(tl.bfloat16, bitcast=True), tl.trans(bits.to(tl.bfloat16, bitcast=True)), acc)
        else:
            acc = tl.dot(values.to(tl.float16, bitcast=True), tl.trans(bits.to(tl.float16, bitcast=True)), acc)
    if HAS_BIAS:
        acc += _widen(tl.load(bias + n, mask=n < N, other=0), KIND)[None, :]
    at = row[:, None] * stride + n[None, :]
    tl.store(y + at, _narrow(acc, KIND), mask=(member < count)[:, None] & (n < N)[None, :])
