"""Tensors of dtypes that the format does not know are ignored in a base, unless a delta names them (SPEC 7)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import peraxis_format as pxd
from peraxis_tools import apply, compress, diff, verify
from peraxis_tools.chain.state import NoState
from peraxis_tools.chain.write import update


def written(folder: Path, seed: int, foreign: dict[str, bytes]) -> Path:
    """A checkpoint with two tensors, and others of the dtype F9_NEW."""
    torch.manual_seed(seed)
    tensors = {"a.weight": torch.randn(16, 16).bfloat16(), "norm.weight": torch.randn(16).bfloat16()}
    data = save({name: tensor for name, tensor in tensors.items() if name not in foreign})
    length = int.from_bytes(data[:8], "little")
    header, end = json.loads(data[8 : 8 + length]), len(data) - 8 - length
    for name, raw in foreign.items():
        header[name] = {"dtype": "F9_NEW", "shape": [len(raw)], "data_offsets": [end, end + len(raw)]}
        end += len(raw)
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :] + b"".join(foreign.values()))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return written(tmp_path / "base", 0, {"old.scale": b"abc"}), written(tmp_path / "tuned", 1, {})


def test_in_a_base_they_are_ignored_by_every_verb_and_listed_as_dropped(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    base, tuned = pair
    delta, step = tmp_path / "d.pxd", tmp_path / "step-1.pxd"
    compress(base, tuned, delta, exact=".*", force=True)
    update(base, tuned, step)
    for path in (delta, step):
        with pxd.open(path) as file:
            assert file.manifest.dropped == ("old.scale",)
        assert verify(path, base=base).status.value == "passed"
        assert diff(path, tuned, base=base).equal
    apply(base, delta, tmp_path / "applied")
    apply(base, [step], tmp_path / "state")
    with pxd.Safetensors.open(tuned) as wanted:
        for folder in ("applied", "state"):
            with pxd.Safetensors.open(tmp_path / folder) as found:
                assert list(found) == list(wanted)
                assert all((found.read(name) == wanted.read(name)).all() for name in wanted)


def test_a_state_after_an_update_has_none_so_the_next_update_neither_drops_nor_refuses_them(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    base, tuned = pair
    more = {"a.weight": torch.ones(16, 16).bfloat16(), "norm.weight": torch.ones(16).bfloat16()}
    more["old.scale"] = torch.ones(3)
    (tmp_path / "more").mkdir()
    (tmp_path / "more/model.safetensors").write_bytes(save(more))
    steps = [tmp_path / f"step-{number}.pxd" for number in (1, 2, 3)]
    update(base, tuned, steps[0])
    update(base, tuned, steps[1], after=steps[0])
    update(base, tmp_path / "more", steps[2], after=steps[:2])
    dropped = []
    for step in steps:
        with pxd.open(step) as file:
            dropped.append(file.manifest.dropped)
    assert dropped == [("old.scale",), (), ()]
    apply(base, steps, tmp_path / "state")
    with pxd.Safetensors.open(tmp_path / "state") as found:
        assert list(found) == ["a.weight", "norm.weight", "old.scale"]


def test_before_an_anchor_there_are_none(pair: tuple[Path, Path]) -> None:
    with pxd.Safetensors.open(pair[0]) as base:
        assert base.foreign
        assert not NoState(base).foreign


def test_a_base_tensor_that_a_delta_names_is_another_one(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    compress(base, tuned, tmp_path / "d.pxd", exact=".*", force=True)
    other = written(tmp_path / "other", 0, {"a.weight": b"abc"})
    with pytest.raises(pxd.BindingError, match="F9_NEW") as raised:
        apply(other, tmp_path / "d.pxd", tmp_path / "applied")
    assert raised.value.code == "E403"
    assert not (tmp_path / "applied").exists()
    with pytest.raises(pxd.CheckpointError, match=r"'a\.weight' has dtype 'F9_NEW'"):
        compress(other, tuned, tmp_path / "e.pxd", exact=".*", force=True)


def test_in_a_fine_tune_they_are_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    compress(base, tuned, tmp_path / "d.pxd", exact=".*", force=True)
    odd = written(tmp_path / "odd", 1, {"old.scale": b"abc"})
    for verb in (
        lambda: compress(base, odd, tmp_path / "e.pxd", exact=".*", force=True),
        lambda: update(base, odd, tmp_path / "step-1.pxd"),
        lambda: diff(tmp_path / "d.pxd", odd, base=base),
    ):
        with pytest.raises(pxd.CheckpointError, match=r"'old\.scale' has dtype 'F9_NEW'"):
            verb()
    assert sorted(path.name for path in tmp_path.glob("*.pxd")) == ["d.pxd"]


def test_in_a_base_a_name_that_no_file_can_have_is_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base = written(tmp_path / "odd", 0, {"old/scale": b"abc"})
    with pytest.raises(Exception, match="a name that PXD does not allow"):
        compress(base, pair[1], tmp_path / "d.pxd", exact=".*", force=True)
