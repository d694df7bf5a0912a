"""A chain at a URL for the ranks of a sharded model: the first rank fetches it, and every rank has the same files.

Only the first rank lists and downloads: one answer of the store is the chain for all, the store sends each byte once,
and only that rank needs fsspec and credentials. Ranks that see its folder (on the same host) read it there. On another
host the lowest rank gets the bytes from the first one, in pieces, and writes them for all of its host.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from peraxis_format.torch.place.ranks import KeptError, Ranks, agree, together
from peraxis_format.torch.updates.mirror import PREFIX, Mirror

__all__ = ["SharedMirror"]

_PIECE: Final = 32 << 20  # bytes to send at a time
_TOKEN: Final = ".token"


class SharedMirror:
    """Mirror for all ranks of a group. All methods but `close` are collective. folder: this rank's, with all files."""

    def __init__(self, url: str, group: Any) -> None:
        """Raises LiveModelError on all ranks, as Mirror."""
        self._ranks = Ranks(group)
        self.first: Mirror | None = None  # on the first rank
        with together(group):
            self.first = Mirror(url) if self._ranks.rank == 0 else None
        self.url: str = self._ranks.broadcast(self.first.url if self.first is not None else "", rank=0)
        self._writers: list[int] = []
        self._fetches: dict[str, int] = {}  # on another host: of the files that are here
        self.close: Callable[[], object] = lambda: None
        self.folder = self._shared_folder()

    def _shared_folder(self) -> Path:
        """A folder that this rank sees. Its writer is rank 0, or the lowest rank that sees no folder before it."""
        mine: Path | None = None
        folder: Path | None = None
        while without := [rank for rank, has in enumerate(self._ranks.all_gather(folder is not None)) if not has]:
            writer, token = without[0], secrets.token_hex(8)
            self._writers.append(writer)
            with together(self._ranks.group):
                if self._ranks.rank == writer:
                    folder = mine = Path(tempfile.mkdtemp(prefix=PREFIX)) if self.first is None else self.first.folder
                    (mine / _TOKEN).write_text(token, "utf-8")
            said: tuple[Path, str] = self._ranks.broadcast((mine, token), rank=writer)
            if folder is None and _reads(said[0] / _TOKEN, said[1]):
                folder = said[0]
        self.close = weakref.finalize(self, _remove, mine, self.first)
        return Path() if folder is None else folder

    def sync(self, *, after: int | None, others: bool = False) -> None:
        """Fetch the updates after step `after`, see Mirror. Raises OSError, on all ranks."""
        names: dict[str, int] = {}
        with together(self._ranks.group):
            if self.first is not None:
                self.first.sync(after=after, others=others)
                names = dict(self.first.fetches)
        if len(self._writers) > 1:
            self._send(self._ranks.broadcast(names, rank=0))

    def doubt(self, names: Iterable[str]) -> None:
        """See Mirror; not collective."""
        if self.first is not None:
            self.first.doubt(names)

    def _send(self, names: dict[str, int]) -> None:
        """Give the other writers the files that they do not have, and remove others there. names: and their fetches."""
        rank, failure = self._ranks.rank, KeptError()
        writes = rank in self._writers and rank != 0
        here = set(names)
        with failure:
            if writes:
                found = {path.name for path in self.folder.glob("*.pxd")}
                here = {name for name in found & set(names) if self._fetches.get(name) == names[name]}
                for name in found - here:
                    (self.folder / name).unlink()
        lacking = self._ranks.all_gather(set(names) - here)
        for name in sorted(set().union(*lacking)):
            partial = self.folder / f".{name}.part" if writes and name in lacking[rank] else None
            size, sent = self._ranks.broadcast(self._sizes(name, failure), rank=0)
            if partial is not None:
                with failure:
                    partial.write_bytes(b"")
            for begin in range(0, sent, _PIECE):
                piece = self._ranks.broadcast(self._piece(name, begin, sent, failure), rank=0)
                if partial is not None and failure.error is None:
                    with failure, open(partial, "ab") as file:
                        file.write(piece)
            if partial is not None and failure.error is None:
                with failure:
                    if partial.stat().st_size == sent:  # else the first rank could not read it, and has the error
                        os.truncate(partial, size)
                        partial.rename(self.folder / name)
                        self._fetches[name] = names[name]
        agree(failure.error, self._ranks.group)

    def _sizes(self, name: str, failure: KeptError) -> tuple[int, int]:
        """The bytes of a file, and those of them to send: its header, if only that was fetched. On the first rank."""
        with failure:
            if self.first is not None:
                size = (self.folder / name).stat().st_size
                return size, self.first.headers.get(name, size)
        return 0, 0

    def _piece(self, name: str, begin: int, end: int, failure: KeptError) -> bytes:
        """A piece of the bytes before `end` of a file, on the first rank."""
        with failure:
            if self._ranks.rank == 0:
                with open(self.folder / name, "rb") as file:
                    file.seek(begin)
                    return file.read(min(_PIECE, end - begin))
        return b""


def _reads(path: Path, token: str) -> bool:
    """Whether this process sees the writer's folder, and not another one of the same name."""
    try:
        return path.read_text("utf-8") == token
    except OSError:
        return False


def _remove(folder: Path | None, mirror: Mirror | None) -> None:
    if mirror is not None:
        mirror.close()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
