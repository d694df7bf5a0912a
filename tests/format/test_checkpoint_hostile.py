"""Safetensors headers that the safetensors library refuses are refused; those of real files are read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.numpy import load

import peraxis_format as pxd
from peraxis_format.errors import CheckpointError


def tensor(begin: int, end: int, shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def written(path: Path, header: dict[str, Any] | str, data: bytes) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


ONE, SECOND = json.dumps(tensor(0, 2)), json.dumps(tensor(2, 4))
REFUSED: dict[str, tuple[dict[str, Any] | str, str]] = {
    "one range for two tensors": ({"a": tensor(0, 4), "b": tensor(0, 4)}, "'b': overlaps another"),
    "an overlap": ({"a": tensor(0, 3), "b": tensor(2, 4)}, "'b': overlaps another"),
    "a gap": ({"a": tensor(0, 2), "b": tensor(3, 4)}, "'b': has a gap before it"),
    "a gap at the start": ({"a": tensor(1, 4)}, "'a': has a gap before it"),
    "a remainder": ({"a": tensor(0, 3)}, "1 bytes after the last tensor"),
    "an empty tensor within another": ({"a": tensor(0, 4), "z": tensor(2, 2)}, "'z': overlaps another"),
    "a name twice": (f'{{"a":{ONE},"a":{SECOND}}}', "duplicate key: 'a'"),
    "a field twice": (f'{{"a":{ONE[:-1]},"dtype":"U8"}},"b":{SECOND}}}', "duplicate key: 'dtype'"),
    "the metadata twice": (f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{ONE},"b":{SECOND}}}', "duplicate key"),
}
READ: dict[str, dict[str, Any]] = {
    "empty tensors at the start, between, and at the end": {
        "y": tensor(0, 0, [0, 3]),
        "a": tensor(0, 2),
        "x": tensor(2, 2),
        "b": tensor(2, 4),
        "z": tensor(4, 4, [2, 0]),
    },
    "another order than the data's": {"b": tensor(2, 4), "a": tensor(0, 2)},
    "scalars": {f"s{i}": tensor(i, i + 1, []) for i in range(4)},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_whose_tensors_do_not_cover_its_data_once_is_refused(kind: str, tmp_path: Path) -> None:
    header, words_of_error = REFUSED[kind]
    path = written(tmp_path / "a.safetensors", header, b"abcd")
    with pytest.raises(SafetensorError):
        load(path.read_bytes())
    with pytest.raises(CheckpointError, match=words_of_error):
        pxd.Safetensors.open(path)


@pytest.mark.parametrize("kind", READ)
def test_a_file_that_the_library_reads_is_read(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", READ[kind], b"abcd")
    wanted = load(path.read_bytes())
    with pxd.Safetensors.open(path) as tensors:
        assert {name: tensors.read(name).tobytes() for name in tensors} == {n: a.tobytes() for n, a in wanted.items()}


def test_a_shape_of_many_dimensions_is_refused_before_they_are_multiplied(tmp_path: Path) -> None:
    wide = tensor(0, 4, [4, *[1] * 63])
    with pxd.Safetensors.open(written(tmp_path / "64.safetensors", {"a": wide}, b"abcd")) as tensors:
        assert len(tensors["a"].shape) == 64
    long = written(tmp_path / "long.safetensors", {"a": tensor(0, 4, [9] * 100_000)}, b"abcd")
    with pytest.raises(CheckpointError, match="has 100000 dimensions"):
        pxd.Safetensors.open(long)
