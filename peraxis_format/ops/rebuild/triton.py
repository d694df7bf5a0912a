"""rebuild in Triton: base + masks -> weights. signed_matmul/triton.py serves many variants over one base.

A byte of a mask has the signs of eight columns: a thread has 16 bytes of BF16 and one byte of mask, and loads each
once. A warp reads 512 adjacent bytes.

    sign        ((byte >> lane) & 1) ^ 1, moved to bit 31, xor into the scale
    F32 -> BF16 (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, NaN selected: integers only, since Triton's interpreter
                truncates in its cast; the same code is exact on both

Fused multiply-adds change nothing, because size = row * col * 2^e is exact in binary32 (SPEC 6.1).

Records are int64 rows in device memory, so that one launch covers every module of a transfer:
    record   base address, out address, d_out, d_in, first tile, first term, terms, 0
    term     mask offset, row offset or -1, row stride (0: a scalar), col offset or -1, bits of 2^e
Offsets count from the transfer's buffer; addresses are those of live storage, which never moves.
"""

# Triton reads the annotations of a kernel: constants have one, other arguments must have none.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from peraxis_format.bits import mask_width
from peraxis_format.delta import Axis
from peraxis_format.dtypes import DType
from peraxis_format.manifest import ComponentEntry

__all__ = [
    "BF16", "COLUMNS", "F16", "F32", "KINDS", "ROWS", "Launch", "StoredModule", "apply_kernel", "flip", "launches",
    "narrow", "widen",
]  # fmt: skip

ROWS: Final = 16  # rows of a tile of the apply kernel
COLUMNS: Final = 256
BF16: Final = 0
F16: Final = 1
F32: Final = 2
KINDS: Final = {DType.BF16: BF16, DType.F16: F16, DType.F32: F32}

_BF16 = tl.constexpr(BF16)
_F16 = tl.constexpr(F16)
_F32 = tl.constexpr(F32)


@triton.jit
def widen(values, KIND: tl.constexpr):
    """Storage bits -> binary32, exactly."""
    if KIND == _BF16:
        wide = (values.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif KIND == _F16:
        wide = values.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        wide = values.to(tl.float32, bitcast=True)
    return wide


@triton.jit
def narrow(total, KIND: tl.constexpr):
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
def flip(mask):
    """Bytes [a, b] -> [a, b, 8] uint32: the sign bit if the weight's sign is -1."""
    lane = tl.arange(0, 8)[None, None, :].to(tl.uint32)
    return (((mask[:, :, None].to(tl.uint32) >> lane) & 1) ^ 1) << 31


@triton.jit
def _term(
    buffer, term, rows, groups, columns, d_out, d_in,
    ROWS_: tl.constexpr, COLUMNS_: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One component (SPEC 5.3), F32 [rows, columns]."""
    width = (d_in + 7) // 8
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
    column = tl.full((COLUMNS_,), 1.0, tl.float32)
    if col_at >= 0:
        at = (buffer + col_at).to(tl.pointer_type(tl.float16))
        column = tl.load(at + columns, mask=columns < d_in, other=0).to(tl.float32)
    size = (scale[:, None] * column[None, :]).to(tl.uint32, bitcast=True)
    return (size ^ tl.reshape(flip(mask), (ROWS_, COLUMNS_))).to(tl.float32, bitcast=True)


@triton.jit
def apply_kernel(
    records, count, terms, buffer,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, ROWS_: tl.constexpr, COLUMNS_: tl.constexpr,
):  # fmt: skip
    """One tile [ROWS, COLUMNS] of one module: out = round(base + sum of terms) (SPEC 6.1).

    count: the number of records. ALIGNED: d_in of every record is a multiple of 8, and base and out begin at multiples
    of 16.
    """
    program = tl.program_id(0)
    # Find the last record that begins at this program or before it. A few reads of a table that all programs share
    # are faster than one read of a table of programs, which comes from memory each time.
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        begun = tl.load(records + middle * 8 + 4) <= program
        low, high = tl.where(begun, middle, low), tl.where(begun, high, middle)
    record = records + low * 8
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
    columns = (tile % across) * COLUMNS_ + tl.arange(0, COLUMNS_)
    groups = (tile % across) * (COLUMNS_ // 8) + tl.arange(0, COLUMNS_ // 8)
    # If d_in is a multiple of 8, one predicate serves the eight columns of a group, so one 16-byte access suffices.
    inside = (rows < d_out)[:, None] & (columns < d_in)[None, :]
    at = (rows.to(tl.int64) * d_in)[:, None] + columns[None, :]
    bits = tl.load(base + at, mask=inside, other=0)
    # The first component comes before the base is used, otherwise its loads would wait for those of the base.
    term = terms + tl.load(record + 5) * 5
    first = _term(buffer, term, rows, groups, columns, d_out, d_in, ROWS_, COLUMNS_, ALIGNED)
    total = widen(bits, KIND) + first
    # A `while` loop, because the interpreter's range() does not accept loaded numbers.
    left = tl.load(record + 6) - 1
    while left > 0:
        term += 5
        total += _term(buffer, term, rows, groups, columns, d_out, d_in, ROWS_, COLUMNS_, ALIGNED)
        left -= 1
    tl.store(out + at, narrow(total, KIND), mask=inside)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StoredModule:
    """A `sign` module in a transfer's buffer, its pristine base, and the storage that it is rebuilt into.

    offsets: those of its parts in the buffer, by suffix, multiples of 64. base, out: [..., d_out, d_in], contiguous.
    """

    components: tuple[ComponentEntry, ...]
    offsets: Mapping[str, int]
    base: Tensor
    out: Tensor
    dtype: DType


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """The tables of one launch, for all modules of a dtype and an alignment; on the device."""

    kind: int
    aligned: bool
    programs: int
    records: Tensor
    terms: Tensor

    def run(self, buffer: Tensor) -> None:
        """Launch the kernel that rebuilds the modules from a buffer with a transfer's bytes."""
        # Kernels are launched on the current device, so set it.
        current: Any = torch.cuda.device(buffer.device) if buffer.is_cuda else contextlib.nullcontext()
        with current:
            apply_kernel[(self.programs,)](
                self.records, len(self.records), self.terms, buffer, KIND=self.kind, ALIGNED=self.aligned, ROWS_=ROWS,
                COLUMNS_=COLUMNS, num_warps=8,
            )  # fmt: skip


def launches(modules: Sequence[StoredModule], device: torch.device) -> Iterator[Launch]:
    """The launches that rebuild these modules, one for each kind of module."""
    grouped: dict[tuple[int, bool], list[StoredModule]] = {}
    for module in modules:
        d_out, d_in = module.out.shape[-2:]
        aligned = d_in % 8 == 0 and module.base.data_ptr() % 16 == 0 and module.out.data_ptr() % 16 == 0
        # A mask begins at a multiple of 64 in the buffer; masks of later batch elements only if their size is a
        # multiple.
        aligned = aligned and (module.out.ndim == 2 or d_out * d_in % 128 == 0)
        grouped.setdefault((KINDS[module.dtype], aligned), []).append(module)
    for (kind, aligned), members in grouped.items():
        programs, *tables = _matrix_rows(members)
        yield Launch(
            kind, aligned, programs, *(torch.tensor(rows, dtype=torch.int64, device=device) for rows in tables)
        )


def _matrix_rows(modules: Sequence[StoredModule]) -> tuple[int, list[list[int]], list[list[int]]]:
    """The number of tiles, records and terms, with a record for each matrix (each batch element)."""
    records: list[list[int]] = []
    terms: list[list[int]] = []
    tiles = 0
    for module in modules:
        d_out, d_in = module.out.shape[-2:]
        size = d_out * d_in * module.base.element_size()
        for e in range(math.prod(module.out.shape[:-2])):
            base, out = module.base.data_ptr() + e * size, module.out.data_ptr() + e * size
            records.append([base, out, d_out, d_in, tiles, len(terms), len(module.components), 0])
            terms.extend(_term_rows(module, e))
            tiles += -(-d_out // ROWS) * -(-d_in // COLUMNS)
    return tiles, records, terms


def _term_rows(module: StoredModule, e: int) -> Iterator[list[int]]:
    d_out, d_in = module.out.shape[-2:]
    for k, component in enumerate(module.components):
        row, stride, col = -1, 0, -1
        if component.axis in (Axis.ROW, Axis.ROW_COL):
            row, stride = module.offsets[f"{k}.row"] + 2 * e * d_out, 1
        elif component.axis is Axis.TENSOR:
            row = module.offsets[f"{k}.scalar"]
        if component.axis in (Axis.COL, Axis.ROW_COL):
            col = module.offsets[f"{k}.col"] + 2 * e * d_in
        factor = int(np.float32(2.0**component.exponent).view(np.uint32))
        yield [module.offsets[f"{k}.mask"] + e * d_out * mask_width(d_in), row, stride, col, factor]
