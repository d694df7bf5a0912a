"""A tied model, whose head a trainer lists as an alias and transformers never saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peraxis
import peraxis_format as pxd
from peraxis_format.errors import LiveModelError
from peraxis_format.torch import apply_
from peraxis_format.torch.updates import UpdateWriter, follow
from peraxis_tools.verify_files import Status

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def tied_model(seed: int = 0) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=61, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


@torch.no_grad()
def train(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.5)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    with pxd.Safetensors.open(folder) as tensors:
        assert HEAD not in tensors
    return folder


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("order", ["UWUW", "WUUW", "WWUU"])
def test_a_trainer_and_update_take_turns_on_a_tied_model(order: str, tmp_path: Path) -> None:
    model, live, run = tied_model(), tied_model(1), tmp_path / "run"
    UpdateWriter(model, run).step()
    base = state = saved(model, tmp_path / "0")
    follower = follow(live, run)
    for step, writer in enumerate(order, 1):
        train(model)
        state = saved(model, tmp_path / str(step))
        if writer == "W":
            again = UpdateWriter(model, run)
            assert (again.step_number, again.step().step) == (step - 1, step)
        else:
            peraxis.update(base, state, run / f"step-{step:08d}.pxd", after=run)
        found = follower.poll()
        assert (found.step, found.lag, dict(found.waiting)) == (step, 0, {})
        assert weights(live) == weights(model)
    late = tied_model(2)
    assert follow(late, run).poll().step == len(order)
    assert weights(late) == weights(model)
    assert live.lm_head.weight is live.model.embed_tokens.weight
    assert [entry.name for entry in peraxis.log(run).updates[1:]] == [
        f"step-{step:08d}.pxd" for step in range(1, 1 + len(order))
    ]
    assert peraxis.verify(run, base=base).status is Status.PASSED
    peraxis.apply(base, run, tmp_path / "out")
    with pxd.Safetensors.open(tmp_path / "out") as out, pxd.Safetensors.open(state) as last:
        assert (HEAD in out) == (order[-1] == "W")  # a trainer lists it
        for name in last:
            assert out.read(name).tobytes() == last.read(name).tobytes()


def test_a_dropped_tensor_that_the_model_does_not_tie_is_still_refused(tmp_path: Path) -> None:
    model, run = tied_model(), tmp_path / "run"
    UpdateWriter(model, run).step()
    before = saved(model, tmp_path / "before")
    train(model)
    peraxis.update(before, saved(model, tmp_path / "after"), run / "step-00000001.pxd", after=run)
    live = tied_model(1)
    live.lm_head.weight = nn.Parameter(live.lm_head.weight.detach().clone())
    found = follow(live, run).poll()
    assert found.step == 0
    assert "has no 'lm_head.weight', but the live model uses it" in found.waiting[run / "step-00000001.pxd"]


def test_a_delta_that_drops_the_head_is_applied_to_a_tied_model(tmp_path: Path) -> None:
    tensors = {"embed.weight": torch.ones(8, 4), "head.weight": torch.ones(8, 4)}
    path = tmp_path / "d.pxd"
    with pxd.DeltaWriter(path, base=pxd.Identity(id="b"), fine_tuned=pxd.Identity(id="t")) as writer:
        full = 2 * tensors["embed.weight"].numpy()
        writer.add(
            pxd.ModuleDelta(
                name="embed.weight", shape=(8, 4), dtype=pxd.DType.F32, encoding=pxd.Encoding.FULL, full=full
            )
        )
        writer.drop("head.weight")
        writer.finish()
    with pytest.raises(LiveModelError, match=r"has no 'head\.weight', but the live model uses it"):
        apply_(tensors, path)
    tensors["head.weight"] = tensors["embed.weight"]
    apply_(tensors, path)
    assert torch.equal(tensors["head.weight"], torch.full((8, 4), 2.0))
