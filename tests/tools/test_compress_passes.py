"""Passes through a block: kept, waiting and repeated ones give the same tensors, with weights that change meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers

from peraxis_tools.compress.fit.moments.passes import Kept, Repeated, Waiting
from peraxis_tools.compress.fit.moments.recorder import Call, Watch, discover
from peraxis_tools.compress.fit.moments.stages import stages_of
from peraxis_tools.compress.model.layerwise_model import Skeleton
from tests.tools.compress_pairs import llama_config

Runs = Callable[[Callable[[Call], None]], torch.Tensor]


def block(config: Any) -> tuple[Skeleton, list[str], torch.Tensor]:
    """A skeleton whose layer 0 has random weights, their names, and token ids."""
    torch.manual_seed(0)
    skeleton = Skeleton(config, dtype=torch.float32, device=torch.device("cpu"))
    for name in [*skeleton.outer_parameters(), *skeleton.layer_parameters(0)]:
        skeleton.set(name, 0.3 * torch.randn(skeleton.get(name).shape))
    skeleton.retie()
    names = [name for name in skeleton.layer_parameters(0) if skeleton.get(name).dim() == 2]
    return skeleton, names, torch.randint(3, 30, (2, 7))


@contextmanager
def opened(config: Any, *, hooks: bool) -> Iterator[tuple[Skeleton, Any, Runs, frozenset[str]]]:
    """(skeleton, what one pass shows, a run of layer 0, parameters that hooks see)."""
    skeleton, names, ids = block(config)
    parameters = {name: skeleton.get(name) for name in names}
    owners = {name: skeleton.owner(name) for name in names}
    with torch.no_grad(), skeleton.at_layer(0) as forward:
        hidden = skeleton.get(names[0]).new_ones(2, 7, config.hidden_size).cumsum(dim=1)
        found = discover(lambda: forward(ids, hidden), parameters, owners)
        with Watch(parameters, owners, hooked=found.hooked if hooks else ()) as watch:

            def run(see: Callable[[Call], None]) -> torch.Tensor:
                with torch.no_grad(), watch.reporting(see):
                    return forward(ids, hidden)

            yield skeleton, found, run, found.hooked


def gpt2() -> Any:
    return transformers.GPT2Config(vocab_size=32, n_embd=24, n_layer=1, n_head=4, n_positions=16)


@pytest.mark.parametrize(("config", "hooks"), [(llama_config, True), (llama_config, False), (gpt2, False)])
def test_all_passes_give_the_same_tensors_while_weights_change(config: Callable[[], Any], hooks: bool) -> None:
    with opened(config(), hooks=hooks) as (skeleton, found, run, hooked):
        # A Conv1D is no nn.Linear: only the dispatcher sees its product.
        assert bool(hooked) == (config is llama_config)
        stages = stages_of(found.calls)
        assert len(stages) == 4
        assert all(stage.waits for stage in stages)
        kept, waiting, repeated = Kept.of(run, stages), Waiting(run), Repeated(run)
        same_start = True
        for stage in stages:
            seen = [one.inputs(stage) for one in (kept, waiting, repeated)]
            assert seen[0].keys() == seen[1].keys() == seen[2].keys() == stage.leaders
            for key in stage.leaders:
                assert torch.equal(seen[1][key], seen[2][key])
                # The kept pass ran before any weight changed.
                assert torch.equal(seen[0][key], seen[1][key]) == same_start
            for name in stage.parameters:
                skeleton.write(name, 1.5 * skeleton.get(name))
            same_start = False
        assert torch.equal(waiting.finish(), repeated.finish())
        assert torch.equal(kept.finish(), found.output)
        assert not torch.equal(kept.finish(), waiting.finish())


def test_many_waiting_passes_can_be_closed_half_way_and_leave_no_thread() -> None:
    before = threading.active_count()
    with opened(llama_config(), hooks=True) as (_, found, run, _):
        first, second, *_ = stages_of(found.calls)
        passes = [Waiting(run) for _ in range(5)]
        for one in passes:
            one.inputs(first)
        assert torch.equal(*(one.inputs(second)[next(iter(second.leaders))] for one in passes[:2]))
        assert threading.active_count() == before + 5
        for one in passes:
            one.close()
    assert threading.active_count() == before


def test_an_error_in_a_waiting_pass_is_raised_where_it_was_asked_for() -> None:
    def run(see: Callable[[Call], None]) -> torch.Tensor:
        raise KeyError("no such layer")

    with pytest.raises(KeyError, match="no such layer"):
        Waiting(run).finish()
