"""A live model that was untied has a copy of the embeddings as its head; a variant that ties them writes both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peraxis
from peraxis_format.torch import VariantSwitch, apply_, serve
from peraxis_format.torch.updates import follow

pytest.importorskip("transformers", minversion="5.0")
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
IDS = torch.arange(1, 17).view(2, 8)


def saved(folder: Path, seed: int, *, tie: bool = True) -> Path:
    """A checkpoint near the first one: a few weights differ, by the seed."""
    from transformers import AutoModelForCausalLM

    from tests.tools.compress_pairs import llama_config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama_config(tie_word_embeddings=True), dtype=torch.bfloat16)
    if not tie:
        model.save_pretrained(folder)
        model = untied(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters() if seed else ():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def tied(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def untied(folder: Path) -> Any:
    """The tied checkpoint with a head of its own."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, tie_word_embeddings=False).eval()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base", 0)


def delta_of(base: Path, fine_tuned: Path, *, exact: bool) -> tuple[Path, Any]:
    """A delta of the two, and the model that it makes."""
    path = fine_tuned.with_suffix(".pxd")
    options: dict[str, Any] = {"exact": ".*"} if exact else {"fit": "none"}
    peraxis.compress(base, fine_tuned, path, force=True, **options)
    peraxis.apply(base, path, fine_tuned.with_suffix(".applied"))
    return path, fine_tuned.with_suffix(".applied")


@pytest.mark.parametrize("exact", [False, True])
def test_the_head_of_an_untied_model_follows_the_embeddings_of_a_tied_variant(
    exact: bool, base: Path, tmp_path: Path
) -> None:
    path, applied = delta_of(base, saved(tmp_path / "tuned", 1), exact=exact)
    expected, before = tied(applied)(IDS).logits, tied(base)(IDS).logits
    live = untied(base)
    apply_(live, path)
    assert torch.equal(live(IDS).logits, expected)
    check_switched(untied(base), path, expected, before)


def check_switched(live: Any, path: Path, expected: Tensor, before: Tensor) -> None:
    """Check the logits of a model with a variant, and as the base again."""
    with VariantSwitch(live) as switch:
        switch.add("a", path)
        switch.use("a")
        assert torch.equal(live(IDS).logits, expected)
        switch.use(None)
        assert torch.equal(live(IDS).logits, before)


def with_compiled_blocks(model: Any) -> Any:
    model.model = torch.compile(model.model, backend="eager")
    return model


def with_checkpointed_head(model: Any) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.lm_head = checkpoint_wrapper(model.lm_head)
    return model


def with_an_adapter_on(module: str) -> Callable[[Any], Any]:
    def adapted(model: Any) -> Any:
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[module]))

    return adapted


def with_a_head_in_f32(model: Any) -> Any:
    model.lm_head.float().register_forward_pre_hook(lambda _, args: (args[0].float(),))
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize(
    "changed",
    [
        with_compiled_blocks,
        with_checkpointed_head,
        with_an_adapter_on("embed_tokens"),
        with_an_adapter_on("lm_head"),
        with_a_head_in_f32,
    ],
)
def test_an_untied_head_follows_the_embeddings_inside_wrappers_and_in_f32(
    changed: Callable[[Any], Any], base: Path, tmp_path: Path
) -> None:
    path, applied = delta_of(base, saved(tmp_path / "tuned", 1), exact=False)
    expected = changed(untied(applied))(IDS).logits
    live = changed(untied(base))
    check_switched(live, path, expected, live(IDS).logits)
    apply_(live, path)
    assert torch.equal(live(IDS).logits, expected)


def test_served_variants_of_an_untied_model_have_their_own_heads(base: Path, tmp_path: Path) -> None:
    path, applied = delta_of(base, saved(tmp_path / "tuned", 1), exact=False)
    live, expected = untied(base), tied(applied)(IDS).logits
    with serve(live, {"a": path}) as served, served.using("a"):
        torch.testing.assert_close(live(IDS).logits, expected, rtol=0.05, atol=0.05)
        assert not torch.equal(live(IDS).logits, untied(base)(IDS).logits)


@pytest.mark.parametrize("between", [False, True])
def test_tied_and_untied_variants_take_turns_also_if_one_is_added_while_the_other_is_in_use(
    between: bool, base: Path, tmp_path: Path
) -> None:
    one, tied_applied = delta_of(base, saved(tmp_path / "tied", 1), exact=False)
    two, untied_applied = delta_of(base, saved(tmp_path / "untied", 2, tie=False), exact=False)
    live = untied(base)
    with VariantSwitch(live) as switch:
        switch.add("untied", two)
        if between:
            switch.use("untied")
        switch.add("tied", one)
        for name, folder in [("tied", tied_applied), ("untied", untied_applied)] * 2:
            switch.use(name)
            assert torch.equal(live(IDS).logits, tied(folder)(IDS).logits), name


def test_updates_of_a_tied_checkpoint_reach_the_head_of_an_untied_server(base: Path, tmp_path: Path) -> None:
    new = saved(tmp_path / "new", 1)
    (tmp_path / "chain").mkdir()
    peraxis.update(base, new, tmp_path / "chain" / "step-00000001.pxd")
    live = untied(base)
    assert follow(live, tmp_path / "chain").poll().step == 1
    assert torch.equal(live(IDS).logits, tied(new)(IDS).logits)


def test_a_head_that_is_no_copy_of_the_embeddings_is_not_overwritten(base: Path, tmp_path: Path) -> None:
    """A trainer may publish a mapping of some tensors, and a server keep the others."""
    trained, live = untied(base), untied(base)
    with torch.no_grad():
        live.lm_head.weight.zero_()
    state = {name: tensor for name, tensor in trained.state_dict().items() if name != HEAD}
    writer = peraxis.UpdateWriter(state, tmp_path / "chain")
    for step in range(2):
        writer.step()
        assert follow(live, tmp_path / "chain").poll().step == step
        assert torch.equal(live.get_parameter(EMBED), trained.get_parameter(EMBED))
        assert not live.lm_head.weight.any()
        with torch.no_grad():
            state[EMBED].add_(0.01)
