"""Tensors of carried types (F4, F6, F8_E8M0, C64, ...) go through every verb byte for byte."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

import peraxis_format as pxd
from peraxis_format import DType
from peraxis_format.errors import LiveModelError
from peraxis_tools.apply import apply
from peraxis_tools.chain import compact, update
from peraxis_tools.checkpoints.shards import TensorSpec, shard_header
from peraxis_tools.compress import compress
from peraxis_tools.compress.plan.quantised import quantisation_of
from peraxis_tools.diff import diff, diff_checkpoint
from peraxis_tools.inspect import inspect
from peraxis_tools.merge import merge
from peraxis_tools.verify import verify

CARRIED = [dtype for dtype in DType if not dtype.is_float]
MATRIX = "model.layers.0.mlp.up_proj.weight"

Tensors = dict[str, tuple[DType, tuple[int, ...], bytes]]


def folder_of(path: Path, tensors: Tensors) -> Path:
    path.mkdir()
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()]
    data = b"".join(data for _, _, data in tensors.values())
    (path / "model.safetensors").write_bytes(shard_header(specs) + data)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


def contents(path: Path) -> dict[str, tuple[Any, ...]]:
    """Return the contents as the parser of safetensors reads them."""
    found = safetensors.deserialize((path / "model.safetensors").read_bytes())
    return {name: (said["dtype"], tuple(said["shape"]), bytes(said["data"])) for name, said in found}


def checkpoint(seed: int, *, rows: int = 4) -> Tensors:
    """A float matrix that changes, and for each type a tensor that changes, one that stays and one with other rows."""
    rng, still = np.random.default_rng(seed), np.random.default_rng(99)
    weights = pxd.from_float32(rng.standard_normal((64, 64)).astype(np.float32), DType.BF16)
    tensors: Tensors = {MATRIX: (DType.BF16, (64, 64), weights.tobytes())}
    for dtype in CARRIED:
        for word, shape, source in (("moves", (4, 3), rng), ("stays", (4, 3), still), ("embed", (rows, 4), still)):
            raw = source.integers(0, 2, dtype.size_of(shape), dtype=np.uint8)
            tensors[f"model.{dtype.value}.{word}"] = (dtype, shape, raw.tobytes())
    return tensors


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("carried")
    return folder_of(folder / "base", checkpoint(0)), folder_of(folder / "tuned", checkpoint(1))


@pytest.fixture(scope="module")
def delta(pair: tuple[Path, Path]) -> Path:
    path = pair[1].parent / "d.pxd"
    compress(*pair, path, fit="none", force=True)
    return path


def test_compress_and_apply_give_every_carried_tensor_back(
    pair: tuple[Path, Path], delta: Path, tmp_path: Path
) -> None:
    verify(delta, base=pair[0])
    apply(pair[0], delta, tmp_path / "applied")
    wanted, found = contents(pair[1]), contents(tmp_path / "applied")
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == [MATRIX]
    with pxd.open(delta) as file:
        encodings = {entry.name: entry.encoding.value for entry in file.manifest.modules}
    for dtype in CARRIED:
        assert encodings[f"model.{dtype.value}.moves"] == "full"
        assert encodings[f"model.{dtype.value}.stays"] == "same"


def test_inspect_counts_the_bytes_of_the_checkpoint(pair: tuple[Path, Path], delta: Path) -> None:
    found = inspect(delta)
    assert found.full_bytes == sum(len(data) for _, _, data in contents(pair[1]).values())


def test_diff_tells_which_of_them_differ(pair: tuple[Path, Path], delta: Path, tmp_path: Path) -> None:
    result = diff_checkpoint(delta, base=pair[0], fine_tuned=pair[1])
    assert [module.name for module in result.modules if not module.identical] == [MATRIX]
    other = folder_of(tmp_path / "other", checkpoint(2))
    compress(pair[0], other, tmp_path / "o.pxd", fit="none", force=True)
    moved = {module.name for module in diff(delta, tmp_path / "o.pxd").modules if not module.identical}
    assert moved == {MATRIX, *(f"model.{dtype.value}.moves" for dtype in CARRIED)}


def test_new_rows_of_a_packed_tensor_are_counted_as_rows(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """There are eight rows instead of the base's four, and the last of the four is changed."""
    tensors = checkpoint(1, rows=8)
    name = "model.F4.embed"
    dtype, shape, data = tensors[name]
    changed = {**tensors, name: (dtype, shape, data[:-1] + bytes([data[-1] ^ 0x80]))}
    for word, held in (("a", tensors), ("b", changed)):
        compress(pair[0], folder_of(tmp_path / word, held), tmp_path / f"{word}.pxd", fit="none", force=True)
    found = {module.name: module for module in diff(tmp_path / "a.pxd", tmp_path / "b.pxd").modules}
    assert any("1 of 4 new rows differ" in change for change in found[name].changes)


def test_a_merge_of_what_is_equal_keeps_it_and_of_what_differs_is_refused(
    pair: tuple[Path, Path], delta: Path, tmp_path: Path
) -> None:
    other = folder_of(tmp_path / "other", checkpoint(2))
    compress(pair[0], other, tmp_path / "o.pxd", fit="none", force=True)
    with pytest.raises(Exception, match=re.escape("cannot be averaged")):
        merge([delta, tmp_path / "o.pxd"], tmp_path / "m.pxd", weights=[0.5, 0.5], base=pair[0])
    merge([delta], tmp_path / "m.pxd", weights=[1.0], base=pair[0])
    apply(pair[0], tmp_path / "m.pxd", tmp_path / "applied")
    found, wanted = contents(tmp_path / "applied"), contents(pair[1])
    assert [name for name in wanted if found[name] != wanted[name]] == [MATRIX]


def test_a_chain_of_updates_gives_every_byte_back(pair: tuple[Path, Path], tmp_path: Path) -> None:
    states = [folder_of(tmp_path / f"s{i}", checkpoint(i, rows=4 + 4 * (i > 1))) for i in range(3)]
    first = update(states[0], states[1], tmp_path / "1.pxd")
    assert first.weights == sum(int(np.prod(shape)) for _, shape, _ in checkpoint(1).values())
    update(states[0], states[2], tmp_path / "2.pxd", after=[tmp_path / "1.pxd"])
    compact(states[0], [tmp_path / "1.pxd", tmp_path / "2.pxd"], tmp_path / "c.pxd")
    apply(states[0], [tmp_path / "2.pxd", tmp_path / "1.pxd"], tmp_path / "chain")
    apply(states[0], tmp_path / "c.pxd", tmp_path / "compacted")
    assert contents(tmp_path / "chain") == contents(states[2]) == contents(tmp_path / "compacted")


@pytest.mark.parametrize(
    ("dtype", "elements"), [(DType.F4, 12), (DType.F6_E2M3, 12), (DType.F6_E3M2, 12), (DType.C64, 12)]
)
def test_changed_elements_are_counted_and_not_their_bytes(tmp_path: Path, dtype: DType, elements: int) -> None:
    zeros = bytes(dtype.size_of((elements,)))
    one = {"w": (dtype, (elements,), zeros)}
    two = {"w": (dtype, (elements,), b"\x11" + zeros[1:-1] + b"\x80")}  # both halves of the first byte
    result = update(folder_of(tmp_path / "a", one), folder_of(tmp_path / "b", two), tmp_path / "u.pxd")
    assert result.weights == elements
    assert result.changed == (2 if dtype is DType.C64 else 3 if dtype is DType.F4 else 2)


def test_live_models_hold_none_and_say_so() -> None:
    torch = pytest.importorskip("torch")
    from peraxis_format.ops.tensors import dtype_of, from_storage, storage_array

    for dtype in DType:
        array = np.arange(dtype.size_of((4,)), dtype=np.uint8).view(dtype.storage)
        if dtype.is_packed:
            with pytest.raises(LiveModelError, match=f"torch has no {dtype.value} tensors"):
                from_storage(array, dtype)
        elif dtype is not DType.BOOL:
            tensor = from_storage(array, dtype)
            assert tuple(tensor.shape) == (4,)
            assert dtype_of(tensor, "w") is dtype
            assert storage_array(tensor).tobytes() == array.tobytes()
    with pytest.raises(LiveModelError, match="float4"):
        dtype_of(torch.empty(2, dtype=torch.float4_e2m1fn_x2), "w")


@pytest.mark.parametrize("dtype", DType)
def test_a_matrix_of_floats_below_16_bits_alone_shows_a_quantised_checkpoint(dtype: DType) -> None:
    file, end = Path("model.safetensors"), dtype.size_of((4, 8))
    info = pxd.TensorInfo(name="a.weight", dtype=dtype, shape=(4, 8), file=file, begin=0, end=end)
    small = dtype.value.startswith("F") and dtype.bits < 16
    assert (quantisation_of([info], None) is not None) == small
