"""Prove that a PXD file is whole, and with a base, that it was made for this base (steps 1 to 12 of SPEC 8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peraxis_format as pxd
from peraxis_tools.checkpoint import open_checkpoint
from peraxis_tools.unpacked import check_results

__all__ = ["VerifyResult", "verify", "verify_size"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """What was proven. base: the checkpoint that the binding was checked against, None where none was given."""

    file: str
    content_id: str
    modules: int
    bytes: int
    base: str | None


def verify_size(path: str | Path, base: str | Path | None) -> int:
    """Bytes that `verify` reads, for its progress."""
    with pxd.open(path) as delta:
        total = delta.size - delta.header_size
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
    progress: Callable[[int], None] | None = None,
) -> VerifyResult:
    """Steps 1 to 11, and 12 with a base. Returns what was proven; raises PxdError at the first failure."""
    with pxd.open(path) as delta:
        delta.verify(workers=workers, progress=progress)
        if base is not None:
            with open_checkpoint(base, revision=base_revision) as checkpoint:
                pxd.check_base(delta.manifest, checkpoint.tensors, workers=workers, progress=progress)
                check_results(delta, checkpoint.tensors)
        return VerifyResult(
            file=str(path),
            content_id=delta.content_id,
            modules=len(delta),
            bytes=delta.size,
            base=None if base is None else str(base),
        )
