"""The files of a chain that a caller names: files, folders, URLs and repositories on the hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import peraxis_format as pxd
from peraxis_tools.chain.order import Link, folds, link_from
from peraxis_tools.delta_parts import is_part
from peraxis_tools.errors import ToolError
from peraxis_tools.progress import ProgressOf, silent
from peraxis_tools.remote import listed, local_copy
from peraxis_tools.urls import without_secrets

__all__ = ["local_updates"]


@contextlib.contextmanager
def local_updates(sources: Sequence[str | Path], *, progress: ProgressOf = silent) -> Iterator[list[Path]]:
    """Yield local paths of updates: files, and for a folder (a path, a URL, a repository) every .pxd in it.

    Files of a folder that replace several others (anchors and folded updates) are left out. Copies of remote files are
    removed at the end. Raises ToolError for a folder of other files, CheckpointError.
    """
    with contextlib.ExitStack() as stack:
        found: list[Path] = []
        for source in sources:
            names = listed(source)
            copies = [stack.enter_context(local_copy(name, progress=progress)) for name in names]
            if len(copies) == 1:
                found += copies
                continue
            links = [_link(path, source, len(copies)) for path in copies]
            left_out = {link.path for link in folds(links)}
            found += [link.path for link in links if link.path not in left_out]
        yield found


def _link(path: Path, source: str | Path, count: int) -> Link:
    with pxd.open(path) as file:
        manifest = file.manifest
    state = f"{without_secrets(str(source))}: has {count} .pxd files, and {path.name}"
    if is_part(manifest):
        raise ToolError(f"{state} is a part of a delta; join the parts with `peraxis-tools merge` first")
    if manifest.result is None:
        raise ToolError(f"{state} is not an update of a chain; name one file")
    return link_from(path, manifest)
