"""The verb diff: compare two deltas on one base, or a delta with its fine-tuned checkpoint; streamed.

Memory: two modules of each file, or blocks of rows of exact tensors. Time: reading and hashing, and about the same
again for the sums over signs. It imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Literal

import peraxis_format as pxd
from peraxis_format.urls import is_url
from peraxis_tools.arguments import check_paths, check_workers
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.deltas.rows import BaseRows, base_rows
from peraxis_tools.deltas.unpacked import unpacked
from peraxis_tools.diff.checkpoint import compare_with_checkpoint
from peraxis_tools.diff.manifests import manifest_changes
from peraxis_tools.diff.modules import compare_modules
from peraxis_tools.diff.result import DiffResult, GroupDiff, ManifestChange, ModuleDiff, group
from peraxis_tools.display.progress import Progress, watched
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.process.parallel import balanced_map

__all__ = ["DiffResult", "GroupDiff", "ManifestChange", "ModuleDiff", "diff", "diff_checkpoint", "names_checkpoint"]

_DENSE_WORKERS: Final = 2  # blocks of rows take some tens of MiB per worker


def diff(
    a: str | Path,
    b: str | Path,
    *,
    base: str | Path | None = None,
    workers: int | None = None,
    progress: Progress = None,
) -> DiffResult:
    """Compare two deltas made for one base, or a delta with a fine-tuned checkpoint (a folder, a file or a hub id).

    base: the checkpoint of the base. It is needed for exact tensors, and if B is a checkpoint; it is checked. progress:
    called with numbers of payload bytes of A, or True for a bar. Raises CheckFailedError if the bases differ,
    ToolError, PxdError, CheckpointError, OSError.
    """
    check_paths(a=a, b=b)
    check_paths(base=base, optional=True)
    check_workers(workers)
    if names_checkpoint(b):
        if base is None:
            raise ToolError(f"{b}: is a checkpoint; pass base (--base) to compare a delta with it")
        return diff_checkpoint(a, b, base=base, workers=workers, progress=progress)
    with ExitStack() as stack:
        tensors = None if base is None else stack.enter_context(open_checkpoint(base)).tensors
        file_a, file_b = (unpacked(stack.enter_context(pxd.open(path)), tensors) for path in (a, b))
        step = stack.enter_context(watched(progress, "diff", _payload_bytes(file_a)))
        common = [name for name in file_a if name in file_b]
        _check_one_base(file_a, file_b, common)
        if tensors is not None:
            pxd.check_base_names(file_a.manifest, tensors)
        modules = _compare(file_a, file_b, common, tensors, workers, step)
        return _result(
            file_a,
            modules,
            b=str(b),
            content_id_b=file_b.content_id,
            equal=file_a.content_id == file_b.content_id,
            manifest=manifest_changes(file_a.manifest, file_b.manifest),
            only_in_b=tuple(name for name in file_b if name not in file_a),
            only_in_a=tuple(name for name in file_a if name not in file_b),
        )


def names_checkpoint(source: str | Path) -> bool:
    """Whether this is a folder, a safetensors file or a hub id. A URL and any other file is a delta."""
    if is_url(source):
        return False
    path = Path(source)
    return path.suffix != ".pxd" and (not path.is_file() or path.suffix in (".safetensors", ".json"))


def diff_checkpoint(
    a: str | Path,
    fine_tuned: str | Path,
    *,
    base: str | Path,
    workers: int | None = None,
    progress: Progress = None,
) -> DiffResult:
    """Compare base + delta with a fine-tuned checkpoint; relative distances are to the checkpoint's own delta.

    Raises CheckFailedError, PxdError, CheckpointError, OSError.
    """
    check_paths(a=a, fine_tuned=fine_tuned, base=base)
    check_workers(workers)
    with (
        pxd.open(a) as opened,
        open_checkpoint(base) as before,
        open_checkpoint(fine_tuned) as after,
        watched(progress, "diff", _payload_bytes(opened)) as step,
    ):
        after.tensors.check_dtypes()
        file = unpacked(opened, before.tensors)
        pxd.check_base_names(file.manifest, before.tensors)
        aliases = {alias: name for name, alias in file.manifest.tied}
        common = [name for name in file if name in after.tensors]
        if not common:
            raise CheckFailedError(
                f"{after.tensors.label}: has none of the modules of {a}; pass the fine-tuned checkpoint"
            )

        def work(name: str) -> ModuleDiff:
            found = compare_with_checkpoint(file, name, before.tensors, after.tensors)
            step(file.payload_bytes(name))
            return found

        modules = balanced_map(
            work, common, cost=lambda name: math.prod(file.entry(name).shape), workers=workers or _DENSE_WORKERS
        )
        modules += [
            compare_with_checkpoint(file, name, before.tensors, after.tensors, alias=alias)
            for alias, name in aliases.items()
            if alias in after.tensors and not _equal(after.tensors, alias, name)
        ]
        only_in_a = tuple(name for name in (*file, *aliases) if name not in after.tensors)
        only_in_b = tuple(name for name in after.tensors if name not in file and name not in aliases)
        return _result(
            file,
            modules,
            b=str(fine_tuned),
            content_id_b=None,
            equal=not only_in_a and not only_in_b and all(module.identical for module in modules),
            manifest=(),
            only_in_a=only_in_a,
            only_in_b=only_in_b,
        )


def _equal(tensors: pxd.Safetensors, a: str, b: str) -> bool:
    """Whether two tensors of a checkpoint have the same bytes, dtype and shape."""
    if b not in tensors or (tensors[a].dtype, tensors[a].shape) != (tensors[b].dtype, tensors[b].shape):
        return False
    return tensors.sha256(a) == tensors.sha256(b)


def _payload_bytes(file: pxd.DeltaFile) -> int:
    return sum(map(file.payload_bytes, file))


def _check_one_base(a: pxd.DeltaFile, b: pxd.DeltaFile, common: list[str]) -> None:
    if not common:
        raise CheckFailedError(f"{a.path} and {b.path}: have no module in common; these are deltas of different models")
    for name in common:
        refs = a.entry(name).base, b.entry(name).base
        if refs[0] is not None and refs[1] is not None and refs[0] != refs[1]:
            raise CheckFailedError(
                f"{a.path} and {b.path}: made for different bases ({a.manifest.base.id!r} and {b.manifest.base.id!r} "
                f"differ at {name}); only deltas on one base can be compared"
            )


def _compare(
    a: pxd.DeltaFile,
    b: pxd.DeltaFile,
    common: list[str],
    base: pxd.Safetensors | None,
    workers: int | None,
    step: Callable[[int], None],
) -> list[ModuleDiff]:
    def rows(name: str) -> BaseRows | None:
        entry = a.entry(name)
        return None if base is None or entry.base is None or b.entry(name).base is None else base_rows(base, entry)

    def work(name: str) -> ModuleDiff:
        found = compare_modules(a, b, name, rows(name))
        step(a.payload_bytes(name))
        return found

    def cost(name: str) -> int:
        return a.payload_bytes(name) + b.payload_bytes(name)

    return balanced_map(work, common, cost=cost, workers=workers)


def _result(
    file: pxd.DeltaFile,
    modules: list[ModuleDiff],
    *,
    b: str,
    content_id_b: str | None,
    equal: bool,
    manifest: tuple[ManifestChange, ...],
    only_in_a: tuple[str, ...],
    only_in_b: tuple[str, ...],
) -> DiffResult:
    groups: dict[str, list[ModuleDiff]] = {}
    for module in modules:
        groups.setdefault(module.group, []).append(module)

    tied = {alias: name for name, alias in file.manifest.tied}

    def weights(name: str) -> int:
        return math.prod(file.entry(tied.get(name, name)).shape)

    against: Literal["a", "b"] = "a" if content_id_b is not None else "b"
    return DiffResult(
        a=str(file.path),
        b=b,
        content_id_a=file.content_id,
        content_id_b=content_id_b,
        equal=equal,
        manifest_changes=manifest,
        only_in_a=only_in_a,
        only_in_b=only_in_b,
        total=group("total", modules, weights, against=against),
        by_group=tuple(group(label, members, weights, against=against) for label, members in groups.items()),
        modules=tuple(modules),
    )
