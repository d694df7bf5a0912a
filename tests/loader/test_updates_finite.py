"""A trainer says that it publishes weights that are NaN or infinite, or refuses to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peraxis_format.errors import ArgumentError, LiveModelError
from peraxis_format.torch.updates import UpdateWriter, follow
from tests.loader.updates_pair import published, server, train, trainer

ODD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("first", [0, 1], ids=["anchor", "update"])
def test_a_weight_that_is_not_finite_is_published_with_one_warning_that_names_its_tensor(
    tmp_path: Path, odd: float, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, live = trainer(), server()
    writer = UpdateWriter(model, tmp_path)
    for step in range(4):
        if step == first:
            model.up.weight.data[3, 5] = odd
        writer.step()
        train(model, step)
    told = [message for message in caplog.messages if "NaN or infinite" in message]
    assert len(told) == 1
    assert told[0].startswith("up.weight: 1 of 16400 weights to publish are NaN or infinite in BF16")
    assert follow(live, tmp_path).poll().step == 3


def test_each_tensor_is_named_once_and_of_many_only_some(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = {f"t{i}": torch.zeros(3) for i in range(9)}
    model["t5"][0] = -float("inf")  # on purpose, from the start
    writer = UpdateWriter(model, tmp_path, dtype=None)
    for step in range(3):
        writer.step()
        for i in range(9):
            model[f"t{i}"] += float("nan") if step == 1 else 1.0
    writer.step()
    told = [message.partition(":")[0] for message in caplog.messages if "NaN or infinite" in message]
    assert told == ["t5", "t0", "t1", "t2"]


@pytest.mark.parametrize("odd", ODD)
def test_a_step_that_is_refused_publishes_nothing_and_the_next_one_goes_on(tmp_path: Path, odd: float) -> None:
    model, live = trainer(), server()
    writer = UpdateWriter(model, tmp_path, nonfinite="refuse")
    for step in range(3):
        good = model.up.weight.data.clone()
        model.up.weight.data[3, 5] = odd
        before = sorted(tmp_path.iterdir())
        for _ in range(2):
            with pytest.raises(LiveModelError, match=r"up\.weight: 1 of 16400 weights .*nothing is published"):
                writer.step()
        assert sorted(tmp_path.iterdir()) == before
        model.up.weight.data.copy_(good)
        assert writer.step().step == step
        train(model, step)
    train(model, 9)
    writer.step()
    assert follow(live, tmp_path).poll().step == 3
    assert published(live) == published(model)


def test_a_weight_that_only_the_published_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = {"weight": torch.tensor([1.0, 1e6])}
    with pytest.raises(LiveModelError, match=r"weight: 1 of 2 weights to publish are NaN or infinite in F16"):
        UpdateWriter(model, tmp_path, dtype=torch.float16, nonfinite="refuse").step()
    UpdateWriter(model, tmp_path, nonfinite="refuse").step()


def test_the_largest_weights_of_each_dtype_and_other_tensors_are_finite(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    model = {str(dtype): torch.tensor([torch.finfo(dtype).min, torch.finfo(dtype).max]).to(dtype) for dtype in dtypes}
    model["count"] = torch.tensor(-1)
    UpdateWriter(model, tmp_path, dtype=None, nonfinite="refuse").step()
    assert not caplog.messages


def test_another_word_for_nonfinite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="nonfinite 'ignore': choose one of warn, refuse"):
        UpdateWriter(trainer(), tmp_path, nonfinite="ignore")  # type: ignore[arg-type]
