"""The inputs of a verb are the same in Python and on the command line: folders of updates, checkpoints, URLs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import peraxis
import peraxis_format as pxd
from peraxis_tools.cli import cli
from peraxis_tools.errors import ToolError
from tests.factories import write_checkpoint
from tests.tools.test_chain import start, stepped


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """base, one, two, and a chain of two updates from the first to the last."""
    first = start()
    second = stepped(first, 1, wild=0)
    states = [first, second, stepped(second, 2, wild=0)]
    for name, its in zip(("base", "one", "two"), states, strict=True):
        write_checkpoint(tmp_path / name, its)
    (tmp_path / "chain").mkdir()
    peraxis.update(tmp_path / "base", tmp_path / "one", tmp_path / "chain" / "1.pxd")
    peraxis.update(tmp_path / "base", tmp_path / "two", tmp_path / "chain" / "2.pxd", after=tmp_path / "chain")
    return tmp_path / "chain"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def weights(folder: Path) -> dict[str, Any]:
    with pxd.Safetensors.open(folder) as file:
        return {name: file.read(name).copy() for name in file}


def test_python_takes_a_folder_or_a_url_of_updates_as_the_command_line_does(chain: Path, tmp_path: Path) -> None:
    wanted = weights(tmp_path / "two")
    for number, source in enumerate((chain, f"file://{chain}", sorted(chain.glob("*.pxd")))):
        found = weights(peraxis.apply(tmp_path / "base", source, tmp_path / f"state{number}").path)
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    folded = peraxis.compact(tmp_path / "base", chain, tmp_path / "folded.pxd")
    assert folded.result == peraxis.log(chain).updates[-1].result


def test_python_compares_a_delta_with_a_checkpoint_as_the_command_line_does(chain: Path, tmp_path: Path) -> None:
    first = chain / "1.pxd"
    assert peraxis.diff(first, tmp_path / "one", base=tmp_path / "base").equal
    assert not peraxis.diff(first, tmp_path / "two", base=tmp_path / "base").equal
    with pytest.raises(ToolError, match=r"one: is a checkpoint; pass base \(--base\)"):
        peraxis.diff(first, tmp_path / "one")


def test_a_folder_of_parts_is_joined_and_not_applied(chain: Path, tmp_path: Path) -> None:
    whole, parts = chain / "1.pxd", tmp_path / "parts"
    peraxis.split(whole, parts, parts=2)
    for attempt in (
        lambda: peraxis.apply(tmp_path / "base", parts, tmp_path / "new"),
        lambda: peraxis.compact(tmp_path / "base", parts, tmp_path / "new.pxd"),
    ):
        with pytest.raises(ToolError, match=r"has 2 \.pxd files, and .* is a part of a delta; join the parts"):
            attempt()
    assert invoke("merge", parts, "-o", tmp_path / "joined.pxd").exit_code == 0
    assert (tmp_path / "joined.pxd").read_bytes() == whole.read_bytes()
    with pytest.raises(ToolError, match=r"1\.pxd: is none of the parts of a delta"):
        peraxis.merge_parts([chain / "1.pxd", chain / "2.pxd"], tmp_path / "wrong.pxd")


def test_sign_and_publish_refuse_a_url_by_its_name(chain: Path, tmp_path: Path) -> None:
    url = f"file://{chain}/1.pxd"
    for arguments in (
        ("sign", url, "--private-key", tmp_path / "key.pem"),
        ("publish", "me/delta", url, "--dry-run", tmp_path / "repo"),
    ):
        assert f"{url}: is a URL and not a file; fetch it with `pull` first" in str(invoke(*arguments).exception)


def test_a_fetched_file_that_is_no_delta_is_named_by_its_url(chain: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/base/model.safetensors"
    error = invoke("pull", url, "-o", tmp_path / "pulled").exception
    assert isinstance(error, pxd.PxdError)
    assert url in str(error)
    assert ".peraxis~" not in str(error)


def test_what_convert_cannot_read_is_called_what_it_is(chain: Path, tmp_path: Path) -> None:
    base, new = tmp_path / "base", tmp_path / "new.pxd"
    with pytest.raises(ToolError, match=r"1\.pxd: is already a \.pxd"):
        peraxis.convert(chain / "1.pxd", new, to="pxd", base=base)
    assert "is already a .pxd" in str(
        invoke("convert", chain / "1.pxd", "--to", "pxd", "--base", base, "-o", new).exception
    )
    with pytest.raises(ToolError, match=r"model\.safetensors: is neither a \.pt delta nor a wire; `compress` makes"):
        peraxis.convert(tmp_path / "two" / "model.safetensors", new, to="pxd", base=base)


def test_a_load_with_delta_and_base_exchanged_says_so(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="pass them in the other order"):
        peraxis.load_model(chain / "1.pxd", tmp_path / "base")
