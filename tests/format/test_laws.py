"""Laws of the format, each for any content from the strategies of peraxis_format.testing."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from peraxis_conformance.generator import oracle

import peraxis_format as pxd
from peraxis_format.testing import (
    Delta,
    deltas,
    exponents,
    float_dtypes,
    modules,
    scales,
    shapes,
    signs,
    storage_arrays,
    texts,
)

_COUNTER = itertools.count()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as made:
        yield Path(made)


def fresh(folder: Path) -> Path:
    return folder / f"{next(_COUNTER)}.pxd"


def same_module(a: pxd.ModuleDelta, b: pxd.ModuleDelta) -> bool:
    """Whether two modules are equal bit for bit."""
    fields = ("name", "shape", "dtype", "encoding", "base")
    held_a, held_b = dict(a.tensors()), dict(b.tensors())
    return (
        all(getattr(a, name) == getattr(b, name) for name in fields)
        and [(c.axis, c.exponent) for c in a.components] == [(c.axis, c.exponent) for c in b.components]
        and list(held_a) == list(held_b)
        and all(
            held_a[name].shape == held_b[name].shape and held_a[name].tobytes() == held_b[name].tobytes()
            for name in held_a
        )
    )


# --- bits and numbers ------------------------------------------------------------------------------------


@given(shapes().flatmap(signs))
def test_unpacking_a_packed_mask_gives_the_signs_back(given_signs: np.ndarray) -> None:
    mask = pxd.pack_signs(given_signs)
    assert mask.shape == (*given_signs.shape[:-1], -(-given_signs.shape[-1] // 8))
    assert np.array_equal(pxd.unpack_signs(mask, given_signs.shape[-1]), given_signs)


@given(shapes().flatmap(signs))
def test_the_bits_beyond_the_width_are_zero(given_signs: np.ndarray) -> None:
    width = given_signs.shape[-1]
    last = pxd.pack_signs(given_signs)[..., -1]
    assert width % 8 == 0 or not np.any(last >> (width % 8))


@given(st.data(), float_dtypes())
def test_a_number_that_is_widened_and_narrowed_is_the_same_but_for_nan(data: st.DataObject, dtype: pxd.DType) -> None:
    array = data.draw(storage_arrays(dtype, (9,)))
    wide = pxd.to_float32(array, dtype)
    back = pxd.from_float32(wide, dtype)
    finite = ~np.isnan(wide)
    assert np.array_equal(back.view(f"u{dtype.itemsize}")[finite], array.view(f"u{dtype.itemsize}")[finite])
    assert {int(bits) for bits in back.view(f"u{dtype.itemsize}")[~finite]} <= {oracle.encode(oracle.NAN, dtype.value)}


@given(hnp.arrays(np.uint32, (16,)), float_dtypes())
def test_narrowing_rounds_as_the_integer_oracle_does(bits: np.ndarray, dtype: pxd.DType) -> None:
    ours = pxd.from_float32(bits.view(np.float32), dtype).view(f"u{dtype.itemsize}")
    assert [int(x) for x in ours] == [oracle.encode(oracle.decode(int(b), "F32"), dtype.value) for b in bits]


@given(hnp.arrays(np.float64, (7,), elements=st.floats(0, 2.0**60, allow_subnormal=False)))
def test_encoded_scales_keep_eleven_bits_of_what_is_near_the_largest(values: np.ndarray) -> None:
    array, exponent = pxd.encode_scales(values)
    back = np.ldexp(array.astype(np.float64), exponent)
    assert not np.any(np.signbit(array))
    assert np.all(np.isfinite(array))
    near = (values > values.max() * 2.0**-28) & (values > 2.0**-70)
    assert np.all(np.abs(back - values)[near] <= values[near] * 2.0**-11)


@given(st.floats(0, 1e300), st.floats(0, 1e300))
def test_scales_are_finite_in_f16_or_refused(row: float, col: float) -> None:
    rows, cols = np.array([row]), np.array([col])
    try:
        row16, col16, exponent = pxd.encode_scale_pair(rows, cols)
    except pxd.ShapeError:
        assert max(row, col) >= 2.0**78 or math.log2(row) + math.log2(col) >= 91
        return
    assert np.all(np.isfinite(row16))
    assert np.all(np.isfinite(col16))
    assert pxd.EXPONENT_MIN <= exponent <= pxd.EXPONENT_MAX


def depth(value: object) -> int:
    """Return the nesting depth of arrays and objects."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


# --- manifest and container ------------------------------------------------------------------------------


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | texts(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_canonical_json_is_read_back_and_written_the_same(value: object) -> None:
    text = pxd.canonical_json({"value": value})
    assume(depth({"value": value}) <= 8)
    again = pxd.parse_strict_json(text)
    assert again == {"value": value}
    assert pxd.canonical_json(again) == text


@settings(max_examples=60)
@given(delta=deltas())
def test_a_manifest_that_was_written_is_read_back(folder: Path, delta: Delta) -> None:
    path = fresh(folder)
    written = delta.write(path)
    with pxd.open(path) as opened:
        assert opened.manifest == written
        assert opened.content_id.startswith("sha256:")
        assert [m.name for m in opened.manifest.modules] == [m.name for m in delta.modules]
        assert dict(opened.manifest.metadata) == delta.metadata
    path.unlink()


@settings(max_examples=60)
@given(delta=deltas())
def test_what_is_written_verifies_and_is_read_back_to_the_bit(folder: Path, delta: Delta) -> None:
    path = fresh(folder)
    delta.write(path)
    with pxd.open(path) as opened:
        opened.verify(workers=1)
        assert list(opened) == [module.name for module in delta.modules]
        assert all(same_module(opened.load(module.name), module) for module in delta.modules)
        assert all(same_module(opened[module.name], module) for module in delta.modules)
        assert {name: opened.asset(name) for name in delta.assets} == delta.assets
    path.unlink()


@settings(max_examples=60)
@given(delta=deltas())
def test_writing_what_was_read_gives_the_same_file(folder: Path, delta: Delta) -> None:
    first, second = fresh(folder), fresh(folder)
    delta.write(first)
    with pxd.open(first) as opened:
        said = opened.manifest
        again = Delta(
            modules=tuple(opened.load(name) for name in opened),
            bases={},
            base=pxd.Identity(id=said.base.id, revision=said.base.revision),
            fine_tuned=said.fine_tuned,
            producer=said.producer,
            calibration=said.calibration,
            metadata=dict(said.metadata),
            tied=tuple(reversed(said.tied)),
            dropped=tuple(reversed(said.dropped)),
            assets={asset.path: opened.asset(asset.path) for asset in said.assets},
        )
    again.write(second)
    assert first.read_bytes() == second.read_bytes()
    first.unlink()
    second.unlink()


@settings(max_examples=60)
@given(delta=deltas())
def test_the_rust_parser_finds_the_same_tensors(folder: Path, delta: Delta) -> None:
    path = fresh(folder)
    delta.write(path)
    data = path.read_bytes()
    theirs = dict(safetensors.deserialize(data))
    with pxd.open(path) as opened:
        ours = {
            r.name: (r.dtype.value, list(r.shape), data[opened.header_size + r.begin : opened.header_size + r.end])
            for r in opened.records
        }
    assert ours == {name: (held["dtype"], held["shape"], bytes(held["data"])) for name, held in theirs.items()}
    path.unlink()


@settings(max_examples=60)
@given(delta=deltas(), data=st.data())
def test_a_file_with_one_byte_changed_is_refused(folder: Path, delta: Delta, data: st.DataObject) -> None:
    """Every byte of a file is fixed by the canonical form of the header, by a digest, or because it is a pad.

    Free text of the manifest (ids, metadata) may change. The content ID then changes too.
    """
    path = fresh(folder)
    delta.write(path)
    with pxd.open(path) as opened:
        content_id = opened.content_id
    whole = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        with pxd.open(path) as opened:
            opened.verify(workers=1)
            assert opened.content_id != content_id
    except pxd.PxdError:
        pass
    path.unlink()


# --- arithmetic ------------------------------------------------------------------------------------------


def exact(module: pxd.ModuleDelta, base: np.ndarray, dtype: pxd.DType) -> list[int]:
    """Return the bits of the covered weights by SPEC 6.1, computed in integers."""
    covered = module.covered
    d_out, d_in = covered[-2:]
    held = base.view(f"u{dtype.itemsize}")[: module.kept].reshape(-1)
    parts = [
        (
            c,
            pxd.unpack_signs(c.mask, d_in).reshape(-1),
            {n: a.view(np.uint16).reshape(-1) for n, a in c.scales().items()},
        )
        for c in module.components
    ]
    made = []
    for index, bits in enumerate(held):
        row, j = divmod(index, d_in)
        at = {"row": row, "col": row // d_out * d_in + j, "scalar": 0}
        a = oracle.decode(int(bits), dtype.value)
        for component, sign, values in parts:
            term = oracle.Real("finite", 0, 1, component.exponent)
            for name, array in values.items():
                term = oracle.multiply(term, oracle.decode(int(array[at[name]]), "F16"))
            a = oracle.decode(oracle.encode(oracle.add(a, oracle.signed(term, int(sign[index]))), "F32"), "F32")
        made.append(oracle.encode(a, module.dtype.value))
    return made


@settings(max_examples=60)
@given(modules(encoding=pxd.Encoding.SIGN))
def test_apply_agrees_with_the_integer_oracle_to_the_bit(drawn: tuple[pxd.ModuleDelta, np.ndarray]) -> None:
    module, base = drawn
    assert module.base is not None
    weight = pxd.reconstruct(module, base)
    bits = weight.view(f"u{module.dtype.itemsize}")
    assert [int(x) for x in bits[: module.kept].reshape(-1)] == exact(module, base, module.base.dtype)
    if module.tail is not None:
        assert weight[module.kept :].tobytes() == module.tail.tobytes()


@settings(max_examples=60)
@given(st.data(), shapes(max_dims=3), st.lists(exponents().filter(lambda e: -20 <= e <= 3), min_size=1, max_size=3))
def test_apply_stays_within_the_roundings_of_a_float64_oracle(
    data: st.DataObject, shape: tuple[int, ...], drawn: list[int]
) -> None:
    """|ours - float64| <= one F32 rounding per component of the largest partial sum."""
    base = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-8, 8, width=32)))
    given_signs = [data.draw(signs(shape)) for _ in drawn]
    rows = [data.draw(scales(shape[:-1])) for _ in drawn]
    reference = pxd.BaseRef(dtype=pxd.DType.F32, shape=shape, sha256="0" * 64)
    parts = tuple(
        pxd.Component(axis=pxd.Axis.ROW, exponent=e, mask=pxd.pack_signs(s), row=r)
        for e, s, r in zip(drawn, given_signs, rows, strict=True)
    )
    module = pxd.ModuleDelta(
        name="w", shape=shape, dtype=pxd.DType.F32, encoding=pxd.Encoding.SIGN, base=reference, components=parts
    )
    terms = [
        np.where(s, 1.0, -1.0) * np.ldexp(r.astype(np.float64), e)[..., None]
        for e, s, r in zip(drawn, given_signs, rows, strict=True)
    ]
    total = base.astype(np.float64) + sum(terms)
    size = np.abs(base.astype(np.float64)) + sum(np.abs(term) for term in terms)
    bound = len(drawn) * (size * 2.0**-24 + math.ldexp(1, -150))
    assert np.all(np.abs(pxd.reconstruct(module, base).astype(np.float64) - total) <= bound)


@settings(max_examples=60)
@given(modules(encoding=pxd.Encoding.SAME))
def test_a_same_module_of_equal_dtype_is_the_bytes_of_its_base(drawn: tuple[pxd.ModuleDelta, np.ndarray]) -> None:
    module, base = drawn
    assert module.base is not None
    weight = pxd.reconstruct(module, base)
    assert weight.shape == module.dtype.storage_shape(module.shape)
    found = module.dtype.first_rows(weight, module.shape, module.kept)
    covered = module.base.dtype.first_rows(base, module.base.shape, module.kept)
    if module.base.dtype is module.dtype:
        assert found.tobytes() == covered.tobytes()
    else:
        wide = pxd.to_float32(covered, module.base.dtype)
        assert found.tobytes() == pxd.from_float32(wide, module.dtype).tobytes()
