"""A mistaken argument of the loaders is one clear error, before anything is loaded, swapped or published."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import peraxis
from peraxis import ArgumentError, LiveModelError
from peraxis_format import BindingError
from peraxis_format.torch.updates.published import UpdateOptions
from tests.loader.support import Small, base_of, write_delta

MODEL: Any = "base"


@pytest.mark.parametrize(
    "attempt",
    [
        lambda path: peraxis.apply_(MODEL, path),
        lambda path: peraxis.VariantSwitch(MODEL),
        lambda path: peraxis.follow(MODEL, path.parent),
    ],
    ids=["apply_", "VariantSwitch", "follow"],
)
def test_a_name_in_the_place_of_a_model_is_refused(attempt: Callable[[Path], object], tmp_path: Path) -> None:
    path = write_delta(tmp_path / "a.pxd", base_of(Small()))
    with pytest.raises(LiveModelError, match=r"^the model is a str; pass a module, or a mapping of names to tensors$"):
        attempt(path)


def test_a_model_and_a_delta_in_the_wrong_order_are_told_apart(tmp_path: Path) -> None:
    path = write_delta(tmp_path / "a.pxd", base_of(Small()))
    swapped: Any = Small()
    with pytest.raises(LiveModelError, match="the delta is a Small; pass them in the other order"):
        peraxis.apply_(path, swapped)  # type: ignore[arg-type]
    (tmp_path / "base").mkdir()
    with pytest.raises(peraxis.ToolError, match=r"a.pxd is a delta and .*base is not; pass them in the other order"):
        peraxis.load(tmp_path / "base", path)


def test_a_delta_that_was_applied_already_is_not_a_wrong_base(tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "a.pxd", base_of(model))
    peraxis.apply_(model, path)
    with pytest.raises(BindingError, match="this delta was applied to this model before"):
        peraxis.apply_(model, path)
    other = Small()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    with pytest.raises(BindingError, match="the delta was made for"):
        peraxis.apply_(other, path)


def test_direct_reads_are_refused_where_no_file_is_read(tmp_path: Path) -> None:
    model = Small()
    path = write_delta(tmp_path / "a.pxd", base_of(model))
    with peraxis.VariantSwitch(model) as switch:
        with pytest.raises(LiveModelError, match='direct does nothing with residency="pinned"'):
            switch.add("a", path, direct=True)
        assert not switch.variants()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": MODEL}, "model is a str; pass a module"),
        ({"dtype": torch.int8}, "dtype torch.int8: must be a floating-point dtype"),
        ({"dtype": "bfloat16"}, "dtype 'bfloat16': must be a floating-point dtype"),
        ({"folder": "a.pxd"}, "a.pxd: is a file; pass the folder of the chain"),
    ],
)
def test_a_trainer_publishes_nothing_for_a_mistaken_argument(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "a.pxd").write_bytes(b"")
    model, folder = options.pop("model", torch.nn.Linear(2, 2)), tmp_path / options.pop("folder", "chain")
    with pytest.raises(ArgumentError, match=said):
        peraxis.UpdateWriter(model, folder, **options)
    assert not (tmp_path / "chain").exists()


@pytest.mark.parametrize("every", [0, -1.0, float("nan"), float("inf")])
def test_a_follower_polls_after_a_pause(every: float, tmp_path: Path) -> None:
    follower = peraxis.follow(torch.nn.Linear(2, 2).bfloat16(), tmp_path)
    with pytest.raises(ArgumentError, match="must be a number of seconds above 0"):
        follower.start(every=every)


def test_a_trainers_callback_refuses_an_unknown_option_before_the_training(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(
        ArgumentError, match="anchors: not an option; known are anchor_every, dtype, name, nonfinite, prefer"
    ):
        peraxis.PublishUpdates(tmp_path, anchors=3)
    with pytest.raises(ArgumentError, match="folder is a Small; pass a path"):
        peraxis.PublishUpdates(Small())  # type: ignore[arg-type]


def test_the_options_that_are_passed_on_are_those_of_the_writer() -> None:
    own = inspect.signature(peraxis.UpdateWriter).parameters.keys() - {"model", "folder"}
    assert own == UpdateOptions.__annotations__.keys()
