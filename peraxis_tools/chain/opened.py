"""Open all updates of a chain at once; a long chain has more files than a process may usually open."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import peraxis_format as pxd
from peraxis_tools.chain.order import Link, chain_order, link_of
from peraxis_tools.deltas.predecessor import predecessor_named
from peraxis_tools.errors import ToolError

__all__ = ["opened_all", "opened_deltas", "opened_in_order"]

_DESCRIPTORS: Final = 2  # descriptors of one open file: its own, and that of its map
_OTHERS: Final = 64  # files that a process opens besides
_UNKNOWN: Final = 256  # descriptors in use, where the system does not list them


@contextlib.contextmanager
def opened_all(paths: Sequence[Path]) -> Iterator[list[pxd.DeltaFile]]:
    """Yield the open updates. Raises PxdError, OSError with the path."""
    wanted = _in_use() + _DESCRIPTORS * len(paths) + _OTHERS
    _allow_files(wanted)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_opened(path, wanted)) for path in paths]


@contextlib.contextmanager
def opened_in_order(paths: Sequence[Path]) -> Iterator[tuple[list[Link], list[pxd.DeltaFile]]]:
    """Yield the updates of a chain in order: their links, and the open files. Raises as opened_deltas does."""
    links = chain_order(map(link_of, paths)) if paths else []
    with (
        opened_all([link.path for link in links]) as files,
        predecessor_named(*files) if files else contextlib.nullcontext(),
    ):
        yield links, files


@contextlib.contextmanager
def opened_deltas(deltas: Sequence[Path]) -> Iterator[Sequence[pxd.DeltaFile]]:
    """Yield a delta, or the updates of a chain in order. Raises ToolError, CheckFailedError, PxdError, OSError."""
    if len(deltas) == 1:
        with pxd.open(deltas[0]) as file, predecessor_named(file):
            yield [file]
        return
    for path in deltas:
        with pxd.open(path) as file:
            if file.manifest.result is None:
                raise ToolError(
                    f"{path}: is a delta and not an update of a chain, so it is applied alone; "
                    "to add several deltas up, use merge"
                )
    with opened_in_order(deltas) as (_, files):
        yield files


def _opened(path: Path, wanted: int) -> pxd.DeltaFile:
    try:
        return pxd.open(path)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        reason = f"{error.strerror}; this chain needs {wanted}: raise the limit (ulimit -n), or take fewer updates"
        raise OSError(error.errno, reason, str(path)) from None


def _in_use() -> int:
    """The number above all open descriptors; the limit is on numbers."""
    with contextlib.suppress(OSError, ValueError):
        return max(map(int, os.listdir("/dev/fd")), default=0) + 1
    return _UNKNOWN


def _allow_files(count: int) -> None:
    """Raise the soft limit of open files to this count, or to the hard limit."""
    try:
        import resource
    except ImportError:  # Windows has another limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
