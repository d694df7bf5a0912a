"""The wires of an exact update: ours, and those of other systems, written from their published descriptions.

int32        index and new value of each changed weight, 6 bytes (vLLM, verl, vime, prime-rl)
gaps + XOR   gaps between changed weights, XOR of old and new value, each under zstd 1 (NeMo-RL)
COO + zstd   int32 differences of indices beside new values, zstd 1 (PULSE)
XOR + zstd   XOR of the whole tensor, zstd 1 (slime, SkyRL)
keyed, gaps  the two modes of the encoding `exact` (SPEC 5.6 to 5.9)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Final, Literal

import numba
import numpy as np
from numpy.typing import NDArray

from peraxis_format.dtypes import DType
from peraxis_format.ops.exact import apply, encode

__all__ = ["MODES", "Wire", "Words", "bound", "ours", "peers"]

Words = NDArray[np.uint16]
MODES: Final[dict[str, Literal["size", "speed"]]] = {"keyed": "size", "gaps": "speed"}
ARROW: Any = import_module("pyarrow")
ZSTD: Any = ARROW.Codec("zstd", compression_level=1)


def _pool() -> Any:
    """A memory pool of Arrow that counts its own bytes."""
    return ARROW.proxy_memory_pool(ARROW.default_memory_pool())


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """One wire of an update. size: bytes. apply: writes it into weights, in place. pool: what it decompresses into."""

    name: str
    size: int
    apply: Callable[[Words], None]
    pool: Any = field(default_factory=_pool)


def ours(old: Words, new: Words, threads: int) -> Iterator[Wire]:
    """The two modes of exact updates."""
    for name, prefer in MODES.items():
        index, data = encode(old, new, DType.BF16, prefer=prefer, threads=threads)

        def run(weights: Words, index: Any = index, data: Any = data) -> None:
            apply(weights, index, data, DType.BF16, threads=threads)

        yield Wire(name=name, size=index.nbytes + data.nbytes, apply=run)


def peers(old: Words, new: Words) -> Iterator[Wire]:
    """The wires of other systems. Their loops run on one thread."""
    index = np.flatnonzero(old != new).astype(np.int32)
    values, xored = new[index], old ^ new
    steps = np.diff(index, prepend=-1) - 1
    short = steps.astype(np.uint16 if steps.max(initial=0) < 65536 else np.uint32)
    yield Wire(name="int32", size=6 * index.size, apply=lambda w: _scatter(w, index, values))
    yield _zstd("gaps + XOR", (short, xored[index]), lambda w, gaps, values: _scatter_gaps(w, gaps, values, True))
    yield _zstd("COO + zstd", (steps, values), lambda w, gaps, values: _scatter_gaps(w, gaps, values, False))
    yield _zstd("XOR + zstd", (xored,), _xor)


def bound(old: Words, new: Words) -> float:
    """Bytes: the entropy of the step given the exponent of the old weight."""

    def ordinal(u: Words) -> NDArray[np.int32]:
        wide = u.astype(np.int32)
        return np.where(wide & 0x8000, wide ^ 0xFFFF, wide ^ 0x8000)

    moved = np.flatnonzero(old != new)
    before, after = old[moved], new[moved]
    steps, exponents = ordinal(after) - ordinal(before), (before >> 7) & 255
    weights = np.bincount((old >> 7) & 255, minlength=256)
    bits = 0.0
    for e in np.unique(exponents):
        _, some = np.unique(steps[exponents == e], return_counts=True)
        counts = np.append(some, weights[e] - some.sum())
        counts = counts[counts > 0]
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
    return bits / 8


def _zstd(name: str, arrays: tuple[NDArray[Any], ...], write: Callable[..., None]) -> Wire:
    """A wire of compressed arrays. write: writes the decompressed arrays into weights."""
    packed = [(ZSTD.compress(array, asbytes=True), array.nbytes, array.dtype) for array in arrays]
    pool = _pool()

    def apply(weights: Words) -> None:
        buffers = (ZSTD.decompress(data, size, memory_pool=pool) for data, size, _ in packed)
        write(weights, *(np.frombuffer(b, dtype) for b, (_, _, dtype) in zip(buffers, packed, strict=True)))

    return Wire(name=name, size=sum(len(data) for data, _, _ in packed), apply=apply, pool=pool)


@numba.njit
def _scatter(weights: Any, index: Any, values: Any) -> None:
    for j in range(index.size):
        weights[index[j]] = values[j]


@numba.njit
def _scatter_gaps(weights: Any, gaps: Any, values: Any, xor: Any) -> None:
    place = -1
    for j in range(gaps.size):
        place += 1 + gaps[j]
        weights[place] = weights[place] ^ values[j] if xor else values[j]


@numba.njit
def _xor(weights: Any, other: Any) -> None:
    for i in range(weights.size):
        weights[i] ^= other[i]
