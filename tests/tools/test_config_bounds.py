"""A configuration with more layers or experts than any model has is refused before a model is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from peraxis_tools.checkpoints.config_bounds import check_config_bounds
from peraxis_tools.checkpoints.environment import load_config, parse_config
from peraxis_tools.errors import ToolError

KINDS = ("llama", "gpt2", "t5", "qwen2_moe", "mixtral", "deepseek_v3", "llava", "mamba", "bert", "opt", "qwen3_next")


@pytest.mark.parametrize(
    "odd",
    [
        {"num_hidden_layers": 10**8},
        {"num_hidden_layers": 1e300},
        {"n_layer": 10**12},
        {"num_local_experts": 10**9},
        {"text_config": {"num_hidden_layers": 5000}},
        {"backbones": [{"depth": 10**6}]},
        {"encoder_layers": 10**6},
        {"n_routed_experts": 10**6},
    ],
)
def test_a_count_that_no_model_has_is_named_with_its_file(odd: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | odd))
    with pytest.raises(ToolError, match=r"config\.json: \w+ is .*, which is more than 4096; correct it"):
        load_config(tmp_path)
    with pytest.raises(ToolError, match=r"a\.pxd.*is more than 4096"):
        parse_config({"model_type": "llama"} | odd, label="a.pxd")


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_of_transformers_are_within_the_bound(kind: str, tmp_path: Path) -> None:
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    check_config_bounds(tmp_path)


@pytest.mark.parametrize("data", [b"", b"[" * 20000, b"\xff", b"null", b"[5000]", b'{"num_hidden_layers": "many"}'])
def test_a_file_of_another_kind_is_left_to_its_reader(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(data)
    check_config_bounds(tmp_path)
    check_config_bounds(tmp_path / "nowhere")
