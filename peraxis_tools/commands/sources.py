"""The files on the command line: paths, or URLs that are fetched first, with progress."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from peraxis_format.urls import is_url
from peraxis_tools.chain.sources import local_updates
from peraxis_tools.display.progress import staged
from peraxis_tools.errors import ToolError
from peraxis_tools.remote.files import local_copy
from peraxis_tools.remote.urls import without_secrets

__all__ = ["fetched", "refuse_urls", "updates_of"]


@contextlib.contextmanager
def fetched(sources: Sequence[str | Path], *, quiet: bool) -> Iterator[list[Path]]:
    """Yield local paths of these sources, in order; copies of remote files are removed at the end."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(local_copy(source, progress=staged(quiet=quiet))) for source in sources]


def updates_of(
    sources: Sequence[str], *, quiet: bool, output: str | None = None
) -> contextlib.AbstractContextManager[list[Path]]:
    """Yield local paths of updates, with progress for those that are fetched (`local_updates`)."""
    return local_updates(sources, output=output, progress=staged(quiet=quiet))


def refuse_urls(sources: Sequence[str]) -> list[Path]:
    """The paths of a verb that works on the user's own files. Raises ToolError for a URL."""
    for source in sources:
        if is_url(source):
            raise ToolError(f"{without_secrets(source)}: is a URL and not a file; fetch it with `pull` first")
    return [Path(source) for source in sources]
