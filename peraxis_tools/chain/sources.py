"""The files of a chain that a caller names: files, folders, URLs and repositories on the hub."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from glob import has_magic
from pathlib import Path

import peraxis_format as pxd
from peraxis_format.hub import hub_name
from peraxis_format.urls import is_url
from peraxis_tools.chain.order import Link, beside_chain, link_from
from peraxis_tools.deltas.parts import JOIN_PARTS, is_part
from peraxis_tools.display.progress import ProgressOf, silent
from peraxis_tools.errors import ToolError
from peraxis_tools.outputs.remote_output import refuse_replaced_url
from peraxis_tools.remote.files import deltas_of, local_copy
from peraxis_tools.remote.urls import local_path, without_secrets

__all__ = ["local_updates"]


@contextlib.contextmanager
def local_updates(
    sources: Sequence[str | Path], *, output: str | None = None, progress: ProgressOf = silent
) -> Iterator[list[Path]]:
    """Yield local paths of updates: files, and for a folder (a path, a URL, a repository) every .pxd in it.

    Files that replace others (anchors and folded updates) are left out. output: the output's URL, which must not be the
    URL of an input. Paths are compared in outputs/rules.py. Copies of remote files are removed at the end. Raises
    ToolError for a folder of other files, and for a file that is given twice; CheckpointError.
    """
    with contextlib.ExitStack() as stack:
        found: list[tuple[str | Path, Path]] = []
        links: list[Link] = []
        given: set[str] = set()
        for source in sources:
            _refuse_pattern(source)
            names = deltas_of(source)
            for name in names:
                _refuse_twice(name, given)
                path = stack.enter_context(local_copy(name, progress=progress))
                found.append((name, path))
                if len(names) > 1:  # a file that is no update is refused before the next one is fetched
                    links.append(_link(path, source, len(names)))
                elif len(sources) > 1 and (link := _link_if_update(path)) is not None:
                    links.append(link)
        left_out = {link.path for link in beside_chain(links)}
        used = [(name, path) for name, path in found if path not in left_out]
        if output is not None:
            refuse_replaced_url(output, [name for name, _ in used])
        yield [path for _, path in used]


def _refuse_twice(name: str | Path, given: set[str]) -> None:
    """Raise ToolError for a file that is given already, else add it: by its name in its folder, or its URL.

    A link to another file is a file of its own, as in a folder with a link to its first anchor.
    """
    here = local_path(name) if hub_name(name) is None else None
    own = str(name) if here is None else os.path.join(os.path.realpath(here.parent), here.name)
    if own in given:
        raise ToolError(f"{without_secrets(str(name))}: is given twice; pass it once, as a file or in its folder")
    given.add(own)


def _refuse_pattern(source: str | Path) -> None:
    """Raise ToolError for a pattern in place of a file, like a quoted `run/*.pxd`."""
    name = str(source)
    if not is_url(name) and has_magic(name) and not os.path.lexists(name):
        folder = os.path.dirname(name) or "."
        raise ToolError(f"{name}: no such file; pass the folder, {folder}, which means every .pxd in it")


def _link_if_update(path: Path) -> Link | None:
    """The link of a named file; None for a file that is no update, which is refused later, by its own name."""
    with pxd.open(path) as file:
        manifest = file.manifest
    return None if manifest.result is None or is_part(manifest) else link_from(path, manifest)


def _link(path: Path, source: str | Path, count: int) -> Link:
    with pxd.open(path) as file:
        manifest = file.manifest
    state = f"{without_secrets(str(source))}: has {count} .pxd files, and {path.name}"
    if is_part(manifest):
        raise ToolError(f"{state} is a part of a delta; {JOIN_PARTS} first")
    if manifest.result is None:
        raise ToolError(f"{state} is not an update of a chain; name one file")
    return link_from(path, manifest)
