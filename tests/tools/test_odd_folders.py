"""Checkpoint folders with unusual entries: names that are not text, pipes, devices, loops of links."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import peraxis_format as pxd
from peraxis_format.errors import CheckpointError
from peraxis_tools.apply import apply
from peraxis_tools.checkpoints.assets import LEFT_BEHIND
from peraxis_tools.compress import compress
from tests.factories import random_storage, write_checkpoint

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    pair = [{NAME: (random_storage(rng, (128, 128)), pxd.DType.BF16)} for _ in range(2)]
    return write_checkpoint(tmp_path / "base", pair[0]), write_checkpoint(tmp_path / "tuned", pair[1])


def test_names_that_are_no_text_are_named_in_one_line_each(
    folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned = folders
    for name in (b"\xff.json", b"a\nb.json", b"\x1b[31mred.py", "caf\u00e9.json".encode(), b"plain.py"):
        (tuned / os.fsdecode(name)).write_bytes(b"x")
    compress(base, tuned, tmp_path / "d.pxd", fit="none")
    with pxd.open(tmp_path / "d.pxd") as file:
        left = file.manifest.metadata[LEFT_BEHIND].split("\n")
    assert left == [r"\x1b[31mred.py", r"a\nb.json", "caf\u00e9.json", "plain.py", r"\udcff.json", ""]
    assert apply(base, tmp_path / "d.pxd", tmp_path / "out").left_behind == tuple(left[:-1])
    assert r"\u001b[31mred.py" in caplog.text
    assert all(record.getMessage().isprintable() for record in caplog.records)


def make_odd(path: Path, kind: str) -> None:
    """Make a pipe or a folder, or a link to a device, to itself or to nothing."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path.name, "nothing": "gone"}[kind])


@pytest.mark.parametrize("name", ["config.json", "modules.json", "generation_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder", "nothing"])
def test_what_is_no_file_is_neither_waited_for_nor_read(
    folders: tuple[Path, Path], tmp_path: Path, name: str, kind: str
) -> None:
    base, tuned = folders
    for folder in folders:
        path = folder / name
        path.unlink(missing_ok=True)
        make_odd(path, kind)
    compress(base, tuned, tmp_path / "d.pxd", fit="none")
    apply(base, tmp_path / "d.pxd", tmp_path / "out")
    assert not (tmp_path / "out" / name).exists()


def test_a_current_folder_that_was_removed_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    program = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); from peraxis_tools.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "compress", "base", "tuned", "-o", "new.pxd"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 2
    assert done.stderr == "error: the current folder was removed; change to another one\n"


@pytest.mark.parametrize("name", ["model-1.safetensors", "model.safetensors", "a.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder", "nothing"])
def test_weights_that_are_no_file_are_refused_and_not_waited_for(
    folders: tuple[Path, Path], tmp_path: Path, name: str, kind: str
) -> None:
    base, _ = folders
    (base / "model.safetensors").rename(base / "weights.safetensors")
    path = base / name
    make_odd(path, kind)
    with pytest.raises(CheckpointError, match=rf"{name}: is not a file"):
        pxd.Safetensors.open(base)
    path.unlink() if kind != "folder" else path.rmdir()
    path.symlink_to("weights.safetensors")
    (base / "weights.safetensors").rename(tmp_path / "elsewhere")
    (base / "weights.safetensors").symlink_to(tmp_path / "elsewhere")
    with pxd.Safetensors.open(base if name == "model.safetensors" else base / name) as tensors:
        assert list(tensors) == [NAME]
