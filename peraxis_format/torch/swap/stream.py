"""File -> ring of host buffers -> one upload per transfer -> engine; reads, copies and kernels overlap.

    residency   payload is in                a swap does
    gpu         device memory                kernels
    pinned      page-locked host memory      uploads | kernels
    file        the page cache or the disk   reads by several threads | uploads | kernels

The ring has DEPTH slots; slot i of the host and slot i of the device belong together. Transfer t uses slot t mod DEPTH:

    read t     when upload t - DEPTH has ended          (host slot free)
    upload t   when kernels of t - DEPTH have ended     (device slot free)
    kernels t  when upload t has ended

All buffers are made once and shared by all variants. A module is in one transfer, so it is uploaded once.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import Any

from peraxis_format.thread_pool import ThreadPool
from peraxis_format.torch.device import Device
from peraxis_format.torch.ring import DEPTH, Ring
from peraxis_format.torch.swap.engine import Engine
from peraxis_format.torch.swap.payload import Payload, read_transfer
from peraxis_format.torch.swap.transfer_plan import ALIGN

__all__ = ["stream"]


def stream(payload: Payload, engine: Engine, *, device: Device, ring: Ring, workers: ThreadPool) -> None:
    """Upload every transfer of a payload and write it. Returns when the weights are written."""
    for piece in payload.pieces:
        piece.write(engine.bases[piece.shard])
    if payload.residency == "gpu":
        for index, transfer in enumerate(payload.transfers):
            engine.write(transfer, payload.buffer(index))
        device.synchronize()
        return
    if payload.residency == "file":
        payload.check_same_file()
    try:
        _pipeline(payload, engine, device=device, ring=ring, workers=workers)
    finally:
        device.synchronize()
    if payload.residency == "file":
        payload.check_same_file()


def _pipeline(payload: Payload, engine: Engine, *, device: Device, ring: Ring, workers: ThreadPool) -> None:
    transfers = payload.transfers
    uploaded: list[Any] = [None] * len(transfers)
    written: list[Any] = [None] * len(transfers)
    reading: dict[int, Future[int]] = {}
    begun = device.record()
    # Two, so that the workers can read the next transfer while the last parts of one are still in flight.
    reader = ThreadPool(DEPTH // 2) if payload.residency == "file" else None

    def read(index: int) -> int:
        slot = ring.host[index % DEPTH][: -(-transfers[index].size // ALIGN) * ALIGN]
        return read_transfer(payload.delta, transfers[index], slot, workers, payload.direct)

    try:
        for t, transfer in enumerate(transfers):
            # Half of the ring is read ahead while the other half is uploaded.
            for ahead in range(t, min(t + DEPTH // 2, len(transfers))):
                if reader is not None and ahead not in reading:
                    if ahead >= DEPTH:
                        device.host_waits(uploaded[ahead - DEPTH])
                    reading[ahead] = reader.submit(partial(read, ahead))
            if reader is not None:
                payload.bytes_read += reading[t].result()
                host = ring.host[t % DEPTH][: transfer.size]
            else:
                host = payload.host(t)
            target = ring.slots[t % DEPTH]
            if payload.residency == "pinned" and not device.staged:
                target = host  # the engine reads the payload directly, so the upload copies nothing
            names = tuple(slice_.entry.name for slice_ in transfer.modules)
            free = written[t - DEPTH] if t >= DEPTH else begun
            source = host[transfer.begin :]
            uploaded[t] = device.upload(
                source if target is host else target[transfer.begin : transfer.size], source, after=free, modules=names
            )
            device.compute_waits(uploaded[t])
            engine.write(transfer, target[: transfer.size])
            written[t] = device.record()
    finally:
        if reader is not None:
            reader.close()
