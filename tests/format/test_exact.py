"""Exact updates keep every bit pattern, all backends give the same bytes, and malformed data is refused."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import peraxis_format as pxd
from peraxis_format.delta import BaseRef, Encoding
from peraxis_format.dtypes import DType
from peraxis_format.errors import BindingError, PayloadError, PxdError, ShapeError
from peraxis_format.ops.exact import BLOCK, Prefer, apply, check, encode
from peraxis_format.ops.rebuild import reconstruct
from peraxis_format.testing import exact_modules, float_dtypes, pairs

BACKENDS: tuple[str, ...] = ("numpy", "numba")
PREFERENCES: tuple[Prefer, ...] = ("size", "speed")


def mixed(size: int, dtype: DType, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weights like those of a model, and a step in which small weights change more often than large ones."""
    random = np.random.default_rng(seed)
    old = (random.standard_normal(size) * 0.02).astype(np.float32)
    new = old + (random.standard_normal(size) * 3e-5).astype(np.float32)
    before, after = (pxd.from_float32(array, dtype) for array in (old, new))
    after.view(f"u{dtype.itemsize}")[::9973] ^= 1 << (8 * dtype.itemsize - 1)  # flips a few signs
    return before, after


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_decoded_is_what_was_encoded_whatever_the_backend(data: st.DataObject) -> None:
    dtype = data.draw(float_dtypes())
    old, new = data.draw(pairs(dtype, (data.draw(st.integers(1, 400)),)))
    prefer = data.draw(st.sampled_from(PREFERENCES))
    index, blocks = encode(old, new, dtype, prefer=prefer, backend="numpy")
    other = encode(old, new, dtype, prefer=prefer, backend="numba")
    assert index.tobytes() == other[0].tobytes()
    assert blocks.tobytes() == other[1].tobytes()
    check(index, blocks, old.size, dtype, field="x")
    for backend in BACKENDS:
        weights = old.copy()
        apply(weights, index, blocks, dtype, backend=backend)
        assert weights.tobytes() == new.tobytes()


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
@pytest.mark.parametrize("prefer", PREFERENCES)
def test_all_65536_patterns_survive_as_old_and_as_new(dtype: DType, prefer: Prefer) -> None:
    old = np.arange(65536, dtype=np.uint16)
    for step in (1, -1, 2, 37, 0x8000, 0x7FFF):
        new = (old + np.uint16(step & 0xFFFF)).astype(np.uint16)
        a, b = old.view(dtype.storage), new.view(dtype.storage)
        index, data = encode(a, b, dtype, prefer=prefer)
        for backend in BACKENDS:
            weights = a.copy()
            apply(weights, index, data, dtype, backend=backend)
            assert weights.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32])
def test_several_blocks_the_last_one_short_give_the_same_bytes_on_any_number_of_threads(dtype: DType) -> None:
    old, new = mixed(17 * BLOCK + 77, dtype, 1)
    one = encode(old, new, dtype, threads=1)
    two = encode(old, new, dtype, threads=2)
    assert one[0].tobytes() == two[0].tobytes()
    assert one[1].tobytes() == two[1].tobytes()
    modes = set((one[0] & 255).tolist())
    assert min(modes) > 0
    assert max(modes) < 255
    weights = old.copy()
    apply(weights, *one, dtype, threads=2)
    assert weights.tobytes() == new.tobytes()


def test_the_reference_reads_and_writes_whole_blocks_as_the_compiled_codec_does() -> None:
    old, new = mixed(BLOCK + 5, DType.BF16, 2)
    reference = encode(old, new, DType.BF16, backend="numpy")
    assert reference[1].tobytes() == encode(old, new, DType.BF16, backend="numba")[1].tobytes()
    weights = old.copy()
    apply(weights, *reference, DType.BF16, backend="numpy")
    assert weights.tobytes() == new.tobytes()


def test_a_step_of_the_smallest_kind_takes_less_than_a_byte_a_changed_weight() -> None:
    random = np.random.default_rng(3)
    old = pxd.from_float32((random.standard_normal(2 * BLOCK) * 0.02).astype(np.float32), DType.BF16)
    exact = (old.astype(np.uint32) << np.uint32(16)).view(np.float32)
    ulp = np.exp2(np.floor(np.log2(np.abs(exact) + 1e-30)) - 7)
    master = exact + (random.random(old.size) - 0.5) * ulp * 0.999
    new = pxd.from_float32((master + 1e-6 * random.standard_normal(old.size)).astype(np.float32), DType.BF16)
    index, data = encode(old, new, DType.BF16)
    changed = np.count_nonzero(old != new)
    assert 0.01 < changed / old.size < 0.06
    assert data.nbytes + index.nbytes < 0.85 * changed


def outcome(backend: str, weights: np.ndarray, index: np.ndarray, blocks: np.ndarray, dtype: DType) -> bytes | None:
    moved = weights.copy()
    try:
        apply(moved, index, blocks, dtype, backend=backend)
    except BindingError:
        return None
    return moved.tobytes()


@given(exact_modules(), st.data())
@settings(max_examples=60, deadline=None)
def test_both_backends_refuse_or_decode_alike_where_bits_are_flipped(
    made: tuple[pxd.ModuleDelta, np.ndarray], data: st.DataObject
) -> None:
    module, base = made
    assert module.index is not None
    assert module.data is not None
    raw = bytearray(module.index.tobytes() + module.data.tobytes())
    for bit in data.draw(st.lists(st.integers(0, 8 * len(raw) - 1), min_size=1, max_size=5)):
        raw[bit // 8] ^= 1 << (bit % 8)
    index = np.frombuffer(bytes(raw[: module.index.nbytes]), np.uint32)
    blocks = np.frombuffer(bytes(raw[module.index.nbytes :]), np.uint8)
    kept = base[: module.kept]
    try:
        check(index, blocks, kept.size, module.dtype, field="x")
    except PayloadError:
        return
    first, second = (outcome(backend, kept, index, blocks, module.dtype) for backend in BACKENDS)
    assert first == second


@given(exact_modules())
@settings(max_examples=40, deadline=None)
def test_an_exact_module_goes_through_a_file_and_is_rebuilt(
    tmp_path_factory: pytest.TempPathFactory, made: tuple[pxd.ModuleDelta, np.ndarray]
) -> None:
    module, base = made
    path = tmp_path_factory.mktemp("exact") / "delta.pxd"
    with pxd.DeltaWriter(path, base=pxd.Identity(id="a"), fine_tuned=pxd.Identity(id="b")) as writer:
        writer.add(module)
        manifest = writer.finish()
    assert manifest.features == ("exact",)
    assert manifest.result is not None
    with pxd.open(path) as delta:
        delta.verify()
        assert delta.manifest == manifest
        rebuilt = reconstruct(delta.load("weight"), base)
        assert hashlib.sha256(rebuilt.tobytes()).hexdigest() == module.result
    other = base.copy()
    other.reshape(-1).view(np.uint8)[0] ^= 1
    with contextlib.suppress(BindingError):  # a block of new patterns does not depend on the base
        wrong = reconstruct(module, other)
        assert hashlib.sha256(wrong.tobytes()).hexdigest() == module.result


def written(path: Path, module: pxd.ModuleDelta, **options: object) -> bytes:
    with pxd.DeltaWriter(path, base=pxd.Identity(id="a"), fine_tuned=pxd.Identity(id="b"), **options) as writer:  # type: ignore[arg-type]
        writer.add(module)
        writer.finish()
    return path.read_bytes()


def exact_module(size: int = 300, dtype: DType = DType.BF16) -> tuple[pxd.ModuleDelta, np.ndarray]:
    old, new = mixed(size, dtype, 4)
    base = BaseRef(dtype=dtype, shape=(size,), sha256=hashlib.sha256(old.tobytes()).hexdigest())
    module = pxd.lossless_module("w", new, dtype, old=old, base=base)
    assert module.encoding is Encoding.EXACT
    return module, old


def verify_and_apply(path: Path, base: np.ndarray) -> None:
    with pxd.open(path) as delta:
        delta.verify()
        pxd.check_base_bytes(delta.entry("w"), base)
        reconstruct(delta["w"], base)


def test_single_bit_flips_of_the_data_are_all_refused(tmp_path: Path) -> None:
    module, base = exact_module()
    good = written(tmp_path / "good.pxd", module)
    path = tmp_path / "bad.pxd"
    for bit in range(8 * (8 + int.from_bytes(good[:8], "little")), 8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bad)
        with pytest.raises(PxdError):
            verify_and_apply(path, base)


def replaced(good: bytes, old: bytes, new: bytes) -> bytes:
    """Return the file with other text of the same length in its manifest."""
    assert good.count(old) == 1
    assert len(old) == len(new)
    return good.replace(old, new)


def test_the_feature_is_what_allows_exact_modules_and_the_fields_of_a_chain(tmp_path: Path) -> None:
    module, _ = exact_module()
    good = written(tmp_path / "good.pxd", module, previous="sha256:" + "0" * 64)
    for old, new, code in [
        (b'\\"features\\":[\\"exact\\"]', b'\\"features\\":[\\"exakt\\"]', "E204"),
        (b'\\"features\\":[\\"exact\\"]', b'\\"features\\":[         ]', "E203"),
        (b'\\"previous\\":', b'\\"previouz\\":', "E205"),
        (b'\\"encoding\\":\\"exact\\"', b'\\"encoding\\":\\"exxct\\"', "E205"),
    ]:
        path = tmp_path / "bad.pxd"
        path.write_bytes(replaced(good, old, new))
        with pytest.raises(PxdError, match=code):
            pxd.open(path)


def test_a_result_that_does_not_follow_from_the_modules_is_refused(tmp_path: Path) -> None:
    module, _ = exact_module()
    good = written(tmp_path / "good.pxd", module)
    with pxd.open(tmp_path / "good.pxd") as delta:
        result = delta.manifest.result
    assert result is not None
    path = tmp_path / "bad.pxd"
    path.write_bytes(replaced(good, result.encode(), ("sha256:" + "0" * 64).encode()))
    with pytest.raises(PxdError, match="E214"):
        pxd.open(path)


def test_a_file_says_its_result_only_where_every_result_is_known(tmp_path: Path) -> None:
    module, base = exact_module()
    assert module.base is not None
    cast = pxd.ModuleDelta(name="cast", shape=module.shape, dtype=DType.F32, encoding=Encoding.SAME, base=module.base)
    with pxd.DeltaWriter(tmp_path / "a.pxd", base=pxd.Identity(id="a"), fine_tuned=pxd.Identity(id="b")) as writer:
        writer.add(module)
        writer.add(cast)
        assert writer.finish().result is None
    full = pxd.ModuleDelta(name="w", shape=base.shape, dtype=DType.BF16, encoding=Encoding.FULL, full=base)
    with pxd.DeltaWriter(
        tmp_path / "b.pxd", base=pxd.Identity(id="a"), fine_tuned=pxd.Identity(id="b"), chained=True
    ) as writer:
        writer.add(full)
        manifest = writer.finish()
    assert (manifest.features, manifest.previous) == (("exact",), None)
    assert manifest.result is not None


@pytest.mark.parametrize(
    ("entry", "data"),
    [
        (2 << 8 | 255, b"ab"),  # raw of another length
        (600 << 8 | 0, bytes(600)),  # as long as raw
        (0 << 8 | 7, b""),  # a mode without bytes
        (3 << 8 | 0, bytes(3)),  # gaps without their counts
        (4 << 8 | 0, b"\x01\x00\x00\x00"),  # a move without gap
        (8 << 8 | 0, b"\x01\x00\x00\x00\x02\x00\x00\x00"),  # an unused sign bit is set; one byte too many
        (8 << 8 | 0, b"\x00\x00\x01\x00\xff\xff\x00\x00"),  # an exception outside the block
        (2 << 8 | 9, b"\xff\xff"),  # a unary number without end
        (6 << 8 | 9, b"\x01\x00\x00\x00\xff\xff"),  # an exception outside the block
        (5 << 8 | 9, bytes(4)),  # more bytes than there are
    ],
)
def test_malformed_blocks_are_refused_without_the_base(entry: int, data: bytes) -> None:
    with pytest.raises(PayloadError, match="E307"):
        check(np.array([entry], np.uint32), np.frombuffer(data, np.uint8), 300, DType.BF16, field="w")


def test_arrays_that_are_no_pair_are_a_mistake_of_the_caller() -> None:
    old, new = mixed(10, DType.BF16, 6)
    with pytest.raises(ShapeError):
        encode(old, new[:9], DType.BF16)
    with pytest.raises(ShapeError):
        encode(old, new, DType.F32)
    with pytest.raises(ShapeError):
        encode(old, new, DType.I8)
    with pytest.raises(ShapeError):
        apply(old[::2], *encode(old, new, DType.BF16), DType.BF16)


def test_a_lossless_module_is_the_smallest_of_same_exact_and_full() -> None:
    module, old = exact_module()
    ref = module.base
    assert pxd.lossless_module("w", old, DType.BF16, old=old, base=ref).encoding is Encoding.SAME
    noise = np.random.default_rng(7).integers(0, 65536, old.size).astype(np.uint16)
    assert pxd.lossless_module("w", noise, DType.BF16, old=old, base=ref).encoding is Encoding.FULL
    assert pxd.lossless_module("w", old, DType.BF16).encoding is Encoding.FULL
    assert pxd.lossless_module("w", old.view(np.float16), DType.F16, old=old, base=ref).encoding is Encoding.FULL


@pytest.mark.parametrize(("last_run", "sound"), [(4, True), (3, False), (5, False)])
def test_the_last_run_reaches_behind_the_last_weight_and_no_further_than_it_need(last_run: int, sound: bool) -> None:
    old = np.full(8, 0x3F80, np.uint16)  # exponent 127: class 1 of mode 127, so 8 weights take 8 * 2^14 = 4 * 2^15
    bits = "0" + "1" * last_run + "0"  # no exceptions, then the run; no fields
    data = np.packbits([int(bit) for bit in bits.ljust(8, "0")], bitorder="little")
    index = np.array([data.size << 8 | 127], np.uint32)
    check(index, data, old.size, DType.BF16, field="w")
    found = {outcome(backend, old, index, data, DType.BF16) for backend in BACKENDS}
    assert found == {old.tobytes() if sound else None}


def test_a_last_run_that_is_saved_by_the_bits_behind_it_is_refused() -> None:
    # Mode 120: two weights of class 0 with k = 0, one of class 3, which a run of 0 does not reach by itself.
    old = np.array([119 << 7, 119 << 7, 122 << 7], np.uint16)
    for bits, sound in (("00111100", False), ("001111010", True)):
        data = np.packbits([int(bit) for bit in bits], bitorder="little")
        index = np.array([data.size << 8 | 120], np.uint32)
        check(index, data, old.size, DType.BF16, field="w")
        new = np.array([old[0], old[1] + 2, old[2]], np.uint16)
        assert {outcome(backend, old, index, data, DType.BF16) for backend in BACKENDS} == {
            new.tobytes() if sound else None
        }
