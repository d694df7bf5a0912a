"""The device interface of the stream, and its two implementations: CUDA and the host.

The stream (stream.py) uses only `Device`. On the host a "device buffer" is ordinary memory, an upload is a copy, and
events are None, so that every test covers order, buffers and counters. Code for CUDA is only in this file and in
rebuild/triton.py.
"""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from peraxis_format.errors import DeviceError
from peraxis_format.torch.modes import writes
from peraxis_format.torch.place.shards import Placement

__all__ = ["CudaDevice", "Device", "HostDevice", "UploadCounters", "current_device", "device_of", "require_triton"]


@dataclass(slots=True)
class UploadCounters:
    """The copies from host to device since the last reset, and their bytes."""

    uploads: int = 0
    uploaded_bytes: int = 0
    modules: dict[str, int] = field(default_factory=dict)

    def reset(self) -> None:
        """Set all counters to zero."""
        self.uploads, self.uploaded_bytes = 0, 0
        self.modules.clear()


class Device(Protocol):
    """Buffers, asynchronous copies, and their order with compute."""

    counters: UploadCounters
    torch_device: torch.device
    staged: bool
    """Whether the host has to copy device memory to read it."""

    def host_buffer(self, size: int) -> Tensor:
        """Flat uint8 host memory that begins at a multiple of 4096; page-locked if the device copies from it."""

    def buffer(self, size: int) -> Tensor:
        """Flat uint8 device memory."""

    def upload(self, target: Tensor, source: Tensor, *, after: Any, modules: tuple[str, ...]) -> Any:
        """Copy host to device after the event `after`; returns the event of its end. It is counted, also by module."""

    def download(self, target: Tensor, source: Tensor, *, after: Any) -> Any:
        """Copy device to host after the event `after`; returns the event of its end. Any thread may call it."""

    def compute_waits(self, event: Any) -> None:
        """Make all later launches wait for the event."""

    def record(self) -> Any:
        """The event of the end of all launches so far."""

    def host_waits(self, event: Any) -> None:
        """Block this thread until the event."""

    def synchronize(self) -> None:
        """Block this thread until everything launched from here has run."""

    def wait_all(self) -> None:
        """Block this thread until the device is idle, including forwards that other threads launched."""

    def free_memory(self) -> float:
        """The bytes that can still be allocated; infinite if its memory is the host's."""


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one inside the block, because threads have another; nothing for the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _count(counters: UploadCounters, source: Tensor, modules: tuple[str, ...]) -> None:
    counters.uploads += 1
    counters.uploaded_bytes += source.numel()
    for name in modules:
        counters.modules[name] = counters.modules.get(name, 0) + 1


def _aligned(size: int, *, pinned: bool = False) -> Tensor:
    """Flat uint8 host memory at a multiple of 4096."""
    raw = torch.empty(size + 4096, dtype=torch.uint8, pin_memory=pinned)
    lead = -raw.data_ptr() % 4096
    return raw[lead : lead + size]


class HostDevice:
    """The host as its own device."""

    def __init__(self) -> None:
        self.counters = UploadCounters()
        self.torch_device = torch.device("cpu")
        self.staged = False

    def host_buffer(self, size: int) -> Tensor:
        return _aligned(size)

    def buffer(self, size: int) -> Tensor:
        return _aligned(size)

    def upload(self, target: Tensor, source: Tensor, *, after: Any, modules: tuple[str, ...]) -> Any:
        target.copy_(source)
        _count(self.counters, source, modules)

    def download(self, target: Tensor, source: Tensor, *, after: Any) -> Any:
        target.copy_(source)

    def compute_waits(self, event: Any) -> None:
        pass

    def record(self) -> Any:
        return None

    def host_waits(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait_all(self) -> None:
        pass

    def free_memory(self) -> float:
        return math.inf


def _copied(stream: Any, target: Tensor, source: Tensor, after: Any) -> Any:
    """Copy on a stream after the event `after`; returns the event of its end."""
    if after is not None:
        stream.wait_event(after)
    with torch.cuda.stream(stream):
        with writes():
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]
        event.record(stream)
    return event


class CudaDevice:
    """A CUDA device: uploads and downloads have their own streams, compute uses the caller's current stream."""

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise DeviceError(f"{device}: torch finds no CUDA device here; use a model on the CPU")
        self.counters = UploadCounters()
        self.torch_device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.staged = True
        self._copies = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call, unused-ignore]
        self._downloads = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call, unused-ignore]

    def host_buffer(self, size: int) -> Tensor:
        return _aligned(size, pinned=True)

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.torch_device)

    def upload(self, target: Tensor, source: Tensor, *, after: Any, modules: tuple[str, ...]) -> Any:
        event = _copied(self._copies, target, source, after)
        _count(self.counters, source, modules)
        return event

    def download(self, target: Tensor, source: Tensor, *, after: Any) -> Any:
        return _copied(self._downloads, target, source, after)

    def compute_waits(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream(self.torch_device).wait_event(event)

    def record(self) -> Any:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def host_waits(self, event: Any) -> None:
        if event is not None:
            event.synchronize()

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.torch_device).synchronize()
        self._copies.synchronize()

    def wait_all(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def free_memory(self) -> float:
        # torch's unused cached memory can be allocated too.
        idle = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return torch.cuda.mem_get_info(self.torch_device)[0] + idle


def require_triton() -> None:
    """Raise DeviceError if Triton, which all kernels on CUDA devices use, is not installed."""
    if find_spec("triton") is None:
        raise DeviceError("weights on a CUDA device need Triton, which is not installed: pip install triton")


def device_of(placement: Placement) -> Device:
    """The Device of all live storages. Raises DeviceError for several devices, or for one that is not CPU or CUDA."""
    found = {shard.view.device for placed in placement.values() for shard in placed}
    if len(found) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise DeviceError(f"the model is on several devices ({names}); use one process for each device")
    device = next(iter(found), torch.device("cpu"))
    if device.type == "cpu":
        return HostDevice()
    if device.type == "cuda":
        return CudaDevice(device)
    raise DeviceError(f"{device}: weights must be on the CPU or on a CUDA device")
