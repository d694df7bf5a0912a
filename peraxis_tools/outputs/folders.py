"""Write folders atomically, and recognise an earlier output.

Every folder that the tools write has a `.peraxis-output.json`, which lists the files that they wrote. A folder with
this list is an earlier output: `overwrite` replaces the files of the list and leaves all other files of the folder.
A folder without it is never replaced.

The new folder is made beside the old one, with hard links to the remaining files, and the two are exchanged in one step
(renameat2). If the folder cannot be moved (a mount point, the current folder), files are moved into it one by one. Then
the list is first written as unfinished and afterwards as finished.

A list may come from a stranger's repository. So it only counts if all its names are relative and lead to no other
folder, and no file is written or removed through a symbolic link.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from peraxis_format import atomic_file, new_temporary, remove_leftovers, sync_folder
from peraxis_tools.errors import ToolError

__all__ = ["MARKER", "Earlier", "atomic_folder", "earlier_output", "refuse_folder", "scratch_folder", "write_marker"]

MARKER: Final = ".peraxis-output.json"
_SCHEMA: Final = "peraxis.output/1"
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_CARD_HEAD: Final = 1 << 16
_EXCHANGE: Final = 2  # RENAME_EXCHANGE
_AT_FDCWD: Final = -100
_CANNOT_EXCHANGE: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """An earlier output in a folder: the names of its files, and whether its run finished."""

    files: frozenset[str]
    finished: bool


def earlier_output(folder: Path, *, repository: bool = False) -> Earlier | None:
    """The list of an earlier run in a folder; None if there is none.

    repository: whether `publish` asks. The repository that it wrote has no list, because all files are uploaded; its
    card identifies it. To other verbs it is no earlier output, because nothing tells them its other files.
    """
    try:
        found = json.loads(_start_of(folder / MARKER, -1))
    except (OSError, ValueError, RecursionError):
        return _earlier_repository(folder) if repository else None
    if not isinstance(found, dict) or found.get("schema") != _SCHEMA:
        return None
    files = found.get("files")
    if not isinstance(files, list) or not all(isinstance(name, str) and _is_inside(name) for name in files):
        return None
    return Earlier(files=frozenset(files) | {MARKER}, finished=found.get("finished") is True)


def _start_of(path: Path, size: int) -> bytes:
    """The first bytes of a file, all of them for -1. Raises OSError for a pipe or a device, which could be endless."""
    if not path.is_file():
        raise FileNotFoundError(path)
    with open(path, "rb") as file:
        return file.read(size)


def _is_inside(name: str) -> bool:
    """Whether a name of a list stays in its folder: relative, without `..`."""
    parts = name.split("/")
    return "\0" not in name and not os.path.isabs(name) and not {"", ".", ".."} & set(parts)


def _earlier_repository(folder: Path) -> Earlier | None:
    try:
        head = _start_of(folder / "README.md", _CARD_HEAD)
    except OSError:
        return None
    if not head.startswith(b"---\n") or b"\nlibrary_name: peraxis\n" not in head:
        return None
    return Earlier(files=frozenset({"README.md", ".gitattributes"}), finished=True)


def write_marker(folder: Path, files: Sequence[str], *, finished: bool = True) -> None:
    """Write the list of an output's files (paths relative to the folder)."""
    with atomic_file(folder / MARKER) as file:
        file.write(json.dumps({"schema": _SCHEMA, "finished": finished, "files": sorted(files)}, indent=1).encode())


def refuse_folder(path: Path, *, overwrite: bool, repository: bool = False) -> None:
    """Raise ToolError if a folder cannot become the output. Call this before any work.

    It can if it does not exist or is empty; with overwrite also if it is an earlier output, finished or not.
    repository: as in `earlier_output`.
    """
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise ToolError(f"{path}: exists already and is not a folder; choose another output")
    others = sorted(entry.name for entry in os.scandir(path) if not entry.name.startswith(".peraxis~"))
    earlier = earlier_output(path, repository=repository)
    if not others:
        return
    if not overwrite and earlier is None:
        raise ToolError(f"{path}: exists already, and is no earlier output; choose another output")
    if not overwrite:
        state = "has an unfinished output" if earlier is not None and not earlier.finished else "exists already"
        raise ToolError(f"{path}: {state}; choose another output or pass overwrite (--overwrite)")
    if earlier is None:
        raise ToolError(
            f"{path}: has {others[0]} and no list of an earlier output ({MARKER}), so it is not replaced; "
            "choose another output or remove it yourself"
        )
    if _is_fixed(path) and set(others) - {name.split("/")[0] for name in earlier.files}:
        raise ToolError(f"{path}: has other files too and cannot be moved; choose a folder within it")


@contextlib.contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False, repository: bool = False) -> Iterator[Path]:
    """Make a temporary folder; on success rename it to `path`, else remove it.

    Claim the folder first (outputs.claim_folder). With overwrite, the files of an earlier output are replaced and all
    other files of its folder remain. repository: whether `publish` writes it, so that it has no list of its files.
    """
    path = Path(os.path.realpath(path))
    _restore(path)
    refuse_folder(path, overwrite=overwrite, repository=repository)
    path.parent.mkdir(parents=True, exist_ok=True)
    fixed = _is_fixed(path)
    remove_leftovers(path if fixed else path.parent)
    temporary, descriptor = new_temporary(path if fixed else path.parent, is_folder=True)
    try:
        with _errors_about(path, temporary):
            yield temporary
        files = [file.relative_to(temporary).as_posix() for file in temporary.rglob("*") if not file.is_dir()]
        if not repository and not fixed:
            write_marker(temporary, files)
        _sync(temporary)
        # Check again, because the folder may have been filled in the meantime.
        refuse_folder(path, overwrite=overwrite, repository=repository)
        earlier = earlier_output(path, repository=repository)
        replaced = earlier.files if earlier is not None else frozenset()
        if not repository:  # its card does not say which files were written
            _refuse_taken(path, files, replaced)
        if fixed:
            _move_in(temporary, path, files, replaced - {MARKER}, repository=repository)
        else:
            if path.exists():
                _link_rest(path, temporary, replaced)
                sync_folder(temporary)
            _give_name(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


@contextlib.contextmanager
def _errors_about(path: Path, temporary: Path) -> Iterator[None]:
    """Add the name of the output to errors of the system, and the number of written bytes to those of a full disk."""
    try:
        yield
    except OSError as error:
        inside = os.fspath(temporary) + os.sep
        name = "" if error.filename is None else os.fsdecode(str(error.filename))
        if error.errno is None or (name and not name.startswith(inside)):
            raise
        reason = error.strerror or os.strerror(error.errno)
        if error.errno in _FULL and "bytes" not in reason:
            size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
            reason += f" after {size} bytes"
        shown = path / name.removeprefix(inside) if name else path
        raise OSError(error.errno, reason, str(shown)) from error


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in the system's temporary folder, removed at the end together with those of killed runs."""
    place = Path(tempfile.gettempdir())
    remove_leftovers(place)
    folder, descriptor = new_temporary(place, is_folder=True)
    try:
        folder.chmod(0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _is_fixed(path: Path) -> bool:
    """Whether a folder cannot be moved: a mount point, or this process's current folder."""
    if not path.is_dir():
        return False
    there = os.path.realpath(path)
    try:
        here = os.getcwd()
    except FileNotFoundError:
        here = ""  # removed
    return os.path.ismount(there) or here == there or here.startswith(there.rstrip(os.sep) + os.sep)


def _sync(folder: Path) -> None:
    for each in folder.rglob("*"):
        if each.is_dir():
            sync_folder(each)
        elif each.is_file() and not each.is_symlink():
            with open(each, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def _refuse_taken(path: Path, files: Sequence[str], replaced: frozenset[str]) -> None:
    """Raise ToolError if an output has a file of the name of another one in the folder, which would be lost."""
    for name in sorted({*files} - replaced):
        if os.path.lexists(path / name):
            raise ToolError(
                f"{path / name}: is no file of the earlier output, and the new one has a file of this name; move it "
                "away or choose another output"
            )


def _link_rest(old: Path, new: Path, replaced: frozenset[str]) -> None:
    """Make hard links in `new` to the other files of an earlier output's folder. replaced: the files of the output."""
    for entry in sorted(old.rglob("*")):
        name = entry.relative_to(old)
        target = new / name
        if ".peraxis~" in name.as_posix() or name.as_posix() in replaced or os.path.lexists(target):
            continue
        if entry.is_dir() and not entry.is_symlink():
            listed = any(each.startswith(f"{name.as_posix()}/") for each in replaced)
            if not listed:
                target.mkdir()
                shutil.copystat(entry, target)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(entry, target)
    shutil.copymode(old, new)


def _link_or_copy(source: Path, target: Path) -> None:
    if source.is_symlink():
        os.symlink(os.readlink(source), target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _give_name(temporary: Path, path: Path) -> None:
    """Give the new folder its final name; the old folder gets the temporary name, to be removed."""
    if not path.exists() or not any(path.iterdir()):
        os.rename(temporary, path)  # an empty folder is replaced by a rename
    elif not _exchange(temporary, path):
        os.rename(path, _aside(path))
        os.rename(temporary, path)
        _restore(path)
    sync_folder(path.parent)


def _aside(path: Path) -> Path:
    """The path of the old folder between two renames, on a system that cannot exchange two names in one step."""
    return path.with_name(f".peraxis~{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}.old")


def _restore(path: Path) -> None:
    """Restore a folder that a killed run moved aside, or remove it if the new one exists."""
    if os.path.lexists(path):
        shutil.rmtree(_aside(path), ignore_errors=True)
    elif _aside(path).is_dir():
        os.rename(_aside(path), path)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step. Returns False if the system cannot."""
    rename: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(b))


def _move_in(temporary: Path, path: Path, files: Sequence[str], old: frozenset[str], *, repository: bool) -> None:
    """Move the files of a finished folder into one that cannot be moved, and remove `old`, those of an earlier output.

    The list says which files remain if the run is killed. A repository has none in the end, because all its files are
    uploaded.
    """
    linked = next((name for name in files if _passes_link(path, name)), None)
    if linked is not None:
        raise ToolError(f"{path / linked}: is behind a symbolic link; remove the link or choose another output")
    old = frozenset(name for name in old if not _passes_link(path, name))
    write_marker(path, [*old, *files], finished=False)
    for name in sorted(old - set(files)):
        with contextlib.suppress(OSError):
            (path / name).unlink()
    for name in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / name, path / name)
    if repository:
        (path / MARKER).unlink()
    else:
        write_marker(path, files)
    sync_folder(path)


def _passes_link(folder: Path, name: str) -> bool:
    """Whether a folder on the way from `folder` to the file of this name is a symbolic link."""
    parents = Path(name).parents
    return any((folder / parent).is_symlink() for parent in parents if parent != Path())
