"""The updates of a chain are verified together: each on the state after those before it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import peraxis
from peraxis_tools.cli import cli
from tests.factories import write_checkpoint
from tests.tools.test_chain import start, stepped


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """base, one, two and other; a chain of two updates on base."""
    first = start()
    second = stepped(first, 1, wild=0)
    for name, its in (
        ("base", first),
        ("one", second),
        ("two", stepped(second, 2, wild=0)),
        ("other", stepped(first, 3, wild=0)),
    ):
        write_checkpoint(tmp_path / name, its)
    (tmp_path / "chain").mkdir()
    peraxis.update(tmp_path / "base", tmp_path / "one", tmp_path / "chain" / "1.pxd")
    peraxis.update(tmp_path / "base", tmp_path / "two", tmp_path / "chain" / "2.pxd", after=tmp_path / "chain")
    return tmp_path


def verify(folder: Path, *names: str, base: str) -> tuple[int, str]:
    found = CliRunner().invoke(cli, ["verify", *(str(folder / name) for name in names), "--base", str(folder / base)])
    return found.exit_code, " ".join(found.output.split())


def test_a_chain_is_verified_on_its_base_in_any_order(folder: Path) -> None:
    for names in (("chain",), ("chain/2.pxd", "chain/1.pxd")):
        code, said = verify(folder, *names, base="base")
        assert code == 0
        assert "base is the one that this delta was made for" in said
        assert "follows 1.pxd, whose result is the one that it was made for" in said
        assert said.endswith("2 of 2 verified")


def test_a_chain_on_another_base_fails_as_a_whole(folder: Path) -> None:
    code, said = verify(folder, "chain", base="other")
    assert code == 1
    assert said.count("E404 base tensor with other bytes") == 2
    assert "pass that one too" not in said


def test_an_update_alone_names_the_one_before_it(folder: Path) -> None:
    code, said = verify(folder, "chain/2.pxd", base="base")
    assert code == 1
    assert "it follows update sha256:" in said
    assert verify(folder, "chain/2.pxd", base="one")[0] == 0


def test_an_update_whose_predecessor_is_damaged_is_not_verified_on_it(folder: Path) -> None:
    path = folder / "chain" / "1.pxd"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, said = verify(folder, "chain", base="base")
    assert code == 1
    assert said.endswith("0 of 2 verified")


def test_a_whole_state_says_that_it_has_no_base(folder: Path) -> None:
    import torch

    peraxis.UpdateWriter(torch.nn.Linear(4, 4), folder / "anchors").step()
    code, said = verify(folder, "anchors", base="base")
    assert code == 0
    assert "holds whole tensors and needs no base" in said
