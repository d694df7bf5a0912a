"""Errors of the PXD format: one class for each phase, one stable code for each violated clause (SPEC 8).

A reader stops at the first failure. Each error says what is wrong and where (file, byte offset, field
path), which clause of SPEC.md it violates, and what to do about it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, NoReturn

__all__ = [
    "CODES",
    "ArgumentError",
    "BackendError",
    "BindingError",
    "CheckpointError",
    "Code",
    "ContainerError",
    "DeviceError",
    "LiveModelError",
    "PayloadError",
    "ProfileError",
    "PxdError",
    "ShapeError",
    "TornError",
    "UnsupportedError",
    "base_advice",
    "fail",
    "first_line",
    "located",
    "previous_advice",
    "torn",
]

_FETCH = "fetch the file again from its publisher"
_REWRITE = "fetch the file again, or if the publisher's is the same, write it with a conforming writer"
_BASE = "pass the base checkpoint that `inspect` names, in the same revision"


@dataclass(frozen=True, slots=True)
class Code:
    """One row of SPEC 8: its first clause, the meaning of its violation, and the remedy."""

    clause: str
    meaning: str
    remedy: str


CODES: Final[dict[str, Code]] = {
    "E101": Code("2.1", "not a regular file", "pass the path of one .pxd file"),
    "E102": Code("2.1", "2^53 bytes or more", "split the model into several files"),
    "E103": Code("2.2", "empty, or too short to hold a header", _FETCH),
    "E104": Code("2.2", "a Git LFS pointer, not the file itself", "run `git lfs pull`"),
    "E105": Code("2.2", "an HTML page, not a PXD file", "use the download link; log in if the page asks for it"),
    "E106": Code("2.2", "a zip or torch archive, not a PXD file", "for a .pt delta use `peraxis-tools convert`"),
    "E107": Code("2.2", "a pickle, not a PXD file", "for a .pt delta use `peraxis-tools convert`"),
    "E108": Code("2.2", "nothing but zeros at its start", _FETCH),
    "E109": Code("2.2", "not a PXD file", "pass a .pxd file"),
    "E110": Code("2.3", "impossible header length", _FETCH),
    "E111": Code("2.4", "the header ends beyond the end of the file (truncated)", _FETCH),
    "E112": Code("2.5", "no PXD magic", "pass a .pxd file; an ordinary safetensors file is a checkpoint, not a delta"),
    "E113": Code("2.7", "not UTF-8", _FETCH),
    "E114": Code("2.8", "not a JSON object, or something after it", _FETCH),
    "E115": Code("2.9", "duplicate key", _REWRITE),
    "E116": Code("2.10", "a number that is no integer of magnitude below 2^53", _REWRITE),
    "E117": Code("2.11", "nested more than 8 deep, or more than 2^22 values", _REWRITE),
    "E118": Code("2.12", "malformed record or metadata", _REWRITE),
    "E119": Code("2.13", "unknown dtype", _REWRITE),
    "E120": Code("2.14", "impossible shape", _REWRITE),
    "E121": Code("2.15", "offsets do not fit dtype and shape", _REWRITE),
    "E122": Code("2.16", "header not canonical", _REWRITE),
    "E123": Code("2.17", "gap or overlap between tensors", _REWRITE),
    "E124": Code("2.18", "data shorter than the header says (truncated)", _FETCH),
    "E125": Code("2.18", "bytes after the data", _FETCH),
    "E201": Code("2.6", "version not implemented", "update peraxis"),
    "E202": Code("3.1", "the manifest is not strict JSON", _REWRITE),
    "E203": Code("3.2", "manifest not canonical", _REWRITE),
    "E204": Code("3.3", "unknown feature", "update peraxis"),
    "E205": Code("3.4", "manifest does not follow the schema", _REWRITE),
    "E206": Code("3.5", "malformed name", _REWRITE),
    "E207": Code("3.6", "name repeated or unresolved", _REWRITE),
    "E208": Code("3.8", "limit exceeded", _REWRITE),
    "E209": Code("3.9", "encoding does not fit the tensor", _REWRITE),
    "E210": Code("3.11", "base digest does not follow from the modules", _REWRITE),
    "E211": Code("3.12", "asset path not allowed", _REWRITE),
    "E212": Code("4.1", "tensors are not those that the manifest asks for", _REWRITE),
    "E213": Code("3.13", "digests are not those of the modules", _REWRITE),
    "E214": Code("3.14", "`result` does not follow from the modules", _REWRITE),
    "E301": Code("4.3", "module damaged: its bytes do not match their digest", _FETCH),
    "E302": Code("4.4", "asset damaged: its bytes do not match their digest", _FETCH),
    "E303": Code("5.2", "unused mask bits are set", _REWRITE),
    "E304": Code("4.5", "pad or gap is not zero", _REWRITE),
    "E305": Code("5.4", "scale is not finite", _REWRITE),
    "E306": Code("5.4", "scale has its sign bit set", _REWRITE),
    "E307": Code("5.7", "exact blocks are malformed", _REWRITE),
    "E401": Code("7.1", "this is another model: none of the base tensors is there", _BASE),
    "E402": Code("7.1", "base tensor missing", _BASE),
    "E403": Code("7.2", "base tensor of another dtype or shape", _BASE),
    "E404": Code("7.3", "base tensor with other bytes", _BASE),
    "E405": Code("7.4", "the result is not the tensor that the file names", _BASE),
}


class PxdError(Exception):
    """A file, or a pair of file and base, violates SPEC.md.

    code: a key of CODES. detail: what was found. clause: of SPEC.md, by default the code's first one. file, offset
    (bytes from the start of the file), field (path in the header, like `modules[3].components[0].axis`): the place, if
    known. advice: a remedy for this file, where more is known than the code says.
    """

    phase: ClassVar[str]
    exit_status: ClassVar[int] = 1

    def __init__(
        self,
        code: str,
        detail: str = "",
        *,
        clause: str | None = None,
        file: str | None = None,
        offset: int | None = None,
        field: str | None = None,
    ) -> None:
        self.code = code
        self.detail = detail
        self.clause = clause or CODES[code].clause
        self.file = file
        self.offset = offset
        self.field = field
        self.advice: str | None = None
        super().__init__(code, detail)

    @property
    def remedy(self) -> str:
        """The remedy, as an imperative phrase."""
        return self.advice or CODES[self.code].remedy

    def __str__(self) -> str:
        parts = [f"{self.code}: "]
        if self.file is not None:
            parts.append(f"{self.file}: ")
        parts.append(CODES[self.code].meaning)
        if self.detail:
            parts.append(f": {self.detail}")
        where = [
            *([f"at {self.field}"] if self.field is not None else []),
            *([f"offset {self.offset}"] if self.offset is not None else []),
            f"SPEC {self.clause}",
        ]
        parts.append(f" ({', '.join(where)}); {self.remedy}")
        return "".join(parts)


def base_advice(name: str, revision: str | None) -> str:
    """A remedy for another base than that of a delta: its name, and its revision if it is on the hub."""
    at = f" at revision {revision}" if revision else ""
    return f"the delta was made for {name}{at}: pass that checkpoint as the base"


def previous_advice(content_id: str, named: str = "", *, several: bool = False) -> str:
    """A remedy for a missing update before this one. named: where it is, in parentheses.

    several: whether several updates can be passed.
    """
    also = "that update too, or " if several else ""
    return f"it follows update {content_id}{named}: pass {also}the checkpoint after that update as the base"


class ContainerError(PxdError):
    """E1xx: the bytes are not a well-formed container."""

    phase = "container"


class ProfileError(PxdError):
    """E2xx: a container whose manifest or tensors PXD does not allow."""

    phase = "profile"


class FileKindError(ContainerError):
    """E101: a folder, a pipe or a device in the place of a file, which is an error of input."""

    exit_status = 2


class UnsupportedError(ProfileError):
    """E201, E204: made for a newer reader. The file cannot be verified here, but it may be intact."""

    exit_status = 3


class PayloadError(PxdError):
    """E3xx: the data do not match the manifest."""

    phase = "payload"


class BindingError(PxdError):
    """E4xx: the base is not the one that the delta was made for."""

    phase = "binding"


class CheckpointError(Exception):
    """A checkpoint (not a PXD file) is missing, malformed or not suitable; the message says where and what to do."""

    exit_status: ClassVar[int] = 2


class LiveModelError(Exception):
    """A live model (or state dict) cannot take a delta; the message says where and what to do."""

    exit_status: ClassVar[int] = 2


class TornError(LiveModelError):
    """Weights of a live model were written in part, and could be neither finished nor reverted."""


class DeviceError(LiveModelError):
    """An operation needs a device that is not available."""


class BackendError(DeviceError):
    """A backend is unknown, not installed, or not available for the operation."""


class ArgumentError(ValueError):
    """An argument of the caller has a value that is not allowed; this is a mistake in code, not in a file."""


class ShapeError(ValueError):
    """Arrays of the caller have a wrong shape or dtype; this is a mistake in code, not in a file."""


_PHASES: Final = {"1": ContainerError, "2": ProfileError, "3": PayloadError, "4": BindingError}


@contextlib.contextmanager
def located(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the name of the file to a PxdError that passes through."""
    try:
        yield
    except PxdError as error:
        error.file = error.file or str(path)
        raise


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, or its type: for libraries that add long advice.

    A line that ends with a colon has the next one too.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def torn(
    what: str,
    error: BaseException,
    again: BaseException,
    *,
    undone: str = "reverted",
    advice: str = "load the model again",
) -> TornError:
    """The error of a write that failed, and that could not be reverted, or `undone`, because of the error `again`."""
    return TornError(
        f"{what} failed while weights were written ({first_line(error)}), and could not be {undone} "
        f"({first_line(again)}); {advice}"
    )


_OF_CODE: Final[Mapping[str, type[PxdError]]] = {
    "E101": FileKindError,
    "E201": UnsupportedError,
    "E204": UnsupportedError,
}


def fail(
    code: str, detail: str = "", *, clause: str | None = None, offset: int | None = None, field: str | None = None
) -> NoReturn:
    """Raise the error class of the code's phase. clause: given if it is not the code's first one in SPEC 8."""
    kind = _OF_CODE.get(code, _PHASES[code[1]])
    raise kind(code, detail, clause=clause, offset=offset, field=field)
