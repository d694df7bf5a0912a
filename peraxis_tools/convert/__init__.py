"""Convert other projects' delta files to .pxd, and .pxd to a LoRA adapter. torch is imported when needed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import peraxis_format as pxd
from peraxis_tools.convert.layouts import LAYOUTS, Layout
from peraxis_tools.convert.lora import LeftOut, LoraModule, LoraResult, to_lora
from peraxis_tools.convert.to_pxd import ToPxdResult, to_pxd
from peraxis_tools.errors import ToolError
from peraxis_tools.progress import Progress

__all__ = ["LAYOUTS", "Layout", "LeftOut", "LoraModule", "LoraResult", "ToPxdResult", "convert", "to_lora", "to_pxd"]


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: Literal["pxd", "lora"],
    base: str | Path | None = None,
    layout: Layout | None = None,
    axis: Literal["row", "col"] | None = None,
    name: str | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    overwrite: bool = False,
    progress: Progress = None,
) -> ToPxdResult | LoraResult:
    """Convert a .pt delta to a .pxd file, or a .pxd file to a LoRA adapter.

    to: "pxd" needs `base` and takes `layout` (None: recognise it), `axis` and `name`, as `to_pxd` does. "lora" takes
    either `rank` or `max_error`, as `to_lora` does. For a whole checkpoint call `apply`. progress is called with each
    number of bytes done. Raises ToolError, CheckpointError, PxdError, OSError.
    """
    if to == "lora":
        return to_lora(
            source, output, rank=rank, max_error=max_error, base=base, overwrite=overwrite, progress=progress
        )
    if base is None:
        raise ToolError(f"{source}: pass base, the checkpoint that this delta is for")
    chosen = None if axis is None else pxd.Axis(axis)
    return to_pxd(source, base, output, layout=layout, axis=chosen, name=name, overwrite=overwrite, progress=progress)
