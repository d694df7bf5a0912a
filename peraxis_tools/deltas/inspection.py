"""A summary of a PXD file: its content and the use of its bytes, from the header alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import peraxis_format as pxd
from peraxis_tools.arguments import check_paths
from peraxis_tools.checkpoints.kinds import KINDS, group_of, kind_of
from peraxis_tools.deltas.parts import is_part

__all__ = ["ByteShare", "InspectResult", "ModuleLine", "GroupAxes", "inspect", "needs_no_base", "select", "summarise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleLine:
    """One module: its bytes in the file, and in the full checkpoint."""

    name: str
    kind: str
    group: str
    encoding: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    full_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteShare:
    """The bytes of one encoding or kind of tensor, in the file and in the full checkpoint."""

    label: str
    module_count: int
    bytes: int
    full_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAxes:
    """The number of components by axis, for one group of modules (Figure 2 of the paper)."""

    group: str
    axis_counts: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectResult:
    """The result of `inspect`. overhead_bytes: the bytes of header and pads. ratio: full_bytes / bytes."""

    path: str
    version: str
    content_id: str
    manifest: pxd.Manifest
    bytes: int
    full_bytes: int
    asset_bytes: int
    overhead_bytes: int
    ratio: float
    by_encoding: tuple[ByteShare, ...]
    by_kind: tuple[ByteShare, ...]
    axes_by_group: tuple[GroupAxes, ...]
    modules: tuple[ModuleLine, ...]


def summarise(
    label: str, content_id: str, file_bytes: int, manifest: pxd.Manifest, records: Iterable[pxd.TensorRecord]
) -> InspectResult:
    """Summarise a local or remote file whose header has been read and checked."""
    sizes = {record.name: record.end - record.begin for record in records}
    lines = tuple(_line(module, sizes) for module in manifest.modules)
    assets = sum(count for name, count in sizes.items() if name.startswith("__asset__."))
    stored = sum(line.bytes for line in lines)
    full = sum(line.full_bytes for line in lines)
    return InspectResult(
        path=label,
        version="1.0",
        content_id=content_id,
        manifest=manifest,
        bytes=file_bytes,
        full_bytes=full,
        asset_bytes=assets,
        overhead_bytes=file_bytes - stored - assets,
        ratio=full / file_bytes,
        by_encoding=_shares(lines, [e.value for e in pxd.Encoding], lambda line: line.encoding),
        by_kind=_shares(lines, list(KINDS), lambda line: line.kind),
        axes_by_group=_axes(lines),
        modules=lines,
    )


def inspect(delta: str | Path) -> InspectResult:
    """Read the header of a PXD file (steps 1 to 8 of SPEC 8) and account for every byte.

    Raises ContainerError, ProfileError, OSError.
    """
    check_paths(delta=delta)
    with pxd.open(delta) as file:
        return summarise(str(delta), file.content_id, file.size, file.manifest, file.records)


def select(result: InspectResult, pattern: str) -> InspectResult:
    """The result with only those modules whose names match a glob; sums are still those of the whole file."""
    return replace(result, modules=tuple(line for line in result.modules if fnmatchcase(line.name, pattern)))


def needs_no_base(manifest: pxd.Manifest) -> bool:
    """Whether this is an anchor. The digest of its base is that of no tensor at all, and its name is of no use."""
    return manifest.result is not None and manifest.base.digest == pxd.NO_BASE and not is_part(manifest)


def _line(module: pxd.ModuleEntry, sizes: dict[str, int]) -> ModuleLine:
    tensor = module.tensor()
    return ModuleLine(
        name=module.name,
        kind=kind_of(module.name, module.shape),
        group=group_of(module.name),
        encoding=module.encoding.value,
        axes=tuple(component.axis.value for component in module.components),
        shape=module.shape,
        dtype=module.dtype.value,
        bytes=0 if tensor is None else sizes[tensor[0]],
        full_bytes=module.dtype.size_of(module.shape),
    )


def _shares(lines: Iterable[ModuleLine], labels: list[str], key: Callable[[ModuleLine], str]) -> tuple[ByteShare, ...]:
    lines = list(lines)
    shares = []
    for label in labels:
        chosen = [line for line in lines if key(line) == label]
        if chosen:
            shares.append(
                ByteShare(
                    label=label,
                    module_count=len(chosen),
                    bytes=sum(line.bytes for line in chosen),
                    full_bytes=sum(line.full_bytes for line in chosen),
                )
            )
    return tuple(shares)


def _axes(lines: Iterable[ModuleLine]) -> tuple[GroupAxes, ...]:
    counts: dict[str, Counter[str]] = {}
    for line in lines:
        if line.axes:
            counts.setdefault(line.group, Counter()).update(line.axes)
    order = [axis.value for axis in pxd.Axis]
    return tuple(
        GroupAxes(group=group, axis_counts={axis: found[axis] for axis in order if found[axis]})
        for group, found in counts.items()
    )
