"""A module's delta in memory: components with their signs and scales, exact parts, and the base they refer to.

    W = base + sum over k of b_k * scale_k        b_k in {-1, +1}, scale_k by axis (SPEC 5.3)

A module with shape [R, ...] whose base has Rb rows covers kept = min(R, Rb) of them; rows beyond the base
are its tail, stored exactly (SPEC 3.10). Below, `covered` is [kept, ...] = [..., d_out, d_in].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from peraxis_format.bits import mask_width
from peraxis_format.dtypes import Array, DType
from peraxis_format.errors import ShapeError
from peraxis_format.ops.exact.kinds import blocks_of

__all__ = [
    "EXPONENT_MAX",
    "EXPONENT_MIN",
    "Axis",
    "BaseRef",
    "Component",
    "ComponentFactors",
    "Encoding",
    "ModuleDelta",
    "encode_scale_pair",
    "encode_scales",
    "kept_rows",
    "scale_factors",
    "scale_shapes",
    "tensor_shapes",
]

EXPONENT_MIN: Final = -64
EXPONENT_MAX: Final = 63
# Scales are moved so that the largest lies in [2^14, 2^15): F16 keeps 11 bits down to 2^-14, 28 octaves below.
_TOP: Final = 15
_OVERFLOW: Final = 65520.0  # the least number that F16 rounds to infinity


class Axis(Enum):
    """The axis of a component's scales (SPEC 5.3)."""

    ROW = "row"
    COL = "col"
    ROW_COL = "row+col"
    TENSOR = "tensor"


class Encoding(Enum):
    """The encoding of a module (SPEC 3.9)."""

    SIGN = "sign"
    FULL = "full"
    SAME = "same"
    EXACT = "exact"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRef:
    """The base tensor that a module refers to: dtype, shape, and the hex digest of its raw bytes."""

    dtype: DType
    shape: tuple[int, ...]
    sha256: str


def scale_shapes(axis: Axis, covered: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the scales of one component, in file order (SPEC 5.3). covered: [..., d_out, d_in]."""
    row, col = covered[:-1], (*covered[:-2], covered[-1])
    shapes: dict[Axis, dict[str, tuple[int, ...]]] = {
        Axis.ROW: {"row": row},
        Axis.COL: {"col": col},
        Axis.ROW_COL: {"row": row, "col": col},
        Axis.TENSOR: {"scalar": (1,)},
    }
    return shapes[axis]


def scale_factors(
    exponent: int, scales: Mapping[str, NDArray[np.float16]], covered: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Scales in binary32, so that |term| = row_i * col_j for every axis; all exact (SPEC 5.3, 6.1).

    scales: those of `row`, `col`, `scalar` that the component's axis has. Returns row [batch, d_out] with 2^e and the
    scalar folded in, and col [batch, d_in], None if it is all ones.
    """
    batch, d_out, d_in = math.prod(covered[:-2]), *covered[-2:]
    row = np.full((batch, d_out), 2.0**exponent, np.float32)
    if "row" in scales:
        row *= scales["row"].reshape(batch, d_out).astype(np.float32)
    if "scalar" in scales:
        row *= scales["scalar"].astype(np.float32)
    return row, scales["col"].reshape(batch, d_in).astype(np.float32) if "col" in scales else None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ComponentFactors:
    """One component of one matrix in binary32: term_ij = sign_ij * (row_i * col_j), exact (SPEC 5.3, 6.1).

    mask: U8 [d_out, ceil(d_in/8)]. row: F32 [d_out] with 2^e folded in. col: F32 [d_in]. plain: col is all ones.
    """

    mask: NDArray[np.uint8]
    row: NDArray[np.float32]
    col: NDArray[np.float32]
    plain: bool = False

    def part(self, rows: slice) -> ComponentFactors:
        """Some rows as a component, sharing memory."""
        return ComponentFactors(mask=self.mask[rows], row=self.row[rows], col=self.col, plain=self.plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One sign mask with its scales.

    mask: U8 [..., d_out, ceil(d_in/8)]. row: F16 [..., d_out]. col: F16 [..., d_in]. scalar: F16 [1].
    Exactly the scales of `axis` are set.
    """

    axis: Axis
    exponent: int
    mask: NDArray[np.uint8]
    row: NDArray[np.float16] | None = None
    col: NDArray[np.float16] | None = None
    scalar: NDArray[np.float16] | None = None

    def scales(self) -> dict[str, NDArray[np.float16]]:
        """The scale arrays that are set, by name, in file order."""
        named = {"row": self.row, "col": self.col, "scalar": self.scalar}
        return {name: array for name, array in named.items() if array is not None}

    def factors(self, covered: tuple[int, ...]) -> tuple[ComponentFactors, ...]:
        """The component of each matrix of covered [..., d_out, d_in], in row-major order of the batch (SPEC 5.3)."""
        row, col = scale_factors(self.exponent, self.scales(), covered)
        mask = self.mask.reshape(len(row), *self.mask.shape[-2:])
        ones = np.ones(covered[-1], np.float32)
        return tuple(
            ComponentFactors(mask=mask[e], row=row[e], col=ones if col is None else col[e], plain=col is None)
            for e in range(len(row))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleDelta:
    """One named tensor of the fine-tuned checkpoint in its encoding.

    shape, dtype: the fine-tuned tensor's. base: the base's tensor of the same name, None if it has none.
    components: of a `sign` module, 1 to 8. full: storage array of shape `shape`. index: U32 [blocks], data: U8, and
    result: hex digest of the whole new tensor, of an `exact` module (SPEC 5.6). tail: storage array
    [shape[0] - kept, ...] of a `sign`, `same` or `exact` module with more rows than its base.
    Raises ShapeError if the arrays do not follow SPEC 3.9 to 5.3.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    encoding: Encoding
    base: BaseRef | None = None
    components: tuple[Component, ...] = ()
    full: Array | None = None
    index: NDArray[np.uint32] | None = None
    data: NDArray[np.uint8] | None = None
    result: str | None = None
    tail: Array | None = None

    def __post_init__(self) -> None:
        expected = tensor_shapes(
            shape=self.shape,
            dtype=self.dtype,
            encoding=self.encoding,
            axes=tuple(component.axis for component in self.components),
            base_shape=None if self.base is None else self.base.shape,
            size=None if self.data is None else self.data.size,
        )
        if (self.encoding is Encoding.EXACT) != (self.result is not None):
            raise ShapeError(f"{self.name}: an exact module, and no other, must have a result digest")
        held = dict(self.tensors())
        if list(held) != [suffix for suffix, _, _ in expected]:
            wanted = [suffix for suffix, _, _ in expected]
            raise ShapeError(f"{self.name}: has {sorted(held)}, but its encoding needs {sorted(wanted)}")
        for suffix, dtype, shape in expected:
            array = held[suffix]
            if array.shape != dtype.storage_shape(shape) or array.dtype != dtype.storage or not dtype.fits(shape):
                raise ShapeError(
                    f"{self.name}.{suffix}: {array.dtype} {list(array.shape)} is not {dtype.value} {list(shape)}"
                )
        for component in self.components:
            if not EXPONENT_MIN <= component.exponent <= EXPONENT_MAX:
                raise ShapeError(
                    f"{self.name}: exponent {component.exponent} is not within {EXPONENT_MIN} and {EXPONENT_MAX}"
                )

    @property
    def kept(self) -> int:
        """The number of rows of the first dimension that the base covers."""
        return kept_rows(self.shape, None if self.base is None else self.base.shape)

    @property
    def covered(self) -> tuple[int, ...]:
        """The shape that the components cover: [kept, *shape[1:]]."""
        return (self.kept, *self.shape[1:]) if self.shape else ()

    def factors(self) -> list[list[ComponentFactors]]:
        """The components in order for each matrix of the batch; a `same` module has none."""
        each = [component.factors(self.covered) for component in self.components]
        return [[factors[e] for factors in each] for e in range(math.prod(self.covered[:-2]))]

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """The parts in file order, each with its suffix (SPEC 4.1)."""
        for k, component in enumerate(self.components):
            yield f"{k}.mask", component.mask
            for name, array in component.scales().items():
                yield f"{k}.{name}", array
        if self.full is not None:
            yield "full", self.full
        if self.index is not None:
            yield "index", self.index
        if self.data is not None:
            yield "data", self.data
        if self.tail is not None:
            yield "tail", self.tail


def kept_rows(shape: tuple[int, ...], base_shape: tuple[int, ...] | None) -> int:
    """The number of rows of the first dimension that the base covers (SPEC 3.10); 1 for a scalar."""
    if not shape:
        return 1
    return min(shape[0], base_shape[0]) if base_shape else shape[0]


def tensor_shapes(
    *,
    shape: tuple[int, ...],
    dtype: DType,
    encoding: Encoding,
    axes: tuple[Axis, ...],
    base_shape: tuple[int, ...] | None,
    size: int | None = None,
) -> list[tuple[str, DType, tuple[int, ...]]]:
    """Suffix, dtype and shape of each part of a module, in file order (SPEC 4.1).

    Reader, writer and size estimates share this function of the manifest entry. size: bytes of `exact` data.
    """
    if encoding is Encoding.FULL:
        return [("full", dtype, shape)]
    kept = kept_rows(shape, base_shape)
    covered = (kept, *shape[1:]) if shape else shape
    tensors: list[tuple[str, DType, tuple[int, ...]]] = []
    for k, axis in enumerate(axes):
        tensors.append((f"{k}.mask", DType.U8, (*covered[:-1], mask_width(covered[-1]))))
        tensors.extend((f"{k}.{name}", DType.F16, dims) for name, dims in scale_shapes(axis, covered).items())
    if encoding is Encoding.EXACT:
        tensors.append(("index", DType.U32, (blocks_of(math.prod(covered)),)))
        tensors.append(("data", DType.U8, (size or 0,)))
    if shape and kept < shape[0]:
        tensors.append(("tail", dtype, (shape[0] - kept, *shape[1:])))
    return tensors


def _exponent(largest: float) -> int:
    """The power of two that moves `largest` into [2^14, 2^15); 0 for 0."""
    return math.frexp(largest)[1] - _TOP if largest > 0 else 0


def encode_scales(scales: NDArray[np.floating]) -> tuple[NDArray[np.float16], int]:
    """Round scales to F16 under one exponent that uses F16's full precision (SPEC 5.5).

    scales: any shape, finite, >= 0. Returns (F16 array, e) with scales ~ array * 2^e, relative error at most
    2^-11 for scales within 2^28 of the largest. Raises ShapeError for scales that are negative, not finite or too large
    for F16 and exponent (6e23).
    """
    values = np.asarray(scales, dtype=np.float64)
    if not np.all(np.isfinite(values)) or np.any(values < 0):
        raise ShapeError("scales must be finite and not negative; fold a negative fit into the signs")
    exponent = min(max(_exponent(float(values.max(initial=0.0))), EXPONENT_MIN), EXPONENT_MAX)
    # + 0.0 turns -0 into +0 (SPEC 5.4).
    return _to_f16(np.ldexp(values, -exponent)) + np.float16(0.0), exponent


def _to_f16(scales: NDArray[np.float64]) -> NDArray[np.float16]:
    if float(scales.max(initial=0.0)) >= _OVERFLOW:
        raise ShapeError(f"a scale is too large for F16 and an exponent of {EXPONENT_MAX}")
    return scales.astype(np.float16)


def encode_scale_pair(
    row: NDArray[np.floating], col: NDArray[np.floating]
) -> tuple[NDArray[np.float16], NDArray[np.float16], int]:
    """Round the two scale vectors of a row+col component under one exponent.

    Each vector is scaled into F16's range by its own power of two; the component's exponent is their sum.
    Returns (row, col, e) with row_i * col_j ~ row16_i * col16_j * 2^e. Raises ShapeError as encode_scales does.
    """
    row16, row_exponent = encode_scales(row)
    col16, col_exponent = encode_scales(col)
    exponent = row_exponent + col_exponent
    clamped = min(max(exponent, EXPONENT_MIN), EXPONENT_MAX)
    if clamped != exponent:
        # If the sum is out of the exponent's range, the excess goes back into the rows.
        row16 = _to_f16(np.ldexp(row16.astype(np.float64), exponent - clamped))
    return row16, col16, clamped
