"""Chains of a trainer and of `update`: which of them the other continues."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import peraxis
from peraxis_format.errors import LiveModelError
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.updates import UpdateError, UpdateWriter, follow
from peraxis_tools.errors import CheckFailedError


def saved(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def test_update_continues_the_chain_of_a_trainer_which_goes_on_after_it(tmp_path: Path) -> None:
    weights = {"a": torch.arange(64).bfloat16()}
    UpdateWriter(weights, tmp_path / "run").step()
    before = saved(tmp_path / "before", weights)
    weights["a"] += 1
    after = saved(tmp_path / "after", weights)
    peraxis.update(before, after, tmp_path / "run" / "step-00000001.pxd", after=tmp_path / "run")
    writer = UpdateWriter(weights, tmp_path / "run")
    assert writer.step_number == 1
    assert writer.step().changed == 0
    live = {"a": torch.zeros(64).bfloat16()}
    assert follow(live, tmp_path / "run").poll().step == 2
    assert torch.equal(live["a"], weights["a"])


@pytest.mark.parametrize("name", ["step-00000001.pxd", "1.pxd"])
def test_a_chain_of_update_is_refused_by_a_trainer_with_the_reason(tmp_path: Path, name: str) -> None:
    weights = {"a": torch.arange(64).bfloat16()}
    before = saved(tmp_path / "before", weights)
    weights["a"] += 1
    (tmp_path / "run").mkdir()
    peraxis.update(before, saved(tmp_path / "after", weights), tmp_path / "run" / name)
    with pytest.raises(LiveModelError, match=r"no anchor to begin with, like a chain of `peraxis-tools update`"):
        UpdateWriter(weights, tmp_path / "run")


def chain_of_a_trainer(tmp_path: Path, place: str | Path) -> tuple[dict[str, torch.Tensor], list[Path]]:
    """Publish an anchor and a step. Returns the weights, and folders of their states: of the step, and later ones."""
    weights = {"a": torch.arange(64).bfloat16()}
    writer = UpdateWriter(weights, place)
    writer.step()
    weights["a"] += 1
    writer.step()
    return weights, [saved(tmp_path / f"state-{i + 1}", {"a": weights["a"] + i}) for i in range(3)]


@pytest.mark.parametrize("place", ["folder", "url"])
@pytest.mark.parametrize("name", ["hotfix.pxd", "step-00000003.pxd", "step-00000001a.pxd", "anchor-00000002.pxd"])
def test_update_goes_on_in_a_trainers_chain_under_the_name_of_the_next_step_alone(
    name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(tmp_path / "run") if place == "folder" else f"memory://{uuid.uuid4().hex}/run"
    weights, states = chain_of_a_trainer(tmp_path, run)
    wanted = r"follows step-00000001\.pxd of a trainer's chain, .*; write it to step-00000002\.pxd$"
    with monkeypatch.context() as patch:
        patch.setattr("peraxis_tools.chain.write.write_update", None)  # it is refused before the work
        with pytest.raises(CheckFailedError, match=rf"{name}: {wanted}"):
            peraxis.update(states[0], states[1], f"{run}/{name}", after=run)
    # The state before it is that of the last step, which is only known when the update is made.
    with pytest.raises(CheckFailedError, match=rf"{name}: {wanted}"):
        peraxis.update(states[0], states[1], f"{run}/{name}")
    peraxis.update(states[0], states[1], f"{run}/step-00000002.pxd", after=run)
    live = {"a": torch.zeros(64).bfloat16()}
    assert follow(live, run).poll().step == 2
    assert torch.equal(live["a"], weights["a"] + 1)


def test_update_takes_any_name_elsewhere_and_for_a_folded_chain(tmp_path: Path) -> None:
    _, states = chain_of_a_trainer(tmp_path, tmp_path / "run")
    (tmp_path / "own").mkdir()
    peraxis.update(states[0], states[1], tmp_path / "own" / "hotfix.pxd", after=tmp_path / "run")
    peraxis.compact(states[0], tmp_path / "run", tmp_path / "run" / "whole.pxd")
    live = {"a": torch.zeros(64).bfloat16()}
    found = follow(live, tmp_path / "run").poll()
    assert (found.step, found.lag, dict(found.waiting)) == (1, 0, {})
    assert UpdateWriter(live, tmp_path / "run").step_number == 1


def misnamed(tmp_path: Path, count: int) -> tuple[Path, Path]:
    """The folder of a trainer with updates after its last step under other names, and the first of these files."""
    run, own = tmp_path / "run", tmp_path / "own"
    _, states = chain_of_a_trainer(tmp_path, run)
    own.mkdir()
    names = ["hotfix.pxd", "step-00000002.pxd"][:count]
    for number, name in enumerate(names):
        after = [run, *(own / other for other in names[:number])]
        peraxis.update(states[0], states[number + 1], own / name, after=after)
    for name in names:
        (own / name).rename(run / name)
    return run, run / "hotfix.pxd"


def test_a_follower_names_an_update_that_it_passes_over_because_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file = misnamed(tmp_path, 1)
    (run / "other.pxd").write_bytes(b"no update")
    live = {"a": torch.zeros(64).bfloat16()}
    follower = follow(live, run)
    found = follower.poll()
    assert (found.step, found.lag, list(found.waiting)) == (1, 0, [file])
    wanted = "hotfix.pxd: is passed over, because its name is not that of a step; rename it to step-00000002.pxd, "
    assert wanted in found.waiting[file]
    with pytest.raises(UpdateError, match="is passed over, because its name"):
        follower.apply(file)
    with monkeypatch.context() as patch:
        patch.setattr("peraxis_format.torch.updates.listing.DeltaFile", None)  # no file is opened twice
        assert follower.poll().waiting == found.waiting
    (run / "step-00000002.pxd").hardlink_to(file)
    found = follower.poll()
    assert (found.step, dict(found.waiting)) == (2, {})  # the name does not matter any more


def test_a_follower_tells_a_fork_under_another_name(tmp_path: Path) -> None:
    run, file = misnamed(tmp_path, 1)
    file.rename(tmp_path / "kept")
    weights = {"a": torch.zeros(64).bfloat16()}
    UpdateWriter(weights, run).step()
    (tmp_path / "kept").rename(file)
    found = follow({"a": torch.zeros(64).bfloat16()}, run).poll()
    assert "step-00000002.pxd follows the same state; move it away" in found.waiting[file]
    assert UpdateWriter(weights, run).step_number == 2  # the chain is whole without it


@pytest.mark.parametrize("count", [1, 2])
def test_a_trainer_does_not_fork_a_chain_whose_updates_have_other_names(count: int, tmp_path: Path) -> None:
    run, file = misnamed(tmp_path, count)
    weights = {"a": torch.zeros(64).bfloat16()}
    renamed = "step-00000002.pxd to step-00000003.pxd, then " if count == 2 else ""
    with pytest.raises(LiveModelError, match=rf"rename {renamed}hotfix.pxd to step-00000002.pxd, or move them away"):
        UpdateWriter(weights, run)
    if count == 2:
        (run / "step-00000002.pxd").rename(run / "step-00000003.pxd")
    file.rename(run / "step-00000002.pxd")
    assert UpdateWriter(weights, run).step_number == 1 + count
    with DeltaFile(run / f"step-{1 + count:08d}.pxd") as last:
        assert UpdateWriter(weights, run).result == last.manifest.result
