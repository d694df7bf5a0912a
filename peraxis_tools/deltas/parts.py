"""Parts of one delta: files with some of its modules each, split and joined without changing a byte.

A part is a PXD file whose metadata key `peraxis.part` lists the names of all modules of the whole, in order, as
canonical JSON. Fields of the whole (identities, calibration, producer, dropped tensors, other metadata) are in every
part; an alias is in the part of its module, an asset in at least one part. So the parts can be joined in any order, and
a missing part is detected by the names of its modules.

SPEC 3.7 requires a file to be complete, and a part alone is not. So `apply` and the loaders of models refuse it
(`refuse_part`), but `inspect`, `verify` and `diff` accept it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

import peraxis_format as pxd
from peraxis_tools.display.progress import Progress, watched
from peraxis_tools.errors import ToolError

__all__ = ["JOIN_PARTS", "is_part", "join_parts", "part_of", "refuse_part", "split"]

JOIN_PARTS: Final = "join the parts with `peraxis-tools merge`"  # the remedy where a whole delta is needed


def is_part(manifest: pxd.Manifest) -> bool:
    """Whether a file is marked as a part."""
    return pxd.PART_KEY in manifest.metadata


def refuse_part(manifest: pxd.Manifest, file: object) -> None:
    """Raise ToolError for a part, so that no verb treats it as a whole checkpoint."""
    part = part_of(manifest, file)
    if part is not None:
        raise ToolError(f"{file}: is {part}; {JOIN_PARTS} first")


def part_of(manifest: pxd.Manifest, file: object) -> str | None:
    """`a part with 20 of 39 modules`; None for a whole delta. Raises ToolError if the part's metadata is malformed."""
    if not is_part(manifest):
        return None
    return f"a part with {len(manifest.modules)} of {len(_whole(manifest, file))} modules"


def _part_metadata(names: Sequence[str]) -> dict[str, str]:
    """The metadata that marks a part of a whole with these modules, in order."""
    return {pxd.PART_KEY: pxd.canonical_json(list(names)).decode()}


def _whole(manifest: pxd.Manifest, file: object) -> list[str]:
    try:
        names = json.loads(manifest.metadata[pxd.PART_KEY])
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ToolError(f"{file}: its metadata key {pxd.PART_KEY} is not an array of names; write the parts again")
    if not {module.name for module in manifest.modules} <= set(names):
        raise ToolError(
            f"{file}: has modules that its metadata key {pxd.PART_KEY} does not list; write the parts again"
        )
    return names


def _writer(
    output: Path, manifest: pxd.Manifest, metadata: dict[str, str], *, overwrite: bool = True
) -> pxd.DeltaWriter:
    return pxd.DeltaWriter(
        output,
        base=pxd.Identity(id=manifest.base.id, revision=manifest.base.revision),
        fine_tuned=manifest.fine_tuned,
        producer=manifest.producer,
        calibration=manifest.calibration,
        metadata=metadata,
        previous=manifest.previous,
        chained=bool(manifest.features),
        overwrite=overwrite,
    )


def split(
    delta: pxd.DeltaFile,
    groups: Sequence[Sequence[str]],
    outputs: Sequence[Path],
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write one part for each group of module names. Assets go into the first part.

    Law: join_parts of them gives the same bytes. Raises ToolError unless each module is in exactly one group.
    """
    names = list(delta)
    if sorted(name for group in groups for name in group) != sorted(names):
        raise ToolError("each module must be in exactly one part")
    for number, (group, output) in enumerate(zip(groups, outputs, strict=True)):
        chosen = set(group)
        with _writer(output, delta.manifest, {**delta.manifest.metadata, **_part_metadata(names)}) as writer:
            for name in names:
                if name in chosen:
                    writer.add(delta.load(name))
                    (progress or (lambda _: None))(delta.payload_bytes(name))
            tied = [(name, alias) for name, alias in delta.manifest.tied if name in chosen]
            assets = delta.manifest.assets if number == 0 else ()
            writer.add_rest(
                tied=tied,
                dropped=delta.manifest.dropped,
                assets=((asset.path, delta.asset(asset.path)) for asset in assets),
            )
            writer.finish()


def join_parts(
    paths: Sequence[Path], output: Path, *, overwrite: bool = True, progress: Progress = None
) -> tuple[pxd.Manifest, list[str], int]:
    """Join the parts of a delta and write it. Returns its manifest, the parts' content IDs, and its size in bytes.

    The bytes do not depend on the order of the parts, and equal those of the delta before it was split. Raises
    ToolError if a part is missing, doubled, or of another delta.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(pxd.open(path)) for path in paths]
        for file in files:
            if not is_part(file.manifest):
                raise ToolError(f"{file.path}: is none of the parts of a delta; pass the files that `split` wrote")
        names = _whole(files[0].manifest, files[0].path)
        owners = _owners(files, names)
        # Sort by the first module, so that the order of the arguments does not matter.
        place = {name: i for i, name in enumerate(names)}
        files.sort(key=lambda file: place[next(iter(file))])
        first = files[0].manifest
        metadata = {key: value for key, value in first.metadata.items() if key != pxd.PART_KEY}
        total = sum(file.data_size for file in files)
        with _writer(output, first, metadata, overwrite=overwrite) as writer, watched(progress, "merge", total) as step:
            for name in names:
                writer.add(owners[name].load(name))
                step(owners[name].payload_bytes(name))
            tied = {pair for file in files for pair in file.manifest.tied}
            writer.add_rest(tied=tied, dropped=first.dropped, assets=_assets(files).items())
            return writer.finish(), [file.content_id for file in files], writer.size


def _owners(files: Sequence[pxd.DeltaFile], names: list[str]) -> dict[str, pxd.DeltaFile]:
    first = files[0]
    owners: dict[str, pxd.DeltaFile] = {}
    for file in files:
        if _of_whole(file.manifest) != _of_whole(first.manifest) or _whole(file.manifest, file.path) != names:
            raise ToolError(f"{file.path}: is not a part of the same delta as {first.path}; pass parts of one delta")
        for name in file:
            if name in owners:
                raise ToolError(f"{name}: is in {owners[name].path} and in {file.path}; pass each part once")
            owners[name] = file
    missing = [name for name in names if name not in owners]
    if missing:
        raise ToolError(
            f"{len(missing)} of {len(names)} modules are in none of the parts, for example {missing[0]}; pass all parts"
        )
    return owners


def _of_whole(manifest: pxd.Manifest) -> pxd.Manifest:
    """The manifest without the fields that differ between the parts of a whole."""
    return replace(manifest, base=replace(manifest.base, digest=""), modules=(), tied=(), assets=(), result=None)


def _assets(files: Sequence[pxd.DeltaFile]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for file in files:
        for asset in file.manifest.assets:
            data = file.asset(asset.path)
            if found.setdefault(asset.path, data) != data:
                raise ToolError(f"{file.path}: has another {asset.path} than the other parts; write the parts again")
    return found
