"""An error of an update says what can be done in that call; one of a delta still says what `apply_` can do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import peraxis_format as pxd
from peraxis_format.errors import LiveModelError, PxdError
from peraxis_format.torch import VariantSwitch, apply_
from peraxis_format.torch.updates import UpdateWriter, apply_update, follow

IMPOSSIBLE = ("views", "peraxis-tools apply", "pass that update too", "as the base")


def run_of(folder: Path, dtype: torch.dtype, *, steps: int = 1, published: torch.dtype | None = None) -> list[Path]:
    """The files of a trainer with weights of this dtype."""
    weights = {"a": torch.ones(64, 8, dtype=dtype)}
    writer = UpdateWriter(weights, folder, dtype=published)
    files = []
    for _ in range(steps):
        files.append(Path(writer.step().path))
        weights["a"] += 1
    return files


@pytest.mark.parametrize(
    ("published", "live", "remedy"),
    [
        (torch.bfloat16, torch.float32, "load the model with dtype=torch.bfloat16, or publish in F32 (dtype=None)"),
        (
            torch.float32,
            torch.bfloat16,
            "load the model with dtype=torch.float32, or publish with dtype=torch.bfloat16",
        ),
        (torch.bfloat16, torch.float16, "load the model with dtype=torch.bfloat16"),
    ],
)
def test_a_model_in_another_dtype_is_told_which_one_to_load_or_to_publish(
    published: torch.dtype, live: torch.dtype, remedy: str, tmp_path: Path
) -> None:
    anchor, step = run_of(tmp_path, published, steps=2)
    model = {"a": torch.ones(64, 8, dtype=live)}
    assert follow(model, tmp_path).poll().waiting[anchor].endswith(f"; {remedy}")
    with pytest.raises(PxdError, match=r"E403.*load the model with dtype=torch\.\w+ .*the trainer publishes") as error:
        apply_update(model, step)
    assert not any(word in str(error.value) for word in IMPOSSIBLE)
    # What it says is true.
    loaded = {"a": torch.zeros(64, 8, dtype=published)}
    assert follow(loaded, tmp_path).poll().step == 1
    if live is not torch.float16:
        run_of(tmp_path / "again", torch.float32, steps=2, published=None if live is torch.float32 else live)
        assert follow(model, tmp_path / "again").poll().step == 1


@pytest.mark.parametrize(
    "live", [{"b": torch.ones(64, 8).bfloat16()}, {"a": torch.ones(4, 8).bfloat16()}], ids=["name", "shape"]
)
def test_another_model_is_told_to_be_that_of_the_trainer(live: dict[str, Tensor], tmp_path: Path) -> None:
    files = run_of(tmp_path, torch.bfloat16, steps=2)
    reason = follow(live, tmp_path).poll().waiting[files[0]]
    assert reason.endswith("; load the model that the trainer publishes")
    for file in files:
        with pytest.raises((PxdError, LiveModelError), match="that the trainer publishes") as error:
            apply_update(live, file)
        assert not any(word in str(error.value) for word in IMPOSSIBLE)


def test_a_fused_model_of_another_size_is_told_no_place_for_views(tmp_path: Path) -> None:
    UpdateWriter({f"{word}_proj.weight": torch.ones(4, 4) for word in "qkv"}, tmp_path, dtype=None).step()
    told = follow({"qkv_proj.weight": torch.ones(10, 4)}, tmp_path).poll().waiting[tmp_path / "anchor-00000000.pxd"]
    assert "have 12 together; load the model that the trainer publishes, under the same names" in told


def test_a_followed_model_that_other_code_has_written_goes_on_with_the_next_anchor(tmp_path: Path) -> None:
    weights, live = {"a": torch.ones(64, 8).bfloat16()}, {"a": torch.zeros(64, 8).bfloat16()}
    writer, follower = UpdateWriter(weights, tmp_path, anchor_every=3), follow(live, tmp_path)
    for _ in range(2):
        writer.step()
        follower.poll()
        weights["a"] += 1
    live["a"][0] = 7
    reason = follower.poll().waiting if writer.step().step == 2 else {}
    told = reason[tmp_path / "step-00000002.pxd"]
    assert "E405" in told
    assert told.endswith(
        "; if other code has changed the model's weights, the next anchor replaces them; or load the model again, and "
        "follow again"
    )
    assert not any(word in told for word in IMPOSSIBLE)
    weights["a"] += 1
    writer.step()
    assert follower.poll().step == 3
    assert torch.equal(live["a"], weights["a"])


def test_an_update_out_of_order_names_the_one_to_apply_first(tmp_path: Path) -> None:
    files = run_of(tmp_path, torch.bfloat16, steps=3)
    live = {"a": torch.ones(64, 8).bfloat16()}
    with pxd.open(files[1]) as before:
        wanted = rf"E405.*; apply update {before.content_id} first; .* apply an anchor, or load it again$"
    with pytest.raises(PxdError, match=wanted):
        apply_update(live, files[2])
    apply_update(live, files[0])
    apply_update(live, files[1])
    apply_update(live, files[2])
    assert float(live["a"].max()) == 3.0


def test_a_delta_keeps_the_remedies_of_its_calls(tmp_path: Path) -> None:
    anchor, _ = run_of(tmp_path, torch.bfloat16, steps=2)
    write = r"write the checkpoint with `peraxis-tools apply`"
    wide, other = {"a": torch.ones(64, 8)}, {"b": torch.ones(64, 8).bfloat16()}
    for model, wanted in (
        (wide, f"cannot change in place; {write}"),
        (other, f"{write}, or pass the tensor in `views`"),
    ):
        with pytest.raises(LiveModelError, match=wanted):
            apply_(model, anchor)
        with VariantSwitch(model) as switch, pytest.raises(LiveModelError, match=wanted):
            switch.add("v", anchor)
