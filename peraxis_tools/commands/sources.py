"""Artifacts named on the command line: paths, or URLs that are fetched first, with progress."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from peraxis_tools.progress import staged
from peraxis_tools.remote import local_copy

__all__ = ["fetched", "updates_of"]


@contextlib.contextmanager
def fetched(sources: Sequence[str], *, quiet: bool) -> Iterator[list[Path]]:
    """Local paths for these sources, in order; copies of remote ones are removed at the end."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(local_copy(source, progress=staged(quiet=quiet))) for source in sources]


@contextlib.contextmanager
def updates_of(sources: Sequence[str], *, quiet: bool) -> Iterator[list[Path]]:
    """Local paths of updates: files, and of a folder every .pxd in it."""
    with fetched(sources, quiet=quiet) as paths:
        yield [file for path in paths for file in (sorted(path.glob("*.pxd")) if path.is_dir() else [path])]
