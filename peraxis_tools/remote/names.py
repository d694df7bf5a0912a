"""Names on the hub, and how to tell names of files from them, so that a mistyped file is not looked up on a network."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Final

__all__ = ["HUB_ID", "HUB_NAME", "names_a_file"]

_WORD: Final = r"[A-Za-z0-9][\w.-]*"
_AT: Final = r"(@(?P<revision>[\w./-]+))?"
HUB_ID: Final = re.compile(rf"{_WORD}/{_WORD}", re.ASCII)  # org/name
HUB_NAME: Final = re.compile(rf"(?P<id>{_WORD}/{_WORD}){_AT}", re.ASCII)  # org/name or org/name@revision

# Suffixes of files; names on the hub contain dots too (org/model-2.5), but do not end like this.
_SUFFIXES: Final = frozenset(
    ".bin .csv .gguf .gz .html .json .jsonl .md .parquet .pt .pth .pxd .safetensors .sig .tsv .txt .yaml .zip".split()
)
_ON_THE_HUB: Final = re.compile(rf"{_WORD}(/{_WORD})?{_AT}")


def names_a_file(name: str) -> bool:
    """Whether this name can only be that of a file or folder: by its suffix, or by more than org/name."""
    return PurePath(name).suffix.lower() in _SUFFIXES or _ON_THE_HUB.fullmatch(name) is None
