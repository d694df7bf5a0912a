"""Mistakes of a trainer are refused with their reason, before anything is published."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from peraxis_format.errors import LiveModelError
from peraxis_format.torch.updates import UpdateWriter, follow


def weights() -> dict[str, Any]:
    return {"a": torch.arange(64).bfloat16()}


def test_a_trainer_that_was_overtaken_publishes_nothing_more(tmp_path: Path) -> None:
    model = weights()
    writer = UpdateWriter(model, tmp_path, anchor_every=2)
    for _ in range(2):
        writer.step()
    stale = UpdateWriter(model, tmp_path)
    for _ in range(3):
        model["a"] += 1
        writer.step()
    writer.prune(anchors=1)  # the step that the stale one would write is gone
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileExistsError, match="another process publishes there"):
        stale.step()
    assert sorted(tmp_path.iterdir()) == before
    live = {"a": torch.zeros(64).bfloat16()}
    assert follow(live, tmp_path).poll().step == writer.step().step - 1


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.empty(3, 3, device="meta"), "a: on the meta device"),
        (torch.ones(3, 3).to_sparse(), r"a: torch\.sparse_coo, without dense weights"),
    ],
)
def test_weights_that_are_not_there_are_refused_by_name(tensor: torch.Tensor, reason: str, tmp_path: Path) -> None:
    with pytest.raises(LiveModelError, match=reason):
        UpdateWriter({"a": tensor}, tmp_path).step()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("others", [{}, {"w": torch.ones(3)}])
def test_a_model_with_nothing_to_publish_and_a_tensor_without_elements_are_refused(
    others: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    reason = r"none: has no elements \(shape \[0, 5\]\)" if others else "has no tensors to publish"
    model = others | {"none": torch.empty(0, 5)} if others else {}
    with pytest.raises(LiveModelError, match=reason):
        UpdateWriter(model, tmp_path / "chain").step()


def test_a_folder_that_was_removed_is_named(tmp_path: Path) -> None:
    writer = UpdateWriter(weights(), tmp_path / "chain")
    writer.step()
    shutil.rmtree(tmp_path / "chain")
    with pytest.raises(FileNotFoundError, match="chain'"):
        writer.step()


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"b": torch.zeros(64).bfloat16()}, id="name"),
        pytest.param({"a": torch.zeros(8).bfloat16()}, id="shape"),
        pytest.param({"a": torch.zeros(64).half()}, id="dtype"),
        pytest.param({"a": torch.zeros(64).bfloat16(), "b": torch.zeros(1).bfloat16()}, id="one more"),
    ],
)
def test_a_chain_of_other_tensors_is_refused_when_the_writer_is_made(other: dict[str, Any], tmp_path: Path) -> None:
    UpdateWriter(weights(), tmp_path).step()
    with pytest.raises(LiveModelError, match="use a new folder"):
        UpdateWriter(other, tmp_path)
    assert UpdateWriter(weights(), tmp_path).step_number == 0


@pytest.mark.parametrize("steps", [0, 1])
def test_the_second_of_two_trainers_is_told_of_the_first(steps: int, tmp_path: Path) -> None:
    model = weights()
    for _ in range(steps):
        UpdateWriter(model, tmp_path).step()
    first, second = UpdateWriter(model, tmp_path), UpdateWriter(model, tmp_path)
    first.step()
    with pytest.raises(FileExistsError, match=r"0\d\.pxd: exists already; another process publishes there; stop one"):
        second.step()
