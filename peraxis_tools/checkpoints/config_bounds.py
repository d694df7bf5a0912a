"""Refuse a configuration whose counts no model has, or that names code, before transformers builds the model.

A model is built from config.json alone, before its weights are read, so one number could keep it busy for days. An
implementation of attention may be the name of a repository, whose kernel transformers would fetch and run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from peraxis_tools.errors import ToolError

__all__ = ["check_config_bounds"]

_MOST: Final = 4096  # layers, and experts of one layer; the largest models have a few hundred
_COUNTS: Final = re.compile(
    r"(\w+_)?(num|n)_(\w+_)?(layers?|blocks?|experts?|stages?)|(encoder|decoder|text|vision)_layers|num_\w+_layers|depth|layers"
)
_IMPLEMENTATION: Final = re.compile(r"_?(attn|experts)_implementation(_internal)?")


def check_config_bounds(folder: Path, *, shown: str | None = None) -> None:
    """Raise ToolError if the config.json of a folder has more than 4096 layers or experts, or names code, at any depth.

    A missing or malformed file is no error here; loading it says more. shown: the folder's name in errors.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else None
        wrong = next(_wrong("", config), None)
    except (OSError, ValueError, RecursionError):
        return
    if wrong is not None:
        raise ToolError(f"{shown or folder}/{path.name}: {wrong}; correct it")


def _wrong(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _wrong(str(key), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _wrong(name, inner)
    elif isinstance(value, int | float) and value > _MOST and _COUNTS.fullmatch(name):
        yield f"{name} is {value:.6g}, which is more than {_MOST}"
    elif isinstance(value, str) and "/" in value and _IMPLEMENTATION.fullmatch(name):
        yield f"{name} names code of a repository, which is never run"
