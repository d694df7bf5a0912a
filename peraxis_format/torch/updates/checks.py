"""Checks of a trainer's arguments before anything is published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from peraxis_format.errors import ArgumentError

__all__ = ["check_publishing"]


def check_publishing(model: object, folder: str | Path, dtype: object) -> None:
    """Raise ArgumentError unless a model, a folder or URL, and a floating-point dtype (or None) are given."""
    if not isinstance(model, nn.Module | Mapping):
        raise ArgumentError(f"model is a {type(model).__name__}: pass a module, or a mapping of names to tensors")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ArgumentError(f"dtype {dtype!r}: must be a floating-point dtype, like torch.bfloat16, or None")
    if Path(folder).is_file():
        raise ArgumentError(f"{folder}: is a file; pass the folder of the chain")
