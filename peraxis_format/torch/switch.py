"""VariantSwitch: many variants of one live model, one of them at a time, changed in the time that the bytes need.

    switch = VariantSwitch(model)
    switch.add("legal", "legal.pxd", residency="pinned")
    switch.use("legal");  switch.use(None)          # None is the base, bit for bit

Weights are rebuilt out of place: pristine base copy + payload -> live storage, in one pass. Adding a delta and
subtracting it again is not exact in BF16 (up to a seventh of the weights end up wrong), so the base is kept: beside the
model, or with base="pinned" in page-locked host memory, which kernels read over the link.

A swap is all or nothing: on an error the model goes back to the variant before, or else to the base, and the error says
which. A forward never sees half a swap: the model's own hooks hold swaps off while it runs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peraxis_format.reader import DeltaFile
from peraxis_format.torch.apply import TRANSFER_LIMIT, together, verify_share
from peraxis_format.torch.binding import check_live, is_sharded, sharded_anywhere
from peraxis_format.torch.device import Device, device_of
from peraxis_format.torch.digests import inherit
from peraxis_format.torch.engine import Engine, engine_for
from peraxis_format.torch.errors import DeviceError, LiveModelError
from peraxis_format.torch.gate import Gate
from peraxis_format.torch.image import cut_transfers
from peraxis_format.torch.parts import (
    Part,
    Placement,
    Shard,
    Target,
    Views,
    copy_aside,
    increment_versions,
    storage_key,
)
from peraxis_format.torch.payload import Payload, Residency
from peraxis_format.torch.placement import place
from peraxis_format.torch.reports import Swap, SwapError, Variant
from peraxis_format.torch.ring import Ring
from peraxis_format.torch.stream import stream
from peraxis_format.torch.work import Workers

__all__ = ["VariantSwitch"]


@dataclass(frozen=True, slots=True, eq=False)
class _Registered:
    variant: Variant
    file: DeltaFile
    owned: bool
    placement: Placement
    payload: Payload
    engine: Engine
    parts: frozenset[Part]


class VariantSwitch:
    """Variants of one model. base: where the pristine copy lies, "device" (beside the model) or "pinned" (host).

    guard: hold swaps off while the model's forward runs; without it (a compiled model) wrap steps in `running()`.
    views, shards, group, workers: see apply_. Methods may be called from any thread. A context manager; `close` leaves
    the weights as they are.
    """

    def __init__(
        self,
        model: Target,
        *,
        base: Literal["device", "pinned"] = "device",
        guard: bool = True,
        views: Views | None = None,
        shards: Mapping[str, Shard] | None = None,
        group: Any = None,
        workers: int | None = None,
    ) -> None:
        self._model = model
        self._base_place = base
        self._views, self._shards, self._group = views, shards, group
        self._workers = Workers(workers)
        self._gate = Gate()
        self._device: Device | None = None
        self._ring: Ring | None = None
        self._parts: dict[Any, Part] = {}
        self._bases: dict[Part, Tensor] = {}
        self._variants: dict[str, _Registered] = {}
        self._current: str | None = None
        self._dirty: frozenset[Part] = frozenset()
        self._epoch = 0
        self._hooks: list[Any] = []
        if guard and isinstance(model, nn.Module):
            self._hooks = [
                model.register_forward_pre_hook(lambda *_: self._gate.enter(), prepend=True),
                model.register_forward_hook(lambda *_: self._gate.leave(), always_call=True),
            ]

    # --- what it holds -------------------------------------------------------------------------------

    @property
    def current(self) -> str | None:
        """The variant that the model is now; None: the base."""
        return self._current

    @property
    def epoch(self) -> int:
        """Goes up with every change of the weights, failed swaps that touched them included."""
        return self._epoch

    def variants(self) -> tuple[Variant, ...]:
        """The registered variants, in the order of `add`."""
        return tuple(registered.variant for registered in self._variants.values())

    @property
    def base_size(self) -> int:
        """Bytes of the pristine copy."""
        return sum(base.numel() * base.element_size() for base in self._bases.values())

    @property
    def ring_size(self) -> int:
        """Bytes of the ring, on the host and again on the device."""
        return 0 if self._ring is None else self._ring.size

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Hold swaps off: for a step that is no forward of the model itself, or several that belong together."""
        return self._gate.shared()

    # --- registering ---------------------------------------------------------------------------------

    @torch.no_grad()
    def add(
        self,
        name: str,
        delta: DeltaFile | str | os.PathLike[str],
        residency: Residency | None = None,
        *,
        direct: bool = False,
    ) -> Variant:
        """Register a variant: check its file, its base, and bring its payload to where it shall be.

        residency: "gpu", "pinned" or "file" (default: "gpu" on a CUDA device, else "pinned"). direct: for "file", read
        past the page cache. The model is not changed. Raises as apply_ does; LiveModelError for a name in use.
        """
        if name in self._variants:
            raise LiveModelError(f"variant {name!r} is registered already; remove it first")
        owned = not isinstance(delta, DeltaFile)
        file = delta if isinstance(delta, DeltaFile) else DeltaFile(delta)
        try:
            with self._gate.exclusive():
                registered = self._register(name, file, owned, residency, direct)
        except BaseException:
            if owned:
                file.close()
            raise
        self._variants[name] = registered
        return registered.variant

    def _register(
        self, name: str, file: DeltaFile, owned: bool, residency: Residency | None, direct: bool
    ) -> _Registered:
        found = place(self._model, file.manifest, views=self._views, shards=self._shards)
        device, ring = self._prepare(found)
        chosen = _residency(residency, device)
        placement = self._known(found)
        transfers = cut_transfers(file, placement, limit=TRANSFER_LIMIT)
        ring.reserve(max((transfer.size for transfer in transfers), default=0))
        self._check(file, placement, ring)
        sharded = self._is_sharded(file, placement)
        with together(sharded, self._group):
            if sharded:
                verify_share(file, self._group, self._workers)
            payload = Payload(
                file, transfers, residency=chosen, device=device, ring=ring, workers=self._workers, direct=direct
            )
        self._keep_base(placement)
        engine = engine_for(transfers, self._bases, device=device, workers=self._workers)
        variant = Variant(
            name=name,
            content_id=file.content_id,
            residency=chosen,
            stored=payload.size,
            host=payload.size if chosen == "pinned" else 0,
            device=payload.size if chosen == "gpu" else 0,
        )
        parts = frozenset(part for transfer in transfers for packed in transfer.modules for part in packed.views)
        return _Registered(variant, file, owned, placement, payload, engine, parts)

    def _prepare(self, placement: Placement) -> tuple[Device, Ring]:
        if self._device is None or self._ring is None:
            self._device = device_of(placement)
            self._ring = Ring(self._device)
            if self._base_place == "pinned" and self._device.torch_device.type != "cuda":
                raise DeviceError('base="pinned" needs a CUDA device; on the CPU the base is in host memory anyway')
        return self._device, self._ring

    def _known(self, placement: Placement) -> Placement:
        """The same storages are the same parts for all variants."""
        return {
            name: tuple(self._parts.setdefault((part.box, storage_key(part.view)), part) for part in parts)
            for name, parts in placement.items()
        }

    def _check(self, file: DeltaFile, placement: Placement, ring: Ring) -> None:
        """The base's bytes: of the pristine copies where there are some, since the live weights may be a variant's."""
        pristine = {
            name: tuple(Part(part.box, self._bases.get(part, part.view)) for part in parts)
            for name, parts in placement.items()
        }
        check_live(file.manifest, pristine, ring=ring, workers=self._workers.count, group=self._group)

    def _is_sharded(self, file: DeltaFile, placement: Placement) -> bool:
        return sharded_anywhere(is_sharded(placement, file.manifest), self._group)

    def _keep_base(self, placement: Placement) -> None:
        new = {name: tuple(p for p in parts if p not in self._bases) for name, parts in placement.items()}
        copies = copy_aside(new, pinned=self._base_place == "pinned")
        for part, base in copies.items():
            inherit(base, part.view)
        self._bases.update(copies)

    def remove(self, name: str) -> None:
        """Forget a variant. Raises LiveModelError for the one in use, and for an unknown one."""
        if name == self._current:
            raise LiveModelError(f"variant {name!r} is in use; use another one, or None, first")
        registered = self._variants.pop(self._find(name).variant.name)
        registered.payload.close()
        if registered.owned:
            registered.file.close()

    def _find(self, name: str) -> _Registered:
        if name not in self._variants:
            known = ", ".join(sorted(self._variants)) or "none"
            raise LiveModelError(f"no variant {name!r}; registered: {known}")
        return self._variants[name]

    # --- swapping ------------------------------------------------------------------------------------

    @torch.no_grad()
    def use(self, name: str | None) -> Swap:
        """Make the model a variant, or the base. Waits for forwards that run. Using the current one does nothing.

        Raises SwapError, which says what the model is afterwards; LiveModelError for an unknown name.
        """
        target = None if name is None else self._find(name)
        with self._gate.exclusive():
            started = time.perf_counter()
            swap = Swap(name=name, previous=self._current, residency=None, epoch=self._epoch, seconds=0.0)
            if name == self._current:
                return replace(swap, residency=None if target is None else target.variant.residency)
            if self._device is not None:
                self._device.wait_all()
            uploads, uploaded = self._uploads()
            read = 0 if target is None else target.payload.reads.size
            try:
                written = self._write(target)
            except BaseException as error:
                now = self._restore()
                if not isinstance(error, Exception):
                    raise  # an interrupt stays one
                what = "the base" if now is None else f"variant {now!r}"
                raise SwapError(f"swap to {name!r} failed ({error}); the model is {what}", now=now) from error
            self._current = name
            after = self._uploads()
            return replace(
                swap,
                residency=None if target is None else target.variant.residency,
                epoch=self._epoch,
                seconds=time.perf_counter() - started,
                read=0 if target is None else target.payload.reads.size - read,
                uploads=after[0] - uploads,
                uploaded=after[1] - uploaded,
                written=written,
            )

    def _uploads(self) -> tuple[int, int]:
        counters = None if self._device is None else self._device.counters
        return (0, 0) if counters is None else (counters.uploads, counters.uploaded_bytes)

    def _write(self, target: _Registered | None) -> int:
        """Live storages become the target's, from the pristine base; returns the bytes written."""
        parts = frozenset() if target is None else target.parts
        restored = self._dirty - parts
        touched = self._dirty | parts
        # Set before the first write: whatever happens now, these storages may not be the base's any more.
        self._dirty = touched
        self._epoch += 1
        for part in restored:
            part.view.copy_(self._bases[part], non_blocking=True)
        device, ring = self._device, self._ring
        if device is not None and ring is not None:
            sharded = target is not None and self._is_sharded(target.file, target.placement)
            with together(sharded, self._group):
                if target is not None:
                    stream(target.payload, target.engine, device=device, ring=ring, workers=self._workers)
            device.synchronize()
        self._dirty = parts
        increment_versions({"": tuple(touched)})
        return sum(part.view.numel() * part.view.element_size() for part in restored | parts)

    def _restore(self) -> str | None:
        """After a failed swap: the variant before, else the base. Returns what it is."""
        previous = None if self._current is None else self._variants[self._current]
        if previous is not None:
            with contextlib.suppress(Exception):
                self._write(previous)
                return self._current
        self._current = None
        self._write(None)
        return None

    # --- the end -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove the hooks, end the threads, let go of payloads and base. The weights stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for registered in self._variants.values():
            registered.payload.close()
            if registered.owned:
                registered.file.close()
        self._variants.clear()
        self._bases.clear()
        self._workers.close()

    def __enter__(self) -> VariantSwitch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _residency(asked: Residency | None, device: Device) -> Residency:
    cuda = device.torch_device.type == "cuda"
    if asked == "gpu" and not cuda:
        raise DeviceError('residency="gpu" needs a model on a CUDA device; on the CPU use "pinned" or "file"')
    return asked or ("gpu" if cuda else "pinned")
