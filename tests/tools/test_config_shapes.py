"""A configuration whose model does not fit the weights is refused before memory is taken for the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import peraxis_format as pxd
import peraxis_tools
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.checkpoints.config_shapes import check_config_shapes
from peraxis_tools.errors import CheckFailedError
from peraxis_tools.evaluate.models import load_checkpoint_model
from tests.engines.pair import make_base, make_delta

HUGE = 1 << 40
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "num_key_value_heads": 2, "tie_word_embeddings": True}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "gemma3_text": SIZES | {"head_dim": 8},
    "mixtral": SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3_moe": SIZES | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "mamba": {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = make_base(folder / "base", tied=False)
    return base, make_delta(folder / "delta.pxd", base, seed=1)


def with_vocabulary(base: Path, rows: int, output: Path) -> Path:
    shutil.copytree(base, output)
    config = json.loads((base / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    return output


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model outside the meta device is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model is built")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize("rows", [501, HUGE])
def test_a_vocabulary_that_the_weights_do_not_have_is_refused_before_the_model_is_built(
    rows: int, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, delta = pair
    odd = with_vocabulary(base, rows, tmp_path / "odd")
    said = rf"weight is \[500, 256\], and the model of its config\.json has \[{rows}, 256\] there"
    with pytest.raises(CheckFailedError, match=rf"delta\.pxd: \S+{said}") as caught:
        peraxis_tools.load_model(odd, delta)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckFailedError, match=rf"odd: \S+{said}"):
        load_checkpoint_model(odd, dtype=torch.float32, device=torch.device("cpu"))


def test_of_a_wrong_base_and_its_configuration_the_base_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    config = transformers.LlamaConfig(**SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(other)
    with pytest.raises(pxd.BindingError):
        peraxis_tools.load_model(other, pair[1])


def test_a_weight_under_a_new_name_is_at_most_as_large_as_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(rows: int) -> nn.Module:
        return nn.Linear(4, rows, bias=False)

    check_config_shapes(build, 11, {"old": (20, 2)}, "a.pxd")  # so few weights are harmless
    monkeypatch.setattr("peraxis_tools.checkpoints.config_shapes._HARMLESS", 0)
    check_config_shapes(build, 10, {"old": (20, 2)}, "a.pxd")
    with pytest.raises(
        CheckFailedError, match=r"a\.pxd: the model of its config\.json has a weight weight of \[11, 4\]"
    ):
        check_config_shapes(build, 11, {"old": (20, 2)}, "a.pxd")


@pytest.mark.parametrize("kind", KINDS)
def test_no_model_is_refused_with_its_own_weights(kind: str, tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind])
    build = transformers.AutoModelForCausalLM.from_config
    build(config).save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        shapes = {name: checkpoint.tensors[name].shape for name in checkpoint.tensors}
    check_config_shapes(build, config, shapes, kind)
    with pytest.raises(CheckFailedError):
        check_config_shapes(
            build, transformers.AutoConfig.for_model(kind, **KINDS[kind] | {"vocab_size": HUGE}), shapes, kind
        )
