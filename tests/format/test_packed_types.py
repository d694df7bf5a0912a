"""The library accepts every type of safetensors, including carried types and elements smaller than a byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors

import peraxis_format as pxd
from peraxis_format import DType

PACKED = [dtype for dtype in DType if dtype.is_packed]
SHAPES = ((1,), (2,), (3,), (4,), (6,), (3, 3), (4, 3), (3, 4), (2, 1, 2), (1, 1), ())


def file_of(dtype: str, shape: tuple[int, ...], size: int) -> bytes:
    record = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({"w": record}, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + bytes(range(1, size + 1))


def taken_by_safetensors(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tensor_has_the_bytes_that_safetensors_gives_it(tmp_path: Path, dtype: DType, shape: tuple[int, ...]) -> None:
    path = tmp_path / "model.safetensors"
    for size in sorted({dtype.size_of(shape), dtype.size_of(shape) - 1, dtype.size_of(shape) + 1} - {0, -1}):
        data = file_of(dtype.value, shape, size)
        path.write_bytes(data)
        taken = taken_by_safetensors(data)
        assert taken == (dtype.fits(shape) and size == dtype.size_of(shape))
        if not taken:
            with pytest.raises(pxd.CheckpointError):
                pxd.Safetensors.open(path)
            continue
        with pxd.Safetensors.open(path) as tensors:
            array = tensors.read("w")
            assert array.shape == dtype.storage_shape(shape)
            assert bytes(pxd.raw_bytes(array)) == bytes(range(1, size + 1))


def test_every_type_of_safetensors_is_carried() -> None:
    """The names come from the error of safetensors about an unknown type."""
    with pytest.raises(safetensors.SafetensorError) as raised:
        safetensors.deserialize(file_of("NONE", (1,), 1))
    names = set(
        str(raised.value)
        .partition("expected one of")[2]
        .replace("`", "")
        .split(" at line")[0]
        .replace(",", " ")
        .split()
    )
    assert names == {dtype.value for dtype in DType}


@pytest.mark.parametrize("dtype", PACKED)
def test_rows_of_whole_bytes_are_read_alone(tmp_path: Path, dtype: DType) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(dtype.value, (6, 4), dtype.size_of((6, 4))))
    with pxd.Safetensors.open(path) as tensors:
        whole = tensors.read("w")
        for begin, end in ((0, 2), (1, 5), (3, 6)):
            row = dtype.size_of((1, 4))
            assert tensors.read("w", slice(begin, end)).tolist() == whole[begin * row : end * row].tolist()


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize(("rows", "base_rows"), [(4, 4), (8, 4), (4, 8)])
def test_a_packed_tensor_that_is_the_bases_is_kept_for_nothing(dtype: DType, rows: int, base_rows: int) -> None:
    """With one element per row, rows end inside bytes."""
    rng = np.random.default_rng(rows)
    most = rng.integers(0, 256, dtype.size_of((8, 1)), dtype=np.uint8)
    old, new = (most[: dtype.size_of((count, 1))] for count in (base_rows, rows))
    ref = pxd.BaseRef(dtype=dtype, shape=(base_rows, 1), sha256="0" * 64)
    module = pxd.lossless_module("w", new, dtype, shape=(rows, 1), old=old, base=ref)
    assert module.encoding is pxd.Encoding.SAME
    assert (module.tail is None) == (rows <= base_rows)
    assert pxd.reconstruct(module, old).tolist() == new.tolist()
    changed = new.copy()
    changed[0] ^= 1
    whole = pxd.lossless_module("w", changed, dtype, shape=(rows, 1), old=old, base=ref)
    assert whole.encoding is pxd.Encoding.FULL
    assert pxd.reconstruct(whole).tolist() == changed.tolist()


@pytest.mark.parametrize("dtype", PACKED)
def test_a_module_of_half_bytes_is_refused_by_the_writer(dtype: DType) -> None:
    count = 3
    with pytest.raises(pxd.ShapeError, match=dtype.value):
        pxd.ModuleDelta(
            name="w",
            shape=(count,),
            dtype=dtype,
            encoding=pxd.Encoding.FULL,
            full=np.zeros(dtype.size_of((count,)), np.uint8),
        )
