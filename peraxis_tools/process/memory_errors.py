"""Errors of memory that ran out: numpy's, torch's on the processor, and torch's on a device."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from peraxis_tools.errors import error_line

__all__ = ["out_of_memory"]

_DTYPE: Final = "--compute-dtype"


def out_of_memory(error: BaseException, options: Collection[str] = ()) -> str | None:
    """What failed and what to do; None for an error of another kind. options: those of the command, like `--masks`."""
    on_processor = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)  # torch has no class for it
    if isinstance(error, MemoryError) or on_processor:
        return "out of memory; use a machine with more memory, or smaller batches and samples"
    # By name, because a verb without a model does not import torch.
    if "OutOfMemoryError" not in {kind.__name__ for kind in type(error).__mro__}:
        return None
    narrow = f", or {_DTYPE} bfloat16, which is less exact" if _DTYPE in options else ""
    return (
        f"{error_line(error).split('. ')[0]}; use a device with more memory, --device cpu, "
        f"smaller batches and samples{narrow}"
    )
