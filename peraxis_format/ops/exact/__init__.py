"""Exact updates (SPEC 5.6 to 5.9): the step from one tensor to another, bit for bit, in blocks of 65,536 weights.

    index, data = encode(old, new, DType.BF16)
    apply(weights, index, data, DType.BF16)         # changes weights from old to new

Backends: numpy (the reference), numba (blocks in parallel; the default if it is installed and the tensor is not small),
triton (torch.py; one program for each block).
"""

from __future__ import annotations

from typing import Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from peraxis_format.dtypes import Array, DType
from peraxis_format.errors import ShapeError, fail
from peraxis_format.ops.backend import choose
from peraxis_format.ops.exact import numpy as reference
from peraxis_format.ops.exact.kinds import BLOCK, RAW, FloatKind, block_bytes, blocks_of, kind_of

__all__ = ["BLOCK", "Prefer", "apply", "check", "encode", "refuse_block"]

Prefer = Literal["size", "speed"]


def _compiled(backend: str | None, weights: int) -> bool:
    return choose("exact", weights, backend=backend) == "numba"


def _words(array: Array, kind: FloatKind) -> Array:
    """A storage array as unsigned words, 1-D, sharing memory."""
    if not array.flags.c_contiguous:
        raise ShapeError("exact updates need C-contiguous arrays")
    return array.reshape(-1).view(f"u{kind.width // 8}")


def encode(
    old: Array, new: Array, dtype: DType, *, prefer: Prefer = "size", backend: str | None = None,
    threads: int | None = None,
) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:  # fmt: skip
    """The step from old to new: (index [blocks], data). data is empty if nothing changed.

    old, new: storage arrays of one shape and dtype (BF16, F16, F32). prefer: the fewest bytes, or the fastest decoding.
    The bytes do not depend on backend or threads. Raises ShapeError.
    """
    kind = kind_of(dtype)
    if old.shape != new.shape or old.dtype != dtype.storage or new.dtype != dtype.storage:
        raise ShapeError(
            f"{old.dtype} {list(old.shape)} and {new.dtype} {list(new.shape)} are not two {dtype.value} tensors"
        )
    before, after = _words(np.ascontiguousarray(old), kind), _words(np.ascontiguousarray(new), kind)
    if _compiled(backend, before.size):
        from peraxis_format.ops.exact import numba

        return numba.encode(before, after, kind, keyed=prefer == "size", threads=threads)
    index, parts = np.zeros(blocks_of(before.size), np.uint32), []
    for b in range(index.size):
        block = slice(b * BLOCK, (b + 1) * BLOCK)
        pair = before[block].astype(np.int64), after[block].astype(np.int64)
        mode, part = reference.encode_block(*pair, kind, keyed=prefer == "size")
        index[b] = len(part) << 8 | mode
        parts.append(part)
    return index, np.frombuffer(b"".join(parts), np.uint8)


def apply(
    weights: Array, index: NDArray[np.uint32], data: NDArray[np.uint8], dtype: DType, *,
    backend: str | None = None, threads: int | None = None, field: str | None = None, first: int = 0,
) -> None:  # fmt: skip
    """Change weights in place from old to new patterns.

    weights: a C-contiguous storage array, writable, any shape. index, data: the caller has called `check` on them.
    field: the tensor's name, for errors; first: the number of the first block, if the weights are a range of a tensor.
    Raises BindingError (E405) if the bits do not decode on these weights; their content is then undefined.
    """
    kind = kind_of(dtype)
    words = _words(weights, kind)
    if index.size != blocks_of(words.size) or int((index >> np.uint32(8)).sum(dtype=np.int64)) != data.size:
        raise ShapeError(f"an index of {index.size} blocks and {data.size} bytes do not fit {words.size} weights")
    if _compiled(backend, words.size):
        from peraxis_format.ops.exact import numba

        block = numba.apply(words, index, data, kind, threads=threads)
    else:
        block = _apply(words, index, data, kind)
    if block is not None:
        refuse_block(first + block, field)


def refuse_block(block: int, field: str | None) -> NoReturn:
    """Raise BindingError (E405) for a block that does not decode. field: the tensor's name."""
    fail("E405", f"block {block} does not decode on these weights", field=field)  # SPEC 7.4


def _apply(words: Array, index: NDArray[np.uint32], data: NDArray[np.uint8], kind: FloatKind) -> int | None:
    begin = 0
    for b, entry in enumerate(index.tolist()):
        block = slice(b * BLOCK, (b + 1) * BLOCK)
        part = data[begin : begin + (entry >> 8)]
        begin += entry >> 8
        try:
            words[block] = reference.decode_block(words[block].astype(np.int64), entry & 255, part, kind)
        except ValueError:
            return b
    return None


def check(index: NDArray[np.uint32], data: NDArray[np.uint8], weights: int, dtype: DType, *, field: str) -> None:
    """The checks that need no base (SPEC 5.7 to 5.9). Raises PayloadError (E307). field: that of the error."""
    kind = kind_of(dtype)
    if int((index >> np.uint32(8)).sum(dtype=np.int64)) != data.size:
        fail("E307", f"the index counts other than {data.size} bytes", field=field)  # SPEC 5.7
    modes, lengths = index & np.uint32(255), (index >> np.uint32(8)).astype(np.int64)
    raw = np.full(index.size, block_bytes(BLOCK, 0, kind), np.int64)
    raw[-1] = block_bytes(weights, index.size - 1, kind)
    wrong = np.where(modes == RAW, lengths != raw, (lengths >= raw) | ((modes > 0) & (lengths == 0)))
    if wrong.any():
        b = int(np.flatnonzero(wrong)[0])
        fail("E307", f"block {b}: mode {modes[b]} with {lengths[b]} bytes", field=field)  # SPEC 5.7
    ends = np.cumsum(lengths)
    for b in np.flatnonzero((modes != RAW) & (lengths > 0)).tolist():
        rule = reference.check_keyed if modes[b] else reference.check_gaps
        try:
            rule(data[ends[b] - lengths[b] : ends[b]], int(raw[b]) * 8 // kind.width, kind)
        except ValueError as error:
            clause = "5.8" if isinstance(error, reference.LayoutError) else "5.7"
            fail("E307", f"block {b}: its exceptions or gaps are malformed", clause=clause, field=field)
