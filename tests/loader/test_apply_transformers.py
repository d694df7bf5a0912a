"""apply_ turns models of transformers into the model that the fine-tuned checkpoint loads as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peraxis_format.torch import LiveModelError, apply_
from tests.loader.support import base_of, bytes_of, expected_bytes, named_tensors, refused, write_delta


def configurations() -> list[Any]:
    from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

    size = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    return [
        LlamaConfig(**size),
        LlamaConfig(**size, tie_word_embeddings=True),
        MistralConfig(**size),
        Qwen2Config(**size, tie_word_embeddings=True),
        Qwen3Config(**size, head_dim=8),
        Gemma2Config(**size, head_dim=8),
        Phi3Config(**size),
        GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    ]


@pytest.mark.parametrize("index", range(8))
def test_transformers_models_become_what_the_fine_tuned_checkpoint_would_be(index: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = configurations()[index]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    base = base_of(model)
    tied = {}
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        first = next(n for n, p in named_tensors(model).items() if p is model.get_input_embeddings().weight)
        last = [n for n, p in named_tensors(model).items() if p is model.get_input_embeddings().weight][-1]
        tied = {last: first} if last != first else {}
    path = write_delta(tmp_path / "d.pxd", base, tied=tied, components=1 + index % 2)
    apply_(model, path)
    assert bytes_of(named_tensors(model)) == expected_bytes(path, base)
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.isfinite(model(ids).logits).all()


def test_the_stories_pair_becomes_what_the_reference_makes_of_it(shared: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared / "pairs" / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    base = base_of(model)
    path = write_delta(tmp_path / "d.pxd", base, tied={"lm_head.weight": "model.embed_tokens.weight"}, components=2)
    apply_(model, path)
    assert bytes_of(named_tensors(model)) == expected_bytes(path, base)


def moe_configurations() -> list[Any]:
    from transformers import MixtralConfig, Qwen3MoeConfig

    size = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    return [
        MixtralConfig(**size, num_local_experts=3),
        Qwen3MoeConfig(**size, num_experts=4, moe_intermediate_size=20, head_dim=8),
    ]


def moe_pair(index: int, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return a model as from_pretrained loads it, and the tensors of its checkpoint."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from safetensors.torch import load_file

    config = moe_configurations()[index]
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return model, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("index", [0, 1])
def test_experts_with_other_names_in_the_checkpoint_become_what_it_would_load(index: int, tmp_path: Path) -> None:
    """Mixtral renames and fuses its experts, and Qwen3-MoE fuses them. `place` finds each in the live tensors."""
    model, base = moe_pair(index, tmp_path / "base")
    assert base.keys() - named_tensors(model).keys()
    path = write_delta(tmp_path / "d.pxd", base, components=1 + index)
    apply_(model, path)
    model.save_pretrained(tmp_path / "tuned")
    from safetensors.torch import load_file

    assert bytes_of(load_file(tmp_path / "tuned" / "model.safetensors")) == expected_bytes(path, base)


def test_a_mapping_that_permutes_inside_tensors_is_told_from_a_missing_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    from transformers import core_model_loading

    model, base = moe_pair(1, tmp_path / "base")
    path = write_delta(tmp_path / "d.pxd", base)

    real = core_model_loading.revert_weight_conversion

    def permuted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = real(model, state)
        return {name: t.reshape(2, -1).t().reshape(t.shape) if "expert" in name else t for name, t in found.items()}

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", permuted)
    refused(model, path, LiveModelError, r"experts.*stores it in several tensors, or in another order")


def test_a_model_without_its_prefix_is_told_from_another_model(tmp_path: Path) -> None:
    """AutoModel has no prefix `model.` in its names, which the checkpoint of the language model has."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configurations()[1]).to(torch.bfloat16)
    path = write_delta(tmp_path / "d.pxd", base_of(model), tied={"lm_head.weight": "model.embed_tokens.weight"})
    refused(model.model, path, LiveModelError, r"in place of model\.\S+, like a part of the model; load all of it")
