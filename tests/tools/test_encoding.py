"""What a tokenizer of a stranger raises, panics included, is one error that names its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peraxis_tools.checkpoints.environment import load_tokenizer
from peraxis_tools.compress.calibration.generate import starts_of
from peraxis_tools.errors import ToolError
from peraxis_tools.texts.encoding import token_ids, tokenizer_errors
from peraxis_tools.texts.samples import load_samples
from tests.tools.compress_pairs import write_text, write_tokenizer


def write(folder: Path, part: str, value: Any) -> Path:
    write_tokenizer(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
    return folder


def test_a_panic_while_loading_names_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "odd", "normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    with pytest.raises(ToolError, match=r"odd: its tokenizer cannot be loaded: .*charsmap"):
        load_tokenizer(folder)


def test_a_failure_while_encoding_names_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "odd", "model", {"type": "Unigram", "unk_id": None, "vocab": []})
    tokenizer = load_tokenizer(folder)
    text = write_text(tmp_path / "text.jsonl")
    for call in (
        lambda: token_ids(tokenizer, "sun"),
        lambda: load_samples(str(text), tokenizer, samples=2, length=8, seed=0),
        lambda: starts_of(tokenizer),
    ):
        with pytest.raises(ToolError, match=r"odd: its tokenizer cannot encode a text: .*unk_id"):
            call()


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 5000}),
        ("model", None),
    ],
)
def test_an_error_has_the_name_that_the_folder_is_shown_by(part: str, value: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "temporary", part, value)
    with pytest.raises(ToolError, match=r"^d\.pxd") as caught:
        load_tokenizer(folder, shown="d.pxd")
    assert str(folder) not in str(caught.value)


def test_an_interrupt_passes() -> None:
    with pytest.raises(KeyboardInterrupt), tokenizer_errors("a"):
        raise KeyboardInterrupt
