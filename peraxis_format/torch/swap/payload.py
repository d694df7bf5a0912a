"""The payload of one variant for one model: read, checked, and kept at the place of its residency."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from peraxis_format.delta import Encoding
from peraxis_format.dtypes import Array, raw_bytes
from peraxis_format.errors import DeviceError, LiveModelError, fail, located
from peraxis_format.ops.tensors import storage_array
from peraxis_format.payload import check_pad, check_values
from peraxis_format.reader import DeltaFile
from peraxis_format.thread_pool import ThreadPool
from peraxis_format.torch.device import Device, current_device
from peraxis_format.torch.place.proof import proven
from peraxis_format.torch.place.sharded_exact import ExactPiece
from peraxis_format.torch.place.shards import ShardView
from peraxis_format.torch.ring import Ring
from peraxis_format.torch.swap.transfer_plan import ALIGN, ByteRange, ModuleSlice, Transfer, piece

__all__ = ["Payload", "Residency", "check_pads", "read_transfer"]

Residency = Literal["gpu", "pinned", "file"]
_READ: Final = 4 << 20  # bytes that one thread reads at a time

# --- reading and checking ------------------------------------------------------------------------------


def read_transfer(
    delta: DeltaFile, transfer: Transfer, target: Tensor, workers: ThreadPool, direct: int | None = None
) -> int:
    """Fill a host buffer with a transfer's bytes, several threads at a time. Returns their number.

    direct: a descriptor opened with O_DIRECT. Buffers begin at a page of the file, so a transfer of one range can be
    read in whole pages without the page cache; boxes, which are many short ranges, always use the page cache.
    """
    array = storage_array(target)
    if direct is not None and len(transfer.runs) == 1:
        run = transfer.runs[0]
        workers.run(_direct_jobs(direct, run.source - run.target, raw_bytes(array)))
    else:
        workers.run(_read_jobs(delta, transfer.runs, raw_bytes(array)))
    for slice_ in transfer.modules:
        _shift_masks(slice_, array)
    return sum(run.size for run in transfer.runs)


def _shift_masks(slice_: ModuleSlice, buffer: Array) -> None:
    """Shift the bits of masks whose box begins inside a byte, in place."""
    for f in slice_.fields:
        if f.shift:
            rows = math.prod(f.shape[:-1])
            read = buffer[f.offset : f.offset + rows * f.read_width].reshape(rows, f.read_width)
            width = slice_.shape[-1]
            bits = np.unpackbits(read, axis=-1, bitorder="little")[:, f.shift : f.shift + width]
            buffer[f.offset : f.offset + f.size] = np.packbits(bits, axis=-1, bitorder="little").reshape(-1)


def _direct_jobs(descriptor: int, origin: int, target: memoryview) -> Iterator[Callable[[], None]]:
    """target: page-aligned, a whole number of pages. origin: its offset in the file, a multiple of the page."""

    def job(begin: int) -> None:
        window = target[begin : begin + _READ]
        done = 0
        while done < len(window):
            count = os.preadv(descriptor, [window[done:]], origin + begin + done)
            done += count
            if count == 0 or count % ALIGN:
                return  # the end of the file is in this page; a shorter file fails its digests

    return (partial(job, begin) for begin in range(0, len(target), _READ))


def _read_jobs(delta: DeltaFile, runs: Sequence[ByteRange], target: memoryview) -> Iterator[Callable[[], None]]:
    """Split long ranges and join short ones, so that a job reads about _READ bytes."""

    def job(reads: list[tuple[int, int, int]]) -> Callable[[], None]:
        def read() -> None:
            for source, at, size in reads:
                delta.read_into(target[at : at + size], source)

        return read

    reads: list[tuple[int, int, int]] = []
    size = 0
    for run in runs:
        for begin in range(0, run.size, _READ):
            length = min(_READ, run.size - begin)
            reads.append((run.source + begin, run.target + begin, length))
            size += length
            if size >= _READ:
                yield job(reads)
                reads, size = [], 0
    if reads:
        yield job(reads)


def _check_transfer(delta: DeltaFile, transfer: Transfer, buffer: Tensor, workers: ThreadPool) -> None:
    """Steps 9 to 11 of SPEC 8 on a buffer's bytes, in parallel: for whole modules all, for boxes only the scales."""
    array = storage_array(buffer)

    def check(slice_: ModuleSlice) -> Callable[[], None]:
        def run() -> None:
            if slice_.is_whole:
                digest = hashlib.sha256(raw_bytes(array)[slice_.begin : slice_.end]).hexdigest()
                if digest != slice_.entry.sha256:
                    fail("E301", field=slice_.entry.name, offset=delta.span(slice_.entry.name)[0])  # SPEC 4.3
                check_gaps(slice_)
                check_values(piece(slice_, array))

        return run

    def check_gaps(slice_: ModuleSlice) -> None:
        # SPEC 4.5: between the parts of a module, and after the last one
        begins = [*(field.offset for field in slice_.fields[1:]), slice_.end]
        for field, begin in zip(slice_.fields, begins, strict=True):
            end = field.offset + field.size
            place = delta.span(slice_.entry.name)[0] + end - slice_.begin
            check_pad(array[end:begin].tobytes(), slice_.entry.name, place)

    with located(delta.path):
        workers.run(check(slice_) for slice_ in transfer.modules)


def _prove_transfer(
    delta: DeltaFile, transfer: Transfer, buffer: Tensor, base_of: Callable[[ShardView], Tensor], workers: ThreadPool
) -> None:
    """Check the results of a transfer's exact modules (SPEC 7.4), whose base has been checked.

    base_of: the base's weights of a shard. Raises BindingError (E405) with the tensor's name.
    """
    array = storage_array(buffer)

    def prove(slice_: ModuleSlice, shard: ShardView) -> Callable[[], None]:
        def run() -> None:
            base = base_of(shard)
            with torch.no_grad(), current_device(shard.view.device):
                for _ in proven(slice_.entry, base, piece(slice_, array)):
                    pass

        return run

    with located(delta.path):
        workers.run(
            prove(slice_, shard)
            for slice_ in transfer.modules
            if slice_.entry.encoding is Encoding.EXACT
            for shard in slice_.views
        )


def check_pads(delta: DeltaFile) -> None:
    """Check SPEC 4.5 for the pads between tensors, which are few and small."""
    for name, begin, end in delta.pads():
        data = bytearray(end - begin)
        delta.read_into(memoryview(data), begin)
        with located(delta.path):
            check_pad(bytes(data), name, begin)


# --- one variant's payload -----------------------------------------------------------------------------


@dataclass(slots=True)
class _Stamp:
    """The attributes that identify the checked file."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int  # changes even if a writer resets the time of modification

    @classmethod
    def of(cls, delta: DeltaFile) -> _Stamp:
        found = os.stat(delta.path)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class Payload:
    """One variant's bytes for one placement, under one residency. The bytes that are kept are checked here.

    For `file` nothing is kept: the file is checked once, and each use checks that it is still the same file.
    direct: read without the page cache, for files that are read once and would evict others from it.
    """

    def __init__(
        self,
        delta: DeltaFile,
        transfers: tuple[Transfer, ...],
        *,
        residency: Residency,
        device: Device,
        ring: Ring,
        workers: ThreadPool,
        base_of: Callable[[ShardView], Tensor],
        pieces: tuple[ExactPiece, ...] = (),
        direct: bool = False,
    ) -> None:
        """base_of: the base's weights of a shard, which have been checked. pieces: those of sharded exact modules."""
        self.delta = delta
        self.pieces = pieces
        self.direct = _open_direct(delta) if direct else None
        self.transfers = transfers
        self.residency = residency
        self.bytes_read = 0
        self.size = sum(transfer.size - transfer.begin for transfer in transfers)
        self._kept: list[Tensor] = []
        self._stamp = _Stamp.of(delta)
        self._base_of = base_of
        check_pads(delta)
        for transfer in transfers:
            self._keep(transfer, device, ring, workers)
        device.synchronize()

    def _keep(self, transfer: Transfer, device: Device, ring: Ring, workers: ThreadPool) -> None:
        pages = -(-transfer.size // ALIGN) * ALIGN
        whole = device.host_buffer(pages) if self.residency == "pinned" else ring.host[0][:pages]
        self.bytes_read += read_transfer(self.delta, transfer, whole, workers, self.direct)
        host = whole[: transfer.size]
        _check_transfer(self.delta, transfer, host, workers)
        _prove_transfer(self.delta, transfer, host, self._base_of, workers)
        if self.residency == "pinned":
            self._kept.append(host)
        elif self.residency == "gpu":
            buffer = device.buffer(transfer.size)
            names = tuple(slice_.entry.name for slice_ in transfer.modules)
            # After all launches, because the allocator may return memory that running kernels still use.
            device.host_waits(device.upload(buffer, host, after=device.record(), modules=names))
            self._kept.append(buffer)

    def host(self, index: int) -> Tensor:
        """The bytes of transfer `index` in host memory (`pinned`)."""
        return self._kept[index]

    def buffer(self, index: int) -> Tensor:
        """The bytes of transfer `index` in device memory (`gpu`)."""
        return self._kept[index]

    def close(self) -> None:
        """Close the descriptor of direct reads, and free the bytes."""
        self._kept.clear()
        if self.direct is not None:
            os.close(self.direct)
            self.direct = None

    def check_same_file(self) -> None:
        """Raise LiveModelError if the file is no longer the one that was checked."""
        try:
            same = _Stamp.of(self.delta) == self._stamp
        except OSError:
            same = False
        if not same:
            raise LiveModelError(
                f"{self.delta.path}: changed or removed since it was registered; remove the variant and add it again"
            )


def _open_direct(delta: DeltaFile) -> int:
    if not hasattr(os, "O_DIRECT"):
        raise DeviceError("this system has no O_DIRECT; register the variant without `direct`")
    try:
        return os.open(delta.path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        raise DeviceError(
            f"{delta.path}: its file system refuses O_DIRECT ({error.strerror}); register it without `direct`"
        ) from None
