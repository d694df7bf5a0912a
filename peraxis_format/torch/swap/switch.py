"""VariantSwitch: many variants of one live model, one of them at a time.

    switch = VariantSwitch(model)
    switch.add("legal", "legal.pxd", residency="pinned")
    switch.use("legal");  switch.use(None)          # None is the base, bit for bit

Weights are rebuilt out of place: pristine base copy + payload -> live storage, in one pass. Adding a delta and
subtracting it again is not exact in BF16 (up to a seventh of the weights become wrong), so a copy of the base is kept:
on the model's device, or with base="pinned" in page-locked host memory, which kernels read over the link. With
base="undo" only the weights that would become wrong are kept (undo.py).

A swap is atomic: on an error the model returns to the previous variant, or else to the base, and the error names it. A
forward never sees half a swap: a guard around the model's forward blocks swaps while it runs.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from peraxis_format.errors import LiveModelError, first_line, torn
from peraxis_format.interrupts import uninterrupted
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.modes import allocates, writes
from peraxis_format.torch.place.ranks import together
from peraxis_format.torch.place.shards import Shard, ShardView, Target, Views, increment_versions
from peraxis_format.torch.swap.guard import Guard
from peraxis_format.torch.swap.lock import SwapLock
from peraxis_format.torch.swap.payload import Residency
from peraxis_format.torch.swap.registry import BasePlace, Registered, Registry
from peraxis_format.torch.swap.reports import Swap, SwapError, Variant
from peraxis_format.torch.swap.stream import stream
from peraxis_format.torch.swap.undo import InPlace

__all__ = ["VariantSwitch"]


class VariantSwitch:
    """Many variants of one model, one of them at a time.

    base: the place of the pristine copy: "device" (the model's), "pinned" (page-locked host memory), or "auto", which
    takes the device if it has room when the first variant is registered. "undo" keeps no copy: variants are written in
    place and reverted by arithmetic and a list of exceptions; their payloads stay in host memory. guard: block swaps
    while the model's forward runs; without a guard (a compiled model) put steps that belong together into `running()`.
    views, shards, group, workers: as in apply_. Methods may be called from any thread. The class is a context manager;
    `close` does not change the weights.
    """

    def __init__(
        self,
        model: Target,
        *,
        base: BasePlace = "auto",
        guard: bool = True,
        views: Views | None = None,
        shards: Mapping[str, Shard] | None = None,
        group: Any = None,
        workers: int | None = None,
    ) -> None:
        self._registry = Registry(model, base=base, views=views, shards=shards, group=group, workers=workers)
        self._torn = False  # whether a failed swap could not be reverted
        self._lock = SwapLock()
        self._changes = threading.Lock()  # one thread at a time registers or swaps
        self._current: str | None = None
        self._dirty: frozenset[ShardView] = frozenset()
        self._epoch = 0
        self._guard = Guard(model, self._lock) if guard and isinstance(model, nn.Module) else None
        self._closed = False

    def __repr__(self) -> str:
        names = ", ".join(f"{v.name!r} ({v.residency}, {v.stored} bytes)" for v in self.variants()) or "none"
        now = "the base" if self._current is None else repr(self._current)
        return f"<VariantSwitch: now {now}, epoch {self._epoch}, base {self.base_place}; variants: {names}>"

    # --- state ---------------------------------------------------------------------------------------

    @property
    def current(self) -> str | None:
        """The name of the current variant; None means the base."""
        return self._current

    @property
    def epoch(self) -> int:
        """A counter of changes of the weights. A failed swap that wrote weights counts too."""
        return self._epoch

    def variants(self) -> tuple[Variant, ...]:
        """The registered variants, in the order of registration."""
        return tuple(registered.variant for registered in self._registry.variants.values())

    @property
    def base_place(self) -> BasePlace:
        """The place of the pristine copy: "device", "pinned" or "undo" (no copy); "auto" before the first variant."""
        return self._registry.base_place

    @property
    def base_size(self) -> int:
        """The size of the pristine copy in bytes."""
        return sum(base.numel() * base.element_size() for base in self._registry.bases.values())

    @property
    def undo_size(self) -> int:
        """With base="undo": the bytes in host memory that revert used variants."""
        logs = (registered.log for registered in self._registry.variants.values())
        return sum(log.size for log in logs if log is not None)

    @property
    def ring_size(self) -> int:
        """The size of the ring in bytes on the host; it has the same size on the device."""
        return 0 if self._registry.ring is None else self._registry.ring.size

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Block swaps during a step that is not a forward of the model, or during several that belong together."""
        return self._lock.shared()

    # --- registering ---------------------------------------------------------------------------------

    @allocates()
    def add(
        self,
        name: str,
        delta: DeltaFile | str | os.PathLike[str],
        residency: Residency | None = None,
        *,
        direct: bool = False,
    ) -> Variant:
        """Register a variant: check its file and its base, and load its payload to the place of its residency.

        residency: "gpu", "pinned" or "file" (default: "gpu" on a CUDA device, else "pinned"). direct: for "file", read
        without the page cache. The model is not changed, and forwards may run meanwhile. Raises the errors of apply_;
        LiveModelError for a name in use.
        """
        self._lock.refuse_inside()
        with self._changes:
            self._refuse_closed()
            return self._registry.add(name, delta, residency, direct=direct)

    def remove(self, name: str) -> None:
        """Remove a variant. Raises LiveModelError if it is in use or unknown."""
        self._lock.refuse_inside()
        with self._changes:
            if name == self._current:
                raise LiveModelError(f"variant {name!r} is in use; use another one, or None, first")
            self._registry.remove(name)

    # --- swapping ------------------------------------------------------------------------------------

    @allocates()
    def use(self, name: str | None, *, overwrite: bool = False) -> Swap:
        """Turn the model into a variant, or into the base (None). The current one costs nothing.

        It waits for running forwards. overwrite: swap even if other code has written the weights since the last swap;
        these changes are lost. Ctrl-C waits for the end of the writes. Raises SwapError, which names the model's
        variant afterwards, or TornError if the model could not be reverted to one. Raises LiveModelError for an unknown
        name, or if the model's tensors are no longer those of the registered variants.
        """
        self._lock.refuse_inside()
        with self._changes, self._lock.exclusive():
            self._refuse_closed()
            target = None if name is None else self._registry.find(name)
            with together(self._registry.group, sharded=self._registry.is_sharded):
                self._registry.check_tensors(overwrite=overwrite)
                if self._registry.device is not None:
                    self._registry.device.wait_all()
            started = time.perf_counter()
            swap = Swap(name=name, previous=self._current, residency=None, epoch=self._epoch, seconds=0.0)
            if name == self._current and not (overwrite or self._torn):
                return replace(swap, residency=None if target is None else target.variant.residency)
            self._dirty |= self._registry.live.written()
            uploads, uploaded = self._uploads()
            read = 0 if target is None else target.payload.bytes_read
            with uninterrupted():
                written = self._swapped(name, target)
            after = self._uploads()
            return replace(
                swap,
                residency=None if target is None else target.variant.residency,
                epoch=self._epoch,
                seconds=time.perf_counter() - started,
                read=0 if target is None else target.payload.bytes_read - read,
                uploads=after[0] - uploads,
                uploaded=after[1] - uploaded,
                written=written,
            )

    def _swapped(self, name: str | None, target: Registered | None) -> int:
        """Write the target's weights, or revert them on an error. Returns the bytes written. Raises SwapError."""
        try:
            written = self._write(target)
        except BaseException as error:
            now = self._restored(error)
            if not isinstance(error, Exception):
                raise  # an interrupt is not wrapped
            what = "the base" if now is None else f"variant {now!r}"
            raise SwapError(f"swap to {name!r} failed ({first_line(error)}); the model is {what}", now=now) from error
        self._current, self._torn = name, False
        return written

    def _uploads(self) -> tuple[int, int]:
        counters = None if self._registry.device is None else self._registry.device.counters
        return (0, 0) if counters is None else (counters.uploads, counters.uploaded_bytes)

    def _write(self, target: Registered | None) -> int:
        """Rebuild the target's weights from the base into live storage. Returns the bytes written."""
        if self._registry.in_place is not None:
            return self._write_in_place(target, self._registry.in_place)
        changed = frozenset() if target is None else target.changed
        restored = self._dirty - changed
        touched = self._dirty | changed
        registry = self._registry
        # Set before the first write: from here on these storages may differ from the base.
        self._dirty = touched
        self._epoch += 1
        increment_versions(touched)
        device, ring = registry.device, registry.ring
        try:
            with together(registry.group, sharded=registry.is_sharded), writes():
                for shard in restored:
                    shard.view.copy_(registry.bases[shard], non_blocking=True)
                    shard.publish()
                if device is not None and ring is not None:
                    if target is not None and target.engine is not None:
                        stream(target.payload, target.engine, device=device, ring=ring, workers=registry.workers)
                    device.synchronize()
        finally:
            registry.live.remember(touched)
        self._dirty = changed
        return sum(shard.view.nbytes for shard in restored) + (0 if target is None else target.weights)

    def _write_in_place(self, target: Registered | None, weights: InPlace) -> int:
        registry = self._registry
        touched = weights.changed() | (frozenset() if target is None else target.changed)
        self._epoch += 1
        increment_versions(touched)
        try:
            with together(registry.group, sharded=registry.is_sharded):
                return weights.write(None if target is None else target.log)
        finally:
            if registry.device is not None:
                registry.device.wait_all()
            registry.live.remember(touched)

    def _restored(self, error: BaseException) -> str | None:
        """Revert a failed swap. Raises TornError if that fails too; a copy of the base makes another try possible."""
        self._torn = True
        try:
            now = self._restore()
        except BaseException as failure:
            undo = self._registry.in_place is not None
            remedy = "load the base again and make a new VariantSwitch" if undo else "use(None) tries it again"
            advice = f"the weights are neither the base's nor a variant's; {remedy}"
            raise torn("a swap", error, failure, advice=advice) from error
        self._torn = False
        return now

    def _restore(self) -> str | None:
        """Restore the previous variant, or else the base. Returns the name of the current variant."""
        previous = None if self._current is None else self._registry.find(self._current)
        if previous is not None:
            with contextlib.suppress(Exception):
                self._write(previous)
                return self._current
        self._current = None
        self._write(None)
        return None

    # --- the end -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove the guard, end the threads, and free the payloads and the base. The weights are unchanged."""
        self._closed = True
        if self._guard is not None:
            self._guard.remove()
        self._registry.in_place = None
        self._registry.close()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise LiveModelError("the VariantSwitch is closed; make a new one for the model")
        if self._torn and self._registry.in_place is not None:
            raise LiveModelError("a swap could not be reverted; load the base again and make a new VariantSwitch")

    def __enter__(self) -> VariantSwitch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
