"""The name of a checkpoint: a local copy keeps its name on the hub."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import peraxis_format as pxd
from peraxis_format import CheckpointError
from peraxis_tools.checkpoints.checkpoint import open_checkpoint, parse_identity
from peraxis_tools.compress import compress
from peraxis_tools.errors import ToolError


def write(folder: Path, shift: float = 0.0) -> Path:
    folder.mkdir(parents=True)
    weight = np.linspace(0.0, 1.0, 64 * 64, dtype=np.float32).reshape(64, 64)
    save_file(
        {"layers.0.w.weight": weight + shift * np.sin(weight * 99).astype(np.float32)}, folder / "model.safetensors"
    )
    return folder


def base_of(path: Path) -> tuple[str, str | None]:
    with pxd.open(path) as delta:
        return delta.manifest.base.id, delta.manifest.base.revision


def test_a_snapshot_of_the_hubs_cache_keeps_its_id_and_commit(tmp_path: Path) -> None:
    snapshot = write(tmp_path / "hub" / "models--org--my--base" / "snapshots" / "0123abcd")
    for source in (snapshot, snapshot / "model.safetensors"):
        with open_checkpoint(source) as checkpoint:
            assert checkpoint.identity == pxd.Identity(id="org/my--base", revision="0123abcd")


def test_the_hub_id_of_a_folder_can_be_given(tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned", 0.01)
    compress(base, tuned, tmp_path / "d.pxd")
    assert base_of(tmp_path / "d.pxd") == ("base", None)
    compress(base, tuned, tmp_path / "d.pxd", base_id="org/base@main", overwrite=True)
    assert base_of(tmp_path / "d.pxd") == ("org/base", "main")
    with pytest.raises(ToolError, match="not a hub id"):
        compress(base, tuned, tmp_path / "e.pxd", base_id="not an id")


@pytest.mark.parametrize(
    "address", ["hf://org/base", "https://huggingface.co/org/base/tree/main", "hf://models/org/base"]
)
def test_the_address_of_a_repository_on_the_hub_is_answered_with_its_id(address: str) -> None:
    with pytest.raises(pxd.CheckpointError, match=r"pass org/base$"):
        open_checkpoint(address)


def test_ids_are_read_as_the_hub_writes_them() -> None:
    assert parse_identity("org/name") == pxd.Identity(id="org/name")
    for wrong in ("name", "org/name@", "/name", "org/na me", "a/b/c"):
        with pytest.raises(ToolError):
            parse_identity(wrong)


def test_what_is_not_read_of_a_folder_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "two")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with caplog.at_level(logging.WARNING, "peraxis"), open_checkpoint(folder):
        pass
    assert "model.safetensors.index.json not read: model.safetensors comes first" in caplog.text


def test_a_note_is_said_once_and_not_at_all_when_quiet(tmp_path: Path) -> None:
    folder = write(tmp_path / "two")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    arguments = [sys.executable, "-m", "peraxis_tools", "compress", str(folder), str(folder), "--force", "--overwrite"]
    arguments += ["-o", str(tmp_path / "d.pxd")]
    loud, hushed = (subprocess.run([*arguments, *more], capture_output=True, text=True) for more in ([], ["--quiet"]))
    assert (loud.returncode, hushed.returncode) == (0, 0), loud.stderr
    assert loud.stderr.count("not read") == 1
    assert hushed.stderr == ""


def test_a_repository_without_safetensors_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CheckpointError, match="org/gguf: has no safetensors checkpoint"):
        open_checkpoint("org/gguf")
