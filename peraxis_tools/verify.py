"""The verb verify: check that PXD files are intact, from the right author, and made for a base (SPEC 8).

verify_files.py has the checks.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from peraxis_format.urls import is_url
from peraxis_tools.arguments import (
    check_least,
    check_paths,
    check_texts_by_domain,
    check_workers,
    refuse_idle,
    sequence,
)
from peraxis_tools.chain.siblings import order_fault
from peraxis_tools.checkpoints.checkpoint import with_revision
from peraxis_tools.display.notes import note
from peraxis_tools.display.progress import Progress, stages_of
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.remote.files import local_copy, refuse_closed
from peraxis_tools.verify_files import Signature, VerifyResult, Wanted, verify_files, with_broken_chains

__all__ = ["VerifyResult", "delta_files", "verify"]


def verify(
    deltas: str | Path | Sequence[str | Path],
    *,
    base: str | Path | None = None,
    base_revision: str | None = None,
    expect_content_id: str | Sequence[str] = (),
    signature: bool = False,
    bundle: str | Path | None = None,
    public_key: str | Path | None = None,
    certificate_chain: str | Path | Sequence[str | Path] = (),
    fine_tuned: str | Path | None = None,
    max_error: float | None = None,
    max_kl: float | None = None,
    texts: Mapping[str, str | Path] | None = None,
    keep_going: bool = False,
    workers: int | None = None,
    progress: Progress = None,
) -> VerifyResult:
    """Check deltas: steps 1 to 11 of SPEC 8, and everything that the options ask for. Raises at the first failure.

    deltas: one or several of a path, a URL, a glob, or a folder, which means every .pxd in it and in the folders below.
    The updates of a chain in a folder must have one order, as for `log` and `apply`. base: a folder, a file or a hub
    id; step 12 is checked on it, or, for an update that follows others of these files, on the state after them.
    expect_content_id: the content IDs that a delta may have. signature: check the bundle, by default `<delta>.sig`, by
    a public key or a chain of certificates; each of these three also asks for this check. max_error, max_kl: bounds on
    base + delta against fine_tuned: the relative error of the deltas (what has none must be equal: names, dtypes,
    shapes, new rows, bits), and KL in nats per token on each of the texts (domain -> text). keep_going: check all
    files, and return failures instead of raising; a folder whose chain has no order is one more row. progress: called
    with numbers of bytes, or True for a bar. Raises PxdError, CheckFailedError, CheckpointError, ToolError, OSError.
    """
    check_paths(base=base, bundle=bundle, public_key=public_key, fine_tuned=fine_tuned, optional=True)
    check_workers(workers)
    check_least("max_error", max_error, 0)
    check_least("max_kl", max_kl, 0)
    check_texts_by_domain(texts or {})
    if base is None:
        refuse_idle("without base (--base)", base_revision=base_revision)
    if max_kl is None:
        refuse_idle("without max_kl (--max-kl)", texts=dict(texts or {}) or None)
    if max_kl is None and max_error is None:
        refuse_idle("without max_error (--max-error) or max_kl (--max-kl)", fine_tuned=fine_tuned)
    expected = Signature(
        public_key=None if public_key is None else Path(public_key),
        certificate_chain=tuple(map(Path, sequence(certificate_chain))),
        bundle=None if bundle is None else Path(bundle),
    )
    wanted = Wanted(
        base=base if base is None else with_revision(base, base_revision),
        content_ids=sequence(expect_content_id),
        signature=expected if signature or expected != Signature() else None,
        fine_tuned=fine_tuned,
        max_error=max_error,
        max_kl=max_kl,
        texts=texts or {},
    )
    files = delta_files(deltas)
    if not files:
        raise ToolError("no deltas to verify; pass at least one")

    stages = stages_of(progress)

    @contextlib.contextmanager
    def open_file(file: str) -> Iterator[Path]:
        _refuse_empty(file)
        with local_copy(file, progress=stages) as path:
            yield path

    report = verify_files(files, wanted, open_file=open_file, progress=stages, workers=workers, keep_going=keep_going)
    broken = _broken_chains(deltas)
    if broken and not keep_going:
        raise CheckFailedError(next(iter(broken.values())))
    return with_broken_chains(report, broken)


def delta_files(deltas: str | Path | Sequence[str | Path]) -> list[str]:
    """Replace folders and globs by their sorted files; those without one remain. An existing name is not a glob.

    Nothing is raised for a name that cannot be looked up, and a folder that cannot be listed remains too: opening it is
    an error of its own row.
    """
    files: list[str] = []
    for pattern in map(str, sequence(deltas)):
        if not is_url(pattern) and os.path.isdir(pattern):
            files.extend(_files_below(pattern) or [pattern])
            continue
        if is_url(pattern) or os.path.exists(pattern) or not glob.has_magic(pattern):
            files.append(pattern)
            continue
        files.extend(sorted(glob.glob(pattern, recursive=True)) or [pattern])
    return files


def _files_below(folder: str) -> list[str]:
    """The sorted .pxd of a folder and of those in it, and folders that cannot be listed.

    Pipes, links without a target and folders with such a name are included: an error is better than a file that is
    silently not there.
    """
    found: list[str] = []
    for place, folders, names in os.walk(folder, onerror=lambda error: found.append(str(error.filename))):
        found.extend(str(Path(place, name)) for name in (*folders, *names) if name.endswith(".pxd"))
    return sorted(found)


def _broken_chains(deltas: str | Path | Sequence[str | Path]) -> dict[str, str]:
    """The folders with updates that are meant as one chain and are none: the reasons. Globs are not looked at."""
    tops = [name for name in map(str, sequence(deltas)) if not is_url(name) and os.path.isdir(name)]
    broken: dict[str, str] = {}
    for folder in sorted({place for top in tops for place, _, _ in os.walk(top)}):
        fault = order_fault(Path(folder))
        if fault is None:
            continue
        if fault.certain:
            broken[folder] = f"{fault.reason}; `log` and `apply` refuse this folder"
        else:
            note(f"{folder} is not one chain, so `log` and `apply` refuse it: {fault.reason}")
    return broken


def _refuse_empty(name: str) -> None:
    """Raise ToolError for a folder or a glob that `delta_files` found no file for; OSError for a closed folder."""
    if is_url(name):
        return
    if os.path.isdir(name):
        os.listdir(name)
        if name.endswith(".pxd"):
            raise ToolError(f"{name}: is a folder with the name of a file; move it away or rename it")
        raise ToolError(
            f"{name}: has no .pxd; to compare a checkpoint with its delta, run "
            f"`peraxis-tools diff DELTA {name} --base BASE`"
        )
    if glob.has_magic(name) and not os.path.exists(name):
        refuse_closed(name)
        raise ToolError(f"{name}: matches no file")
