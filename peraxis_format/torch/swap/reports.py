"""What a VariantSwitch says: its variants, what a swap did, and why one failed."""

from __future__ import annotations

from dataclasses import dataclass

from peraxis_format.errors import LiveModelError
from peraxis_format.torch.swap.payload import Residency

__all__ = ["Swap", "SwapError", "Variant"]


class SwapError(LiveModelError):
    """A swap failed; `now` says what the model is after it (None: the base)."""

    def __init__(self, message: str, *, now: str | None) -> None:
        super().__init__(message)
        self.now = now


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A registered variant. stored: bytes of its payload; host, device: what its residency keeps of them there."""

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
    """What a swap did. read: bytes of the file; uploads, uploaded: copies to the device and their bytes; written: bytes
    of weights. epoch: counts changes of the weights, for whoever caches something that depends on them.
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
