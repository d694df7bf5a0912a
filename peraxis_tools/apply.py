"""The verb apply: base + delta -> the fine-tuned checkpoint, streamed tensor by tensor (SPEC 8)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import peraxis_format as pxd
from peraxis_tools.arguments import check_least, check_paths, check_workers, sequence
from peraxis_tools.chain import opened_deltas, state_before
from peraxis_tools.chain.sources import local_updates
from peraxis_tools.checkpoints.assets import LEFT_BEHIND
from peraxis_tools.checkpoints.checkpoint import open_checkpoint, refuse_swapped
from peraxis_tools.checkpoints.completeness import note_borrowed, refuse_foreign
from peraxis_tools.checkpoints.shards import (
    SHARD_BYTES,
    ShardFile,
    plan_shards,
    shard_header,
    write_index,
    write_tensor,
)
from peraxis_tools.deltas.parts import refuse_part
from peraxis_tools.deltas.rebuild import assets_of, checkpoint_bytes, payload_first, rebuild_all, tensor_specs
from peraxis_tools.display.progress import Progress, watched
from peraxis_tools.display.sizes import parse_size
from peraxis_tools.errors import OptionError, ToolError
from peraxis_tools.outputs.folders import MARKER, atomic_folder
from peraxis_tools.outputs.rules import claim_folder

__all__ = ["ApplyResult", "apply"]

_REPEATS: Final = 2  # a checkpoint may have a copy of each of its tensors
_SHARD_LEAST: Final = 1_000_000  # a smaller one is a mistake in the unit, and gives a file for each tensor
_SMALL: Final = 1 << 26  # bytes that may be written from any base


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyResult:
    """The result of `apply`.

    path: the folder. files: paths in it. left_behind: files of the fine-tuned folder that the delta does not contain.
    """

    path: Path
    content_id: str
    tensors: int
    full_bytes: int
    files: tuple[str, ...]
    left_behind: tuple[str, ...] = ()


def apply(
    base: str | Path,
    deltas: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    base_revision: str | None = None,
    overwrite: bool = False,
    shard_size: int | str = SHARD_BYTES,
    workers: int | None = None,
    progress: Progress = None,
) -> ApplyResult:
    """Write base + delta as a Hugging Face folder: shards, index, configuration, tokenizer.

    base: a folder, a file or a hub id. deltas: one, or the updates of a chain in any order: files, a folder, a URL or a
    repository on the hub. shard_size: a number of bytes, or a text like 2GB; 1MB or more. progress: called with each
    number of bytes written, or True for a bar. The folder is written to `output` atomically. Raises PxdError,
    CheckpointError, ToolError, OSError.
    """
    check_paths(base=base, output=output)
    check_workers(workers)
    shard_bytes = _shard_bytes(shard_size)
    output = Path(output)
    deltas = sequence(deltas)
    if not deltas:
        raise ToolError("no delta to apply; pass one")
    refuse_swapped(base, deltas[0])
    with (
        claim_folder(output, overwrite=overwrite, inputs=(base, *deltas)),
        local_updates(deltas) as paths,
        opened_deltas(paths) as files,
        open_checkpoint(base, revision=base_revision) as opened,
        watched(progress, "apply", checkpoint_bytes(files[-1].manifest)) as step,
        payload_first(files[-1]),
    ):
        file, checkpoint = files[-1], state_before(files, opened)
        refuse_part(file.manifest, file.path)
        refuse_foreign(files[0], opened)
        _refuse_repeats(file, opened.tensors.size + sum(path.stat().st_size for path in paths))
        note_borrowed(file, checkpoint)
        shards = plan_shards(tensor_specs(file.manifest), shard_bytes=shard_bytes)
        with atomic_folder(output, overwrite=overwrite) as folder:
            _write_shards(folder, shards, file, checkpoint.tensors, workers, step)
            write_index(folder, shards)
            for name, data in assets_of(file, checkpoint):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(data)
            written = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            names = tuple(sorted(name for name in written if name != MARKER))
        tensors = [tensor for shard in shards for tensor in shard.tensors]
        return ApplyResult(
            path=output,
            content_id=file.content_id,
            tensors=len(tensors),
            full_bytes=sum(tensor.size for tensor in tensors),
            files=names,
            left_behind=tuple(file.manifest.metadata.get(LEFT_BEHIND, "").split("\n")[:-1]),
        )


def _shard_bytes(size: int | str) -> int:
    found = parse_size(size)
    check_least("shard_size", found, 1)
    if found < _SHARD_LEAST:
        raise OptionError(f"shard_size {found}: must be 1MB or more; write it like 5GB")
    return found


def _refuse_repeats(file: pxd.DeltaFile, read: int) -> None:
    """Refuse a checkpoint whose tied tensors would make it much larger than base and delta together.

    read: the bytes of base and delta.
    """
    size = checkpoint_bytes(file.manifest)
    if size > _REPEATS * read + _SMALL:
        raise ToolError(
            f"{file.path}: ties so many tensors that {size} bytes would be written from {read} bytes of base and "
            "delta; write the file again"
        )


def _write_shards(
    folder: Path,
    shards: list[ShardFile],
    delta: pxd.DeltaFile,
    base: pxd.Safetensors,
    workers: int | None,
    progress: Callable[[int], None],
) -> None:
    names = delta.manifest.names()
    arrays = (array for entry, array in rebuild_all(delta, base, workers=workers) for _ in names[entry.name])
    with contextlib.closing(arrays):
        for shard in shards:
            with open(folder / shard.file_name, "wb") as file:
                file.write(shard_header(shard.tensors))
                for spec in shard.tensors:
                    write_tensor(file, spec, next(arrays))
                    progress(spec.size)
