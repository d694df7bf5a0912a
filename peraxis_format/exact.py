"""Tensors of a lossless delta: `same`, `exact` or `full`, the encoding with the fewest bytes; and their changes."""

from __future__ import annotations

from typing import get_args

import numpy as np

from peraxis_format.arguments import check_choice, check_least
from peraxis_format.delta import BaseRef, Encoding, ModuleDelta
from peraxis_format.dtypes import Array, DType, digest_of, raw_bytes
from peraxis_format.ops.exact import Prefer, encode

__all__ = ["count_changed", "lossless_module"]


def lossless_module(
    name: str,
    new: Array,
    dtype: DType,
    *,
    shape: tuple[int, ...] | None = None,
    old: Array | None = None,
    base: BaseRef | None = None,
    prefer: Prefer = "size",
    threads: int | None = None,
) -> ModuleDelta:
    """The module that rebuilds `new` bit for bit.

    new: storage array. shape: the tensor's, if its storage array has another (F4, F6). old: the base's storage array,
    with base its reference, or neither. prefer: see ops.exact.encode. A base of another dtype or shape gives `full`,
    except one that differs only in the first dimension. Raises ArgumentError.
    """
    check_choice("prefer", prefer, get_args(Prefer))
    check_least("threads", threads, 1)
    shape = new.shape if shape is None else shape
    full = ModuleDelta(name=name, shape=shape, dtype=dtype, encoding=Encoding.FULL, base=base, full=new)
    if old is None or base is None or base.dtype is not dtype or len(shape) != len(base.shape):
        return full
    if shape[1:] != base.shape[1:]:
        return full
    kept = min(shape[0], base.shape[0]) if shape else 1
    covered, before = dtype.first_rows(new, shape, kept), dtype.first_rows(old, base.shape, kept)
    tail = dtype.rows_from(new, shape, kept) if shape and kept < shape[0] else None
    if raw_bytes(covered) == raw_bytes(before):
        return ModuleDelta(name=name, shape=shape, dtype=dtype, encoding=Encoding.SAME, base=base, tail=tail)
    if not dtype.is_float:
        return full
    index, data = encode(before, covered, dtype, prefer=prefer, threads=threads)
    if index.nbytes + data.nbytes >= covered.nbytes:
        return full
    return ModuleDelta(
        name=name,
        shape=shape,
        dtype=dtype,
        encoding=Encoding.EXACT,
        base=base,
        index=index,
        data=data,
        result=digest_of(new),
        tail=tail,
    )


def count_changed(old: Array, new: Array) -> int:
    """The number of elements of two storage arrays whose bits differ; all of them if shapes or dtypes differ."""
    if old.shape != new.shape or old.dtype != new.dtype:
        return int(new.size)
    width = f"u{old.dtype.itemsize}"
    return int(np.count_nonzero(old.reshape(-1).view(width) != new.reshape(-1).view(width)))
