"""Reports of a VariantSwitch: its variants, the result of a swap, and the error of one that failed."""

from __future__ import annotations

from dataclasses import dataclass

from peraxis_format.errors import LiveModelError
from peraxis_format.torch.swap.payload import Residency

__all__ = ["Swap", "SwapError", "Variant"]


class SwapError(LiveModelError):
    """A swap failed. `now` is the name of the model's variant afterwards; None means the base."""

    def __init__(self, message: str, *, now: str | None) -> None:
        super().__init__(message)
        self.now = now


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A registered variant. stored: the bytes of its payload; host, device: the bytes in host and device memory."""

    name: str
    content_id: str
    residency: Residency
    stored: int
    host: int
    device: int

    def __repr__(self) -> str:
        held = f"{self.stored} bytes stored, {self.host} on the host, {self.device} on the device"
        return f"<Variant {self.name!r}: {self.residency}, {held}, {self.content_id[:19]}…>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """The result of a swap.

    read: bytes read from the file. uploads, uploaded: the number of copies to the device, and their bytes. written:
    bytes of weights. epoch: the counter of changes; a cache that depends on the weights is valid for one epoch.
    """

    name: str | None
    previous: str | None
    residency: Residency | None
    epoch: int
    seconds: float
    read: int = 0
    uploads: int = 0
    uploaded: int = 0
    written: int = 0
