"""Models that are not plain causal language models, and configurations with numbers that JSON lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import peraxis_tools
from peraxis_tools.compress import compress
from peraxis_tools.errors import ToolError
from peraxis_tools.evaluate import evaluate
from tests.tools.compress_pairs import FEW, write_pair, write_text, write_tokenizer

KINDS: dict[str, tuple[type[hf.PreTrainedModel], dict[str, Any]]] = {
    "t5": (
        hf.T5ForConditionalGeneration,
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    ),
    "vit": (
        hf.ViTForImageClassification,
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "image_size": 32,
        },
    ),
}


def pair(folder: Path, kind: str) -> tuple[Path, Path]:
    cls, values = KINDS[kind]
    torch.manual_seed(0)
    model = cls(cls.config_class(**values)).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.01 * torch.randn(parameter.shape)).to(parameter.dtype)
    model.save_pretrained(folder / "tuned")
    for name in ("base", "tuned"):
        write_tokenizer(folder / name)
    return folder / "base", folder / "tuned"


@pytest.mark.parametrize("kind", KINDS)
def test_text_for_a_model_that_predicts_none_is_refused_with_a_remedy_before_work(tmp_path: Path, kind: str) -> None:
    base, tuned = pair(tmp_path, kind)
    text = write_text(tmp_path / "text.jsonl")
    said = rf"transformers has no causal language model for model type {kind}; "
    with pytest.raises(ToolError, match=said + r".*--fit none"):
        compress(base, tuned, tmp_path / "d.pxd", calibration=str(text), **FEW)
    assert not list(tmp_path.glob("d.pxd*"))
    compress(base, tuned, tmp_path / "d.pxd", fit="none", force=True)
    with pytest.raises(ToolError, match=said + r".*use diff or verify"):
        evaluate(base, tuned, tmp_path / "d.pxd", {"held": text})


def test_a_configuration_with_infinity_is_loaded_and_evaluated(tmp_path: Path) -> None:
    """For Mamba2 and similar models transformers writes infinity as {"__float__": "Infinity"}."""
    config = hf.Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=1,
        chunk_size=16, expand=2, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    base, tuned = write_pair(tmp_path, config)
    assert "__float__" in json.dumps(json.loads((tuned / "config.json").read_text()))
    compress(base, tuned, tmp_path / "d.pxd", fit="none", force=True)
    model = peraxis_tools.load_model(base, tmp_path / "d.pxd")
    assert model.config.time_step_limit[1] == float("inf")
    text = write_text(tmp_path / "text.jsonl", documents=8)
    found = evaluate(base, tuned, tmp_path / "d.pxd", {"held": text}, samples=2, sequence_length=16)
    assert 0.0 <= found.domains[0].candidates["merged"].kl < float("inf")
