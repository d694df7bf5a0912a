"""Convert other projects' delta files and wires to .pxd, and .pxd to these and to LoRA. Imports torch when needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, get_args

import peraxis_format as pxd
from peraxis_tools.arguments import check_choice, check_least, check_paths, refuse_idle, sequence
from peraxis_tools.chain.write import UpdateResult
from peraxis_tools.convert.layouts import LAYOUTS, Layout
from peraxis_tools.convert.lora import LeftOut, LoraModule, LoraResult, to_lora
from peraxis_tools.convert.to_pxd import ToPxdResult, to_pxd
from peraxis_tools.convert.wires import WIRES, ToWireResult, WireName, from_wire, recognised, to_wire
from peraxis_tools.display.progress import Progress
from peraxis_tools.errors import OptionError, ToolError

__all__ = [
    "DEFAULT_RANK",
    "LAYOUTS",
    "WIRES",
    "Layout",
    "LeftOut",
    "LoraModule",
    "LoraResult",
    "ToPxdResult",
    "ToWireResult",
    "WireName",
    "convert",
    "from_wire",
    "recognised",
    "to_lora",
    "to_pxd",
    "to_wire",
]

DEFAULT_RANK: Final = 16  # of a LoRA adapter


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: Literal["pxd", "lora"] | WireName,
    base: str | Path | None = None,
    layout: Layout | WireName | None = None,
    axis: Literal["row", "col"] | None = None,
    name: str | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    after: str | Path | Sequence[str | Path] = (),
    prefer: pxd.Prefer = "size",
    overwrite: bool = False,
    progress: Progress = None,
) -> ToPxdResult | LoraResult | UpdateResult | ToWireResult:
    """Convert a .pt delta or a wire to a .pxd file, or a .pxd file to a wire or a LoRA adapter.

    to: "pxd" needs `base` and takes `layout` (None: recognise it), `axis` and `name`, as `to_pxd` does, and for a wire
    `after` and `prefer`, as `from_wire` does. "lora" takes `rank` (default: 16) or `max_error`, as `to_lora` does. A
    wire's name needs `base` and takes `after`, as `to_wire` does. For a whole checkpoint call `apply`. progress is
    called with each number of bytes done. Raises ToolError, CheckpointError, PxdError, OSError.
    """
    check_paths(source=source, output=output)
    check_paths(base=base, optional=True)
    after = sequence(after)
    check_choice("to", to, ("pxd", "lora", *WIRES))
    _check_words(layout, axis, prefer)
    _check_closeness(rank, max_error)
    faster = None if prefer == "size" else prefer
    if to != "lora":
        refuse_idle(f'with to="{to}"', rank=rank, max_error=max_error)
    if to != "pxd":
        refuse_idle(f'with to="{to}"', layout=layout, axis=axis, name=name, prefer=faster)
    if to == "lora":
        refuse_idle('with to="lora"', after=after)
        rank = DEFAULT_RANK if rank is None and max_error is None else rank
        return to_lora(
            source, output, rank=rank, max_error=max_error, base=base, overwrite=overwrite, progress=progress
        )
    if base is None:
        raise ToolError(f"{source}: pass base, the checkpoint that this delta is for")
    if to != "pxd":
        return to_wire(source, base, output, wire=to, after=after, overwrite=overwrite, progress=progress)
    wire = recognised(Path(source)) if layout is None else next((item for item in WIRES if item == layout), None)
    if wire is not None:
        refuse_idle(f"with the wire {wire}", axis=axis)
        return from_wire(
            source,
            base,
            output,
            wire=wire,
            after=after,
            name=name,
            prefer=prefer,
            overwrite=overwrite,
            progress=progress,
        )
    refuse_idle("without a wire", after=after, prefer=faster)
    known = next((item for item in LAYOUTS if item == layout), None)
    chosen = None if axis is None else pxd.Axis(axis)
    return to_pxd(source, base, output, layout=known, axis=chosen, name=name, overwrite=overwrite, progress=progress)


def _check_words(layout: str | None, axis: str | None, prefer: str) -> None:
    check_choice("prefer", prefer, get_args(pxd.Prefer))
    if layout is not None:
        check_choice("layout", layout, (*LAYOUTS, *WIRES))
    if axis is not None:
        check_choice("axis", axis, ("row", "col"))


def _check_closeness(rank: int | None, max_error: float | None) -> None:
    check_least("rank", rank, 1)
    if max_error is not None and not 0.0 < max_error < 1.0:
        raise OptionError(f"max_error {max_error}: must be above 0 and below 1")
