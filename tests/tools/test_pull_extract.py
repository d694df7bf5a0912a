"""`pull`, `extract`, and `verify` of a folder bring deltas and their small files to a user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import peraxis_format as pxd
from peraxis_tools.commands.verify import command as verify
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.extract import extract
from peraxis_tools.pull import pull
from tests.factories import random_storage, sign_module, write_delta

ASSETS = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "1_Pooling/config.json": b"{ }"}


def delta(path: Path, seed: int = 0, assets: dict[str, bytes] | None = None) -> Path:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(exist_ok=True)
    return write_delta(path, [sign_module(rng, "a.weight", random_storage(rng, (16, 24)))], assets=assets or {})


def damaged(path: Path, at: int = -1) -> Path:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    return path


def content_id(path: Path) -> str:
    with pxd.open(path) as file:
        return file.content_id


class Hub:
    """A test double of the hub with the files of one folder. It records the requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self) -> Hub:
        return self

    def list_repo_files(self, repository: str, revision: str | None = None) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def hf_hub_download(self, repository: str, name: str, revision: str | None = None) -> str:
        self.asked.append((name, revision))
        return str(self.folder / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import huggingface_hub

    double: Any = Hub(tmp_path / "repo")
    delta(tmp_path / "repo" / "a.pxd")
    delta(tmp_path / "repo" / "b.pxd", seed=1)
    (tmp_path / "repo" / "a.pxd.sig").write_text("{}")
    (tmp_path / "repo" / "README.md").write_text("card")
    monkeypatch.setattr(huggingface_hub, "HfApi", double)
    return double


def test_a_repository_is_pulled_with_its_signatures(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    result = pull("me/deltas@v1", tmp_path / "here")
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["a.pxd", "a.pxd.sig", "b.pxd"]
    assert [file.content_id for file in result.files] == [content_id(hub.folder / n) for n in ("a.pxd", "b.pxd")] + [
        None
    ]
    assert {revision for _, revision in hub.asked} == {"v1"}
    with pytest.raises(ToolError, match="exists already"):
        pull("me/deltas", tmp_path / "here")


def test_a_single_delta_and_a_pin_are_held(hub: Hub, tmp_path: Path) -> None:
    own = content_id(hub.folder / "b.pxd")
    assert [file.path.name for file in pull("me/d", tmp_path, files=["b.pxd"], expect_content_id=[own]).files] == [
        "b.pxd"
    ]
    with pytest.raises(CheckFailedError, match="none of those expected"):
        pull("me/d", tmp_path, files=["a.pxd"], expect_content_id=[own])
    with pytest.raises(ToolError, match=r"has no c\.pxd"):
        pull("me/d", tmp_path, files=["c.pxd"])
    with pytest.raises(ToolError, match="neither a repository"):
        pull("no such thing", tmp_path)
    assert not (tmp_path / "a.pxd").exists()


def test_nothing_is_written_where_one_of_them_is_damaged(hub: Hub, tmp_path: Path) -> None:
    damaged(hub.folder / "b.pxd")
    (tmp_path / "here").mkdir()
    with pytest.raises(pxd.PayloadError):
        pull("me/d", tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []


def test_a_url_is_pulled_and_verified(tmp_path: Path) -> None:
    source = delta(tmp_path / "there" / "d.pxd")
    (tmp_path / "here").mkdir()
    pull(f"file://{source}", tmp_path / "here")
    assert (tmp_path / "here" / "d.pxd").read_bytes() == source.read_bytes()
    damaged(source)
    with pytest.raises(pxd.PayloadError):
        pull(f"file://{source}", tmp_path / "here", overwrite=True)


@pytest.mark.parametrize("remote", [False, True])
def test_the_small_files_are_extracted_as_they_were(tmp_path: Path, remote: bool) -> None:
    source = delta(tmp_path / "d.pxd", assets=ASSETS)
    result = extract(f"file://{source}" if remote else source, tmp_path / "out")
    assert {path: (tmp_path / "out" / path).read_bytes() for path in result.files} == ASSETS
    assert result.content_id == content_id(source)
    damaged(source)
    with pytest.raises((pxd.PayloadError, CheckFailedError)):
        extract(f"file://{source}" if remote else source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_delta_without_small_files_says_so(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="has no assets"):
        extract(delta(tmp_path / "d.pxd"), tmp_path / "out")


def test_verify_of_a_folder_checks_every_delta_in_it(tmp_path: Path) -> None:
    for name in ("a.pxd", "b.pxd"):
        delta(tmp_path / "repo" / name)
    (tmp_path / "repo" / "README.md").write_text("card")
    done = CliRunner().invoke(verify, [str(tmp_path / "repo")])
    assert done.exit_code == 0
    assert done.stdout.count("a.pxd") == done.stdout.count("b.pxd") == 1
    damaged(tmp_path / "repo" / "b.pxd")
    assert CliRunner().invoke(verify, [str(tmp_path / "repo")]).exit_code == 1
    (tmp_path / "empty").mkdir()
    assert "has no .pxd" in CliRunner().invoke(verify, [str(tmp_path / "empty")]).stdout
