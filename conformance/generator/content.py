"""The content of a file without its layout: modules, components, assets.

Signs are one byte a weight (0 or 1, row-major); scales are tuples of F16 bit patterns; exact tensors and base
tensors are raw little-endian bytes. `signs` and `words` give deterministic pseudo-random content.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "BITS",
    "Asset",
    "Base",
    "Component",
    "Content",
    "Module",
    "component",
    "full",
    "noise",
    "same",
    "scales",
    "sign",
    "signs",
    "words",
]

BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """The base tensor of a module. data: raw bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """One sign mask with its scales; signs cover [kept, *shape[1:]]."""

    axis: str
    exponent: int
    signs: bytes
    row: tuple[int, ...] = ()
    col: tuple[int, ...] = ()
    scalar: tuple[int, ...] = ()

    @property
    def scales(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The scale tensors in the order of SPEC 5.3."""
        named = (("row", self.row), ("col", self.col), ("scalar", self.scalar))
        return tuple((word, values) for word, values in named if values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """One named tensor of the fine-tuned checkpoint. exact: the bytes of `full` or of the tail.

    new, index, data: for an `exact` module, the new covered weights and the parts of SPEC 4.1.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    base: Base | None = None
    components: tuple[Component, ...] = ()
    exact: bytes = b""
    new: bytes = b""
    index: tuple[int, ...] = ()
    data: bytes = b""

    @property
    def covered(self) -> tuple[int, ...]:
        """[kept, *shape[1:]] of SPEC 3.10; the shape itself without a base."""
        if self.encoding == "full" or self.base is None or not self.shape or not self.base.shape:
            return self.shape
        return (min(self.shape[0], self.base.shape[0]), *self.shape[1:])

    @property
    def tail(self) -> tuple[int, ...] | None:
        """The tail's shape, or None."""
        rest = self.shape[0] - self.covered[0] if self.shape else 0
        return (rest, *self.shape[1:]) if rest else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Asset:
    path: str
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """A whole file. chained: whether it has a result without an exact module."""

    modules: tuple[Module, ...]
    tied: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()
    assets: tuple[Asset, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    base: tuple[str, str | None] = ("example/base", "0123abcd")
    fine_tuned: tuple[str, str | None] = ("example/fine-tuned", None)
    producer: tuple[str, str] = ("conformance", "1")
    calibration: dict[str, Any] | None = None
    chained: bool = False
    previous: str | None = None

    @property
    def features(self) -> list[str]:
        """The features that the content needs (SPEC 3.3)."""
        exact = self.chained or self.previous or any(module.encoding == "exact" for module in self.modules)
        return ["exact"] if exact else []


def noise(seed: str, count: int) -> bytes:
    """`count` bytes that depend on the seed alone."""
    blocks = (hashlib.sha256(f"{seed}/{i}".encode()).digest() for i in range(count // 32 + 1))
    return b"".join(blocks)[:count]


def signs(seed: str, shape: tuple[int, ...]) -> bytes:
    """One byte, 0 or 1, for each weight of `shape`."""
    return bytes(byte & 1 for byte in noise(f"signs {seed}", math.prod(shape)))


def words(values: tuple[int, ...] | list[int], size: int = 2) -> bytes:
    """Little-endian integers of `size` bytes."""
    return b"".join(value.to_bytes(size, "little") for value in values)


def scales(seed: str, count: int) -> tuple[int, ...]:
    """`count` positive normal F16 numbers between 2^-6 and 2^2."""
    raw = noise(f"scales {seed}", 2 * count)
    pairs = (raw[2 * i] | raw[2 * i + 1] << 8 for i in range(count))
    return tuple(((9 + (pair >> 10) % 8) << 10) | (pair & 0x3FF) for pair in pairs)


def component(seed: str, shape: tuple[int, ...], axis: str, exponent: int = 0, **given: Any) -> Component:
    """A component of pseudo-random signs and scales; `given` fixes signs, row, col or scalar."""
    rows, cols = math.prod(shape[:-1]), math.prod(shape[:-2]) * shape[-1]
    made: dict[str, Any] = {"signs": signs(seed, shape)}
    if axis in ("row", "row+col"):
        made["row"] = scales(f"{seed} row", rows)
    if axis in ("col", "row+col"):
        made["col"] = scales(f"{seed} col", cols)
    if axis == "tensor":
        made["scalar"] = scales(f"{seed} scalar", 1)
    return Component(axis=axis, exponent=exponent, **{**made, **given})


def weights(seed: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Finite base weights of magnitude 2^-5 to 2^-1 for float types, any bytes otherwise."""
    count = math.prod(shape)
    raw = noise(f"weights {seed}", count * BITS[dtype] // 8)
    if dtype not in ("F16", "BF16", "F32"):
        return bytes(byte & 1 for byte in raw) if dtype == "BOOL" else raw
    size, fraction, bias = BITS[dtype] // 8, {"F16": 10, "BF16": 7, "F32": 23}[dtype], 15 if dtype == "F16" else 127
    values = []
    for i in range(count):
        bits = int.from_bytes(raw[i * size : (i + 1) * size], "little")
        sign, exponent = bits >> (8 * size - 1), bias - 5 + (bits >> fraction) % 4
        values.append(sign << (8 * size - 1) | exponent << fraction | bits & ((1 << fraction) - 1))
    return words(values, size)


def sign(
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...] = ("row",),
    *,
    dtype: str = "BF16",
    base_dtype: str | None = None,
    base_rows: int | None = None,
    exponent: int = -3,
    components: tuple[Component, ...] | None = None,
    base: bytes | None = None,
) -> Module:
    """A `sign` module; base_rows sets the base's first dimension if it differs."""
    base_shape = (base_rows or shape[0], *shape[1:])
    held = Base(
        dtype=base_dtype or dtype,
        shape=base_shape,
        data=base if base is not None else weights(name, base_dtype or dtype, base_shape),
    )
    covered = (min(shape[0], base_shape[0]), *shape[1:])
    if components is None:
        components = tuple(component(f"{name} {k}", covered, axis, exponent - k) for k, axis in enumerate(axes))
    tail = (shape[0] - covered[0], *shape[1:])
    exact = weights(f"{name} tail", dtype, tail) if tail[0] else b""
    return Module(name=name, dtype=dtype, shape=shape, encoding="sign", base=held, components=components, exact=exact)


def full(
    name: str, shape: tuple[int, ...], *, dtype: str = "BF16", base: Base | None = None, exact: bytes | None = None
) -> Module:
    """A `full` module."""
    data = weights(f"{name} full", dtype, shape) if exact is None else exact
    return Module(name=name, dtype=dtype, shape=shape, encoding="full", base=base, exact=data)


def same(
    name: str,
    shape: tuple[int, ...],
    *,
    dtype: str = "BF16",
    base_dtype: str | None = None,
    base_rows: int | None = None,
    base: bytes | None = None,
) -> Module:
    """A `same` module, with a tail if the base has fewer rows."""
    base_shape = (base_rows or shape[0], *shape[1:]) if shape else ()
    data = weights(name, base_dtype or dtype, base_shape) if base is None else base
    held = Base(dtype=base_dtype or dtype, shape=base_shape, data=data)
    rest = shape[0] - base_shape[0] if shape else 0
    exact = weights(f"{name} tail", dtype, (rest, *shape[1:])) if rest > 0 else b""
    return Module(name=name, dtype=dtype, shape=shape, encoding="same", base=held, exact=exact)
