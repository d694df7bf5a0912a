"""Output files at a URL: written locally first, then sent; they get their name when they are complete.

The rules for outputs (rules.py) hold here too: an output never replaces an input, and another file only with
`overwrite`. A file:// URL is the path that it names, so all of them are checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peraxis_format.create_remote import create_remote, replace_remote
from peraxis_format.hub import hub_name
from peraxis_format.urls import is_http, is_url
from peraxis_tools.errors import ToolError
from peraxis_tools.outputs.folders import scratch_folder
from peraxis_tools.outputs.rules import Inputs, claim_delta, exists_already, made_folder
from peraxis_tools.process.optional import require
from peraxis_tools.remote.files import hub_form, patience, readable
from peraxis_tools.remote.urls import file_of, local_path, without_secrets

__all__ = ["names_beside", "output_file", "refuse_replaced_url"]


@contextlib.contextmanager
def output_file(output: str | Path, *, overwrite: bool, inputs: Inputs) -> Iterator[Path]:
    """Yield the path to write an output file to: the path itself, or a temporary one that is sent to a URL at the end.

    Raises ToolError, OSError.
    """
    here = local_path(output)
    if here is not None:
        # As in a store, the folders of a URL need not exist.
        folder = made_folder(here.parent) if is_url(output) else contextlib.nullcontext()
        with folder, claim_delta(here, overwrite=overwrite, inputs=inputs):
            yield here
        return
    url = str(output)
    refuse_replaced_url(url, inputs)
    system, path = _place(url)
    shown = without_secrets(url)
    with readable(url, done="written"):
        if system.exists(path) and not overwrite:
            raise exists_already(shown)
    name = path.rpartition("/")[2]
    if not name:
        raise ToolError(f"{shown}: does not name a file")
    with scratch_folder() as folder_here:
        yield folder_here / name
        _send(system, folder_here / name, path, url, overwrite=overwrite)


def refuse_replaced_url(output: str | Path, inputs: Inputs) -> None:
    """Raise ToolError if an output is at the URL of an input. Paths are compared by rules.py."""
    if not is_url(output) or file_of(output) is not None:
        return
    wanted = _identity(str(output))
    for source in inputs:
        if source is None or file_of(source) is not None:
            continue
        if (is_url(source) or hub_name(source) is not None) and _identity(str(source)) == wanted:
            raise ToolError(f"{without_secrets(str(output))}: is an input of this run; choose another output")


def names_beside(url: str) -> list[str]:
    """The URLs of every .pxd in the folder of an output's URL; none if there is no such folder, or over HTTP.

    Raises ToolError if the store cannot be read, MissingPackageError.
    """
    if is_http(url):
        return []
    system, path = _place(url)
    folder = path.rpartition("/")[0]
    with readable(url):
        system.invalidate_cache()
        try:
            names = system.ls(folder, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [system.unstrip_protocol(name) for name in sorted(names) if name.endswith(".pxd")]


def _identity(url: str) -> tuple[frozenset[str], str]:
    """The store and the path in it, without the revision."""
    name = hub_name(url)
    if name is not None:
        return frozenset({"hf"}), f"{name.repository}/{name.file}"
    system, path = _place(url)
    kinds = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
    return frozenset(kinds), path


def _place(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it. Raises ToolError, MissingPackageError."""
    require(without_secrets(url), "fsspec")
    with readable(url, done="written"):
        import fsspec

        system, path = fsspec.core.url_to_fs(hub_form(url), **patience(url))
    return system, str(path)


def _send(system: Any, local: Path, path: str, url: str, *, overwrite: bool) -> None:
    shown = without_secrets(url)
    with readable(url, done="written"):
        if overwrite:
            replace_remote(system, local, path)
            return
        try:
            create_remote(system, local, path, url=shown)
        except FileExistsError:
            raise exists_already(shown) from None
