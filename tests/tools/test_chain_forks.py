"""A fork in a folder of updates is refused before it is written, and named where the folder is read."""

from __future__ import annotations

import os
import threading
import time
import uuid
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from click.testing import CliRunner

import peraxis
from peraxis_format import files, name_lock
from peraxis_tools.chain import siblings
from peraxis_tools.chain.siblings import refuse_disorder
from peraxis_tools.cli import cli
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.outputs.remote_output import names_beside
from tests.factories import write_checkpoint
from tests.tools.test_chain import start, stepped


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """base, one, two; a chain with an update from base to one."""
    first = start()
    second = stepped(first, 1, wild=0)
    for name, its in (("base", first), ("one", second), ("two", stepped(second, 2, wild=0))):
        write_checkpoint(tmp_path / name, its)
    (tmp_path / "chain").mkdir()
    peraxis.update(tmp_path / "base", tmp_path / "one", tmp_path / "chain" / "1.pxd")
    return tmp_path


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, folder: Path) -> str:
    """A folder or a URL with an update from base to one, 1.pxd."""
    return str(folder / "chain") if request.param == "folder" else at_url(folder)


def at_url(folder: Path) -> str:
    """A URL with an update from base to one, 1.pxd."""
    pytest.importorskip("fsspec")
    url = f"memory://{uuid.uuid4().hex}/run"
    peraxis.update(folder / "base", folder / "one", f"{url}/1.pxd")
    return url


def said(*words: str | Path) -> tuple[int, str]:
    found = CliRunner().invoke(cli, list(map(str, words)))
    return found.exit_code, " ".join(found.output.split()) or str(found.exception)


def test_an_update_that_would_fork_its_folder_is_not_written(folder: Path) -> None:
    with pytest.raises(CheckFailedError, match=r"2\.pxd: would be a fork, because .*1\.pxd was made .*--after"):
        peraxis.update(folder / "base", folder / "two", folder / "chain" / "2.pxd")
    assert [path.name for path in (folder / "chain").iterdir()] == ["1.pxd"]
    peraxis.update(folder / "base", folder / "two", folder / "chain" / "2.pxd", after=folder / "chain")


def test_an_update_that_would_fork_its_folder_or_url_is_not_written(folder: Path, place: str) -> None:
    with pytest.raises(CheckFailedError, match=r"/2\.pxd: would be a fork, because .*1\.pxd was made .*--after"):
        peraxis.update(folder / "base", folder / "two", f"{place}/2.pxd")
    assert [entry.name for entry in peraxis.log(place).updates] == ["1.pxd"]
    peraxis.update(folder / "base", folder / "two", f"{place}/1.pxd", overwrite=True)
    assert [entry.name for entry in peraxis.log(place).updates] == ["1.pxd"]


@pytest.mark.parametrize("old", ["base", "one"])
def test_a_second_successor_of_an_update_is_not_written(folder: Path, place: str, old: str) -> None:
    peraxis.update(folder / "base", folder / "two", f"{place}/2.pxd", after=f"{place}/1.pxd")
    write_checkpoint(folder / "three", stepped(start(), 3))
    after = [f"{place}/1.pxd"] if old == "base" else []
    with pytest.raises(CheckFailedError, match=r"/3\.pxd: would be a fork, because .*2\.pxd was made .*--after"):
        peraxis.update(folder / old, folder / "three", f"{place}/3.pxd", after=after)
    assert [entry.name for entry in peraxis.log(place).updates] == ["1.pxd", "2.pxd"]
    peraxis.update(folder / "base", folder / "three", f"{place}/3.pxd", after=[f"{place}/1.pxd", f"{place}/2.pxd"])
    peraxis.compact(folder / "base", [f"{place}/{i}.pxd" for i in (1, 2)], f"{place}/1-2.pxd")
    assert [entry.name for entry in peraxis.log(place).updates] == ["1.pxd", "2.pxd", "3.pxd"]


def test_an_update_that_returns_to_an_earlier_state_follows_by_its_name(folder: Path, place: str) -> None:
    with pytest.raises(CheckFailedError, match=r"/2\.pxd: returns to an earlier state.*--after"):
        peraxis.update(folder / "one", folder / "base", f"{place}/2.pxd")
    names = [f"{place}/{i}.pxd" for i in range(1, 6)]
    for i in range(1, 5):
        peraxis.update(folder / "base", folder / ("base", "one")[i % 2], names[i], after=names[:i])
    assert [entry.name for entry in peraxis.log(place).updates] == [f"{i}.pxd" for i in range(1, 6)]


def test_a_file_at_a_url_that_is_no_update_is_passed_over_and_one_that_cannot_be_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec, place = pytest.importorskip("fsspec"), at_url(folder)
    system = fsspec.filesystem("memory")
    system.pipe(f"{place}/0.pxd", b"nothing")
    peraxis.update(folder / "base", folder / "two", f"{place}/2.pxd", after=f"{place}/1.pxd")

    def broken(*_: object, **__: object) -> bytes:
        raise OSError("the link is down")

    monkeypatch.setattr(type(system), "cat_file", broken)
    with pytest.raises(ToolError, match=r"0\.pxd: cannot be read .*the link is down"):
        peraxis.update(folder / "base", folder / "two", f"{place}/3.pxd")


@pytest.mark.parametrize("call", ["size", "cat_file"])
def test_an_update_at_a_url_that_is_deleted_while_its_folder_is_read_is_passed_over(
    call: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec, place = pytest.importorskip("fsspec"), at_url(folder)
    system = fsspec.filesystem("memory")
    read = getattr(type(system), call)

    def after_it_is_deleted(its: Any, path: str, *arguments: Any, **options: Any) -> Any:
        if path.endswith("1.pxd") and its.exists(path):
            its.rm(path)
        return read(its, path, *arguments, **options)

    monkeypatch.setattr(type(system), call, after_it_is_deleted)
    peraxis.update(folder / "one", folder / "two", f"{place}/2.pxd")
    assert [PurePosixPath(name).name for name in names_beside(f"{place}/2.pxd")] == ["2.pxd"]


def test_of_two_runs_at_one_moment_the_second_sees_the_update_of_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def slow(*arguments: Any, **options: Any) -> None:
        refuse_disorder(*arguments, **options)
        time.sleep(0.3)

    def run(name: str) -> None:
        try:
            peraxis.update(folder / "one", folder / name, folder / "chain" / f"{name}.pxd")
        except CheckFailedError as error:
            told.append(str(error))

    write_checkpoint(folder / "three", stepped(start(), 3))
    monkeypatch.setattr("peraxis_tools.chain.write.refuse_disorder", slow)
    threads = [threading.Thread(target=run, args=(name,)) for name in ("two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ["would be a fork" in text for text in told] == [True]
    assert len(peraxis.log(folder / "chain").updates) == 2
    assert not list((folder / "chain").glob(".*"))


def test_a_run_says_for_which_process_it_waits_and_ends_when_that_takes_too_long(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(siblings, "_TURN_SECONDS", 0.2)
    monkeypatch.setattr(files, "_PATIENCE", 0.05)
    told = rf"2\.pxd: another run \(process {os.getpid()}\) is writing into its folder"
    with name_lock(folder / "chain", siblings._TURN), pytest.raises(ToolError, match=told) as caught:
        peraxis.update(folder / "one", folder / "two", folder / "chain" / "2.pxd")
    assert caught.value.exit_status == 2
    assert [f"waits for process {os.getpid()}, " in message for message in caplog.messages] == [True]
    peraxis.update(folder / "one", folder / "two", folder / "chain" / "2.pxd")


def test_an_update_may_be_replaced_repeated_elsewhere_and_folded(folder: Path) -> None:
    chain = folder / "chain"
    peraxis.update(folder / "base", folder / "one", chain / "1.pxd", overwrite=True)
    peraxis.update(folder / "base", folder / "two", folder / "elsewhere.pxd")
    peraxis.update(folder / "base", folder / "two", chain / "2.pxd", after=chain)
    peraxis.update(folder / "base", folder / "two", chain / "1-2.pxd")
    assert [entry.name for entry in peraxis.log(chain).updates] == ["1.pxd", "2.pxd"]


@pytest.mark.parametrize("followed", [False, True])
def test_an_update_written_twice_is_noted_as_such_though_it_names_no_predecessor(
    followed: bool, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chain = folder / "chain"
    peraxis.update(folder / "base", folder / "two", chain / "2.pxd", after=chain)
    if followed:
        write_checkpoint(folder / "three", stepped(start(), 3, wild=0))
        peraxis.update(folder / "two", folder / "three", chain / "3.pxd")
    assert not caplog.messages
    peraxis.update(folder / "one", folder / "two", chain / "again.pxd")
    assert [f"again.pxd: repeats {chain / '2.pxd'}, " in message for message in caplog.messages] == [True]
    (chain / "again.pxd").unlink()
    assert len(peraxis.log(chain).updates) == 2 + followed


def test_a_fork_is_named_with_its_remedy_by_each_verb_that_reads_the_folder(folder: Path) -> None:
    chain = folder / "chain"
    peraxis.update(folder / "base", folder / "two", folder / "2.pxd")
    (folder / "2.pxd").rename(chain / "2.pxd")
    for words in (("log", chain), ("apply", folder / "base", chain, "-o", folder / "out")):
        code, text = said(*words)
        assert code == 1
        assert "a fork; both were made on one state; leave one of them out, or write it again with" in text


def test_verify_tells_that_a_folder_is_not_one_chain(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    chain = folder / "chain"
    said("verify", chain, "--base", folder / "base")
    assert not caplog.messages
    peraxis.update(folder / "base", folder / "two", folder / "2.pxd")
    (folder / "2.pxd").rename(chain / "2.pxd")
    assert said("verify", chain, "--base", folder / "base")[0] == 0
    assert any("is not one chain" in message and "a fork" in message for message in caplog.messages)


def test_folds_from_one_base_stand_side_by_side(folder: Path) -> None:
    chain, folds = folder / "chain", folder / "folds"
    folds.mkdir()
    peraxis.compact(folder / "base", chain, folds / "1.pxd")
    peraxis.update(folder / "base", folder / "two", chain / "2.pxd", after=chain)
    peraxis.compact(folder / "base", chain, folds / "1-2.pxd")
    assert sorted(path.name for path in folds.iterdir()) == ["1-2.pxd", "1.pxd"]


def test_a_fold_that_repeats_an_update_of_its_folder_is_noted_as_such(
    folder: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The chain comes back to the state after its first update."""
    peraxis.update(folder / "base", folder / "two", f"{place}/2.pxd", after=place)
    peraxis.update(folder / "base", folder / "one", f"{place}/3.pxd", after=place)
    assert not caplog.messages
    peraxis.compact(folder / "base", place, f"{place}/fold.pxd")
    (noted,) = caplog.messages
    assert "/fold.pxd: repeats" in noted
    assert "1.pxd" in noted
    with pytest.raises(CheckFailedError, match="is the same update as"):
        peraxis.log(place)
