"""A configuration states the size of a model; a false one must not make the tools build it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peraxis_tools.checkpoints import parameter_names
from peraxis_tools.checkpoints.parameter_names import map_names
from peraxis_tools.convert import targets
from peraxis_tools.convert.targets import targets_by_model, targets_by_name

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16,
}  # fmt: skip
NAMES = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(2) for part in ("up", "down", "gate")]


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 7}, {"text_config": {"num_hidden_layers": 10**12}}, {"n_layer": 10**12}]
)
def test_a_model_with_more_layers_than_tensors_is_not_built(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = targets_by_model(CONFIG, NAMES)
    assert found is not None
    assert sorted(found.places) == sorted(NAMES)
    monkeypatch.setattr(targets, "_model", lambda _: pytest.fail("the model is built"))
    assert targets_by_model({**CONFIG, **change}, NAMES) is None


def test_probes_of_a_model_that_is_too_large_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = targets._model({**CONFIG, "vocab_size": 1 << 40})
    assert model is not None
    monkeypatch.setattr(torch, "arange", lambda *_, **__: pytest.fail("a probe is made"))
    found = map_names(model, [*NAMES, "other"])  # type: ignore[arg-type]
    assert found.unmapped == ("other",)
    assert sorted(found.by_tensor) == sorted(NAMES)


def test_names_that_are_the_models_own_need_no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = targets._model(CONFIG)
    assert model is not None
    monkeypatch.setattr(parameter_names, "_converted", lambda *_: pytest.fail("probes are made"))
    assert map_names(model, NAMES).unmapped == ()  # type: ignore[arg-type]


def test_a_layer_by_name_is_a_leaf_if_no_other_is_within_it() -> None:
    names = ["a.weight", "a.b.weight", "a.b.c.weight", "a.bc.weight", "ab.weight", "a-.weight", "a0.weight", "z.bias"]
    layers = {name.rpartition(".")[0] for name in names}
    found = targets_by_name(dict.fromkeys(names, (2, 2)), ())
    for name, place in found.places.items():
        layer = name.rpartition(".")[0]
        assert place.leaf == (not any(other.startswith(f"{layer}.") for other in layers)), name
