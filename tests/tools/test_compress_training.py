"""Training steps, schedules and resumption."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peraxis_tools.compress.distill.training import Group, Training, TrainingState
from peraxis_tools.compress.run.work_folder import WorkFolder

STEPS = 20


class Toy:
    """Three parameter groups: one trains to the end, one rests early, and one does not affect the loss."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.long, self.short, self.idle = (nn.Parameter(torch.randn(3, 4)) for _ in range(3))
        groups = [Group(parameters=[self.long, self.idle], lr=0.1), Group(parameters=[self.short], lr=0.1, share=0.5)]
        self.training = Training([*groups, Group(parameters=[], lr=1.0)], steps=STEPS)

    def run(self, first: int, stop: int) -> None:
        for step in range(first, stop):
            self.training.step(step, (self.long * (step + 1) - self.short).square().sum().backward)

    def values(self) -> list[Tensor]:
        return [value.detach().clone() for value in (self.long, self.short, self.idle)]


@pytest.mark.parametrize("kept", [1, 7, 15])
def test_training_goes_on_to_the_bits_of_an_undisturbed_one(tmp_path: Path, kept: int) -> None:
    whole = Toy()
    whole.run(0, STEPS)
    work = WorkFolder(tmp_path / "delta.pxd", "digest", resume=True)
    cut = Toy()
    assert cut.training.resume(work) is None
    cut.run(0, kept)
    cut.training.save(work, TrainingState(epochs=kept, best=0.1, before=1 / 3))
    resumed = Toy()
    assert resumed.training.resume(work) == TrainingState(epochs=kept, best=0.1, before=1 / 3)
    resumed.run(kept, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(resumed.values(), whole.values(), strict=True))


def test_a_group_rests_after_its_share_of_the_steps() -> None:
    toy = Toy()
    seen = [toy.values()]
    for step in range(STEPS):
        toy.run(step, step + 1)
        seen.append(toy.values())
    moved = [[not torch.equal(a, b) for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(seen)]
    assert [line[0] for line in moved] == [True] * STEPS
    assert [line[1] for line in moved] == [True] * (STEPS // 2) + [False] * (STEPS // 2)
    assert not any(line[2] for line in moved)
