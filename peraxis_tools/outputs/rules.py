"""The rules for outputs. They are the same for every verb and are checked before any work begins.

- An output never replaces an input, nor another output of the same run.
- An existing output is replaced only with `overwrite`. Devices, pipes and open files are written into; if that is
  standard output, the report goes to standard error.
- A folder is replaced only if it is an earlier output (see folders.py).
- The folder that an output stands in exists already. Only a URL's folders are made, as in a store.
- One run at a time writes an output: a lock beside it is held for the whole run, work folder included.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from peraxis_format import is_stream, name_lock, remove_leftovers
from peraxis_tools.display.notes import note
from peraxis_tools.errors import ToolError
from peraxis_tools.outputs.folders import refuse_folder
from peraxis_tools.outputs.standard_streams import claim_stream, refuse_notes, same_stream
from peraxis_tools.process.command_line import told_on_interrupt

__all__ = [
    "Inputs",
    "check_delta",
    "check_folder",
    "claim_delta",
    "claim_file",
    "claim_files",
    "claim_folder",
    "exists_already",
    "made_folder",
    "refuse_missing",
]

# Paths, hub ids and URLs of inputs. Only an existing path can be replaced.
Inputs: TypeAlias = Iterable[str | Path | None]

# Files that the tools write beside a checkpoint's own files; no reader of a checkpoint opens them.
_NEVER_READ = (".pxd", ".sig")


@contextlib.contextmanager
def claim_file(path: str | Path, *, overwrite: bool, inputs: Inputs = ()) -> Iterator[None]:
    """Check the rules for one output file, and hold its lock until the end. Raises ToolError, OSError."""
    with claim_files([path], overwrite=overwrite, inputs=inputs):
        yield


@contextlib.contextmanager
def claim_delta(path: str | Path, *, overwrite: bool, inputs: Inputs) -> Iterator[None]:
    """`claim_file` for a .pxd; notes a name that no verb finds in a folder. Standard error is refused."""
    check_delta(path, overwrite=overwrite, inputs=inputs)
    file = _plain(path)
    with claim_file(path, overwrite=overwrite, inputs=inputs):
        if file.suffix != ".pxd" and not is_stream(file):
            note(f"{file}: verify finds only *.pxd in a folder; call it {file.name}.pxd to have it found")
        yield


@contextlib.contextmanager
def claim_files(paths: Sequence[str | Path], *, overwrite: bool, inputs: Inputs = ()) -> Iterator[None]:
    """`claim_file` for several output files of one run, in existing folders. Notes a signature that is left behind."""
    _check_files(paths, overwrite=overwrite, inputs=inputs)
    with contextlib.ExitStack() as stack:
        for file in map(_plain, paths):
            if is_stream(file):
                claim_stream(file)
            else:
                stack.enter_context(_only_run(file))
                stack.enter_context(told_on_interrupt(_unwritten(file)))
                stack.enter_context(_signature_told(file))
        yield


def check_delta(path: str | Path, *, overwrite: bool, inputs: Inputs) -> None:
    """`_check_files` for a .pxd. Standard error is refused."""
    if is_stream(_plain(path)):
        refuse_notes(_plain(path))
    _check_files([path], overwrite=overwrite, inputs=inputs)


def _check_files(paths: Sequence[str | Path], *, overwrite: bool, inputs: Inputs) -> None:
    """Check the rules for output files without a lock: for work before the run such as a download, and a dry run."""
    known = _existing(inputs)
    files = [_plain(path) for path in paths]
    for place, file in enumerate(files):
        same = same_stream if is_stream(file) else _same
        if any(same(file, other) for other in files[:place]):
            raise ToolError(f"{file}: is named for two outputs; name another file for one of them")
        if is_stream(file):
            continue
        refuse_missing(file.parent)
        if file.is_dir():
            raise ToolError(f"{file}: is a folder; name a file")
        _refuse_replaced_input(file, known)
        if os.path.lexists(file) and not overwrite:
            raise exists_already(file)


def exists_already(output: object) -> ToolError:
    """Return the error for an output that exists. output: its path, or its URL without secrets."""
    return ToolError(f"{output}: exists already; choose another output or pass overwrite (--overwrite)")


@contextlib.contextmanager
def claim_folder(path: str | Path, *, overwrite: bool, inputs: Inputs = (), repository: bool = False) -> Iterator[None]:
    """Check the rules for an output folder, and hold its lock until the end. Raises ToolError, OSError.

    repository: whether `publish` writes it, which alone replaces a repository (folders.earlier_output).
    """
    folder = check_folder(path, overwrite=overwrite, inputs=inputs, repository=repository)
    with _only_run(folder):
        # Check again, because another run may have finished while this one waited for the lock.
        refuse_folder(folder, overwrite=overwrite, repository=repository)
        with told_on_interrupt(_unwritten(folder)):
            yield


def check_folder(path: str | Path, *, overwrite: bool, inputs: Inputs, repository: bool = False) -> Path:
    """Check the rules for an output folder without a lock. Returns it as a path that has a name."""
    folder = _plain(path)
    for source in _existing(inputs):
        if _within(source, folder):
            same = os.path.realpath(source) == os.path.realpath(folder)
            what = "is an input of this run" if same else f"contains the input {source}"
            raise ToolError(f"{folder}: {what}; choose another output")
    refuse_missing(folder.parent)
    refuse_folder(folder, overwrite=overwrite, repository=repository)
    return folder


@contextlib.contextmanager
def _signature_told(file: Path) -> Iterator[None]:
    """Note, at the end of a run that wrote this file, that the signature beside it is of an earlier one."""
    signature = file.with_name(f"{file.name}.sig")
    before = _identity(file), _identity(signature)
    yield
    written, kept = _identity(file) != before[0], _identity(signature) == before[1] is not None
    if written and kept:
        note(f"{signature}: was made for an earlier {file.name}; sign it again with `peraxis-tools sign`")


def _unwritten(path: Path) -> Callable[[], str | None]:
    """A function that says, after an interrupt, that an output was not written; None if it has changed since now."""
    before = _identity(path)
    return lambda: f"{path} was not written" if _identity(path) == before else None


def _identity(path: Path) -> tuple[int, int] | None:
    """What changes when a path is replaced or written; None if it does not exist."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def refuse_missing(folder: Path) -> None:
    """Raise ToolError if the folder that an output is written to does not exist: its name may be mistyped."""
    if not folder.is_dir():
        if re.match(r"[A-Za-z][\w.+-]+:(/|$)", str(folder)):  # the two slashes of a URL have become one
            raise ToolError(f"{folder}: looks like a URL; only `update` and `compact` write to one; name a file here")
        raise ToolError(f"{folder}: no such folder; make it first")


def _plain(path: str | Path) -> Path:
    if not str(path) or "\0" in str(path):
        raise ToolError("the output's name is empty; name a file or folder")
    if str(path) == "-":
        raise ToolError("-: is no name of an output; for standard output name /dev/stdout")
    path = Path(path)
    if not path.name or path.name == "..":
        return Path(os.path.abspath(path))
    if len(os.fsencode(path.name)) > 255:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))
    return path


def _existing(inputs: Inputs) -> list[Path]:
    """The inputs that are paths on this machine; for an index its folder, because its shards are inputs too."""
    found = []
    for source in inputs:
        if source is None or not str(source) or not os.path.exists(source):
            continue
        path = Path(source)
        found.append(path.parent if path.name.endswith(".index.json") else path)
    return found


def _same(a: Path, b: Path) -> bool:
    if os.path.abspath(a) == os.path.abspath(b):
        return True
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def _within(path: Path, folder: Path) -> bool:
    """Whether a path is this folder or lies in it, by its name or through links."""
    return any(
        inner == outer or inner.startswith(outer.rstrip(os.sep) + os.sep)
        for inner, outer in (
            (os.path.realpath(path), os.path.realpath(folder)),
            (os.path.abspath(path), os.path.abspath(folder)),
        )
    )


def _refuse_replaced_input(file: Path, inputs: Sequence[Path]) -> None:
    for source in inputs:
        if source.is_dir():
            if os.path.lexists(file) and _holds(source, file):
                raise ToolError(f"{file}: is a file of the input {source}; choose another output")
        elif _same(file, source):
            raise ToolError(f"{file}: is an input of this run; choose another output")


def _holds(folder: Path, file: Path) -> bool:
    """Whether readers of the folder open this file, directly or through links (a hub cache consists of links)."""
    if _within(file.parent, folder) and file.suffix not in _NEVER_READ:
        return True
    entries = (entry for entry in folder.iterdir() if entry.suffix not in _NEVER_READ)
    return file.exists() and any(entry.is_file() and entry.samefile(file) for entry in entries)


@contextlib.contextmanager
def _only_run(path: Path) -> Iterator[None]:
    remove_leftovers(path.parent)
    key = hashlib.sha256(os.fsencode(os.path.join(os.path.realpath(path.parent), path.name))).hexdigest()[:8]
    with contextlib.ExitStack() as stack:
        try:
            other = stack.enter_context(name_lock(path.parent, key))
        except FileExistsError:
            raise  # it names the lock
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        if other is not None:
            who = f"another run (process {other})" if other else "another run"
            raise ToolError(f"{path}: {who} is writing it; wait for its end or choose another output")
        yield


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; on failure remove the new ones."""
    made = []
    while not os.path.lexists(folder):
        made.append(folder)
        folder = folder.parent
    try:
        for each in reversed(made):
            each.mkdir(exist_ok=True)
        yield
    except BaseException:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise
