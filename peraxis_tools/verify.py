"""The verb verify: check that a PXD file is intact and was made for a base (steps 1 to 12 of SPEC 8)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import peraxis_format as pxd
from peraxis_tools.arguments import check_workers, refuse_idle
from peraxis_tools.checkpoint import open_checkpoint
from peraxis_tools.predecessor import predecessor_named
from peraxis_tools.progress import Steps, watched
from peraxis_tools.unpacked import check_results

__all__ = ["VerifyResult", "verify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """The result of a verification. base: the checkpoint that the binding was checked against, or None."""

    file: str
    content_id: str
    modules: int
    bytes: int
    base: str | None


def _verify_size(path: str | Path, base: str | Path | None) -> int:
    """The bytes that `verify` reads, for its progress."""
    with pxd.open(path) as delta:
        total = delta.data_size
    if base is not None:
        with open_checkpoint(base) as checkpoint:
            total += checkpoint.tensors.size
    return total


def verify(
    path: str | Path,
    *,
    base: str | Path | None = None,
    base_revision: str | None = None,
    workers: int | None = None,
    progress: Steps | bool | None = None,
) -> VerifyResult:
    """Check a PXD file: steps 1 to 11 of SPEC 8, and step 12 if a base is given.

    base: a folder, a file or a hub id. progress: called with numbers of bytes read, or True for a bar. Raises PxdError
    at the first failure, CheckpointError, ToolError, OSError.
    """
    check_workers(workers)
    if base is None:
        refuse_idle("without base", base_revision=base_revision)
    with pxd.open(path) as delta, watched(progress, "verify", _verify_size(path, base)) as step:
        delta.verify(workers=workers, progress=step)
        if base is not None:
            with open_checkpoint(base, revision=base_revision) as checkpoint, predecessor_named(delta):
                pxd.check_base(delta.manifest, checkpoint.tensors, workers=workers, progress=step)
                check_results(delta, checkpoint.tensors)
        return VerifyResult(
            file=str(path),
            content_id=delta.content_id,
            modules=len(delta),
            bytes=delta.size,
            base=None if base is None else str(base),
        )
