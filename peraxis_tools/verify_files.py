"""Verify several files: one verdict for each file, one line for each check, one exit code for a CI job.

The checks of one file run in this order and end with the first that does not pass:

    structure   steps 1 to 8 of SPEC 8          payload    steps 9 to 11
    content id  it is one of those expected     signature  the bundle matches file and key
    base        step 12                         error, kl  bounds against the fine-tuned checkpoint; of an update that
                                                           follows another of the files, `fine-tuned` says why not

A folder whose updates are not one chain has a verdict of its own, with the check `chain`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Final, NoReturn, TypeAlias

import peraxis_format as pxd
from peraxis_tools.chain.checks import BaseChecks
from peraxis_tools.checkpoints.checkpoint import Checkpoint, open_checkpoint
from peraxis_tools.checkpoints.completeness import refuse_foreign
from peraxis_tools.deltas.content_ids import parse_content_ids
from peraxis_tools.deltas.parts import part_of
from peraxis_tools.display.progress import ProgressOf
from peraxis_tools.display.shown import counted
from peraxis_tools.errors import CheckFailedError, NotVerifiableError, ToolError, error_line
from peraxis_tools.remote.urls import without_secrets
from peraxis_tools.texts.samples import check_texts

__all__ = [
    "Check",
    "FileVerdict",
    "Opener",
    "Signature",
    "Status",
    "VerifyResult",
    "Wanted",
    "verify_files",
    "with_broken_chains",
]

# Opens a file by the name that the user gave; a remote file is fetched first.
Opener: TypeAlias = Callable[[str], AbstractContextManager[Path]]


class Status(Enum):
    """The outcome of a check, a file or a whole run."""

    FAILED = "failed"
    ERROR = "error"
    NOT_VERIFIABLE = "not verifiable"
    PASSED = "passed"

    @property
    def exit_status(self) -> int:
        """0 passed, 1 failed, 2 usage, input or I/O, 3 not verifiable."""
        return {Status.PASSED: 0, Status.FAILED: 1, Status.ERROR: 2, Status.NOT_VERIFIABLE: 3}[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check of one file. code, clause, offset, field: those of SPEC 8 if a clause is violated."""

    name: str
    status: Status
    message: str | None = None
    code: str | None = None
    clause: str | None = None
    field: str | None = None
    offset: int | None = None
    remedy: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileVerdict:
    """The outcome of one file. content_id and bytes are None if it could not be opened, and for a folder that is not
    one chain.

    unchecked: base, if the file needs one and none was given; signature, if one lies beside the file and was not asked
    for.
    """

    path: str
    status: Status
    content_id: str | None
    bytes: int | None
    checks: tuple[Check, ...]
    unchecked: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """All files. status: the gravest, FAILED before ERROR before NOT_VERIFIABLE."""

    status: Status
    files: tuple[FileVerdict, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The keys or certificates to check a signature with."""

    public_key: Path | None = None
    certificate_chain: tuple[Path, ...] = ()
    bundle: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The checks beyond structure and payload. texts: domain -> the text on which KL is measured."""

    base: str | Path | None = None
    content_ids: Sequence[str] = ()
    signature: Signature | None = None
    fine_tuned: str | Path | None = None
    max_error: float | None = None
    max_kl: float | None = None
    texts: Mapping[str, str | Path] = field(default_factory=dict)


def verify_files(
    files: Sequence[str],
    wanted: Wanted,
    *,
    open_file: Opener,
    progress: ProgressOf,
    workers: int | None = None,
    keep_going: bool = True,
) -> VerifyResult:
    """Verify each file. keep_going: a failure is in the file's verdict and does not end the run; else it is raised.

    Raises ToolError for options that contradict each other, before any file is opened.
    """
    _check_bounds(wanted)
    check_texts(wanted.texts.values())
    wanted = replace(wanted, content_ids=parse_content_ids(wanted.content_ids))
    together = files if wanted.base is not None and len(files) > 1 else ()
    with contextlib.closing(BaseChecks(together, partial(_open_base, wanted.base), workers=workers)) as bases:
        run = _VerifyRun(
            wanted=wanted, bases=bases, open_file=open_file, progress=progress, workers=workers, keep_going=keep_going
        )
        verdicts = tuple(_verdict(file, run) for file in files)
    return VerifyResult(status=_gravest(verdict.status for verdict in verdicts), files=verdicts)


def with_broken_chains(report: VerifyResult, broken: Mapping[str, str]) -> VerifyResult:
    """Add a verdict for each folder whose updates are not one chain. broken: folder -> the reason."""
    verdicts = (
        FileVerdict(
            path=folder,
            status=Status.FAILED,
            content_id=None,
            bytes=None,
            checks=(Check(name="chain", status=Status.FAILED, message=reason),),
        )
        for folder, reason in broken.items()
    )
    files = (*report.files, *verdicts)
    return VerifyResult(status=_gravest(verdict.status for verdict in files), files=files)


def _check_bounds(wanted: Wanted) -> None:
    """Raise ToolError for a bound without all that it needs; the error names all of it."""
    if wanted.max_error is None and wanted.max_kl is None:
        return
    missing = [
        *(["a text: texts (--text domain=FILE)"] if wanted.max_kl is not None and not wanted.texts else []),
        *(["the checkpoint to compare with: fine_tuned (--fine-tuned)"] if wanted.fine_tuned is None else []),
        *(["the base, which the delta is applied to: base (--base)"] if wanted.base is None else []),
    ]
    if missing:
        raise ToolError(f"a bound needs {'; and '.join(missing)}")


def _gravest(statuses: Iterator[Status]) -> Status:
    order: Final = list(Status)
    return min(statuses, key=order.index, default=Status.PASSED)


@dataclass(frozen=True, slots=True, kw_only=True)
class _VerifyRun:
    """What is the same for all files. bases: the checks of their base."""

    wanted: Wanted
    bases: BaseChecks
    open_file: Opener
    progress: ProgressOf
    workers: int | None
    keep_going: bool


def _verdict(file: str, run: _VerifyRun) -> FileVerdict:
    checks: list[Check] = []
    content_id, size = None, None
    unchecked: tuple[str, ...] = ()
    opened: Path | None = None
    name = "structure"
    try:
        with run.open_file(file) as path, pxd.open(path) as delta:
            opened = path
            content_id, size = delta.content_id, delta.size
            unchecked = _unchecked(path, delta, run.wanted)
            for name, check in _checks(path, delta, run):
                checks.append(Check(name=name, status=Status.PASSED, message=check()))
    except (pxd.PxdError, pxd.CheckpointError, ToolError, OSError) as error:
        if not run.keep_going:
            raise
        checks.append(_failed(name, error, opened, shown=without_secrets(file)))
    return FileVerdict(
        path=without_secrets(file),
        status=_gravest(check.status for check in checks),
        content_id=content_id,
        bytes=size,
        checks=tuple(checks),
        unchecked=unchecked,
    )


def _unchecked(path: Path, delta: pxd.DeltaFile, wanted: Wanted) -> tuple[str, ...]:
    """The checks that could be made of this file and were not asked for."""
    bound = any(module.base is not None for module in delta.manifest.modules)
    signed = os.path.exists(path.with_name(f"{path.name}.sig"))  # False too where the name is too long to exist
    return (
        *(["signature"] if signed and wanted.signature is None else []),
        *(["base"] if bound and wanted.base is None else []),
    )


def _checks(path: Path, delta: pxd.DeltaFile, run: _VerifyRun) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """The name and action of each check, in order; an action returns a text, or raises."""
    wanted, progress, workers = run.wanted, run.progress, run.workers
    followed: list[Path] = []
    yield "structure", lambda: part_of(delta.manifest, path) or counted(len(delta), "module")
    yield "payload", lambda: _payload(delta, progress, workers)
    if wanted.content_ids:
        yield "content id", lambda: _content_id(delta, wanted.content_ids)
    if wanted.signature is not None:
        yield "signature", partial(_signature, path, wanted.signature, progress)
    if wanted.base is not None:
        yield "base", partial(_base, delta, wanted.base, run.bases, progress, followed)
    base, fine_tuned = wanted.base, wanted.fine_tuned
    if base is None or fine_tuned is None:
        return
    if followed:
        yield "fine-tuned", partial(_refuse_follower, followed[0])
        return
    from peraxis_tools.bounds import error_within, kl_within

    if wanted.max_error is not None:
        within = partial(error_within, wanted.max_error, path, fine_tuned, base=base)
        yield "error", partial(within, progress=progress, workers=workers)
    if wanted.max_kl is not None:
        largest = partial(kl_within, wanted.max_kl, path, fine_tuned, base=base)
        yield "kl", partial(largest, texts=wanted.texts, progress=progress)


def _payload(delta: pxd.DeltaFile, progress: ProgressOf, workers: int | None) -> str:
    with progress("verify", delta.data_size) as step:
        delta.verify(workers=workers, progress=step)
    return f"{delta.data_size} bytes"


def _content_id(delta: pxd.DeltaFile, expected: Sequence[str]) -> str:
    if delta.content_id not in expected:
        raise CheckFailedError(f"is {delta.content_id}, not {' or '.join(expected)}; this is another file")
    return delta.content_id


def _refuse_follower(before: Path) -> NoReturn:
    raise ToolError(
        f"follows {before.name}; an update in a chain is not compared with a fine-tune: apply the chain, or pass this "
        "update alone with the state before it as base (--base)"
    )


def _base(delta: pxd.DeltaFile, base: str | Path, bases: BaseChecks, progress: ProgressOf, followed: list[Path]) -> str:
    """followed: the update before this one is added to it."""
    found = bases.check(delta, progress)
    followed += [] if found.before is None else [found.before]
    bound = any(module.base is not None for module in delta.manifest.modules)
    if not bound:
        refuse_foreign(delta, bases.base)
    text = f"{base} is the one that this delta was made for" if bound else "holds whole tensors and needs no base"
    if found.before is not None:
        text = f"follows {found.before.name}, whose result is the one that it was made for"
    if found.results:
        one = found.results == 1
        text += f"; {found.results} exact {'update has the right result' if one else 'updates have the right results'}"
    return text


def _open_base(source: str | Path | None) -> Checkpoint:
    """Open the base. A missing base is NotVerifiableError, because it is neither damage nor a wrong base."""
    try:
        if source is None:
            raise NotVerifiableError("no base is given; pass base (--base)")
        return open_checkpoint(source)
    except pxd.CheckpointError as error:
        raise NotVerifiableError(str(error)) from None


def _signature(path: Path, wanted: Signature, progress: ProgressOf) -> str:
    from peraxis_tools.deltas.signatures import check_signature

    with progress("signature", None):
        check_signature(
            path, public_key=wanted.public_key, certificate_chain=wanted.certificate_chain, bundle=wanted.bundle
        )
    return "signed with this key" if wanted.public_key else "signed under this certificate"


def _failed(name: str, error: Exception, opened: Path | None, *, shown: str) -> Check:
    """The check that failed. opened: the file; the error may be that of an update before it. shown: the file's name."""
    status = {1: Status.FAILED, 2: Status.ERROR, 3: Status.NOT_VERIFIABLE}[getattr(error, "exit_status", 2)]
    if isinstance(error, pxd.PxdError):
        meaning = pxd.CODES[error.code].meaning
        message = f"{meaning}: {error.detail}" if error.detail else meaning
        before = (
            opened is not None
            and error.file not in (None, shown)
            and Path(str(error.file)).resolve() != opened.resolve()
        )
        return Check(
            name=name,
            status=status,
            message=f"after {error.file}, which failed: {message}" if before else message,
            code=error.code,
            clause=error.clause,
            field=None if before else error.field,
            offset=None if before else error.offset,
            remedy=f"{error.file}: {error.remedy}" if before else error.remedy,
        )
    return Check(name=name, status=status, message=error_line(error))
