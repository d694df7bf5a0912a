"""Cached, suspended and replayed passes through a block give the same tensors, even if weights change between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers

from peraxis_tools.compress.fit.moments.passes import CachedPass, ReplayedPass, SuspendedPass
from peraxis_tools.compress.fit.moments.recorder import Call, Watch, discover
from peraxis_tools.compress.fit.moments.stages import stages_of
from peraxis_tools.compress.model.layerwise_model import LayerwiseModel
from tests.tools.compress_pairs import llama_config

Runs = Callable[[Callable[[Call], None]], torch.Tensor]


def block(config: Any) -> tuple[LayerwiseModel, list[str], torch.Tensor]:
    """Return a model whose layer 0 has random weights, their names, and token ids."""
    torch.manual_seed(0)
    model = LayerwiseModel(config, dtype=torch.float32, device=torch.device("cpu"))
    for name in [*model.outer_parameters(), *model.layer_parameters(0)]:
        model.set(name, 0.3 * torch.randn(model.get(name).shape))
    model.retie()
    names = [name for name in model.layer_parameters(0) if model.get(name).dim() == 2]
    return model, names, torch.randint(3, 30, (2, 7))


@contextmanager
def opened(config: Any, *, hooks: bool) -> Iterator[tuple[LayerwiseModel, Any, Runs, frozenset[str]]]:
    """Open (model, the tensors of one pass, a run of layer 0, the parameters that hooks see)."""
    model, names, ids = block(config)
    parameters = {name: model.get(name) for name in names}
    owners = {name: model.owner(name) for name in names}
    with torch.no_grad(), model.at_layer(0) as forward:
        hidden = model.get(names[0]).new_ones(2, 7, config.hidden_size).cumsum(dim=1)
        found = discover(lambda: forward(ids, hidden), parameters, owners)
        with Watch(parameters, owners, hooked=found.hooked if hooks else ()) as watch:

            def run(see: Callable[[Call], None]) -> torch.Tensor:
                with torch.no_grad(), watch.reporting(see):
                    return forward(ids, hidden)

            yield model, found, run, found.hooked


def gpt2() -> Any:
    return transformers.GPT2Config(vocab_size=32, n_embd=24, n_layer=1, n_head=4, n_positions=16)


@pytest.mark.parametrize(("config", "hooks"), [(llama_config, True), (llama_config, False), (gpt2, False)])
def test_all_passes_give_the_same_tensors_while_weights_change(config: Callable[[], Any], hooks: bool) -> None:
    with opened(config(), hooks=hooks) as (model, found, run, hooked):
        # A Conv1D is not an nn.Linear, so only the dispatcher sees its product.
        assert bool(hooked) == (config is llama_config)
        stages = stages_of(found.calls)
        assert len(stages) == 4
        assert all(stage.can_suspend for stage in stages)
        kept, waiting, repeated = CachedPass.of(run, stages), SuspendedPass(run), ReplayedPass(run)
        same_start = True
        for stage in stages:
            seen = [one.inputs(stage) for one in (kept, waiting, repeated)]
            assert seen[0].keys() == seen[1].keys() == seen[2].keys() == stage.observed
            for key in stage.observed:
                assert torch.equal(seen[1][key], seen[2][key])
                # The cached pass ran before any weight changed.
                assert torch.equal(seen[0][key], seen[1][key]) == same_start
            for name in stage.parameters:
                model.write(name, 1.5 * model.get(name))
            same_start = False
        assert torch.equal(waiting.finish(), repeated.finish())
        assert torch.equal(kept.finish(), found.output)
        assert not torch.equal(kept.finish(), waiting.finish())


def test_many_waiting_passes_can_be_closed_half_way_and_leave_no_thread() -> None:
    before = set(threading.enumerate())
    with opened(llama_config(), hooks=True) as (_, found, run, _):
        first, second, *_ = stages_of(found.calls)
        passes = [SuspendedPass(run) for _ in range(5)]
        for one in passes:
            one.inputs(first)
        assert torch.equal(*(one.inputs(second)[next(iter(second.observed))] for one in passes[:2]))
        assert len(set(threading.enumerate()) - before) == 5
        for one in passes:
            one.close()
    assert set(threading.enumerate()) <= before


def test_an_error_in_a_waiting_pass_is_raised_where_it_was_asked_for() -> None:
    def run(see: Callable[[Call], None]) -> torch.Tensor:
        raise KeyError("no such layer")

    with pytest.raises(KeyError, match="no such layer"):
        SuspendedPass(run).finish()
