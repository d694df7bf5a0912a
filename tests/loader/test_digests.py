"""Digests of live tensors are those of their bytes, are cached, and go through page-locked memory on a device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from peraxis_format.ops.tensors import as_bytes
from peraxis_format.torch.device import HostDevice
from peraxis_format.torch.place import digests as module
from peraxis_format.torch.place.digests import digests, forget_digests, inherit
from peraxis_format.torch.ring import DEPTH, Ring


class Far(HostDevice):
    """A device whose copies to the host run at the latest possible time, when the host waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.staged = True
        self.downloads = 0

    def download(self, target: Tensor, source: Tensor, *, after: Any) -> Callable[[], Tensor]:
        self.downloads += 1
        target.fill_(0xEE)
        return lambda: target.copy_(source)

    def host_waits(self, event: Any) -> None:
        event()


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size).bfloat16() for size in (3, 2048, 9000, 50_000)] + [torch.randn(40, 70).t()]


def plain(tensor: Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("workers", [1, 2, 9])
@pytest.mark.parametrize("slot", [8192, 70_000])
def test_pieces_through_the_ring_have_the_digest_of_the_whole(workers: int, slot: int) -> None:
    device = Far()
    ring = Ring(device)
    ring.reserve(slot)
    views = tensors()
    assert list(digests(views, device=device, ring=ring, workers=workers)) == [plain(view) for view in views]
    assert device.downloads > len(views)
    assert list(digests(views, device=HostDevice(), ring=Ring(HostDevice()))) == [plain(view) for view in views]


def test_pieces_of_the_ring_do_not_overlap() -> None:
    ring = Ring(HostDevice())
    ring.reserve(5 * 8192)
    for threads in (1, 4, 16, 100):
        pairs = ring.staging(threads)
        assert 1 <= len(pairs) <= threads
        spans = sorted((p.data_ptr(), p.data_ptr() + p.numel()) for pair in pairs for p in pair)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
        assert min(end - begin for begin, end in spans) >= 4096
    assert len(ring.staging(100)) == DEPTH * 5


def test_a_digest_is_remembered_until_the_tensor_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    device, ring = HostDevice(), Ring(HostDevice())
    view = torch.randn(100)
    hashed: list[int] = []

    def counted(tensor: Tensor) -> Tensor:
        hashed.append(1)
        return as_bytes(tensor)

    monkeypatch.setattr(module, "as_bytes", counted)

    def digest(tensor: Tensor) -> str:
        return next(iter(digests([tensor], device=device, ring=ring, workers=1)))

    first = digest(view)
    copy = view.clone()
    inherit(copy, view)
    assert digest(view) == digest(copy) == first
    assert len(hashed) == 1
    forget_digests([view])
    assert digest(view) == first
    view[0] += 1
    assert digest(view) != first
    assert digest(copy) == first
    assert len(hashed) == 3


@pytest.mark.parametrize("size", [1, 4096, 8192, 100_000])
@pytest.mark.parametrize("threads", [1, 3, 16, 200])
def test_the_slots_of_a_ring_are_cut_into_pairs_however_small_they_are(size: int, threads: int) -> None:
    ring = Ring(HostDevice())
    ring.reserve(size)
    pairs = ring.staging(threads)
    assert 1 <= len(pairs) <= threads
    pieces = [piece for pair in pairs for piece in pair]
    assert {piece.numel() for piece in pieces} == {pieces[0].numel()}
    assert pieces[0].numel() > 0
    assert pieces[0].numel() % 4096 == 0
    spans = sorted((piece.data_ptr(), piece.data_ptr() + piece.numel()) for piece in pieces)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
