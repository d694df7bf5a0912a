"""A fine-tune without a configuration or a tokenizer: who has them is said, and the model loads where that is safe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import peraxis
from peraxis_tools.apply import apply
from peraxis_tools.compress import compress
from peraxis_tools.errors import first_line
from tests.tools.compress_pairs import llama_pair


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base, tuned, _ = llama_pair(tmp_path)
    return base, tuned


def _delta(base: Path, tuned: Path) -> Path:
    return compress(base, tuned, tuned.parent / "d.pxd", force=True, fit="none").path


@pytest.mark.parametrize("left", [[], ["tokenizer_config.json"]])
def test_the_base_lends_what_the_fine_tune_lacks_and_each_step_says_so(
    pair: tuple[Path, Path], tmp_path: Path, left: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned = pair
    for path in tuned.glob("*.json"):
        if path.name not in left:
            path.unlink()
    delta = _delta(base, tuned)
    assert "has no config.json" in caplog.text
    assert "has no tokenizer, so the delta has none; a loader takes that of the base" in caplog.text
    caplog.clear()
    apply(base, delta, tmp_path / "out")
    assert "has no config.json; that of the base is taken" in caplog.text
    assert "has no tokenizer; that of the base is taken" in caplog.text
    caplog.clear()
    _, tokenizer = peraxis.load(delta, base=base)
    assert caplog.text.count("has no tokenizer; that of the base is taken") == 1
    assert tokenizer("red")["input_ids"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_tokenizer_of_another_size_is_not_taken(
    pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned = pair
    for path in tuned.glob("token*.json"):
        path.unlink()
    delta = _delta(base, tuned)
    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    caplog.clear()
    assert "tokenizer.json" not in apply(other, delta, tmp_path / "out").files
    assert "another size" in caplog.text


def test_a_complete_fine_tune_is_not_noted(
    pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    apply(pair[0], _delta(*pair), tmp_path / "out")
    assert not caplog.records


def test_neither_has_a_tokenizer(pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in pair:
        for path in folder.glob("token*.json"):
            path.unlink()
    delta = _delta(*pair)
    assert "has no tokenizer, so the delta has none; nor has the base" in caplog.text
    assert peraxis.load(delta, base=pair[0]).tokenizer is None


def test_the_line_of_an_error_does_not_end_at_a_colon() -> None:
    assert first_line(ValueError("cannot be loaded from one of:\n(1) a tokenizer.json\n(2) ...")) == (
        "cannot be loaded from one of: (1) a tokenizer.json"
    )
    assert first_line(ValueError("\nbroken\nadvice")) == "broken"


def test_a_configuration_of_generation_alone_does_not_keep_the_bases_config_out(
    pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    base, tuned = pair
    (tuned / "config.json").unlink()
    (tuned / "generation_config.json").write_text('{"eos_token_id": 3}')
    delta = _delta(base, tuned)
    assert [f"{tuned.name}: has no config.json; that of the base is stored" in told for told in caplog.messages].count(
        True
    )
    apply(base, delta, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == 3
    caplog.clear()
    peraxis.update(base, tuned, tmp_path / "u.pxd")
    assert "has generation_config.json and no config.json, and so has the checkpoint that apply writes" in caplog.text
    caplog.clear()
