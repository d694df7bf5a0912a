"""The files on the command line: paths, or URLs that are fetched first, with progress."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from peraxis_tools.progress import staged
from peraxis_tools.remote import local_copy

__all__ = ["fetched"]


@contextlib.contextmanager
def fetched(sources: Sequence[str], *, quiet: bool) -> Iterator[list[Path]]:
    """Yield local paths of these sources, in order; copies of remote files are removed at the end."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(local_copy(source, progress=staged(quiet=quiet))) for source in sources]
