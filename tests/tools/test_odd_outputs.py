"""Pipes and devices in the place of files: neither an earlier output nor a source is waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import peraxis_format as pxd
from peraxis_tools.convert import WIRES, WireName, from_wire, recognised, to_pxd
from peraxis_tools.errors import ToolError
from peraxis_tools.extract import extract
from peraxis_tools.outputs.folders import MARKER, atomic_folder
from tests.factories import random_storage, sign_module, write_checkpoint, write_delta


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


ODD = pytest.mark.parametrize("make", [pipe, device])


@ODD
@pytest.mark.parametrize("name", [MARKER, "README.md"])
def test_a_folder_with_a_pipe_as_its_list_is_no_earlier_output(
    make: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    modules = [sign_module(rng, "w", random_storage(rng, (16, 24)))]
    delta = write_delta(tmp_path / "a.pxd", modules, assets={"config.json": b"{}"})
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / name)
    with pytest.raises(ToolError, match="no list of an earlier output"):
        extract(delta, tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


@ODD
def test_a_source_of_convert_that_is_no_file_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"w": (np.zeros((4, 4), np.uint16), pxd.DType.BF16)})
    source = tmp_path / "source.safetensors"
    make(source)
    assert recognised(source) is None
    wires: list[WireName | None] = [None, *WIRES]
    for wire in wires:
        with pytest.raises(ToolError, match="not a regular file"):
            from_wire(source, base, tmp_path / "x.pxd", wire=wire)
    with pytest.raises(ToolError, match="no such file"):
        to_pxd(source, base, tmp_path / "x.pxd")


def test_a_repository_that_is_written_into_the_current_folder_has_no_list_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for repository in (True, False):
        with atomic_folder(Path(), overwrite=True, repository=repository) as folder:
            (folder / "own.txt").write_text("new")
        assert (tmp_path / MARKER).exists() is not repository
        (tmp_path / MARKER).unlink(missing_ok=True)
        (tmp_path / "own.txt").unlink()


@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling/config.json"])
def test_a_file_that_another_put_into_an_earlier_output_is_not_replaced_by_one_of_its_name(
    name: str, tmp_path: Path
) -> None:
    """A note of `apply` asks for a copy of the tokenizer, and the next delta may have its own."""
    output = tmp_path / "out"

    def write(*names: str) -> None:
        with atomic_folder(output, overwrite=True) as folder:
            for each in names:
                (folder / each).parent.mkdir(exist_ok=True)
                (folder / each).write_text("of the run")

    write("config.json")
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("mine")
    with pytest.raises(ToolError, match=rf"{name}: is no file of the earlier output, .*; move it away or"):
        write("config.json", name)
    assert (output / name).read_text() == "mine"
    (output / name).unlink()
    write("config.json", name)
    write("config.json", name)
    assert (output / name).read_text() == "of the run"
