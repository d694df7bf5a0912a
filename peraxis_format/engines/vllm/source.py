"""Open a delta by the operator's name: a path, hf://org/repo/file.pxd, org/repo, or an http(s) URL.

Every rank opens it separately. A URL is fetched at each opening, because its file may be another one by then, into a
temporary folder that is removed when the file is open; the hub's cache is used for the hub (peraxis_format.hub).
"""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.error import HTTPError

from peraxis_format.engines.vllm.bridge import Ranks, together
from peraxis_format.errors import CheckpointError, LiveModelError, PxdError
from peraxis_format.hub import hub_path
from peraxis_format.reader import DeltaFile
from peraxis_format.urls import SILENCE_SECONDS, is_http

__all__ = ["LONGEST_SOURCE", "NAME_RULE", "copy_announced", "downloaded", "open_delta", "quoted", "shown"]

_PIECE: Final = 1 << 20
LONGEST_SOURCE: Final = 4096  # the longest path on Linux
NAME_RULE: Final = "it must be a text of 1 to {} characters without control characters"
_LONGEST_QUOTE: Final = 100


def open_delta(source: str, *, group: Any = None) -> DeltaFile:
    """Open a delta on every rank of a group; all open the same file, or all raise.

    Raises CheckpointError, PxdError, OSError; LiveModelError if ranks find different files under one name.
    """
    with ExitStack() as stack:
        with together(group, sharded=group is not None):
            file = stack.enter_context(_opened(source))
        _refuse_different(source, file, group)
        stack.pop_all()
    return file


def _opened(source: str) -> DeltaFile:
    if not source.isprintable() or len(source) > LONGEST_SOURCE:
        raise CheckpointError(f"{quoted(source)}: is not a name of a file; {NAME_RULE.format(LONGEST_SOURCE)}")
    if not is_http(source):
        return DeltaFile(hub_path(source))
    with downloaded(source) as path:
        try:
            return DeltaFile(path)  # the open file stays readable without its name
        except PxdError as error:
            error.file = shown(source)
            raise


def _refuse_different(source: str, file: DeltaFile, group: Any) -> None:
    if group is not None and len(set(Ranks(group).all_gather(file.content_id))) > 1:
        raise LiveModelError(f"{shown(source)}: is another file on another rank; give every host the same file")


def quoted(value: object) -> str:
    """A value of a request for an error, in one line that a request cannot make long."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a JSON {type(value).__name__}"
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}... ({len(text)} characters)"


def shown(source: str) -> str:
    """The name for errors and logs: of a URL without user, password, query and fragment."""
    if not is_http(source):
        return source
    scheme, _, rest = source.partition("://")
    address, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{address.rpartition('@')[2]}{slash}{path}"


def copy_announced(reader: Any, writer: Any) -> None:
    """Write as many bytes as the server announced, so that an endless answer cannot fill the disk.

    Raises OSError if the server announces no size, or sends fewer bytes.
    """
    announced = reader.headers.get("Content-Length", "")
    if not announced.isdecimal():
        raise OSError("the server announces no size")
    left = int(announced)
    while left:
        piece = reader.read(min(left, _PIECE))
        if not piece:
            raise OSError(f"the server sent {left} bytes less than announced")
        writer.write(piece)
        left -= len(piece)


@contextmanager
def downloaded(url: str) -> Iterator[Path]:
    """A file with the bytes that a URL has now, during the block. Raises CheckpointError."""
    if "@" in re.split(r"[/?#]", url.partition("://")[2], maxsplit=1)[0]:
        raise CheckpointError(f"{shown(url)}: a user or a password in a URL is not supported; use a signed URL")
    folder = Path(tempfile.mkdtemp(prefix="peraxis-"))
    try:
        target = folder / (PurePosixPath(shown(url).partition("://")[2].partition("/")[2]).name or "delta.pxd")
        _fetch(url, target)
        yield target
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch(url: str, target: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=SILENCE_SECONDS) as reader, open(target, "wb") as writer:
            copy_announced(reader, writer)
    except (HTTPException, ValueError):
        raise CheckpointError(f"{shown(url)}: cannot be fetched; check the address") from None  # errors quote the query
    except OSError as error:
        if isinstance(error, HTTPError):
            error.close()
        folder = target.parent.parent
        advice = f"make room in {folder}" if error.errno == errno.ENOSPC else "check the address"
        raise CheckpointError(f"{shown(url)}: cannot be fetched ({error}); {advice}") from None
