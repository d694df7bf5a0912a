"""A checkpoint that another program saves while it is read gives an error, never a file of two states."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import peraxis_format as pxd
from peraxis_tools.chain import update
from peraxis_tools.compress import compress
from tests.factories import random_storage, write_checkpoint

NAMES = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]


def state(seed: int, names: list[str] = NAMES) -> dict[str, tuple[np.ndarray, pxd.DType]]:
    rng = np.random.default_rng(seed)
    return {name: (random_storage(rng, (32, 64 + 2 * seed)), pxd.DType.BF16) for name in names}


def replaced(folder: Path, other: Path) -> None:
    """Save as most programs do: under another name, then rename."""
    os.replace(other / "model.safetensors", folder / "model.safetensors")


def written(folder: Path, other: Path) -> None:
    """Save into the same file."""
    with open(folder / "model.safetensors", "r+b") as file:
        file.write((other / "model.safetensors").read_bytes())


Save = Callable[[Path, Path], None]
SAVES = pytest.mark.parametrize("save", [replaced, written])


@SAVES
def test_a_file_that_changed_since_its_header_was_read_is_refused(save: Save, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", state(0))
    other = write_checkpoint(tmp_path / "b", state(1))
    with pxd.Safetensors.open(folder) as tensors:
        save(folder, other)
        with pytest.raises(pxd.CheckpointError, match="was replaced or written while it was read"):
            tensors.read(NAMES[0])
        assert tensors._descriptors == {}


@SAVES
@pytest.mark.parametrize("verb", ["update", "compress"])
@pytest.mark.parametrize("which", ["old", "new"])
def test_a_file_that_changes_between_two_tensors_gives_no_output_of_two_states(
    save: Save, verb: str, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_checkpoint(tmp_path / "old", state(0))
    new = write_checkpoint(tmp_path / "new", state(0))
    changed = dict(state(0), **{NAMES[2]: (random_storage(np.random.default_rng(7), (32, 64)), pxd.DType.BF16)})
    other = write_checkpoint(tmp_path / "other", changed)
    add = pxd.DeltaWriter.add

    def saved_meanwhile(self: pxd.DeltaWriter, module: pxd.ModuleDelta) -> None:
        add(self, module)
        if (other / "model.safetensors").exists():
            save(tmp_path / which, other)
            (other / "model.safetensors").unlink(missing_ok=True)

    monkeypatch.setattr(pxd.DeltaWriter, "add", saved_meanwhile)
    run = update if verb == "update" else partial(compress, fit="none", force=True)
    if save is replaced:  # the open file is still what it was
        run(old, new, tmp_path / "x.pxd")
        with pxd.open(tmp_path / "x.pxd") as delta:
            assert {entry.encoding for entry in delta.manifest.modules} == {pxd.Encoding.SAME}
        return
    with pytest.raises(pxd.CheckpointError, match="was replaced or written while it was read"):
        run(old, new, tmp_path / "x.pxd")
    assert not (tmp_path / "x.pxd").exists()
