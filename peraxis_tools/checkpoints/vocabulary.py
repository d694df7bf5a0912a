"""A checkpoint's tokenizer against its model: whether there is one, and whether the model has its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from peraxis_tools.errors import ToolError

__all__ = ["check_ids", "check_tokenizer_files"]

# Every tokenizer of transformers has a file of one of these names.
_FILES: Final = (
    "*token*",
    "*vocab*",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.codes",
    "merges.txt",
    "spiece*",
)


def check_tokenizer_files(folder: Path, label: str) -> None:
    """Raise ToolError for a folder without the files of a tokenizer. label: the name of the checkpoint."""
    if not any(any(folder.glob(pattern)) for pattern in _FILES):
        raise ToolError(f"{label}: has no tokenizer, which a text needs; copy the tokenizer's files into the folder")


def check_ids(ids: NDArray[np.int64], config: Mapping[str, Any], label: str) -> None:
    """Raise ToolError for a token id that the model has no row for. ids: any shape; config: the model's config.json."""
    text = config.get("text_config")
    rows = (text if isinstance(text, Mapping) else config).get("vocab_size")
    if not isinstance(rows, int) or not ids.size or int(ids.max()) < rows:
        return
    raise ToolError(
        f"{label}: its tokenizer gives token {int(ids.max())}, and the model has {rows} tokens; "
        "the tokenizer is of another model, so copy the right one into the folder"
    )
