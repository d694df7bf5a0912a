"""What a trainer publishes: its options, and the results of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

from peraxis_format.manifest import Manifest
from peraxis_format.ops.exact import Prefer
from peraxis_format.torch.updates.finite import Nonfinite

__all__ = ["Published", "UpdateOptions", "Written"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One published file. changed: weights that differ from the previous step. bytes: the size of the file.

    path: its URL if it was sent to one.
    """

    path: Path | str
    step: int
    content_id: str
    result: str
    changed: int
    weights: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A file that was written and sent. size: its bytes. changed: weights that differ from the state before it."""

    manifest: Manifest
    size: int
    changed: int


class UpdateOptions(TypedDict, total=False):
    """The options of UpdateWriter, for code that passes them on."""

    name: str
    dtype: torch.dtype | None
    prefer: Prefer
    anchor_every: int | None
    nonfinite: Nonfinite
