"""Convert an exact update to a wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import peraxis_format as pxd
from peraxis_format.errors import located
from peraxis_tools.chain.write import open_chain
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.convert.wires import index_value, nemo, xor
from peraxis_tools.convert.wires.read import WireName
from peraxis_tools.deltas.parts import refuse_part
from peraxis_tools.display.notes import note
from peraxis_tools.display.progress import Progress, watched
from peraxis_tools.display.shown import listed
from peraxis_tools.errors import ToolError
from peraxis_tools.outputs.rules import claim_file, claim_folder

__all__ = ["ToWireResult", "to_wire"]

_WRITE: Final[dict[WireName, ModuleType]] = {"index-value": index_value, "nemo-rl": nemo, "xor": xor}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToWireResult:
    """The written wire. changed: changed weights, of `weights`; tensors: changed tensors; bytes: of the files."""

    path: Path
    wire: str
    content_id: str
    tensors: int
    changed: int
    weights: int
    bytes: int


def to_wire(
    delta: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    wire: WireName,
    after: Sequence[str | Path] = (),
    overwrite: bool = False,
    progress: Progress = None,
) -> ToWireResult:
    """Write an exact update as a wire.

    base, after: the state before the update, a checkpoint and the updates on it. Raises PxdError if it is another one
    (E404, E405), ToolError for a delta that a wire cannot represent: tensors that were added or removed, or that
    changed shape or dtype.
    """
    output = Path(output)
    claim = claim_folder if wire == "xor" else claim_file
    with (
        claim(output, overwrite=overwrite, inputs=(delta, base, *after)),
        open_checkpoint(base) as before,
        open_chain(before, after) as (after_updates, _),
        pxd.open(delta) as file,
    ):
        _refuse_others(file)
        state = after_updates.tensors
        pxd.check_base_names(file.manifest, state)
        packed, changed, names = [], 0, file.manifest.names()
        with watched(progress, "convert", state.size) as step:
            for entry in file.manifest.modules:
                old = state.read(entry.name)
                with located(file.path):
                    pxd.check_base_bytes(entry, old)
                step(old.nbytes)
                if entry.encoding is pxd.Encoding.SAME:
                    continue
                with located(file.path):
                    new = pxd.reconstruct(file.load(entry.name), old)
                if (moved := pxd.count_changed(old, new)) == 0:
                    continue
                for name in (name for name in names[entry.name] if name in state):
                    packed.append(_WRITE[wire].pack(name, entry.dtype, old, new))
                    changed += moved
        if file.manifest.assets:
            names_left = listed([asset.path for asset in file.manifest.assets])
            note(f"{file.path}: its small files ({names_left}) are left out, because a wire has none")
        options: dict[str, Any] = {}
        if wire == "xor":
            manifest = file.manifest
            options = {"version": manifest.result or file.content_id, "base_version": manifest.base.digest}
        size: int = _WRITE[wire].write(output, packed, overwrite=overwrite, **options)
        return ToWireResult(
            path=output,
            wire=wire,
            content_id=file.content_id,
            tensors=len(packed),
            changed=changed,
            weights=sum(info.size // info.dtype.itemsize for info in state.infos()),
            bytes=size,
        )


def _refuse_others(file: pxd.DeltaFile) -> None:
    """Raise ToolError unless the file is an update of the same tensors."""
    refuse_part(file.manifest, file.path)
    for entry in file.manifest.modules:
        ref = entry.base
        if ref is None or ref.shape != entry.shape or ref.dtype is not entry.dtype:
            raise ToolError(f"{file.path}: {entry.name}: was added or reshaped or cast, which no wire can represent")
        if entry.encoding is pxd.Encoding.SIGN:
            raise ToolError(f"{file.path}: {entry.name}: has signs; write the update with `update`")
    dropped = file.manifest.dropped
    if dropped:
        raise ToolError(f"{file.path}: {dropped[0]}: is not in the result, which no wire can represent")
