"""Convert a wire to an exact update: its changes are applied to the state before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, TypeAlias

import peraxis_format as pxd
from peraxis_tools.chain.write import UpdateJob, UpdateResult, open_chain, write_update
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.checkpoints.derived import DerivedCheckpoint
from peraxis_tools.convert.wires import zstd
from peraxis_tools.convert.wires.change import WireFile, changed
from peraxis_tools.convert.wires.index_value import IndexValueFile, is_index_value
from peraxis_tools.convert.wires.nemo import NemoFile
from peraxis_tools.convert.wires.xor import XorFolder, index_metadata
from peraxis_tools.display.notes import note
from peraxis_tools.display.progress import Progress, watched
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.outputs.rules import claim_delta

__all__ = ["WIRES", "Wire", "WireName", "from_wire", "recognised"]

WireName: TypeAlias = Literal["index-value", "nemo-rl", "xor"]
WIRES: Final[tuple[WireName, ...]] = ("index-value", "nemo-rl", "xor")
Wire: TypeAlias = Callable[[Path, int], WireFile]  # the source, and the bytes of the state before
_OPEN: Final[Mapping[WireName, Wire]] = {
    "index-value": lambda source, _: IndexValueFile(source),
    "nemo-rl": NemoFile,
    "xor": lambda source, _: XorFolder(source),
}


def recognised(source: Path) -> WireName | None:
    """The wire of a file or folder, recognised by its first bytes; None if it is none of them."""
    if source.is_dir():
        return "xor" if index_metadata(source) is not None else None
    if not source.is_file():  # a pipe would be waited for
        return None
    with contextlib.suppress(OSError), open(source, "rb") as file:
        if file.read(len(zstd.MAGIC)) == zstd.MAGIC:
            return "nemo-rl"
    # An output without the suffix is one too; a damaged file with the suffix is an error that says so.
    passed_over = () if source.suffix == ".safetensors" else (pxd.CheckpointError, OSError)
    with contextlib.suppress(*passed_over), pxd.Safetensors.open(source) as tensors:
        return "index-value" if is_index_value(tensors) else None
    return None


def from_wire(
    source: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    wire: WireName | None = None,
    after: Sequence[str | Path] = (),
    name: str | None = None,
    prefer: pxd.Prefer = "size",
    overwrite: bool = False,
    progress: Progress = None,
) -> UpdateResult:
    """Write one step as an exact update.

    source: the wire; `wire` None recognises it. base, after: the state before the step, a checkpoint and the updates on
    it. name: that of the state after the step. Raises ToolError, CheckpointError, PxdError; CheckFailedError if the
    wire is for another model or state.
    """
    source = Path(source)
    if not source.exists():
        raise ToolError(f"{source}: no such file or folder")
    if not source.is_dir() and not source.is_file():
        raise ToolError(f"{source}: not a regular file; copy it to one")
    chosen = wire or recognised(source)
    if chosen is None:
        raise ToolError(f"{source}: is none of the wires {', '.join(WIRES)}; pass --from")
    if source.is_dir() != (chosen == "xor"):
        raise ToolError(f"{source}: is {'a folder' if source.is_dir() else 'a file'}, which {chosen} is not")
    with (
        claim_delta(output, overwrite=overwrite, inputs=(source, base, *after)),
        open_checkpoint(base) as before,
        open_chain(before, after) as (after_updates, links),
        contextlib.closing(_OPEN[chosen](source, after_updates.tensors.size)) as opened,
    ):
        state = after_updates.tensors
        missing = next((item for item in opened.names if item not in state), None)
        if missing is not None:
            raise CheckFailedError(f"{source}: changes {missing}, which {state.label} lacks; pass the step's base")
        job = UpdateJob(
            output=Path(output),
            old=state,
            new=_Changed(state, opened, source),
            ids=(before.identity, pxd.Identity(id=name or source.stem)),
            previous=links[-1].content_id if links else None,
            assets={},
            prefer=prefer,
            overwrite=overwrite,
            name=output,
            base=links[-1].result if links else None,
        )
        with watched(progress, "convert", job.new.size) as step:
            written = write_update(job, step)
        if not written.changed:
            note(
                f"{source}: changes no weight of {state.label}; if the training step changed any, this is the state "
                "after the step: pass the one before it as the base"
            )
        return written


class _Changed(DerivedCheckpoint):
    """The state after a wire, as a checkpoint: each tensor is read from the state before and changed."""

    def __init__(self, before: pxd.Safetensors, wire: WireFile, source: Path) -> None:
        super().__init__(before, before.infos(), label=f"{before.label} + {source}")
        self._before = before
        self._wire = wire
        self._names = frozenset(wire.names)

    def _whole(self, name: str) -> pxd.Array:
        array = self._before.read(name)
        if name in self._names:
            array = changed(array, self._wire.change(name, self._before[name]))
            self._wire.check(name, array)
        return array
