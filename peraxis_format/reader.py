"""DeltaFile: a PXD file that is opened by its header alone; its data is mapped and read on demand.

open      steps 1 to 8 of SPEC 8; cost: the header
[name]    zero-copy views of the mapped file, unchecked
load      a copy of the module's bytes, read once and checked by steps 9 to 11
chunks    a module's bytes in order, checked by steps 9 to 11 at the end; `check` only checks
verify    steps 9 to 11 for the whole file, on several threads
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from peraxis_format.arguments import check_least, check_path
from peraxis_format.binding import name_base
from peraxis_format.container import TensorRecord, parts_of
from peraxis_format.delta import ModuleDelta
from peraxis_format.errors import PxdError, fail, located
from peraxis_format.header import read_header
from peraxis_format.manifest import Manifest, ModuleEntry
from peraxis_format.opening import open_regular
from peraxis_format.payload import build_module, check_pad, check_stored_values, check_values
from peraxis_format.thread_pool import run_jobs

__all__ = ["DeltaFile", "open"]

_CHUNK: Final = 1 << 19  # hashed while still in the second-level cache


class DeltaFile:
    """One open PXD file. A context manager, and a read-only mapping of module names to ModuleDelta.

    manifest, content_id, size: from the checked header. Arrays stay valid after `close`; reading then is a ValueError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_path("path", path)
        self.path = Path(path)
        self._closed = False
        with located(self.path):
            self._file = open_regular(self.path)
        try:
            self.size = os.fstat(self._file).st_size
            with located(self.path):
                self._header, self.manifest = read_header(self.read, self.size)
                self._map = self._mapped()
        except BaseException:
            os.close(self._file)
            raise
        self._entries = {module.name: module for module in self.manifest.modules}
        self._records = _records_by_module(self._header.records, self.manifest)
        stored = (record for record in self._header.records if record.name.startswith("__asset__."))
        self._assets = {asset.path: (i, next(stored)) for i, asset in enumerate(self.manifest.assets)}

    def __repr__(self) -> str:
        tuned, base = self.manifest.fine_tuned.id, self.manifest.base.id
        state = ", closed" if self._closed else ""
        return (
            f"<DeltaFile {str(self.path)!r}: {tuned!r} on {base!r}, {len(self)} module{'' if len(self) == 1 else 's'}, "
            f"{self.size} bytes, {self.content_id[:19]}…{state}>"
        )

    def _mapped(self) -> mmap.mmap:
        try:
            return mmap.mmap(self._file, self.size, access=mmap.ACCESS_READ)
        except ValueError:
            end = os.fstat(self._file).st_size
            fail("E124", "the file has become shorter since it was opened", offset=end)

    # --- content -------------------------------------------------------------------------------------

    @property
    def content_id(self) -> str:
        """The digest of the manifest's bytes (SPEC 3.2)."""
        return "sha256:" + hashlib.sha256(self._header.manifest).hexdigest()

    @property
    def header_size(self) -> int:
        """The file offset of the data."""
        return self._header.size

    @property
    def data_size(self) -> int:
        """The bytes after the header."""
        return self.size - self._header.size

    @property
    def records(self) -> tuple[TensorRecord, ...]:
        """Every tensor of the file in file order, with pads and assets."""
        return self._header.records

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def entry(self, name: str) -> ModuleEntry:
        """The manifest's entry of a module. Raises KeyError."""
        return self._entries[name]

    def tensors(self, name: str) -> tuple[TensorRecord, ...]:
        """The records of a module's parts: masks, scales, tail or the exact tensor, in file order (SPEC 4.1)."""
        record = self._records[name]
        return () if record is None else tuple(parts_of(self._entries[name], record.begin))

    def span(self, name: str) -> tuple[int, int]:
        """File offsets [begin, end) of a module's tensor; (0, 0) if it has none."""
        record = self._records[name]
        if record is None:
            return 0, 0
        return self._header.size + record.begin, self._header.size + record.end

    def payload_bytes(self, name: str) -> int:
        """The bytes of a module's tensor in the file; 0 if it has none. Raises KeyError."""
        begin, end = self.span(name)
        return end - begin

    def __getitem__(self, name: str) -> ModuleDelta:
        """A module as zero-copy views of the mapped file; its payload is not checked. Raises KeyError."""
        self._refuse_closed()
        begin, end = self.span(name)
        data = memoryview(self._map)[begin:end]
        return build_module(self._entries[name], self.tensors(name), data, begin - self._header.size)

    def load(self, name: str) -> ModuleDelta:
        """Read a module once, check its bytes by steps 9 to 11, and return it with its own memory.

        Raises PayloadError; KeyError for a name that is not a module.
        """
        entry, parts = self._entries[name], self.tensors(name)
        begin, end = self.span(name)
        data = memoryview(self.read(begin, end - begin))
        with located(self.path):
            if entry.sha256 is not None and hashlib.sha256(data).hexdigest() != entry.sha256:
                fail("E301", field=name, offset=begin)  # SPEC 4.3
            for gap, until in self._gaps(name):
                check_pad(bytes(data[gap - begin : until - begin]), name, gap)  # SPEC 4.5
            module = build_module(entry, parts, data, begin - self._header.size)
            check_values(module)
        return module

    def asset(self, path: str) -> bytes:
        """The checked bytes of an asset. Raises PayloadError (E302), KeyError."""
        index, record = self._assets[path]
        begin = self._header.size + record.begin
        data = self.read(begin, record.end - record.begin)
        if hashlib.sha256(data).hexdigest() != self.manifest.assets[index].sha256:
            with located(self.path):
                fail("E302", field=f"assets[{index}]", offset=begin)  # SPEC 4.4
        return data

    # --- checks --------------------------------------------------------------------------------------

    def verify(self, *, workers: int | None = None, progress: Callable[[int], None] | None = None) -> None:
        """Steps 9 to 11 of SPEC 8: digests, unused bits and pads, scales and exact blocks.

        workers: the number of threads (default: one per processor). progress: called with each number of bytes done,
        from any thread. Raises the first PayloadError in file order, for any number of threads.
        """
        step = progress or (lambda _: None)
        modules = [name for name in self if self._records[name] is not None]
        lock, first = threading.Lock(), len(modules)
        failure: PxdError | None = None

        def job(place: int) -> None:
            nonlocal first, failure
            # The first error in file order counts, so modules after a known error are skipped.
            if first < place:
                return
            try:
                self.check(modules[place], progress=step)
            except PxdError as error:
                with lock:
                    if place < first:
                        first, failure = place, error

        # The largest module starts first, so that it is not the last to finish.
        order = sorted(range(len(modules)), key=lambda place: -self.payload_bytes(modules[place]))
        run_jobs([partial(job, place) for place in order], threads=workers)
        if failure is not None:
            raise failure
        with located(self.path):
            for asset in self.manifest.assets:
                step(len(self.asset(asset.path)))
            for name, begin, end in self.pads():
                check_pad(self.read(begin, end - begin), name, begin)

    def check(self, name: str, *, progress: Callable[[int], None] | None = None) -> None:
        """Steps 9 to 11 for one module, chunk by chunk: the checks of `load`, without keeping the bytes.

        Raises PayloadError; KeyError for a name that is not a module.
        """
        for chunk in self.chunks(name):
            if progress is not None:
                progress(len(chunk))

    def chunks(self, name: str, *, size: int = _CHUNK) -> Iterator[memoryview]:
        """Yield the bytes of a module's range in order, `size` at a time; steps 9 to 11 follow the last one.

        Chunks share a buffer (new memory would cost more than the read), so each is valid until the next one. Results
        from chunks are valid only after the iteration has ended. Raises PayloadError, KeyError, ArgumentError.
        """
        check_least("size", size, 1)
        begin, end = self.span(name)
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(size, end - begin)))
        for offset in range(begin, end, size):
            chunk = buffer[: end - offset]
            self.read_into(chunk, offset)
            digest.update(chunk)
            yield chunk
        with located(self.path):
            if end > begin and digest.hexdigest() != self._entries[name].sha256:
                fail("E301", field=name, offset=begin)  # SPEC 4.3
            for gap, until in self._gaps(name):
                check_pad(self.read(gap, until - gap), name, gap)  # SPEC 4.5
            check_stored_values(self._entries[name], self.tensors(name), self._read_data)

    def read_into(self, target: memoryview, offset: int) -> None:
        """Read bytes of the file, from `offset` on, into all of a writable buffer; their content is not checked.

        Raises ContainerError (E124) if the file has become shorter.
        """
        self._refuse_closed()
        done = 0
        while done < len(target):
            count = os.preadv(self._file, [target[done:]], offset + done)
            if count == 0:
                with located(self.path):
                    fail("E124", "the file has become shorter since it was opened", offset=offset + done)
            done += count

    def pads(self) -> Iterator[tuple[str, int, int]]:
        """Name and file offsets [begin, end) of each pad (SPEC 4.2)."""
        for record in self._header.records:
            if record.name.startswith("__pad__."):
                yield record.name, self._header.size + record.begin, self._header.size + record.end

    def _gaps(self, name: str) -> Iterator[tuple[int, int]]:
        """File offsets of the bytes between a module's parts and after the last one (SPEC 4.2)."""
        parts = self.tensors(name)
        ends = [self._header.size + part.end for part in parts]
        begins = [*(self._header.size + part.begin for part in parts[1:]), self.span(name)[1]]
        yield from ((end, begin) for end, begin in zip(ends, begins, strict=bool(parts)) if begin > end)

    # --- reading -------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        """Unchecked bytes of the file, fewer at its end. It may be called from any thread."""
        self._refuse_closed()
        parts = []
        while size > 0:
            part = os.pread(self._file, size, offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_data(self, begin: int, end: int) -> memoryview:
        data = memoryview(bytearray(end - begin))
        self.read_into(data, self._header.size + begin)
        return data

    def _refuse_closed(self) -> None:
        if self._closed:  # its descriptor may be that of another file by now
            raise ValueError(f"{self.path}: is closed; open it again to read from it")

    def close(self) -> None:
        """Close the file. Its arrays stay valid, because they keep the map alive."""
        if not self._closed:
            self._closed = True
            os.close(self._file)
            # A map with live views cannot be closed; it is freed with the last view.
            with contextlib.suppress(BufferError):
                self._map.close()

    def __enter__(self) -> DeltaFile:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: object) -> None:
        name_base(error, self.manifest, self.path)
        self.close()


def _records_by_module(records: Sequence[TensorRecord], manifest: Manifest) -> dict[str, TensorRecord | None]:
    stored = (record for record in records if not record.name.startswith(("__pad__.", "__asset__.")))
    return {m.name: None if m.sha256 is None else next(stored) for m in manifest.modules}


def open(path: str | os.PathLike[str]) -> DeltaFile:
    """Open a PXD file by its header (steps 1 to 8 of SPEC 8).

    Raises ContainerError, ProfileError, UnsupportedError; OSError if the file cannot be read.
    """
    return DeltaFile(path)
