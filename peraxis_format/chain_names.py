"""The names of the files of a trainer's chain: step-<n>.pxd for an update, anchor-<n>.pxd for an anchor.

A trainer and the servers that follow it read only files with such a name.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["anchor_name", "step_name", "step_of"]

_NAME: Final = re.compile(r"(step|anchor)-([0-9]{1,18})\.pxd")


def step_name(step: int) -> str:
    """The file name of an update; names sort by their steps."""
    return f"step-{step:08d}.pxd"


def anchor_name(step: int) -> str:
    """The file name of an anchor."""
    return f"anchor-{step:08d}.pxd"


def step_of(name: str) -> tuple[int, bool] | None:
    """The step of a file name, and whether it is an anchor; None for any other file."""
    match = _NAME.fullmatch(name)
    return None if match is None else (int(match[2]), match[1] == "anchor")
