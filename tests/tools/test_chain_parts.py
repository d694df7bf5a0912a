"""Parts of an update are no updates, and a chain that begins with an anchor folds into an anchor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peraxis_format as pxd
from peraxis_format.torch.updates import UpdateWriter, list_updates
from peraxis_tools.apply import apply
from peraxis_tools.chain import compact, log, update
from peraxis_tools.convert import to_wire
from peraxis_tools.errors import ToolError
from peraxis_tools.split import split
from tests.factories import write_checkpoint
from tests.tools.test_chain import start, stepped


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    first = start()
    return write_checkpoint(tmp_path / "old", first), write_checkpoint(tmp_path / "new", stepped(first, 1))


Use = Callable[[Path, tuple[Path, Path], Path], object]


@pytest.mark.parametrize(
    "use",
    [
        lambda part, pair, out: compact(pair[0], part, out / "x.pxd"),
        lambda part, pair, out: update(pair[0], pair[1], out / "x.pxd", after=part),
        lambda part, pair, out: to_wire(part, pair[0], out / "x", wire="index-value"),
        lambda part, pair, out: log(part),
    ],
)
def test_no_verb_takes_a_part_for_an_update(use: Use, pair: tuple[Path, Path], tmp_path: Path) -> None:
    update(*pair, tmp_path / "u.pxd")
    part = split(tmp_path / "u.pxd", tmp_path / "parts", parts=2).parts[0].path
    with pytest.raises(ToolError, match=r"is a part with \d of 5 modules; join the parts"):
        use(part, pair, tmp_path)
    assert not list(tmp_path.glob("x*"))
    part.rename(tmp_path / "parts" / "step-00000001.pxd")
    found, problems = list_updates(tmp_path / "parts")
    assert not found
    assert "is a part of an update" in next(iter(problems.values()))


def test_a_chain_that_begins_with_an_anchor_folds_into_an_anchor(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = load_file(pair[0] / "model.safetensors")
    writer = UpdateWriter(model, tmp_path / "chain", dtype=None, anchor_every=2)
    for _ in range(4):
        writer.step()
        for tensor in model.values():
            tensor.view(torch.uint8)[::5] += 1
    chain = sorted((tmp_path / "chain").glob("step-*"))
    folded = compact(pair[1], [tmp_path / "chain" / "anchor-00000000.pxd", *chain], tmp_path / "all.pxd")
    assert folded.result == writer.result
    assert set(folded.encodings) == {"full"}
    with pxd.open(tmp_path / "all.pxd") as file:
        assert all(entry.base is None for entry in file.manifest.modules)
    for source in (tmp_path / "all.pxd", [tmp_path / "chain" / "anchor-00000000.pxd", *chain]):
        apply(pair[1], source, tmp_path / "out", overwrite=True)
        with pxd.Safetensors.open(tmp_path / "out") as found:
            digests = {name: found.sha256(name) for name in found}
        with pxd.open(tmp_path / "all.pxd") as file:
            assert digests == {entry.name: entry.sha256 for entry in file.manifest.modules}
