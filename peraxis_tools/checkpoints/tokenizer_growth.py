"""Refuse a tokenizer that makes texts much longer, which costs a few lines of tokenizer.json.

A normaliser replaces characters before a text is cut into tokens. Twelve replacements of `a` by ten of them make a
million million letters of one. tokenizers does this in one call without a bound, so the file is checked before it is
loaded: each replacement has a factor, and those of a sequence multiply.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from peraxis_tools.errors import ToolError

__all__ = ["check_growth", "growth_of"]

_MOST: Final = 4096.0  # usual tokenizers: below 20
_UNICODE: Final = 4.0  # decomposition and bytes as letters


def check_growth(folder: Path, *, shown: str | None = None) -> None:
    """Raise ToolError if the tokenizer.json of a folder may make a text, or a decoded one, over 4096 times longer.

    A missing or malformed file is no error here; loading it says more. shown: the folder's name in errors.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(tokenizer, dict):
        return
    for part in ("normalizer", "decoder"):
        try:
            growth = growth_of(tokenizer.get(part))
        except RecursionError:
            growth = float("inf")
        if growth > _MOST:
            raise ToolError(
                f"{shown or folder}/{path.name}: its {part} can make a text more than {_MOST:.0f} times longer; "
                "correct it, or use the tokenizer of the base"
            )


def growth_of(part: Any) -> float:
    """The largest length of a text after a normaliser or decoder, relative to the text. part: its JSON value."""
    if not isinstance(part, Mapping):
        return 1.0
    kind = part.get("type")
    if kind == "Sequence":
        growth = 1.0
        for value in part.values():
            for inner in value if isinstance(value, list) else ():
                growth = min(growth * growth_of(inner), _MOST * _MOST)
        return growth
    if kind == "Replace":
        return _of_replacement(part.get("pattern"), str(part.get("content", "")))
    if kind == "Prepend":
        return 1.0 + len(str(part.get("prepend", "")))
    return _UNICODE if kind in ("NFD", "NFKD", "NFKC", "ByteLevel", "BertNormalizer") else 1.0


def _of_replacement(pattern: Any, content: str) -> float:
    text = pattern.get("String") if isinstance(pattern, Mapping) else None
    if isinstance(text, str) and text:
        return max(1.0, len(content) / len(text))
    return 1.0 + len(content)  # a regular expression may match nothing, between all characters
