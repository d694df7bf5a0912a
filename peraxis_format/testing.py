"""Hypothesis strategies for PXD content, to test code that reads, writes or transforms deltas.

    from hypothesis import given
    from peraxis_format.testing import deltas

    @given(deltas())
    def test_mine(delta): ...

This is the only module of the package that needs `hypothesis`. All content is valid by SPEC 3 to 5 and small; edge
values (zero, subnormal and largest scales, signed zeros, infinities and NaN in base weights, odd widths, resized first
dimensions) are frequent.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from peraxis_format.bits import pack_signs
from peraxis_format.delta import (
    EXPONENT_MAX,
    EXPONENT_MIN,
    Axis,
    BaseRef,
    Component,
    Encoding,
    ModuleDelta,
    kept_rows,
    scale_shapes,
)
from peraxis_format.dtypes import Array, DType
from peraxis_format.manifest import Calibration, Identity, Manifest, Producer
from peraxis_format.ops.exact import encode
from peraxis_format.writer import DeltaWriter

__all__ = [
    "Delta",
    "assets",
    "components",
    "deltas",
    "exact_modules",
    "exponents",
    "float_dtypes",
    "modules",
    "names",
    "pairs",
    "scales",
    "shapes",
    "signs",
    "storage_arrays",
    "texts",
]

_FLOATS = (DType.BF16, DType.F16, DType.F32)
_NAME = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in "/\\")
_F16_EDGES = (0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF)
_STEM = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """The content of a file, and the base tensors that it refers to.

    bases: module name -> storage array, for every module with a base.
    """

    modules: tuple[ModuleDelta, ...]
    bases: dict[str, Array]
    base: Identity
    fine_tuned: Identity
    producer: Producer
    calibration: Calibration | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    tied: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()
    assets: dict[str, bytes] = field(default_factory=dict)

    def write(self, path: str | os.PathLike[str]) -> Manifest:
        """Write the file; equal content gives equal bytes."""
        with DeltaWriter(
            path,
            base=self.base,
            fine_tuned=self.fine_tuned,
            producer=self.producer,
            calibration=self.calibration,
            metadata=self.metadata,
        ) as writer:
            for module in self.modules:
                writer.add(module)
            for name, alias in self.tied:
                writer.tie(name, alias)
            for name in self.dropped:
                writer.drop(name)
            for name, data in self.assets.items():
                writer.add_asset(name, data)
            return writer.finish()


def texts() -> st.SearchStrategy[str]:
    """Any Unicode text: controls, emoji and direction marks too, but no lone surrogates."""
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def names() -> st.SearchStrategy[str]:
    """Names by SPEC 3.5."""
    return st.text(_NAME, min_size=1, max_size=12).filter(lambda name: not name.startswith("__"))


def float_dtypes() -> st.SearchStrategy[DType]:
    """BF16, F16 or F32."""
    return st.sampled_from(_FLOATS)


def exponents() -> st.SearchStrategy[int]:
    """Exponents of a component, both ends included."""
    return st.integers(EXPONENT_MIN, EXPONENT_MAX)


def shapes(*, min_dims: int = 2, max_dims: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of a few weights; widths near a multiple of 8 are frequent."""
    widths = st.sampled_from((1, 3, 7, 8, 9, 16, 17)) | st.integers(1, 20)
    leading = st.lists(st.integers(1, 3), min_size=min_dims - 1, max_size=max_dims - 1)
    return st.builds(lambda first, last: (*first, last), leading, widths)


def storage_arrays(dtype: DType, shape: tuple[int, ...]) -> st.SearchStrategy[Array]:
    """Any bit patterns of a dtype as a storage array; infinities, NaN and signed zeros among the floats."""
    size = dtype.size_of(shape)

    def build(data: bytes) -> Array:
        raw = bytes(byte & 1 for byte in data) if dtype is DType.BOOL else data
        return np.frombuffer(raw, dtype=dtype.storage).reshape(dtype.storage_shape(shape))

    return st.binary(min_size=size, max_size=size).map(build)


def signs(covered: tuple[int, ...]) -> st.SearchStrategy[NDArray[np.bool_]]:
    """Signs of a covered shape; True is +1."""
    return hnp.arrays(np.bool_, covered)


def scales(shape: tuple[int, ...]) -> st.SearchStrategy[NDArray[np.float16]]:
    """Scales by SPEC 5.4: finite, no sign bit; zero, subnormals and the largest are frequent."""
    bits = st.sampled_from(_F16_EDGES) | st.integers(0, 0x7BFF)
    return hnp.arrays(np.uint16, shape, elements=bits).map(lambda array: array.view(np.float16))


@st.composite
def components(draw: st.DrawFn, covered: tuple[int, ...], axis: Axis | None = None) -> Component:
    """A component of a covered shape [..., d_out, d_in]."""
    axis = axis or draw(st.sampled_from(Axis))
    held = {name: draw(scales(shape)) for name, shape in scale_shapes(axis, covered).items()}
    return Component(axis=axis, exponent=draw(exponents()), mask=pack_signs(draw(signs(covered))), **held)


def _reference(array: Array, dtype: DType, shape: tuple[int, ...]) -> BaseRef:
    return BaseRef(dtype=dtype, shape=shape, sha256=hashlib.sha256(array.tobytes()).hexdigest())


def _whole(dtype: DType, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of whole bytes in every row."""
    return shape if dtype.fits(shape[-1:]) else (*shape[:-1], 4 * shape[-1])


@st.composite
def modules(
    draw: st.DrawFn, *, name: str = "weight", encoding: Encoding | None = None
) -> tuple[ModuleDelta, Array | None]:
    """A module, and its base tensor if it has one."""
    encoding = encoding or draw(st.sampled_from((Encoding.SIGN, Encoding.FULL, Encoding.SAME)))
    if encoding is Encoding.EXACT:
        return draw(exact_modules(name=name))
    if encoding is Encoding.FULL:
        dtype = draw(st.sampled_from(DType))
        shape = _whole(dtype, draw(shapes(min_dims=1)))
        full = draw(storage_arrays(dtype, shape))
        return ModuleDelta(name=name, shape=shape, dtype=dtype, encoding=encoding, full=full), None
    dtype, base_dtype = draw(float_dtypes()), draw(float_dtypes())
    if encoding is Encoding.SAME and draw(st.booleans()):
        dtype = base_dtype = draw(st.sampled_from(DType))
    shape = _whole(dtype, draw(shapes(min_dims=2 if encoding is Encoding.SIGN or dtype.is_packed else 1)))
    base_shape = (draw(st.integers(1, shape[0] + 2)), *shape[1:]) if draw(st.booleans()) else shape
    base = draw(storage_arrays(base_dtype, base_shape))
    kept = kept_rows(shape, base_shape)
    tail = draw(storage_arrays(dtype, (shape[0] - kept, *shape[1:]))) if kept < shape[0] else None
    count = draw(st.integers(1, 3)) if encoding is Encoding.SIGN else 0
    parts = tuple(draw(components((kept, *shape[1:]))) for _ in range(count))
    made = ModuleDelta(
        name=name,
        shape=shape,
        dtype=dtype,
        encoding=encoding,
        base=_reference(base, base_dtype, base_shape),
        components=parts,
        tail=tail,
    )
    return made, base


@st.composite
def pairs(draw: st.DrawFn, dtype: DType, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Two tensors of any bit patterns; few to all elements differ, by one step or by any number."""
    size = math.prod(shape)
    old = draw(storage_arrays(dtype, shape))
    new = old.copy().reshape(-1).view(f"u{dtype.itemsize}")
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    reach = 1 << draw(st.integers(0, 8 * dtype.itemsize - 1))
    chosen = random.random(size) < draw(st.sampled_from((0.002, 0.02, 0.3, 1.0)))
    new[chosen] += random.integers(-reach, reach + 1, size)[chosen].astype(new.dtype)
    return old, new.view(dtype.storage).reshape(shape)


@st.composite
def exact_modules(draw: st.DrawFn, *, name: str = "weight") -> tuple[ModuleDelta, Array]:
    """An `exact` module, and its base tensor."""
    dtype = draw(float_dtypes())
    shape = draw(shapes(min_dims=1))
    base_shape = (draw(st.integers(1, shape[0] + 2)), *shape[1:]) if draw(st.booleans()) else shape
    kept = min(shape[0], base_shape[0])
    base = draw(storage_arrays(dtype, base_shape)).copy()
    new = draw(storage_arrays(dtype, shape)).copy()
    old, new[:kept] = draw(pairs(dtype, (kept, *shape[1:])))
    base[:kept] = old
    if old.tobytes() == new[:kept].tobytes():
        new.reshape(-1).view(np.uint8)[0] ^= 1
    index, data = encode(old, new[:kept], dtype, prefer=draw(st.sampled_from(("size", "speed"))))
    made = ModuleDelta(
        name=name,
        shape=shape,
        dtype=dtype,
        encoding=Encoding.EXACT,
        base=_reference(base, dtype, base_shape),
        index=index,
        data=data,
        result=hashlib.sha256(new.tobytes()).hexdigest(),
        tail=new[kept:] if kept < shape[0] else None,
    )
    return made, base


def assets() -> st.SearchStrategy[dict[str, bytes]]:
    """Small files by SPEC 3.12, with names that are distinct in lower case."""
    suffix = st.sampled_from(("json", "txt", "model", "jinja", "tiktoken", "md"))
    path = st.builds(lambda stem, end: f"{stem}.{end}", st.text(_STEM, min_size=1, max_size=8), suffix)
    unique = st.lists(path, max_size=2, unique_by=str.lower)
    return unique.flatmap(
        lambda found: st.fixed_dictionaries({name: st.binary(min_size=1, max_size=90) for name in found})
    )


def _identities() -> st.SearchStrategy[Identity]:
    return st.builds(Identity, id=texts(), revision=st.none() | texts())


def _calibrations() -> st.SearchStrategy[Calibration]:
    count = st.integers(0, 2**53 - 1)
    digest = st.binary(min_size=32, max_size=32).map(lambda raw: f"sha256:{raw.hex()}")
    return st.builds(Calibration, digest=digest, samples=count, seed=count, sequence_length=count, source=texts())


@st.composite
def deltas(draw: st.DrawFn, *, max_modules: int = 3) -> Delta:
    """The content of a whole file."""
    unique = draw(st.lists(names(), min_size=1, max_size=max_modules + 3, unique=True))
    split = draw(st.integers(1, min(len(unique), max_modules)))
    drawn = [draw(modules(name=name)) for name in unique[:split]]
    rest = unique[split:]
    aliases = rest[: draw(st.integers(0, len(rest)))]
    return Delta(
        modules=tuple(module for module, _ in drawn),
        bases={module.name: base for module, base in drawn if base is not None},
        base=draw(_identities()),
        fine_tuned=draw(_identities()),
        producer=Producer(name=draw(texts()), version=draw(texts())),
        calibration=draw(st.none() | _calibrations()),
        metadata=draw(st.dictionaries(texts(), texts(), max_size=3)),
        tied=tuple((draw(st.sampled_from(unique[:split])), alias) for alias in aliases),
        dropped=tuple(rest[len(aliases) :]),
        assets=draw(assets()),
    )
