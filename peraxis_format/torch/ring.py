"""The ring: the page-locked host buffers and device buffers that all variants of a model share."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from peraxis_format.torch.device import Device
from peraxis_format.torch.swap.transfer_plan import ALIGN

__all__ = ["DEPTH", "Ring"]

DEPTH: Final = 4


class Ring:
    """DEPTH slots on the host and on the device, made on first use, as large as the largest transfer so far."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.slot_size = 0
        self.host: list[Tensor] = []
        self.slots: list[Tensor] = []

    def reserve(self, size: int) -> None:
        """Enlarge the slots to at least `size` bytes. Called when a variant is registered, never during a swap."""
        if size > self.slot_size:
            # At least two pages, because `staging` cuts a slot into pairs.
            self.slot_size = max(2 * ALIGN, -(-size // ALIGN) * ALIGN)
            self.host = [self.device.host_buffer(self.slot_size) for _ in range(DEPTH)]
            self.slots = [self.device.buffer(self.slot_size) for _ in range(DEPTH)]

    def staging(self, threads: int) -> list[tuple[Tensor, Tensor]]:
        """The host slots, cut into pairs of pieces, one pair for each thread (fewer if the pieces would be small)."""
        pairs = max(1, min(-(-threads // DEPTH), self.slot_size // (2 * ALIGN)))  # of one slot
        piece = self.slot_size // (2 * pairs) // ALIGN * ALIGN
        return [
            (slot[at : at + piece], slot[at + piece : at + 2 * piece])
            for slot in self.host
            for at in range(0, 2 * piece * pairs, 2 * piece)
        ][: max(threads, 1)]

    @property
    def size(self) -> int:
        """The size in bytes of the page-locked host memory; the device buffers have the same size."""
        return DEPTH * self.slot_size
