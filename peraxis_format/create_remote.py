"""Create a file at a URL unless one of its name exists, so that two writers never replace each other's files.

    s3, gs, abfs    one conditional request of the store
    hf              one commit on the parent commit that did not have the file
    file            a link
    others          no such operation: a temporary name and a rename, between a look before and a comparison after

The comparison reads the first bytes of the file: the header of a .pxd has the digests of all other bytes. It is made
for every store, because some stores behind s3:// ignore the condition.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from peraxis_format.files import atomic_file
from peraxis_format.hub import commit_new_file

__all__ = ["create_remote", "head_of", "is_replaced", "replace_remote", "start_of"]

_CONDITIONAL: Final = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"})
_LENGTH: Final = 8  # bytes of the header's length at the start of a file
_LONGEST: Final = 1 << 26  # bytes to compare at most
_BLOCK: Final = 1 << 20  # bytes of a request for a header


def start_of(local: Path) -> bytes:
    """The header of a .pxd file."""
    with open(local, "rb") as file:
        return _head(file)


def head_of(system: Any, target: str) -> bytes:
    """The header of a .pxd file at `target`. Raises the errors of the file system."""
    with system.open(target, "rb", block_size=_BLOCK) as file:
        return _head(file)


def _head(file: BinaryIO) -> bytes:
    length = file.read(_LENGTH)
    return length + file.read(min(int.from_bytes(length, "little"), _LONGEST))


def is_replaced(system: Any, target: str, start: bytes) -> bool:
    """Whether there is a file at `target` that begins with other bytes. Raises the errors of the file system."""
    try:
        found: bytes = system.cat_file(target, start=0, end=len(start))
    except FileNotFoundError:
        return False
    return found != start


def create_remote(system: Any, local: Path, target: str, *, url: str) -> None:
    """Send a .pxd file to `target`, a path of an fsspec file system; it appears complete, and never replaces another.

    url: for errors. Raises FileExistsError if the name is taken, and the errors of the file system. If the answer of
    the store is lost although the file is there, this succeeds.
    """
    start = start_of(local)
    system.invalidate_cache()
    if system.exists(target):
        raise _taken(url)
    system.makedirs(target.rpartition("/")[0], exist_ok=True)
    try:
        _create(system, local, target)
    except Exception:
        system.invalidate_cache()
        there, replaced = _there(system, target, start, local.stat().st_size)
        if replaced:
            raise _taken(url) from None
        if not there:
            raise
        return  # the answer was lost
    system.invalidate_cache()
    if _there(system, target, start, local.stat().st_size)[1]:
        raise _taken(url)


def replace_remote(system: Any, local: Path, target: str) -> None:
    """Send a file to `target`, a path of an fsspec file system, in the place of the one there, if there is one.

    At any time one of both is there, or under a temporary name beside it. Raises the errors of the file system.
    """
    system.invalidate_cache()
    system.makedirs(target.rpartition("/")[0], exist_ok=True)
    kinds = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
    if kinds & (_CONDITIONAL | {"hf"}):  # one request, or one commit
        system.put_file(str(local), target)
        return
    aside = _beside(target, "old")
    with _uploaded(system, local, target) as partial:
        if system.exists(target):  # a rename replaces nothing in some stores
            system.mv(target, aside)
        try:
            system.mv(partial, target)
        except BaseException:
            if system.exists(aside):
                system.mv(aside, target)
            raise
    with contextlib.suppress(Exception):  # the file is there; what may remain is a hidden name
        system.rm_file(aside)


@contextlib.contextmanager
def _uploaded(system: Any, local: Path, target: str) -> Iterator[str]:
    """Send a file to a temporary name beside its target, and remove it there if the block fails."""
    partial = _beside(target, "part")
    try:
        system.put_file(str(local), partial)
        yield partial
    except BaseException:
        with contextlib.suppress(Exception):
            system.rm_file(partial)
        raise


def _beside(target: str, kind: str) -> str:
    folder, _, name = target.rpartition("/")
    return f"{folder}/.{name}.{secrets.token_hex(4)}.{kind}"


def _there(system: Any, target: str, start: bytes, size: int) -> tuple[bool, bool]:
    """Whether the whole file is at `target`, and whether another one is; both false if this is not known."""
    with contextlib.suppress(Exception):
        replaced = is_replaced(system, target, start)
        return not replaced and system.size(target) == size, replaced
    return False, False


def _taken(url: str) -> FileExistsError:
    return FileExistsError(
        f"{url}: exists already; another process publishes there; stop one of them, or give each its own URL"
    )


def _create(system: Any, local: Path, target: str) -> None:
    kinds = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
    if kinds & _CONDITIONAL:
        system.put_file(str(local), target, mode="create")
    elif "hf" in kinds:
        place = system.resolve_path(target)
        if not hasattr(place, "path_in_repo"):  # a bucket, which has no commits
            _renamed(system, local, target)
            return
        commit_new_file(
            local,
            place.path_in_repo,
            repository=place.repo_id,
            kind=place.repo_type,
            revision=place.revision,
            endpoint=system.endpoint,
            token=system.token,
        )
    elif "file" in kinds:
        with open(local, "rb") as source, atomic_file(target, overwrite=False) as file:
            shutil.copyfileobj(source, file)
    else:
        _renamed(system, local, target)


def _renamed(system: Any, local: Path, target: str) -> None:
    with _uploaded(system, local, target) as partial:
        if system.exists(target):
            raise FileExistsError(target)
        system.mv(partial, target)
