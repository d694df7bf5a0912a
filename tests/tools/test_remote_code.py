"""Code in a stranger's checkpoint is never run, whatever the configuration names and whoever would be asked."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peraxis_tools.checkpoints.environment import load_config, load_tokenizer
from peraxis_tools.errors import ToolError
from peraxis_tools.evaluate.models import load_checkpoint_model
from tests.tools.compress_pairs import llama_pair

ROOT = Path(__file__).parents[2]
CODE = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
Path({flag!r}).touch()
class OddConfig(PretrainedConfig):
    model_type = "odd"
class OddModel(PreTrainedModel):
    config_class = OddConfig
class OddTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that needs its own code, before a user who answers every question with yes."""
    _, tuned, _ = llama_pair(tmp_path)
    odd = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    for name, values in (
        ("config.json", {"model_type": "odd", "auto_map": odd}),
        ("tokenizer_config.json", {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.OddTokenizer"] * 2}}),
    ):
        path = tuned / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    (tuned / "odd.py").write_text(CODE.format(flag=str(tmp_path / "ran")))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tuned


LOADERS: dict[str, Callable[[Path], Any]] = {
    "configuration": load_config,
    "tokenizer": load_tokenizer,
    "model": lambda folder: load_checkpoint_model(folder, dtype=torch.float32, device=torch.device("cpu")),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_checkpoint_with_code_is_refused_and_the_code_does_not_run(kind: str, folder: Path) -> None:
    with pytest.raises((ToolError, ValueError), match=r"auto_map|trust_remote_code"):
        LOADERS[kind](folder)
    assert not (folder.parent / "ran").exists()


def test_every_automatic_class_is_told_not_to_trust_code() -> None:
    """AutoConfig, AutoTokenizer and AutoModel ask the user on a terminal unless they are told."""
    calls = []
    for path in sorted((ROOT / "peraxis_tools").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value).rpartition(".")[2]
            if owner.startswith("Auto") and node.func.attr in ("from_pretrained", "from_config"):
                calls.append((f"{path.name}:{node.lineno}", {k.arg: ast.unparse(k.value) for k in node.keywords}))
    assert len(calls) >= 5
    assert [place for place, given in calls if given.get("trust_remote_code") != "False"] == []


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation_internal", "experts_implementation"])
def test_a_kernel_of_a_repository_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "text_config": {name: "me/kernel"}}))
    with pytest.raises(ToolError, match=f"{name} names code of a repository, which is never run"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "attn_implementation": "sdpa"}))
    load_config(tmp_path)
