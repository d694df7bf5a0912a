"""SHA-256 of live tensors, computed in parallel and once for each tensor.

Host memory is hashed in place. Device memory goes through the ring's page-locked buffers, two pieces for each thread:
one is hashed while the next is copied.

A digest is cached until torch's version counter of the tensor changes. A write through `.data` does not change it, so
the writer has to call `forget_digests`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Final

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from peraxis_format.dtypes import digest_of, raw_bytes
from peraxis_format.ops.tensors import as_bytes, storage_array
from peraxis_format.thread_pool import thread_count
from peraxis_format.torch.device import Device
from peraxis_format.torch.ring import Ring

__all__ = ["digests", "forget_digests", "inherit"]

_REMEMBERED: Final[Any] = WeakTensorKeyDictionary()  # live tensor -> (data_ptr, version, hex digest)


def digests(views: Sequence[Tensor], *, device: Device, ring: Ring, workers: int | None = None) -> Generator[str]:
    """The hex digest of each tensor's bytes in row-major order. Close it where not all are taken: it has threads."""
    count = workers or thread_count()
    staging: SimpleQueue[tuple[Tensor, Tensor]] = SimpleQueue()
    if device.staged:
        for pair in ring.staging(count):
            staging.put(pair)
    begun = device.record()

    def one(view: Tensor) -> str:
        known = _known(view)
        if known is not None:
            return known
        if not device.staged or view.device != device.torch_device:
            digest = digest_of(storage_array(as_bytes(view)))
        else:
            pair = staging.get()
            try:
                digest = _staged(as_bytes(view), device, pair, begun)
            finally:
                staging.put(pair)
        _remember(view, digest)
        return digest

    with ThreadPoolExecutor(count) as pool:
        yield from pool.map(one, views)


def _staged(data: Tensor, device: Device, pair: tuple[Tensor, Tensor], begun: Any) -> str:
    """data: flat uint8 on the device."""
    step = pair[0].numel()
    hasher = hashlib.sha256()

    def start(begin: int) -> Any:
        piece = data[begin : begin + step]
        return device.download(pair[begin // step % 2][: len(piece)], piece, after=begun)

    arriving = start(0)
    for begin in range(0, len(data), step):
        arrived = arriving
        if begin + step < len(data):
            arriving = start(begin + step)
        device.host_waits(arrived)
        piece = pair[begin // step % 2][: min(step, len(data) - begin)]
        hasher.update(raw_bytes(storage_array(piece)))
    return hasher.hexdigest()


def _known(view: Tensor) -> str | None:
    found = None if view.is_inference() else _REMEMBERED.get(view)
    if found is None or found[:2] != (view.data_ptr(), view._version):
        return None
    digest: str = found[2]
    return digest


def _remember(view: Tensor, digest: str) -> None:
    if not view.is_inference():
        _REMEMBERED[view] = (view.data_ptr(), view._version, digest)


def inherit(copy: Tensor, original: Tensor) -> None:
    """Give a new copy the digest of its original, if it is known."""
    digest = _known(original)
    if digest is not None:
        _remember(copy, digest)


def forget_digests(views: Sequence[Tensor]) -> None:
    """Drop the cached digests of these tensors, so that they are hashed again when needed.

    Call it after a write that torch's version counters do not show, through `param.data` for example.
    """
    for view in views:
        _REMEMBERED.pop(view, None)
