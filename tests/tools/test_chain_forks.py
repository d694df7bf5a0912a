"""A fork in a folder of updates is refused before it is written, and named where the folder is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import peraxis
from peraxis_tools.cli import cli
from peraxis_tools.errors import CheckFailedError
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


def said(*words: str | Path) -> tuple[int, str]:
    found = CliRunner().invoke(cli, list(map(str, words)))
    return found.exit_code, " ".join(found.output.split()) or str(found.exception)


def test_an_update_that_would_fork_its_folder_is_not_written(folder: Path) -> None:
    with pytest.raises(CheckFailedError, match=r"2\.pxd: would be a fork, because .*1\.pxd was made .*--after"):
        peraxis.update(folder / "base", folder / "two", folder / "chain" / "2.pxd")
    assert [path.name for path in (folder / "chain").iterdir()] == ["1.pxd"]
    peraxis.update(folder / "base", folder / "two", folder / "chain" / "2.pxd", after=folder / "chain")


def test_an_update_may_be_replaced_repeated_elsewhere_and_folded(folder: Path) -> None:
    chain = folder / "chain"
    peraxis.update(folder / "base", folder / "one", chain / "1.pxd", overwrite=True)
    peraxis.update(folder / "base", folder / "two", folder / "elsewhere.pxd")
    peraxis.update(folder / "base", folder / "two", chain / "2.pxd", after=chain)
    peraxis.update(folder / "base", folder / "two", chain / "1-2.pxd")
    assert [entry.name for entry in peraxis.log(chain).updates] == ["1.pxd", "2.pxd"]


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
