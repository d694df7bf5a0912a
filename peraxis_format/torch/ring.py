"""The ring: page-locked host buffers and device buffers that all variants of a model share."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from peraxis_format.torch.device import Device
from peraxis_format.torch.image import ALIGN

__all__ = ["DEPTH", "Ring"]

DEPTH: Final = 4


class Ring:
    """DEPTH slots on the host and on the device, made when first needed and as large as the largest transfer so far."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.slot_size = 0
        self.host: list[Tensor] = []
        self.slots: list[Tensor] = []

    def reserve(self, size: int) -> None:
        """Make sure that slots hold `size` bytes. Called when a variant is registered, never during a swap."""
        if size > self.slot_size:
            self.slot_size = -(-size // ALIGN) * ALIGN
            self.host = [self.device.host_buffer(self.slot_size) for _ in range(DEPTH)]
            self.slots = [self.device.buffer(self.slot_size) for _ in range(DEPTH)]

    @property
    def size(self) -> int:
        """Bytes of page-locked host memory; the device holds as many."""
        return DEPTH * self.slot_size
