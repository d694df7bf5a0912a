"""The card of an update says which one it follows, and its commands rebuild the state."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import peraxis
import peraxis_format as pxd
from peraxis_tools.chain import update
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.cli import cli
from peraxis_tools.publish import publish
from tests.factories import random_storage, write_checkpoint

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """Three updates of the four states in tmp_path/s<n>; only the second one has a `previous`."""
    weights = random_storage(np.random.default_rng(0), (64, 64))
    for i in range(4):
        weights = weights.copy()
        weights[i] ^= 1
        write_checkpoint(tmp_path / f"s{i}", {NAME: (weights, pxd.DType.BF16)})
    made: list[Path] = []
    for i in range(3):
        base, after = (0, made[:1]) if i == 1 else (i, [])
        made.append(update(tmp_path / f"s{base}", tmp_path / f"s{i + 1}", tmp_path / f"{i + 1}.pxd", after=after).path)
    return made


def sections(folder: Path, files: list[Path], **options: str) -> dict[str, str]:
    """By file its section of the card."""
    publish("me/run", files, dry_run=folder, **options)
    card = (folder / "README.md").read_text()
    return {path.name: card.partition(f'delta "{path.name}" -->')[2].partition("<!--")[0] for path in files}


def run(section: str, repository: Path, folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the commands of a section in a folder, with copies for the downloads; returns the written checkpoint."""
    monkeypatch.chdir(folder)
    for line in section.partition("```sh\n")[2].partition("```")[0].splitlines():
        words = [str(base) if word == "BASE" else word for word in shlex.split(line)]
        if words[:2] == ["hf", "download"]:
            target = folder / words[-1]
            target.mkdir(exist_ok=True)
            for path in repository.glob("*.pxd" if "--include" in words else words[3]):
                shutil.copy(path, target)
        elif words[0] == "peraxis-tools":
            done = CliRunner().invoke(cli, words[1:])
            assert done.exit_code == 0, (line, done.output, done.exception)
    return folder / "model"


def weights_of(folder: Path) -> bytes:
    with open_checkpoint(folder) as opened:
        return opened.tensors.read(NAME).tobytes()


def test_the_commands_of_each_update_s_card_write_the_state_after_the_chain(
    chain: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sections(tmp_path / "repo", chain)
    for i, path in enumerate(chain):
        (tmp_path / f"run{i}").mkdir()
        made = run(found[path.name], tmp_path / "repo", tmp_path / f"run{i}", tmp_path / "s0", monkeypatch)
        assert weights_of(made) == weights_of(tmp_path / ("s1" if i == 0 else "s3"))
        assert "full fine-tune" not in found[path.name]
        with pxd.open(path) as file:
            assert f"the state after it is `{file.manifest.result}`" in found[path.name]
    with pxd.open(chain[0]) as first, pxd.open(chain[1]) as second:
        assert f"- follows 1.pxd, content ID `{first.content_id}`" in found["2.pxd"]
        assert f"- follows 2.pxd, content ID `{second.content_id}`" in found["3.pxd"]
    assert "An exact update of s0" in found["1.pxd"]


def test_an_update_whose_previous_is_not_here_names_it_by_its_content_id(chain: list[Path], tmp_path: Path) -> None:
    with pxd.open(chain[0]) as file:
        previous = file.content_id
    found = sections(tmp_path / "repo", [chain[1]])["2.pxd"]
    assert f"- follows content ID `{previous}`" in found
    assert "apply BASE updates" in found


def test_the_base_of_a_chain_is_that_of_its_first_update(chain: list[Path], tmp_path: Path) -> None:
    for name, section in sections(tmp_path / "repo", chain, base_id="me/base").items():
        assert "--base me/base" in section, name


def test_a_whole_state_needs_no_base_s_weights(
    chain: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {NAME: torch.ones(64, 64, dtype=torch.bfloat16)}
    writer = peraxis.UpdateWriter(state, tmp_path / "trained")
    writer.step()
    state[NAME][0, :3] = 2.0
    writer.step()
    files = sorted((tmp_path / "trained").glob("*.pxd"))
    found = sections(tmp_path / "repo", files)
    (tmp_path / "one").mkdir()
    made = run(found[files[0].name], tmp_path / "repo", tmp_path / "one", tmp_path / "s2", monkeypatch)
    assert set(np.frombuffer(weights_of(made), np.uint16)) == {0x3F80}
    assert "needs no base" in found[files[0].name]
    assert "- base" not in found[files[0].name]
    assert "verify anchor-00000000.pxd --expect" in found[files[0].name]
    (tmp_path / "both").mkdir()
    made = run(found[files[1].name], tmp_path / "repo", tmp_path / "both", tmp_path / "s2", monkeypatch)
    assert set(np.frombuffer(weights_of(made), np.uint16)) == {0x3F80, 0x4000}
