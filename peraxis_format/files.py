"""Write files atomically, and manage temporary names.

A new file has no name until it is complete, if the system supports that (O_TMPFILE, then link). Otherwise, and for
folders, it has a temporary name: `.peraxis~` and eight hexadecimal digits. The process that uses such a name holds a
lock on it (flock), which ends with the process. So a name without a lock was left by a killed run, and the next run in
that folder removes it (`remove_leftovers`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

__all__ = ["atomic_file", "is_stream", "name_lock", "new_temporary", "remove_leftovers", "sync_folder"]

_PREFIX: Final = ".peraxis~"
_TEMPORARY: Final = re.compile(re.escape(_PREFIX) + r"[0-9a-f]{8}")
# Names of the process's open files; they are written into.
_OPEN_FILE: Final = re.compile(r"/dev/(?:fd/|std)(in|out|err|\d+)|/proc/self/fd/(\d+)")
_PATIENCE, _PAUSE = 1.0, 0.05  # seconds
_ATTEMPTS: Final = 1000  # to lock a name that other processes make and remove meanwhile
_DESCRIPTORS: Final = "/proc/self/fd/"
_STANDARD: Final = {"in": 0, "out": 1, "err": 2}
_NO_UNNAMED: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.ENOSYS})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.ENOENT, errno.EMLINK})


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, if the system can open folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # some file systems cannot open a folder; the rename has happened already
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def is_stream(path: Path) -> bool:
    """Whether `path` is written into, not replaced: a device, a pipe, an open file (/dev/stdout)."""
    if _OPEN_FILE.fullmatch(os.path.abspath(path)):
        return True
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Open a file that gets the name `path` on success, after its bytes are on disk; on failure it is removed.

    Devices, pipes and open files are written into. overwrite: replace an existing file (a link itself, not its target);
    without it, raises FileExistsError if the name exists by then. Raises OSError with the path and, if a write failed,
    the number of written bytes. Also removes leftovers of killed runs in that folder.
    """
    path = Path(path)
    if is_stream(path):
        with _opened_stream(path) as file:
            yield file
        return
    remove_leftovers(path.parent)
    with _new_file(path.parent) as (file, temporary), _named_errors(path, file):
        yield file
        file.flush()
        os.fsync(file.fileno())
        _give_name(file, temporary, path, overwrite=overwrite)
    sync_folder(path.parent)


@contextlib.contextmanager
def _opened_stream(path: Path) -> Iterator[BinaryIO]:
    own = _OPEN_FILE.fullmatch(os.path.abspath(path))
    if own is None:
        descriptor = os.open(path, os.O_WRONLY)
    else:
        number = own[1] or own[2]
        descriptor = os.dup(_STANDARD[number] if number in _STANDARD else int(number))
        if sys.stdout is not None:
            sys.stdout.flush()
    file = os.fdopen(descriptor, "wb")
    try:
        with _named_errors(path, file):
            yield file
            file.flush()
    finally:
        with contextlib.suppress(OSError):
            file.close()


@contextlib.contextmanager
def _new_file(folder: Path) -> Iterator[tuple[BinaryIO, Path | None]]:
    """A new file and its temporary name; the name is None if the system supports files without a name."""
    temporary = None
    try:
        # A file without a name gets one by a link through /proc.
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666) if os.path.isdir(_DESCRIPTORS) else -1
    except AttributeError:  # not Linux
        descriptor = -1
    except OSError as error:
        if error.errno not in _NO_UNNAMED or not os.path.isdir(folder):
            raise
        descriptor = -1
    if descriptor == -1:
        temporary, descriptor = new_temporary(folder)
    else:
        _lock(descriptor)
    file = os.fdopen(descriptor, "wb")
    try:
        yield file, temporary
    finally:
        with contextlib.suppress(OSError):
            file.close()  # flushes the failed bytes again
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _give_name(file: BinaryIO, temporary: Path | None, path: Path, *, overwrite: bool) -> None:
    if temporary is None:
        _link_unnamed(file, path, overwrite=overwrite)
    elif overwrite:
        os.replace(temporary, path)
    else:
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            os.rename(temporary, path)


def _link_unnamed(file: BinaryIO, path: Path, *, overwrite: bool) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        source = f"{_DESCRIPTORS}{file.fileno()}"
        try:
            # Python follows the link only with a folder's descriptor.
            os.link(source, path.name, dst_dir_fd=folder, follow_symlinks=True)
        except FileExistsError:
            if not overwrite:
                raise
            # A link cannot replace a file, but a rename can. The unnamed file's lock holds for the name too.
            temporary = _temporary_name()
            os.link(source, temporary, dst_dir_fd=folder, follow_symlinks=True)
            try:
                os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                os.unlink(temporary, dir_fd=folder)
                raise
    finally:
        os.close(folder)


@contextlib.contextmanager
def _named_errors(path: Path, file: BinaryIO) -> Iterator[None]:
    """Set `path` in errors of the system with no name or a temporary one; a full disk adds the written bytes."""
    try:
        yield
    except OSError as error:
        names = f"{error.filename or ''} {error.filename2 or ''}"
        if error.errno is None or (error.filename is not None and _PREFIX not in names and _DESCRIPTORS not in names):
            raise
        reason = os.strerror(error.errno)
        size = os.fstat(file.fileno()).st_size
        if error.errno in _FULL and size:
            reason += f" after {size} bytes"
        raise OSError(error.errno, reason, str(path)) from error


# --- temporary names ---------------------------------------------------------------------------------------------


def _temporary_name() -> str:
    return _PREFIX + secrets.token_hex(4)


def new_temporary(folder: Path, *, is_folder: bool = False) -> tuple[Path, int]:
    """A new file or folder under a temporary name, and a descriptor that holds its lock until it is closed."""
    while True:
        path = folder / _temporary_name()
        if is_folder:
            path.mkdir()
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # another process removed it as a leftover before it was opened
                continue
        else:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _lock(descriptor)
        if _is_named(descriptor, path):
            return path, descriptor
        os.close(descriptor)  # another process removed it as a leftover before it was locked


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary names of killed runs in a folder. Names of live processes stay."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _TEMPORARY.fullmatch(entry.name)]
    except OSError:
        return
    for name in names:
        path = folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            if _lock(descriptor, wait=False) and _is_named(descriptor, path):
                _remove(path)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def name_lock(folder: Path, key: str) -> Iterator[int | None]:
    """Yield None while this process alone holds `key` (eight hexadecimal digits) in a folder, else the other's pid.

    The pid is 0 if it is not known. On a file system without locks this always yields None. Raises FileExistsError with
    the lock's path if its name belongs to something that is not a lock (a link, a pipe, a folder).
    """
    path = folder / (_PREFIX + key)
    waited = 0.0
    for _ in range(_ATTEMPTS):
        descriptor = _opened_lock(path)
        locked = _lock(descriptor, wait=False)
        if locked is False and waited < _PATIENCE:
            waited += _PAUSE  # a process that removes leftovers holds a name for a moment
            os.close(descriptor)
            time.sleep(_PAUSE)
        elif locked is not False and not _is_named(descriptor, path):
            os.close(descriptor)  # another process removed it, as its own or as a leftover
        else:
            break
    else:
        raise _no_lock(path)
    try:
        if locked is False:
            text = os.pread(descriptor, 32, 0)
            yield int(text) if text.isdigit() else 0
            return
        try:
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield None
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _opened_lock(path: Path) -> int:
    """A descriptor of a lock's file, which is made if there is none. Nothing else is opened, followed or waited for."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO):
            raise
        raise _no_lock(path) from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise _no_lock(path)
    return descriptor


def _no_lock(path: Path) -> OSError:
    return FileExistsError(errno.EEXIST, "is not a lock of this program, but has the name of one; remove it", str(path))


def _lock(descriptor: int, *, wait: bool = True) -> bool | None:
    """Lock an open file for this process. False if another process has it, None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(descriptor))
