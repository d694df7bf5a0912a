"""`apply` writes the results of SPEC.md, which are computed here from the files only with safetensors and numpy."""

from __future__ import annotations

import importlib
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import peraxis_format as pxd
from peraxis_tools.apply import apply
from peraxis_tools.errors import ToolError
from tests.factories import base_ref, large_pair, random_storage, sign_module, write_checkpoint, write_delta


def oracle(delta: Path, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A second implementation of SPEC 3 to 6 without peraxis: safetensors reads, numpy adds, torch rounds."""
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    result = {}
    with safe_open(delta, "np") as numbers, safe_open(delta, "pt") as tensors:
        manifest = json.loads(numbers.metadata()["manifest"])
        for module in manifest["modules"]:
            name, shape = module["name"], module["shape"]
            if module.get("encoding") == "full":
                result[name] = tensors.get_tensor(f"{name}.full")
                continue
            base_shape = module.get("base", {}).get("shape", shape)
            kept = min(shape[0], base_shape[0])
            covered = [kept, *shape[1:]]
            total = base[name][:kept].to(torch.float32).numpy()
            stored = f"{name}.delta"
            data = numbers.get_tensor(stored).tobytes() if stored in numbers.keys() else b""  # noqa: SIM118
            at = 0

            def part(kind: str, dims: list[int]) -> np.ndarray:
                nonlocal at
                count = math.prod(dims)
                array = np.frombuffer(data, kind, count, at).reshape(dims)  # noqa: B023
                at = -(-(at + array.nbytes) // 64) * 64
                return array

            for axis, exponent in module.get("components", []):
                mask = part("u1", [*covered[:-1], -(-shape[-1] // 8)])
                bits = np.unpackbits(mask, axis=-1, bitorder="little")[..., : shape[-1]]
                scale = np.float32(2.0**exponent)
                if axis == "tensor":
                    scale = scale * part("<f2", [1]).astype(np.float32)
                if "row" in axis:
                    scale = scale * part("<f2", covered[:-1]).astype(np.float32)[..., :, None]
                if "col" in axis:
                    scale = scale * part("<f2", [*covered[:-2], shape[-1]]).astype(np.float32)[..., None, :]
                total = total + np.where(bits == 1, scale, -scale)
            dtype = kinds[module.get("dtype", "BF16")]
            rebuilt = torch.from_numpy(total).to(dtype)
            if kept < shape[0]:
                rest = [shape[0] - kept, *shape[1:]]
                tail = torch.frombuffer(bytearray(data[at:]), dtype=dtype, count=math.prod(rest))
                rebuilt = torch.cat([rebuilt, tail.reshape(rest)])
            result[name] = rebuilt
        for name, alias in manifest["tied"]:
            result[alias] = result[name]
    return result


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base folder, and a delta with every encoding, axis, a resized vocabulary, a tie and assets."""
    rng = np.random.default_rng(7)
    embed, wide, odd = (random_storage(rng, shape) for shape in ((40, 24), (16, 24), (24, 43)))
    norm, same = random_storage(rng, (24,)), random_storage(rng, (24, 24))
    half = random_storage(rng, (8, 24), pxd.DType.F16)
    experts = random_storage(rng, (3, 8, 24))
    names = {
        "embed": (embed, pxd.DType.BF16),
        "wide": (wide, pxd.DType.BF16),
        "odd": (odd, pxd.DType.BF16),
        "norm": (norm, pxd.DType.BF16),
        "same": (same, pxd.DType.BF16),
        "half": (half, pxd.DType.F16),
        "experts": (experts, pxd.DType.BF16),
        "gone": (norm, pxd.DType.BF16),
    }
    base = write_checkpoint(tmp_path / "base", names)
    both = (pxd.Axis.ROW_COL, pxd.Axis.TENSOR, pxd.Axis.COL)
    modules = [
        sign_module(rng, "embed", embed, rows=43),
        sign_module(rng, "wide", wide, axes=both, rows=12),
        sign_module(rng, "odd", odd, axes=(pxd.Axis.COL,)),
        sign_module(rng, "half", half, base_dtype=pxd.DType.F16, dtype=pxd.DType.F32),
        sign_module(rng, "experts", experts, axes=(pxd.Axis.ROW_COL, pxd.Axis.ROW)),
        pxd.ModuleDelta(
            name="norm",
            shape=(24,),
            dtype=pxd.DType.BF16,
            encoding=pxd.Encoding.FULL,
            base=base_ref(norm, pxd.DType.BF16),
            full=random_storage(rng, (24,)),
        ),
        pxd.ModuleDelta(
            name="same",
            shape=(24, 24),
            dtype=pxd.DType.BF16,
            encoding=pxd.Encoding.SAME,
            base=base_ref(same, pxd.DType.BF16),
        ),
    ]
    delta = write_delta(
        tmp_path / "delta.pxd",
        modules,
        tied=[("embed", "lm_head")],
        dropped=["gone"],
        assets={"config.json": b'{"model_type": "llama", "tuned": true}'},
    )
    return base, delta


def test_applied_weights_equal_an_application_from_the_spec_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = pair
    apply(base, delta, tmp_path / "out")
    applied, expected = load(tmp_path / "out"), oracle(delta, load(base))
    assert applied.keys() == expected.keys()
    assert all(same_bits(applied[name], expected[name]) for name in expected)


def test_shards_hold_what_one_file_holds_and_the_index_names_them(tmp_path: Path) -> None:
    base, delta = large_pair(tmp_path)
    apply(base, delta, tmp_path / "one")
    apply(base, delta, tmp_path / "many", shard_size="1MB", workers=1)
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["weight_map"].keys() == many.keys() == one.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert all(same_bits(one[name], many[name]) for name in one)


def test_the_deltas_configuration_wins_over_the_bases(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = pair
    apply(base, delta, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tuned"] is True


def test_a_wrong_base_leaves_no_output(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = pair
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (base / "model.safetensors").write_bytes(data)
    with pytest.raises(pxd.BindingError) as caught:
        apply(base, delta, tmp_path / "out")
    assert caught.value.code == "E404"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta.pxd"]


def test_damage_in_the_payload_leaves_no_output(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = pair
    data = bytearray(delta.read_bytes())
    with pxd.open(delta) as file:
        data[file.span("odd")[0]] ^= 1
    delta.write_bytes(data)
    with pytest.raises(pxd.PayloadError):
        apply(base, delta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_reported_before_a_base_that_does_not_fit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = pair
    data, weights = bytearray(delta.read_bytes()), bytearray((base / "model.safetensors").read_bytes())
    with pxd.open(delta) as file:
        data[file.span(list(file)[-1])[1] - 1] ^= 1
    weights[-1] ^= 1
    delta.write_bytes(data)
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(pxd.PayloadError):
        apply(base, delta, tmp_path / "out")
    (base / "model.safetensors").write_bytes(b"no base")
    delta.write_bytes(data[:-1])
    with pytest.raises(pxd.ContainerError, match="E124"):
        apply(base, delta, tmp_path / "out")


def test_a_folder_that_is_no_earlier_output_is_kept_whatever_is_asked(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = pair
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(ToolError, match=r"exists already, and is no earlier output; choose another output$"):
        apply(base, delta, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "mine"
    with pytest.raises(ToolError, match="no list of an earlier output"):
        apply(base, delta, tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_an_output_that_is_an_input_is_called_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = pair
    for target in (base, delta):
        with pytest.raises(ToolError, match=rf"{target.name}: is an input of this run"):
            apply(base, delta, target, overwrite=True)


def test_a_write_that_fails_leaves_no_thread_however_long_its_error_lives(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importlib.import_module("peraxis_tools.apply"), "write_tensor", full)
    before = set(threading.enumerate())
    with pytest.raises((OSError, ToolError)) as error:
        apply(*pair, tmp_path / "out")
    assert set(threading.enumerate()) <= before
    assert error.value.__traceback__ is not None  # keeps the frames and their variables alive


def test_a_few_tied_tensors_are_written_and_a_flood_of_them_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("peraxis_tools.apply"), "_SMALL", 1 << 12)
    rng = np.random.default_rng(0)
    weight = random_storage(rng, (64, 64))
    base = write_checkpoint(tmp_path / "base", {"w": (weight, pxd.DType.BF16)})
    module = sign_module(rng, "w", weight)
    few = write_delta(tmp_path / "few.pxd", [module], tied=[("w", "head")])
    assert apply(base, few, tmp_path / "out").tensors == 2
    many = write_delta(tmp_path / "many.pxd", [module], tied=[("w", f"head{i}") for i in range(9)])
    with pytest.raises(ToolError, match=r"many\.pxd: ties so many tensors that 81920 bytes would be written"):
        apply(base, many, tmp_path / "second")
    assert not (tmp_path / "second").exists()
