"""Refuse a configuration whose counts no model has, before transformers builds as many layers.

A model is built from config.json alone, before its weights are read, so one number could keep it busy for days.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from peraxis_tools.errors import ToolError

__all__ = ["check_counts"]

_MOST: Final = 4096  # layers, and experts of one layer; the largest models have a few hundred
_COUNTS: Final = re.compile(
    r"(num|n)_(\w+_)?(layers?|blocks?|experts?|stages?)|(encoder|decoder|text|vision)_layers|num_\w+_layers|depth|layers"
)


def check_counts(folder: Path) -> None:
    """Raise ToolError if the config.json of a folder has more than 4096 layers or experts, at any depth.

    A missing or malformed file is no error here; loading it says more.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else None
        large = next(_large("", config), None)
    except (OSError, ValueError, RecursionError):
        return
    if large is not None:
        raise ToolError(f"{path}: {large}, which is more than {_MOST}; correct it")


def _large(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _large(str(key), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _large(name, inner)
    elif isinstance(value, int | float) and value > _MOST and _COUNTS.fullmatch(name):
        yield f"{name} is {value:.6g}"
