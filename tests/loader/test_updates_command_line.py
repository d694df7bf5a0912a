"""Chains of a trainer and of `update`: which of them the other continues."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import peraxis
from peraxis_format.errors import LiveModelError
from peraxis_format.torch.updates import UpdateWriter, follow


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


def test_a_chain_of_update_is_refused_by_a_trainer_with_the_reason(tmp_path: Path) -> None:
    weights = {"a": torch.arange(64).bfloat16()}
    before = saved(tmp_path / "before", weights)
    weights["a"] += 1
    (tmp_path / "run").mkdir()
    peraxis.update(before, saved(tmp_path / "after", weights), tmp_path / "run" / "step-00000001.pxd")
    with pytest.raises(LiveModelError, match=r"no anchor to begin with, like a chain of `peraxis-tools update`"):
        UpdateWriter(weights, tmp_path / "run")
