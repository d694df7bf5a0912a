"""The files of a folder that are the checkpoint, in the order of transformers, and the errors about other files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import peraxis_format as pxd
from peraxis_format.errors import CheckpointError


def shard(path: Path, **values: float) -> Path:
    """Write a safetensors file of tensors with one value each."""
    path.parent.mkdir(exist_ok=True)
    save_file({name: np.full((2, 3), value, np.float32) for name, value in values.items()}, path)
    return path


def index(folder: Path, owners: dict[str, str]) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": owners}))
    return path


def value_of(tensors: pxd.Safetensors, name: str) -> float:
    return float(tensors.read(name)[0, 0])


def test_the_single_file_comes_before_an_index_whose_shards_are_there(tmp_path: Path) -> None:
    shard(tmp_path / "model-1.safetensors", a=1.0)
    index(tmp_path, {"a": "model-1.safetensors"})
    shard(tmp_path / "model.safetensors", a=2.0)
    with pxd.Safetensors.open(tmp_path) as tensors:
        assert value_of(tensors, "a") == 2.0
        (sentence,) = tensors.ignored
    assert "model-1.safetensors" in sentence
    assert "model.safetensors.index.json" in sentence


def test_a_stale_index_whose_shards_are_gone_is_no_obstacle(tmp_path: Path) -> None:
    index(tmp_path, {"a": "model-1.safetensors"})
    shard(tmp_path / "model.safetensors", a=2.0)
    with pxd.Safetensors.open(tmp_path) as tensors:
        assert list(tensors) == ["a"]


def test_a_tensor_in_two_shards_belongs_to_the_one_that_the_index_names(tmp_path: Path) -> None:
    for owner, value in (("model-1.safetensors", 1.0), ("model-2.safetensors", 2.0)):
        shard(tmp_path / "model-1.safetensors", a=1.0, b=1.0)
        shard(tmp_path / "model-2.safetensors", a=2.0, c=2.0)
        index(tmp_path, {"a": owner, "b": "model-1.safetensors", "c": "model-2.safetensors"})
        with pxd.Safetensors.open(tmp_path) as tensors:
            assert value_of(tensors, "a") == value
            assert list(tensors) == ["a", "b", "c"]


def test_the_file_that_the_configuration_names_comes_first(tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", a=1.0)
    shard(tmp_path / "other.safetensors", a=2.0)
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "other.safetensors"}))
    with pxd.Safetensors.open(tmp_path) as tensors:
        assert value_of(tensors, "a") == 2.0


def test_transformers_reads_the_same_file(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=None
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    model.lm_head.weight.data += 1.0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pxd.Safetensors.open(tmp_path) as tensors:
        ours = tensors.read("lm_head.weight")
    assert np.array_equal(ours, loaded.lm_head.weight.detach().numpy())


def test_one_tensor_in_two_files_without_an_index_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "one.safetensors", a=1.0)
    shard(tmp_path / "two.safetensors", a=2.0)
    with pytest.raises(CheckpointError, match=r"'a' is in one\.safetensors too"):
        pxd.Safetensors.open(tmp_path)


def test_an_index_that_names_a_tensor_no_file_holds_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "model-1.safetensors", a=1.0)
    index(tmp_path, {"a": "model-1.safetensors", "b": "model-1.safetensors"})
    with pytest.raises(CheckpointError, match="'b' in model-1"):
        pxd.Safetensors.open(tmp_path)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "LFS pointer"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
        (b"PK\x03\x04" + bytes(64), "pickle"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00", "pickle"),
        (b"\n<!DOCTYPE html><html>", "HTML"),
        (bytes(4096), "zeros"),
    ],
)
def test_what_is_no_safetensors_file_is_named_with_what_to_do(tmp_path: Path, start: bytes, said: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(start)
    with pytest.raises(CheckpointError, match=said):
        pxd.Safetensors.open(tmp_path)


def test_a_header_of_640_bytes_is_no_pickle(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).ljust(0x280).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x07")
    assert (tmp_path / "model.safetensors").read_bytes()[:2] == b"\x80\x02"
    with pxd.Safetensors.open(tmp_path) as tensors:
        assert tensors.read("a").tolist() == [7]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "pickle"),
        ("model-q4.gguf", "GGUF"),
        ("adapter_model.safetensors", "merge it into its base first"),
    ],
)
def test_a_folder_of_another_kind_says_what_to_do(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=said):
        pxd.Safetensors.open(tmp_path)


def test_a_name_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    header = b'{"a\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x07")
    with pytest.raises(CheckpointError, match="not valid Unicode"):
        pxd.Safetensors.open(tmp_path)


def of_dtype(folder: Path, dtype: object, end: int = 1) -> Path:
    record = {"dtype": dtype, "shape": [2], "data_offsets": [0, end]}
    known = {"dtype": "U8", "shape": [2 - end], "data_offsets": [end, 2]}
    header = json.dumps({"a.weight": record, "b.weight": known}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x07\x08")
    return folder


@pytest.mark.parametrize("dtype", ["F4_E2M1", "F8_E3M4", "Q4_K", ""])
def test_a_dtype_that_is_unknown_is_named_with_its_tensor_only_if_the_tensor_is_used(
    tmp_path: Path, dtype: str
) -> None:
    """SPEC 7: tensors of the base that the manifest does not name are ignored."""
    with pxd.Safetensors.open(of_dtype(tmp_path, dtype)) as tensors:
        assert (list(tensors), tensors.foreign) == (["b.weight"], {"a.weight": dtype})
        assert tensors.read("b.weight").tolist() == [8]
        assert (len(tensors), tensors.size, "a.weight" in tensors) == (1, 1, False)
        assert tensors.renamed({"a.weight": "c"}).foreign == {"c": dtype}
        with pytest.raises(CheckpointError, match="two tensors would have one name"):
            tensors.renamed({"a.weight": "b.weight"})
        tensors.check_dtypes({"b.weight"})
        with pytest.raises(CheckpointError, match=r"'a\.weight' has dtype .*which PXD does not allow"):
            tensors.check_dtypes({"a.weight"})
        with pytest.raises(CheckpointError, match=r"'a\.weight' has dtype .*which PXD does not allow"):
            tensors.check_dtypes()


@pytest.mark.parametrize(("dtype", "end"), [(None, 1), (3, 1), ("Q4_K", -1), ("Q4_K", 0)])
def test_a_record_of_an_unknown_dtype_must_be_one(tmp_path: Path, dtype: object, end: int) -> None:
    path = of_dtype(tmp_path, dtype, end)
    if end == 0:  # its size cannot be known
        assert pxd.Safetensors.open(path).foreign == {"a.weight": dtype}
        return
    with pytest.raises(CheckpointError, match="malformed safetensors header"):
        pxd.Safetensors.open(path)


def test_an_index_of_many_files_that_are_not_there_is_refused_at_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {f"x{i}": f"model-{i:06d}.safetensors" for i in range(100_000)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    looked: list[Path] = []
    is_file = Path.is_file

    def look(path: Path) -> bool:
        looked.append(path)
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", look)
    with pytest.raises(CheckpointError, match=r"model-000000\.safetensors: missing"):
        pxd.Safetensors.open(tmp_path)
    assert len([path for path in looked if path.name.startswith("model-0")]) == 1


def test_a_tensor_that_a_second_shard_has_too_is_named(tmp_path: Path) -> None:
    shard(tmp_path / "model-1.safetensors", a=1.0, b=1.0)
    shard(tmp_path / "model-2.safetensors", a=2.0, b=2.0, c=2.0)
    index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"})
    with pxd.Safetensors.open(tmp_path) as tensors:
        (sentence,) = tensors.ignored
    assert "'a' is in model-1.safetensors and model-2.safetensors, and 1 more are in two files" in sentence
    assert "the index decides" in sentence


def test_a_name_that_is_too_long_for_a_file_is_a_missing_file(tmp_path: Path) -> None:
    index(tmp_path, {"a": f"{'a' * 300}.safetensors"})
    with pytest.raises(CheckpointError, match=r"missing, although model\.safetensors\.index\.json lists it"):
        pxd.Safetensors.open(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": f"{'b' * 300}.safetensors"}))
    with pytest.raises(CheckpointError, match=r"missing, although config\.json names it"):
        pxd.Safetensors.open(tmp_path)


def test_an_index_of_another_name_is_named(tmp_path: Path) -> None:
    shard(tmp_path / "one.safetensors", a=1.0)
    index(tmp_path, {"a": "one.safetensors"}).rename(tmp_path / "x.safetensors.index.json")
    with pxd.Safetensors.open(tmp_path) as tensors:
        (sentence,) = tensors.ignored
    assert "x.safetensors.index.json not read: an adapter, or an index that is not model" in sentence
