"""The files on the command line: paths, or URLs that are fetched first, with progress."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from peraxis_tools.chain.order import Link, folds, link_of
from peraxis_tools.errors import ToolError
from peraxis_tools.progress import staged
from peraxis_tools.remote import deltas_of, local_copy
from peraxis_tools.remote_output import refuse_replaced_url
from peraxis_tools.urls import without_secrets

__all__ = ["fetched", "updates_of"]


@contextlib.contextmanager
def fetched(sources: Sequence[str], *, quiet: bool) -> Iterator[list[Path]]:
    """Yield local paths of these sources, in order; copies of remote files are removed at the end."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(local_copy(source, progress=staged(quiet=quiet))) for source in sources]


@contextlib.contextmanager
def updates_of(sources: Sequence[str], *, quiet: bool, output: str | None = None) -> Iterator[list[Path]]:
    """Yield local paths of updates: files, and for a folder (a path, a URL, a repository) every .pxd in it.

    Files of a folder that replace several others (anchors and folded updates) are left out. output: a URL that must be
    none of the others'; those that are paths are compared later (outputs.py).
    """
    with contextlib.ExitStack() as stack:
        found: list[Path] = []
        for source in sources:
            names = deltas_of(source)
            copies = [stack.enter_context(local_copy(name, progress=staged(quiet=quiet))) for name in names]
            left_out: set[Path] = set()
            if len(copies) > 1:
                left_out = {link.path for link in folds([_link(path, source, len(copies)) for path in copies])}
            used = [(name, path) for name, path in zip(names, copies, strict=True) if path not in left_out]
            if output is not None:
                refuse_replaced_url(output, [name for name, _ in used])
            found += [path for _, path in used]
        yield found


def _link(path: Path, source: str, count: int) -> Link:
    try:
        return link_of(path)
    except ToolError:
        raise ToolError(
            f"{without_secrets(source)}: has {count} .pxd files, and {path.name} is not an update of a chain; "
            "name one file"
        ) from None
