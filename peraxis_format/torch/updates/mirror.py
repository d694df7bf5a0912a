"""A chain at a URL (any that fsspec reads and writes: s3, gs, hf, memory, ...), and its local folder.

Only files that a follower or a trainer still needs are fetched, one by one and each atomically: the newest anchor if it
has to begin with one, the updates after its state, and the last file. They are sent the same way. Of the last file,
only the header is fetched if it is an anchor that the follower does not need: the rest is a hole in the local file. So
are updates whose name is that of no step, which a follower passes over and reports.

A file is fetched again if the store lists another size, time or tag for it. Some stores list none, and a transfer may
be faulty, so a file that cannot be used (`doubt`) is also fetched again: at the next sync, then after 2, 4 ... 64 more.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, TypeAlias

from peraxis_format.chain_names import step_of
from peraxis_format.create_remote import create_remote, head_of, is_replaced, start_of
from peraxis_format.errors import LiveModelError, PxdError, first_line
from peraxis_format.header import read_header
from peraxis_format.urls import http_options

__all__ = ["PREFIX", "Mirror"]

PREFIX: Final = "peraxis-chain-"  # of temporary folders
_PARTIAL: Final = ".part"
_LONGEST_PAUSE: Final = 64  # syncs between two fetches of a faulty file
_OTHERS: Final = 16  # headers of files with the name of no step that one sync fetches at most
# Entries of a listing that change with the file.
_STAMPS: Final = frozenset(
    {
        "size",
        "ETag",
        "etag",
        "mtime",
        "LastModified",
        "last_modified",
        "last_commit",
        "updated",
        "created",
        "generation",
    }
)
_Stamp: TypeAlias = tuple[tuple[str, str], ...]


class Mirror:
    """The chain of a URL in a temporary folder, which is removed by `close()`, or else with this object.

    Methods turn all errors of the file system into OSError, and leave no partial files.
    """

    def __init__(self, url: str) -> None:
        """Raises LiveModelError if fsspec, or the package of this kind of URL, is not installed."""
        self.url = url.rstrip("/")
        try:
            import fsspec

            self._system, self._path = fsspec.core.url_to_fs(self.url, **http_options(self.url))
        except ImportError as error:
            raise LiveModelError(f"{self.url}: needs a package that is not installed ({error}); install it") from None
        except ValueError as error:
            raise LiveModelError(f"{self.url}: {error}") from None
        self._sent: tuple[str, bytes] | None = None  # name and header of the file that was sent last
        self.fetches: dict[str, int] = {}  # of the files that are here: the number of the fetch
        self.headers: dict[str, int] = {}  # of the files that are here by their header alone: its bytes
        self._stamps: dict[str, _Stamp] = {}
        self._others: dict[str, _Stamp] = {}  # files with the name of no step whose header was fetched
        self._doubted: dict[str, tuple[int, int]] = {}  # name -> syncs until the next fetch, and the pause after it
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self.close = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def names(self) -> list[str]:
        """The file names of the updates and anchors at the URL. Raises OSError."""
        return sorted(name for name in self._listed() if step_of(name) is not None)

    def _listed(self) -> dict[str, _Stamp]:
        """The .pxd files at the URL; none if there is no such folder. Raises OSError if this is not known."""
        with self._errors():
            self._system.invalidate_cache()
            try:
                found = self._system.ls(self._path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            own = self._path.strip("/")
            files = [entry for entry in found if entry["type"] != "directory" and entry["name"].strip("/") != own]
            stamps = {entry["name"].rpartition("/")[2]: _stamp(entry) for entry in files}
        return {name: stamp for name, stamp in stamps.items() if name.endswith(".pxd")}

    def sync(self, *, after: int | None, others: bool = False) -> None:
        """Fetch the updates after step `after`; None: begin with the newest anchor. others: also the headers of files
        with the name of no step.
        """
        listed = self._listed()
        stamps = {name: stamp for name, stamp in listed.items() if step_of(name) is not None}
        found = {name: step_of(name) for name in stamps}
        anchors = {step: name for name, (step, anchor) in _known(found) if anchor}
        steps = {step: name for name, (step, anchor) in _known(found) if not anchor}
        newest = max(anchors, default=None)
        begin = after
        wanted: list[str] = []
        if newest is not None and (after is None or (newest > after and not _leads(steps, after))):
            wanted.append(anchors[newest])
            begin = newest if after is None else after
            if newest in steps:
                wanted.append(steps[newest])  # the next update names it
        wanted += [name for step, name in sorted(steps.items()) if begin is None or step > begin]
        # The last file shows whether this is still the same chain.
        last = [name for name, _ in sorted(_known(found), key=_last)[-1:] if name not in wanted]
        behind = after is not None and newest is not None and newest <= after
        unneeded = {name for name in last if behind and name in anchors.values()}
        wanted += last
        whole = [name for name in wanted if name in unneeded or name not in self.headers]
        kept = [name for name in whole if self._stamps.get(name) == stamps[name] and not self._is_due(name)]
        self._others = {name: stamp for name, stamp in self._others.items() if listed.get(name) == stamp}
        self._keep([*kept, *self._others])
        for name in wanted:
            if not (self.folder / name).exists():
                self.headers.pop(name, None)
                if name not in unneeded or not self._has_header(name):
                    self._fetch(name)
                self._stamps[name] = stamps[name]
                self.fetches[name] = self.fetches.get(name, 0) + 1
        for known in (self._stamps, self.fetches, self._doubted, self.headers):
            for name in known.keys() - set(wanted):
                del known[name]
        new = [name for name in listed if others and name not in stamps and name not in self._others]
        for name in new[:_OTHERS]:
            with contextlib.suppress(OSError):  # it may be gone, and the next sync tries again
                self._fetch_header(name)
                self._others[name] = listed[name]

    def doubt(self, names: Iterable[str]) -> None:
        """Fetch these files again later, because they cannot be used."""
        for name in names:
            self._doubted.setdefault(name, (1, 2))

    def _is_due(self, name: str) -> bool:
        """Count this sync for a doubted file: whether it is to be fetched again."""
        left, pause = self._doubted.get(name, (0, 0))
        if left > 1:
            self._doubted[name] = left - 1, pause
        elif left == 1:
            self._doubted[name] = pause, min(2 * pause, _LONGEST_PAUSE)
        return left == 1

    def send(self, path: Path) -> None:
        """Publish a local file under its name (create_remote.py).

        Raises FileExistsError if the name exists, or if another process has replaced the file that was sent last.
        """
        with self._errors():
            if self._sent is not None and is_replaced(self._system, f"{self._path}/{self._sent[0]}", self._sent[1]):
                raise FileExistsError(
                    f"{self.url}/{self._sent[0]}: was replaced by another process that publishes there; stop one of "
                    "them, and publish to a new URL"
                )
            create_remote(self._system, path, f"{self._path}/{path.name}", url=f"{self.url}/{path.name}")
        self._sent = path.name, start_of(path)

    def exists(self, name: str) -> bool:
        """Whether there is a file with this name."""
        with self._errors():
            self._system.invalidate_cache()
            return bool(self._system.exists(f"{self._path}/{name}"))

    def remove(self, name: str) -> None:
        """Delete a file; if it is gone already, nothing is done."""
        if self._sent is not None and self._sent[0] == name:
            self._sent = None
        with self._errors(), contextlib.suppress(FileNotFoundError):
            self._system.rm_file(f"{self._path}/{name}")

    def _fetch(self, name: str) -> None:
        partial = self.folder / f".{name}{_PARTIAL}"
        with self._errors():
            self._download(f"{self._path}/{name}", partial)
            partial.rename(self.folder / name)

    def _has_header(self, name: str) -> bool:
        """As _fetch_header, but an error of the store comes again when the whole file is fetched."""
        try:
            return self._fetch_header(name)
        except OSError:
            return False

    def _fetch_header(self, name: str) -> bool:
        """Fetch the header of a file, and leave a hole for its data. Whether it has one that can be read.

        Raises OSError for an error of the store.
        """
        partial = self.folder / f".{name}{_PARTIAL}"
        path = f"{self._path}/{name}"
        with self._errors():
            size = self._system.info(path).get("size")
            if size is None:
                return False
            start = head_of(self._system, path)
            try:
                read_header(lambda offset, count: start[offset : offset + count], size)
            except PxdError:
                return False
            with open(partial, "wb") as file:
                file.write(start)
                file.truncate(size)
            partial.rename(self.folder / name)
        self.headers[name] = len(start)
        return True

    def _download(self, path: str, partial: Path) -> None:
        """Fetch a file of the size that the store announces; more bytes would fill the disk."""
        from fsspec.callbacks import Callback

        size = self._system.info(path).get("size")
        if size is None:
            raise OSError(f"{self.url}: the server announces no size of {path.rpartition('/')[2]}")

        class Limit(Callback):  # type: ignore[misc]
            def relative_update(self, inc: int = 1) -> None:
                super().relative_update(inc)
                if self.value > size:
                    raise OSError(
                        f"{path.rpartition('/')[2]}: the server sends more than the {size} bytes it announced"
                    )

        self._system.get_file(path, str(partial), callback=Limit())
        if partial.stat().st_size != size:
            raise OSError(f"{self.url}: has {partial.stat().st_size} bytes of {path.rpartition('/')[2]}, not {size}")

    def _keep(self, names: Iterable[str]) -> None:
        kept = set(names)
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink()

    @contextlib.contextmanager
    def _errors(self) -> Any:
        """Turn all errors of the file system into OSError."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{self.url}: {type(error).__name__}: {first_line(error)}") from None


def _stamp(entry: dict[str, Any]) -> _Stamp:
    return tuple(sorted((key, str(value)) for key, value in entry.items() if key in _STAMPS))


def _known(found: dict[str, tuple[int, bool] | None]) -> list[tuple[str, tuple[int, bool]]]:
    return [(name, place) for name, place in found.items() if place is not None]


def _last(file: tuple[str, tuple[int, bool]]) -> tuple[int, bool]:
    """A key by which the file of the last state is the greatest: the update of a number after its anchor."""
    return file[1][0], not file[1][1]


def _leads(steps: dict[int, str], after: int) -> bool:
    """Whether the updates after `after` have no gap."""
    ahead = sorted(step for step in steps if step > after)
    return bool(ahead) and ahead == list(range(after + 1, after + 1 + len(ahead)))
