"""A name that cannot be looked up, or a folder that cannot be listed, is an error of its own, not of the whole run."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from peraxis_tools.cli import cli
from peraxis_tools.remote.files import deltas_of
from peraxis_tools.verify import delta_files, verify
from tests.tools.output_cases import make_inputs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_inputs(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def close(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody, root included, list a folder."""

    def closed(function: Any) -> Any:
        def call(path: Any = ".") -> Any:
            if not isinstance(path, int) and Path(os.fsdecode(path)).resolve() == folder.resolve():
                raise PermissionError(errno.EACCES, "Permission denied", os.fsdecode(path))
            return function(path)

        return call

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, closed(getattr(os, name)))


def test_a_name_that_cannot_be_looked_up_is_a_row_and_the_other_files_are_checked(folder: Path) -> None:
    impossible = f"{'n' * 300}/b.pxd"
    arguments = ["verify", "a.pxd", impossible, "--report", "json=report.json"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2, done.exception
    rows = json.loads((folder / "report.json").read_text())["files"]
    assert [row["status"] for row in rows] == ["passed", "error"]
    assert "File name too long" in rows[1]["checks"][0]["message"]


def test_a_file_whose_signature_would_have_too_long_a_name_is_verified(folder: Path) -> None:
    for length in (251, 255):
        name = "n" * (length - 4) + ".pxd"
        shutil.copyfile("a.pxd", name)
        assert verify(name, keep_going=True).status.exit_status == 0, length


def test_a_folder_that_cannot_be_listed_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "open").mkdir()
    (folder / "open" / "closed").mkdir()
    shutil.copyfile("a.pxd", "open/a.pxd")
    close(folder / "open" / "closed", monkeypatch)
    assert delta_files("open") == ["open/a.pxd", "open/closed"]
    for name in ("open/closed", "open/closed/*.pxd"):
        [row] = verify(name, keep_going=True).files
        assert "Permission denied" in str(row.checks[0].message), name
    for source in ("open/closed", f"file://{folder}/open/closed/*"):
        with pytest.raises(PermissionError):
            deltas_of(source)
    for line in ("log open/closed", "apply base open/closed -o out"):
        done = CliRunner().invoke(cli, line.split())
        assert isinstance(done.exception, PermissionError), line
