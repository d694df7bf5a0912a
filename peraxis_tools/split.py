"""The verb split: write a delta in parts for upload or transport; `merge` joins them again, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import peraxis_format as pxd
from peraxis_tools.arguments import check_least, check_paths
from peraxis_tools.deltas.parts import refuse_part
from peraxis_tools.deltas.parts import split as write_parts
from peraxis_tools.display.progress import Progress, watched
from peraxis_tools.display.shown import counted
from peraxis_tools.errors import ToolError
from peraxis_tools.outputs.folders import atomic_folder
from peraxis_tools.outputs.rules import claim_folder

__all__ = ["Part", "SplitResult", "split"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One written file."""

    path: Path
    module_count: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitResult:
    """The result of `split`. content_id: the content ID of the whole delta."""

    content_id: str
    parts: tuple[Part, ...]


def split(
    delta: str | Path,
    output: str | Path,
    *,
    parts: int,
    overwrite: bool = False,
    progress: Progress = None,
) -> SplitResult:
    """Write a delta as `parts` files of about equal size, like `<name>-00001-of-00004.pxd`, into the folder `output`.

    The modules keep their order. The folder is written atomically. progress: called with numbers of payload bytes, or
    True for a bar. Raises ToolError, PxdError, OSError.
    """
    check_paths(delta=delta, output=output)
    check_least("parts", parts, 2)
    folder = Path(output)
    with claim_folder(folder, overwrite=overwrite, inputs=(delta,)), pxd.open(delta) as file:
        refuse_part(file.manifest, delta)
        groups = _groups(file, parts)
        stem = Path(delta).stem
        names = [f"{stem}-{i:05d}-of-{len(groups):05d}.pxd" for i in range(1, len(groups) + 1)]
        with (
            atomic_folder(folder, overwrite=overwrite) as temporary,
            watched(progress, "split", file.data_size) as step,
        ):
            write_parts(file, groups, [temporary / name for name in names], progress=step)
        written = zip(groups, (folder / name for name in names), strict=True)
        return SplitResult(
            content_id=file.content_id,
            parts=tuple(Part(path=o, module_count=len(g), bytes=o.stat().st_size) for g, o in written),
        )


def _groups(delta: pxd.DeltaFile, parts: int) -> list[list[str]]:
    """Groups of consecutive modules; a new group starts when the groups before it have their share of the bytes."""
    names = list(delta)
    if parts > len(names):
        most = f"pass at most {len(names)} parts (--parts)" if len(names) > 1 else "it cannot be split"
        raise ToolError(f"{delta.path}: has {counted(len(names), 'module')}, too few for {parts} parts; {most}")
    total = sum(map(delta.payload_bytes, names))
    groups: list[list[str]] = [[]]
    done = 0
    for i, name in enumerate(names):
        if groups[-1] and len(groups) < parts:
            full = done * parts >= total * len(groups)
            if full or len(names) - i <= parts - len(groups):
                groups.append([])
        groups[-1].append(name)
        done += delta.payload_bytes(name)
    return groups
