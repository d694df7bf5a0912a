"""The place that a trainer publishes to: a folder, or a URL by way of a local folder.

A file may be there although its write ended with an error: a flush of the folder failed after the file had its name, a
store took the file and did not answer. Such a file is in doubt until the trainer has read the chain again.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from peraxis_format.chain_names import step_of
from peraxis_format.errors import PxdError
from peraxis_format.manifest import Identity, Manifest
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.updates.listing import UpdateFile, newer_file
from peraxis_format.torch.updates.mirror import Mirror
from peraxis_format.writer import DeltaWriter

__all__ = ["Destination"]

_OTHER = "another process publishes there; stop one of them"


class Destination:
    """Begins, sends and deletes the files of a chain. folder: the local one. name: of the model.

    mirror: that of a URL. On the ranks of a sharded model that do not publish there is none.
    """

    def __init__(self, folder: Path, *, name: str, mirror: Mirror | None) -> None:
        self.folder = folder
        self._mirror = mirror
        self._name = name
        self._last: DeltaWriter | None = None  # the file whose end has begun last
        self._in_doubt = False  # whether that has not ended well
        self._own: dict[str, str] = {}  # the content ID of each file that this process wrote into the folder, by name

    def shown(self, path: Path) -> Path | str:
        """The place of a published file: a path, or its URL."""
        return path if self._mirror is None else f"{self._mirror.url}/{path.name}"

    def writer(self, path: Path, *, previous: str | None) -> DeltaWriter:
        """Begin a file. Raises FileExistsError if the folder has a newer one or a replaced one, OSError."""
        newer = newer_file(path)
        if newer is not None:
            raise FileExistsError(f"{self.shown(newer)}: is newer than {path.name}; {_OTHER}")
        self._refuse_replaced()
        identity = Identity(id=self._name)
        return DeltaWriter(path, base=identity, fine_tuned=identity, previous=previous, chained=True, overwrite=False)

    def finish(self, writer: DeltaWriter) -> Manifest:
        """Give a file its name, and send it to the URL. Raises FileExistsError if the name is taken, OSError."""
        self._last, self._in_doubt = writer, True
        try:
            manifest = writer.finish()
            if self._mirror is not None:
                self._mirror.send(writer.path)
        except FileExistsError as error:
            self._in_doubt = False
            if error.errno is None:  # it says what to do
                raise
            shown = self.shown(writer.path)
            raise FileExistsError(f"{shown}: exists already; {_OTHER}, or give each its own folder") from None
        finally:
            if self._mirror is not None:
                writer.path.unlink(missing_ok=True)
        self._in_doubt = False
        if self._mirror is None:
            self._own[writer.path.name] = manifest.content_id
        return manifest

    def _refuse_replaced(self) -> None:
        """Raise FileExistsError if another file has the name of the newest one of this process that is still there.

        Then another chain has taken the place of this one, and no update of this one could be used there. Mirror.send
        checks the same at a URL.
        """
        there = [path.name for path in self.folder.iterdir() if path.name in self._own]
        for name in sorted(there, key=lambda name: step_of(name) or (0, False))[-1:]:
            with contextlib.suppress(PxdError, FileNotFoundError), DeltaFile(self.folder / name) as file:
                if file.content_id != self._own[name]:
                    raise FileExistsError(
                        f"{self.folder / name}: was replaced by another process that publishes there; stop one of "
                        "them, and publish to a new folder"
                    )

    def has(self, name: str) -> bool:
        """Whether there is a file with this name. Raises OSError."""
        return (self.folder / name).exists() if self._mirror is None else self._mirror.exists(name)

    def is_in_doubt(self) -> bool:
        """Whether a file is there whose end failed. Raises OSError."""
        return self._in_doubt and self._last is not None and self.has(self._last.path.name)

    def check_own(self, head: UpdateFile | None, before: UpdateFile | None) -> None:
        """Raise FileExistsError unless the last file of the chain is `before`, or the one that was written last.

        Where `before` was pruned, the anchor of its number has its state.
        """
        last = None if self._last is None else self._last.content_id
        is_before = before is not None and head is not None and (head.step, head.result) == (before.step, before.result)
        if head is not None and not is_before and head.content_id != last:
            raise FileExistsError(f"{self.shown(head.path)}: is not of this process; {_OTHER}")
        self._in_doubt = False

    def prune(self, anchors: int) -> list[Path | str]:
        """Delete the files before the oldest of the newest `anchors` anchors, oldest first. Returns them."""
        names = [path.name for path in self.folder.iterdir()] if self._mirror is None else self._mirror.names()
        # An update leads to the anchor of its own number, which replaces it.
        places = sorted((place, name) for name in names if (place := step_of(name)) is not None)
        kept = [step for (step, is_anchor), _ in places if is_anchor][-anchors:]
        old = [name for place, name in places if kept and place < (kept[0], True)]
        for name in old:
            if self._mirror is None:
                (self.folder / name).unlink(missing_ok=True)
                self._own.pop(name, None)
            else:
                self._mirror.remove(name)
        return [self.shown(self.folder / name) for name in old]
