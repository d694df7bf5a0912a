"""A text is read with the tokenizer of the model that it is for, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from peraxis_tools.compress import compress
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.run.dry_run import estimate_run
from peraxis_tools.errors import ToolError
from peraxis_tools.evaluate import evaluate
from tests.tools.compress_pairs import FEW, VOCABULARY, llama_config, write_pair, write_text

NARROW = len(VOCABULARY) - 6


@pytest.fixture
def text(tmp_path: Path) -> str:
    return str(write_text(tmp_path / "text.jsonl"))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path, text: str) -> None:
    base, tuned = write_pair(tmp_path, llama_config(vocab_size=NARROW))
    compress(base, tuned, tmp_path / "plain.pxd", force=True)
    options = CompressOptions(calibration=text, sequence_length=16, calibration_samples=8, generated_samples=0)
    for attempt in (
        lambda: compress(base, tuned, tmp_path / "fitted.pxd", calibration=text, **FEW),
        lambda: estimate_run(base, tuned, options=options),
        lambda: evaluate(base, tuned, tmp_path / "plain.pxd", {"a": text}, sequence_length=16),
    ):
        with pytest.raises(
            ToolError, match=rf"tuned: its tokenizer gives token \d+, and the model has {NARROW} tokens"
        ):
            attempt()
    assert not (tmp_path / "fitted.pxd").exists()


def test_a_checkpoint_without_a_tokenizer_is_refused_before_its_weights_are_planned(tmp_path: Path, text: str) -> None:
    base, tuned = write_pair(tmp_path, llama_config())
    for path in tuned.glob("*token*"):
        path.unlink()
    compress(base, tuned, tmp_path / "plain.pxd", force=True)
    planned = []
    with pytest.raises(ToolError, match="tuned: has no tokenizer, which a text needs; copy"):
        compress(base, tuned, tmp_path / "fitted.pxd", calibration=text, show_plan=planned.append, **FEW)
    assert not planned
    with pytest.raises(ToolError, match="tuned: has no tokenizer"):
        evaluate(base, tuned, tmp_path / "plain.pxd", {"a": text}, sequence_length=16)
