"""DeltaWriter: writes modules to one PXD file, deterministically and atomically (SPEC 11).

The header contains the digests of the data after it, so the data is spooled first. Offsets count from the end of the
header, so the spool is copied unchanged after it. The spool has no name, so a killed run leaves no file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from peraxis_format.container import file_size, header_bytes, layout
from peraxis_format.delta import Encoding, ModuleDelta
from peraxis_format.dtypes import raw_bytes
from peraxis_format.errors import ProfileError, PxdError, ShapeError
from peraxis_format.files import atomic_file, is_stream
from peraxis_format.manifest import (
    EXACT_FEATURE,
    Asset,
    BaseIdentity,
    Calibration,
    ComponentEntry,
    Identity,
    Manifest,
    ModuleEntry,
    Producer,
    base_digest,
    result_digest,
)
from peraxis_format.payload import check_values
from peraxis_format.profile import check_manifest
from peraxis_format.schema import parse_manifest
from peraxis_format.sizes import aligned
from peraxis_format.version import __version__

__all__ = ["DeltaWriter"]

_COPY_CHUNK: Final = 1 << 22


class DeltaWriter:
    """Writes one PXD file. A context manager; without `finish` no file appears under `path`.

    Modules are written in the order of `add`, which must be the execution order (SPEC 3.7). Equal calls give equal
    bytes. size: the size of the file in bytes, after `finish`. content_id: that of the file, from the moment that
    `finish` begins to write it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        base: Identity,
        fine_tuned: Identity,
        producer: Producer | None = None,
        calibration: Calibration | None = None,
        metadata: Mapping[str, str] | None = None,
        previous: str | None = None,
        chained: bool = False,
        overwrite: bool = True,
    ) -> None:
        """chained: whether the file has a `result` (SPEC 3.14); with an exact module it always has.

        previous: content ID of the update before it. overwrite: whether `finish` may replace a file at `path`; a
        device or pipe is written into.
        """
        self.path = Path(path)
        self.size = 0
        self.content_id: str | None = None
        self._overwrite = overwrite
        self._base = base
        self._fine_tuned = fine_tuned
        self._producer = producer or Producer(name="peraxis", version=__version__)
        self._calibration = calibration
        self._previous = previous
        self._chained = chained or previous is not None
        self.metadata: dict[str, str] = dict(metadata or {})
        self._modules: list[ModuleEntry] = []
        self._tied: list[tuple[str, str]] = []
        self._dropped: list[str] = []
        self._assets: list[tuple[Asset, int]] = []
        # The spool is beside the file, so that both are on one disk, except if the file is a device.
        spool_folder = None if is_stream(self.path) else self.path.parent
        try:
            self._spool = tempfile.TemporaryFile(dir=spool_folder)  # noqa: SIM115  closed in __exit__
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._end = 0

    def add(self, module: ModuleDelta) -> ModuleEntry:
        """Append a module. Raises ShapeError if a reader would refuse its payload (SPEC 11.2)."""
        try:
            check_values(module)
        except PxdError as error:
            raise ShapeError(str(error)) from None
        digest = hashlib.sha256()
        parts = [array for _, array in module.tensors()]
        if parts:
            self._align()
        for array in parts:
            data = raw_bytes(array)
            digest.update(data)
            self._write(data)
            if module.encoding is not Encoding.FULL:
                digest.update(self._align())  # SPEC 4.2: the parts of a `.delta` tensor are aligned, and so is its end
        entry = ModuleEntry(
            name=module.name,
            shape=module.shape,
            dtype=module.dtype,
            encoding=module.encoding,
            components=tuple(ComponentEntry(axis=c.axis, exponent=c.exponent) for c in module.components),
            sha256=digest.hexdigest() if parts else None,
            base=module.base,
            size=None if module.data is None else module.data.size,
            result=module.result,
        )
        self._chained = self._chained or module.data is not None
        self._modules.append(entry)
        return entry

    def tie(self, name: str, alias: str) -> None:
        """Record that `alias` is the same tensor as the module `name` (SPEC 3.7)."""
        self._tied.append((name, alias))

    def drop(self, name: str) -> None:
        """Record that the base's tensor `name` is not in the fine-tuned checkpoint (SPEC 3.7)."""
        self._dropped.append(name)

    def add_asset(self, path: str, data: bytes) -> None:
        """Append a small file of the checkpoint's folder. Raises ShapeError for an empty one."""
        if not data:
            raise ShapeError(f"{path}: an asset cannot be empty")
        self._align()
        self._write(data)
        self._assets.append((Asset(path=path, sha256=hashlib.sha256(data).hexdigest()), len(data)))

    def add_rest(
        self, *, tied: Iterable[tuple[str, str]], dropped: Iterable[str], assets: Iterable[tuple[str, bytes]]
    ) -> None:
        """Record what a checkpoint has beside its modules: `tie`, `drop` and `add_asset` for each.

        tied: (name, alias). assets: (path, bytes); their order is that of the file.
        """
        for name, alias in tied:
            self.tie(name, alias)
        for name in dropped:
            self.drop(name)
        for path, data in assets:
            self.add_asset(path, data)

    @property
    def base_digest(self) -> str:
        """The digest over all base tensors so far (SPEC 3.11)."""
        return base_digest(self._modules)

    @property
    def result(self) -> str | None:
        """The digest over all new tensors so far (SPEC 3.14); None if one of them is unknown."""
        return result_digest(self._modules)

    def file_size(self) -> int:
        """The bytes of the file if it were finished now."""
        return file_size(self._manifest(), [size for _, size in self._assets])

    def finish(self) -> Manifest:
        """Write header and data to `path` atomically. Returns the manifest.

        Raises ProfileError if the content violates SPEC 3 (a name twice, an asset's path), OSError with the path if it
        cannot be written, FileExistsError if it exists by now and overwrite is false.
        """
        # SPEC 11.2: checked as a reader would, because a caller's metadata can contain anything.
        try:
            manifest, text = self._written()
            check_manifest(parse_manifest(text))
        except PxdError as error:
            error.advice = "correct what the writer was given"  # no file exists that could be fetched again
            raise
        header = header_bytes(text, layout(manifest.modules, [size for _, size in self._assets]))
        self.content_id = manifest.content_id
        with atomic_file(self.path, overwrite=self._overwrite) as file:
            file.write(header)
            self._spool.flush()
            self._spool.seek(0)
            shutil.copyfileobj(self._spool, file, _COPY_CHUNK)
        self.size = len(header) + self._end
        return manifest

    def _written(self) -> tuple[Manifest, bytes]:
        """The manifest and its bytes. Raises ProfileError for a text that is not Unicode."""
        try:
            manifest = self._manifest()
            return manifest, manifest.to_bytes()
        except UnicodeEncodeError as error:  # like a name in bytes that are not UTF-8, from the command line
            beside = error.object[max(0, error.start - 20) : error.end + 20]
            raise ProfileError("E202", f"a text is not Unicode, at {beside!a}") from None

    def _manifest(self) -> Manifest:
        return Manifest(
            base=BaseIdentity(digest=base_digest(self._modules), id=self._base.id, revision=self._base.revision),
            fine_tuned=self._fine_tuned,
            producer=self._producer,
            modules=tuple(self._modules),
            calibration=self._calibration,
            tied=tuple(sorted(self._tied, key=lambda pair: pair[1])),
            dropped=tuple(sorted(self._dropped)),
            assets=tuple(asset for asset, _ in self._assets),
            metadata=self.metadata,
            features=(EXACT_FEATURE,) if self._chained else (),
            previous=self._previous,
            result=result_digest(self._modules) if self._chained else None,
        )

    def _align(self) -> bytes:
        pad = bytes(aligned(self._end) - self._end)
        self._write(pad)
        return pad

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._spool.write(data)
        except OSError as error:
            reason = f"{error.strerror} after {self._end} bytes"
            raise OSError(error.errno, reason, str(self.path)) from None
        self._end += len(data)

    def __enter__(self) -> DeltaWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._spool.close()  # flushes the failed bytes again
