"""Chains at a URL or on the hub are written there, listed by reading only headers, applied and compacted."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from peraxis_tools.chain import log, update
from peraxis_tools.cli import cli
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.remote import files as remote
from tests.factories import random_storage, sign_module, write_checkpoint, write_delta
from tests.tools.test_chain import Tensors, assert_holds, start, stepped

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def states(tmp_path: Path) -> list[Tensors]:
    """The folders state-0 to state-3."""
    found = [start()]
    for seed in range(1, 4):
        found.append(stepped(found[-1], seed))
    for i, state in enumerate(found):
        write_checkpoint(tmp_path / f"state-{i}", state)
    return found


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/run"


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def publish(states: list[Tensors], url: str, tmp_path: Path) -> None:
    """Write the chain of the states to a URL with the command, one update after the other."""
    for i in range(1, len(states)):
        after = ["--after", url] if i > 1 else []
        done = run("update", tmp_path / "state-0", tmp_path / f"state-{i}", *after, "-o", f"{url}/step-{i}.pxd", "-q")
        assert done.exit_code == 0, (done.output, done.exception)
        assert f"{url}/step-{i}.pxd" in done.output.replace("\n", "")


def test_a_chain_is_written_to_a_url_listed_and_applied_from_it(
    states: list[Tensors], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(states, url, tmp_path)
    system = fsspec.filesystem("memory")
    names = [name.rpartition("/")[2] for name in system.ls(url.removeprefix("memory:/"), detail=False)]
    assert sorted(names) == ["step-1.pxd", "step-2.pxd", "step-3.pxd"]
    for source in (url, f"{url}/step-*.pxd"):
        done = run("apply", tmp_path / "state-0", source, "-o", tmp_path / "out", "--overwrite", "-q")
        assert done.exit_code == 0, (done.output, done.exception)
        assert_holds(tmp_path / "out", states[3])

    with monkeypatch.context() as patch:
        patch.setattr(remote.RemoteFile, "download", lambda *_, **__: pytest.fail("log fetches a whole file"))
        done = run("log", url, "--json")
    found = json.loads(done.stdout)
    assert found["path"] == url
    assert [entry["name"] for entry in found["updates"]] == ["step-1.pxd", "step-2.pxd", "step-3.pxd"]
    # A copy of the chain in a folder gives the same result.
    (tmp_path / "here").mkdir()
    for name in names:
        system.get_file(f"{url.removeprefix('memory:/')}/{name}", str(tmp_path / "here" / name))
    assert log(tmp_path / "here").updates == log(url).updates


def test_a_folded_update_beside_the_chain_is_written_and_left_out(
    states: list[Tensors], url: str, tmp_path: Path
) -> None:
    publish(states, url, tmp_path)
    done = run("compact", url, "--base", tmp_path / "state-0", "-o", f"{url}/1-to-3.pxd", "-q")
    assert done.exit_code == 0, (done.output, done.exception)
    assert [entry.name for entry in log(url).folded] == ["1-to-3.pxd"]
    for source in (url, f"{url}/1-to-3.pxd"):
        done = run("apply", tmp_path / "state-0", source, "-o", tmp_path / "out", "--overwrite", "-q")
        assert done.exit_code == 0, (done.output, done.exception)
        assert_holds(tmp_path / "out", states[3])


def test_a_gap_at_a_url_is_refused_by_name(states: list[Tensors], url: str, tmp_path: Path) -> None:
    publish(states, url, tmp_path)
    fsspec.filesystem("memory").rm(f"{url.removeprefix('memory:/')}/step-2.pxd")
    with pytest.raises(CheckFailedError, match=r"step-3\.pxd: a gap; update sha256:"):
        log(url)
    done = run("apply", tmp_path / "state-0", url, "-o", tmp_path / "out", "-q")
    assert isinstance(done.exception, CheckFailedError)
    assert "a gap" in str(done.exception)


def test_what_is_there_is_replaced_with_overwrite_alone_and_a_failure_leaves_nothing(
    states: list[Tensors], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, target = fsspec.filesystem("memory"), f"{url}/step-1.pxd"
    plain = type(system).put_file

    def broken(self: Any, local: str, path: str, **options: Any) -> None:
        plain(self, local, path, **options)
        raise OSError("the link is down")

    with monkeypatch.context() as patch:
        patch.setattr(type(system), "put_file", broken)
        with pytest.raises(ToolError, match=r"cannot be written .*the link is down"):
            update(tmp_path / "state-0", tmp_path / "state-1", target)
    assert system.find(url.removeprefix("memory:/")) == []
    first = update(tmp_path / "state-0", tmp_path / "state-1", target)
    assert str(first.path) == target
    with pytest.raises(ToolError, match="exists already"):
        update(tmp_path / "state-0", tmp_path / "state-2", target)
    second = update(tmp_path / "state-0", tmp_path / "state-2", target, overwrite=True)
    assert log(url).updates[0].content_id == second.content_id != first.content_id


def test_a_folder_without_deltas_or_with_others_is_named(states: list[Tensors], url: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe(f"{url.removeprefix('memory:/')}/README.md", b"-")
    for source in (url, str(tmp_path), f"{url}/*.pxd"):
        with pytest.raises(ToolError, match=r"has no \.pxd files"):
            log(source)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_delta(tmp_path / f"{name}.pxd", [sign_module(rng, "w", random_storage(rng, (16, 24)))])
    done = run("apply", tmp_path / "state-0", tmp_path, "-o", tmp_path / "out", "-q")
    assert isinstance(done.exception, ToolError)
    assert "has 2 .pxd files, and a.pxd is not an update of a chain; name one file" in str(done.exception)


def test_a_repository_on_the_hub_is_a_folder_too(
    states: list[Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    repository = tmp_path / "repository"
    (repository / "run").mkdir(parents=True)
    files: list[Path] = []
    for i in range(1, 4):
        files.append(repository / "run" / f"step-{i}.pxd")
        update(tmp_path / "state-0", tmp_path / f"state-{i}", files[-1], after=files[:-1])

    class Hub:
        def list_repo_files(self, name: str, revision: str | None = None) -> list[str]:
            assert (name, revision) == ("me/run", "v1")
            return [path.relative_to(repository).as_posix() for path in repository.rglob("*.pxd")]

    def download(name: str, file: str, revision: str | None = None) -> str:
        assert (name, revision) == ("me/run", "v1")
        return str(repository / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    done = run("apply", tmp_path / "state-0", "hf://me/run@v1/run", "-o", tmp_path / "out", "-q")
    assert done.exit_code == 0, (done.output, done.exception)
    assert_holds(tmp_path / "out", states[3])
    assert [entry.name for entry in log("hf://me/run/run@v1").updates] == [path.name for path in files]
    for path in files:
        path.rename(repository / path.name)
    assert [entry.name for entry in log("me/run@v1").updates] == [path.name for path in files]
