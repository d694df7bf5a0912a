"""Rebuild weights in live storage from a transfer's buffer on the device: numba or numpy on the host, Triton on CUDA.

An engine has a fixed set of transfers and the pristine base of each live storage. `write` may be called any number of
times, with any buffer of the right content. Bases and live storages must not be reallocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from peraxis_format.delta import Encoding, ModuleDelta
from peraxis_format.dtypes import Array
from peraxis_format.ops.backend import choose
from peraxis_format.ops.exact.torch import decode_into
from peraxis_format.ops.rebuild import reconstruct
from peraxis_format.ops.tensors import storage_array, tensor_view
from peraxis_format.thread_pool import ThreadPool
from peraxis_format.torch.device import Device, require_triton
from peraxis_format.torch.place.shards import ShardView
from peraxis_format.torch.swap.exact import exact_jobs
from peraxis_format.torch.swap.transfer_plan import ModuleSlice, Transfer, piece

__all__ = ["TritonEngine", "Engine", "HostEngine", "engine_for"]

_RANGES: Final = 4  # ranges of jobs for each thread, so that no thread has one long job at the end

if TYPE_CHECKING:
    from peraxis_format.ops.rebuild.triton import Launch, StoredModule


class Engine(Protocol):
    """Writes the modules of a transfer into live storage. bases: the pristine base of each."""

    bases: Mapping[ShardView, Tensor]

    def write(self, transfer: Transfer, buffer: Tensor) -> None:
        """buffer: the transfer's bytes on the device. On return the work is launched; on the host it is done."""


class HostEngine:
    """CPU storages. backend: numpy or numba."""

    def __init__(self, bases: Mapping[ShardView, Tensor], *, workers: ThreadPool, backend: str) -> None:
        self.bases = bases
        self._backend = backend
        self._workers = workers
        self._prepared: dict[Transfer, tuple[int, list[Callable[[], None]]]] = {}

    def prepare(self, transfer: Transfer, buffer: Tensor) -> None:
        """Prepare the jobs of `write` for a buffer that does not change, so that a swap only runs them."""
        jobs = list(self._jobs(transfer, storage_array(buffer)))
        self._prepared[transfer] = buffer.data_ptr(), jobs

    def write(self, transfer: Transfer, buffer: Tensor) -> None:
        place, jobs = self._prepared.get(transfer, (0, []))
        if place == buffer.data_ptr():
            self._workers.run(_in_turn(some) for some in _ranges(jobs, _RANGES * self._workers.count))
        else:
            self._workers.run(self._jobs(transfer, storage_array(buffer)))
        _publish(transfer)

    def _jobs(self, transfer: Transfer, buffer: Array) -> Iterator[Callable[[], None]]:
        for slice_ in transfer.modules:
            module = piece(slice_, buffer)
            for shard in slice_.views:
                yield from self._storage_jobs(module, self.bases[shard], shard.view)

    def _storage_jobs(self, module: ModuleDelta, base: Tensor, live: Tensor) -> Iterator[Callable[[], None]]:
        out = storage_array(live)
        if module.full is not None:
            full = module.full
            yield lambda: np.copyto(out, full)  # SPEC 6.4
        elif module.index is not None:
            yield from exact_jobs(module, storage_array(base), out)
        elif self._backend == "numba" and live.is_contiguous():
            from peraxis_format.ops.rebuild.numba import rebuild_jobs

            kind = module.dtype
            yield from rebuild_jobs(module.factors(), storage_array(base), out, base_dtype=kind, dtype=kind)
        else:
            source = storage_array(base)
            yield lambda: np.copyto(out, reconstruct(module, source, backend=self._backend))


class TritonEngine:
    """CUDA storages, in Triton's interpreter also CPU ones. One launch for each transfer and kind (dtype, alignment).

    The kernels' tables are made once, here; `write` only launches. A live storage that is not contiguous (a transposed
    layout) is rebuilt in a buffer, then copied; all such storages share the buffer.
    """

    def __init__(
        self, transfers: Sequence[Transfer], bases: Mapping[ShardView, Tensor], *, device: torch.device
    ) -> None:
        self.bases = bases
        self._launches = {transfer: _launches(transfer, bases, device) for transfer in transfers}
        self._copies = {transfer: list(_copies(transfer)) for transfer in transfers}
        strided = {transfer: list(_signs(transfer, contiguous=False)) for transfer in transfers}
        sizes = [shard.view.nbytes for items in strided.values() for _, shard in items]
        buffer = torch.empty(max(sizes, default=0), dtype=torch.uint8, device=device)
        self._strided = {
            transfer: [_beside(slice_, bases[shard], shard.view, buffer) for slice_, shard in items]
            for transfer, items in strided.items()
        }

    def write(self, transfer: Transfer, buffer: Tensor) -> None:
        for launch in self._launches[transfer]:
            launch.run(buffer)
        for slice_, offset, view in self._copies[transfer]:
            view.copy_(tensor_view(buffer, offset, slice_.entry.dtype, slice_.shape), non_blocking=True)
        for slice_, shard in _exact(transfer):
            index, data = (buffer[field.offset : field.offset + field.size] for field in slice_.fields[:2])
            decode_into(shard.view, self.bases[shard], index.view(torch.int32), data, slice_.entry.dtype)
        for beside, out, view in self._strided[transfer]:
            for launch in beside:
                launch.run(buffer)
            view.copy_(out)
        _publish(transfer)


def engine_for(
    transfers: Sequence[Transfer],
    bases: Mapping[ShardView, Tensor],
    *,
    device: Device,
    workers: ThreadPool,
) -> Engine:
    """The engine of a device, on the backend that ops/backend.py chooses. Raises BackendError."""
    kind = device.torch_device.type
    if kind != "cpu":
        require_triton()
    weights = sum(math.prod(slice_.shape) for transfer in transfers for slice_ in transfer.modules)
    chosen = choose("rebuild_transfer", weights, kind)
    if chosen == "triton":
        return TritonEngine(transfers, bases, device=device.torch_device)
    if chosen == "numba":
        _compile(transfers)
    return HostEngine(bases, workers=workers, backend=chosen)


def _compile(transfers: Sequence[Transfer]) -> None:
    """Compile the kernels of `write`, so that the first swap does not."""
    from peraxis_format.ops.rebuild.numba import compile_for

    entries = [slice_.entry for transfer in transfers for slice_ in transfer.modules]
    for dtype, components in {(entry.dtype, len(entry.components)) for entry in entries if entry.components}:
        compile_for(dtype, dtype, components)


def _ranges(jobs: Sequence[Callable[[], None]], count: int) -> Iterator[Sequence[Callable[[], None]]]:
    """At most `count` ranges of about equal length, because passing a job to a thread costs as much as a small job."""
    step = -(-len(jobs) // count) or 1
    for begin in range(0, len(jobs), step):
        yield jobs[begin : begin + step]


def _in_turn(jobs: Sequence[Callable[[], None]]) -> Callable[[], None]:
    def run() -> None:
        for job in jobs:
            job()

    return run


def _publish(transfer: Transfer) -> None:
    for slice_ in transfer.modules:
        for shard in slice_.views:
            shard.publish()


def _copies(transfer: Transfer) -> Iterator[tuple[ModuleSlice, int, Tensor]]:
    for slice_ in transfer.modules:
        if slice_.entry.encoding is Encoding.FULL:
            for shard in slice_.views:
                yield slice_, slice_.fields[0].offset, shard.view


def _signs(transfer: Transfer, *, contiguous: bool) -> Iterator[tuple[ModuleSlice, ShardView]]:
    """The `sign` modules of a transfer with their storages that are contiguous, or those that are not."""
    for slice_ in transfer.modules:
        if slice_.entry.encoding is Encoding.SIGN:
            yield from ((slice_, shard) for shard in slice_.views if shard.view.is_contiguous() is contiguous)


def _exact(transfer: Transfer) -> Iterator[tuple[ModuleSlice, ShardView]]:
    for slice_ in transfer.modules:
        if slice_.entry.encoding is Encoding.EXACT:
            yield from ((slice_, shard) for shard in slice_.views)


def _stored(slice_: ModuleSlice, base: Tensor, out: Tensor) -> StoredModule:
    from peraxis_format.ops.rebuild.triton import StoredModule

    offsets = {field.suffix: field.offset for field in slice_.fields}
    return StoredModule(
        components=slice_.entry.components, offsets=offsets, base=base, out=out, dtype=slice_.entry.dtype
    )


def _launches(transfer: Transfer, bases: Mapping[ShardView, Tensor], device: torch.device) -> list[Launch]:
    from peraxis_format.ops.rebuild.triton import launches

    items = _signs(transfer, contiguous=True)
    return list(launches([_stored(slice_, bases[shard], shard.view) for slice_, shard in items], device))


def _beside(slice_: ModuleSlice, base: Tensor, view: Tensor, buffer: Tensor) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches that rebuild one module in a buffer, its place there, and the live view to copy it to."""
    from peraxis_format.ops.rebuild.triton import launches

    out = tensor_view(buffer, 0, slice_.entry.dtype, slice_.shape)
    return list(launches([_stored(slice_, base, out)], base.device)), out, view
