"""The variants of one live model: their payloads, engines, and the pristine base that they are rebuilt from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from torch import Tensor

from peraxis_format.arguments import check_choice, check_least, check_variant, did_you_mean
from peraxis_format.errors import DeviceError, LiveModelError, located
from peraxis_format.reader import DeltaFile
from peraxis_format.thread_pool import ThreadPool
from peraxis_format.torch.device import Device, device_of
from peraxis_format.torch.place.binding import check_live, is_sharded, sharded_anywhere
from peraxis_format.torch.place.claims import claim, release
from peraxis_format.torch.place.digests import inherit
from peraxis_format.torch.place.finder import check_target, untied_copies
from peraxis_format.torch.place.placement import place
from peraxis_format.torch.place.ranks import is_distributed, together
from peraxis_format.torch.place.sharded_exact import exact_pieces
from peraxis_format.torch.place.shards import Placement, Shard, ShardView, Target, Views, copy_aside, storage_key
from peraxis_format.torch.place.watch import LiveTensors
from peraxis_format.torch.ring import Ring
from peraxis_format.torch.swap.apply import verify_share
from peraxis_format.torch.swap.engine import Engine, HostEngine, engine_for
from peraxis_format.torch.swap.payload import Payload, Residency
from peraxis_format.torch.swap.reports import Variant
from peraxis_format.torch.swap.transfer_plan import TRANSFER_LIMIT, cut_transfers
from peraxis_format.torch.swap.undo import InPlace, UndoLog

__all__ = ["BasePlace", "Registered", "Registry"]

BasePlace = Literal["auto", "device", "pinned", "undo"]
_CLAIMED: Final = "a VariantSwitch keeps the base of these weights; add the variant to that switch, or close it first"
_ROOM: Final = 0.9  # share of the free memory that a second copy of the weights may take, with base="auto"


@dataclass(frozen=True, slots=True, eq=False)
class Registered:
    """A variant that is ready for use. owned: the file was opened here. changed: the storages that it changes; weights:
    their size in bytes. engine: rebuilds it from the base; with base="undo" there is a log instead. sharded: whether
    several ranks write it together.
    """

    variant: Variant
    file: DeltaFile
    owned: bool
    placement: Placement
    payload: Payload
    engine: Engine | None
    log: UndoLog | None
    changed: frozenset[ShardView]
    weights: int
    sharded: bool

    def close(self) -> None:
        """Free the payload, and close the file if it was opened here."""
        self.payload.close()
        if self.owned:
            self.file.close()


class Registry:
    """The variants of one switch, with the switch's arguments. It is not thread-safe; the switch locks it."""

    def __init__(
        self,
        model: Target,
        *,
        base: BasePlace,
        views: Views | None,
        shards: Mapping[str, Shard] | None,
        group: Any,
        workers: int | None,
    ) -> None:
        check_choice("base", base, get_args(BasePlace), error=LiveModelError)
        check_least("workers", workers, 1, error=LiveModelError)
        check_target(model)
        self.workers = ThreadPool(workers)
        self.group = group
        self.device: Device | None = None
        self.ring: Ring | None = None
        self.variants: dict[str, Registered] = {}
        self.bases: dict[ShardView, Tensor] = {}
        self._model = model
        self.base_place = base
        self._views, self._shards = views, shards
        self._seen: dict[Any, ShardView] = {}
        self.in_place = InPlace(self.workers) if base == "undo" else None
        self._checked: dict[str, str] = {}  # with base="undo": hex digests of the base's tensors, by name
        self.live = LiveTensors(model)
        self._copies = untied_copies(model)  # found now, because a variant may be in use when another one is added

    def add(
        self, name: str, delta: DeltaFile | str | os.PathLike[str], residency: Residency | None, *, direct: bool
    ) -> Variant:
        """Check a variant's file and base, and load its payload. The model is not changed."""
        if residency is not None:
            check_choice("residency", residency, get_args(Residency), error=LiveModelError)
        check_variant(name, error=LiveModelError)
        if name in self.variants:
            raise LiveModelError(f"variant {name!r} is registered already; remove it first")
        owned = not isinstance(delta, DeltaFile)
        with contextlib.ExitStack() as stack:
            # Each step is collective: a rank that fails must not leave the others in the next one.
            with together(self.group, sharded=is_distributed()):
                file = delta if isinstance(delta, DeltaFile) else stack.enter_context(DeltaFile(delta))
            self.variants[name] = self._registered(name, file, residency, owned=owned, direct=direct)
            stack.pop_all()
        return self.variants[name].variant

    def find(self, name: str) -> Registered:
        """The registered variant of this name. Raises LiveModelError if there is none."""
        if name not in self.variants:
            known = ", ".join(sorted(self.variants)) or "none"
            raise LiveModelError(f"no variant {name!r}; registered: {known}{did_you_mean(name, self.variants)}")
        return self.variants[name]

    def remove(self, name: str) -> None:
        """Remove a variant. Raises LiveModelError if it is unknown."""
        self.find(name).close()
        del self.variants[name]

    def check_tensors(self, *, overwrite: bool) -> None:
        """Raise LiveModelError if a tensor was replaced, or written by other code and that is not allowed."""
        undo = self.base_place == "undo"
        self.live.check(overwrite=overwrite or undo)
        for shard in self.live.written() if undo else ():
            raise LiveModelError(
                f'{self.live.name_of(shard)}: was written since the last swap, and base="undo" keeps no copy of the '
                "base; load the base again and make a new VariantSwitch"
            )

    @property
    def is_sharded(self) -> bool:
        """Whether several ranks have to swap together."""
        return any(registered.sharded for registered in self.variants.values())

    def close(self) -> None:
        """Free all variants and the base, and end the threads."""
        for registered in self.variants.values():
            registered.close()
        self.variants.clear()
        self.bases.clear()
        release(self)
        self.workers.close()

    def _registered(
        self, name: str, file: DeltaFile, residency: Residency | None, *, owned: bool, direct: bool
    ) -> Registered:
        with together(self.group, sharded=is_distributed()):
            self.check_tensors(overwrite=True)
            found = place(self._model, file.manifest, views=self._views, shards=self._shards, copies=self._copies)
            claim((shard.live for placed in found.values() for shard in placed), self, _CLAIMED)
            device, ring = self._prepared(found)
            chosen = _residency(residency, device, undo=self.base_place == "undo")
            if direct and chosen != "file":
                raise LiveModelError(
                    f'direct does nothing with residency="{chosen}"; pass residency="file" or leave it out'
                )
            placement = self._known(found)
            transfers = cut_transfers(file, placement, limit=TRANSFER_LIMIT)
            ring.reserve(max((transfer.size for transfer in transfers), default=0))
        self._check(file, placement, ring)
        sharded = self._anywhere_sharded(file, placement)
        if sharded:
            with together(self.group, sharded=True):
                verify_share(file, self.group, self.workers)
        pieces = exact_pieces(file, placement, base_of=self._base_of, group=self.group) if sharded else ()
        with together(self.group, sharded=sharded):
            payload = Payload(
                file,
                transfers,
                residency=chosen,
                device=device,
                ring=ring,
                workers=self.workers,
                base_of=self._base_of,
                pieces=pieces,
                direct=direct,
            )
            undo = self.base_place == "undo"
            if not undo:
                self._keep_base(placement)
            self.live.add(placement)
            engine = None if undo else engine_for(transfers, self.bases, device=device, workers=self.workers)
            if isinstance(engine, HostEngine) and chosen == "pinned":
                for index, transfer in enumerate(transfers):
                    engine.prepare(transfer, payload.host(index))
            log = UndoLog(payload) if undo else None
        variant = Variant(
            name=name,
            content_id=file.content_id,
            residency=chosen,
            stored=payload.size,
            host=(payload.size if chosen == "pinned" else 0) + sum(piece.nbytes for piece in pieces),
            device=payload.size if chosen == "gpu" else 0,
        )
        slices = (slice_ for transfer in transfers for slice_ in transfer.modules)
        changed = frozenset(
            (*(shard for slice_ in slices for shard in slice_.views), *(piece.shard for piece in pieces))
        )
        weights = sum(shard.view.nbytes for shard in changed)
        return Registered(variant, file, owned, placement, payload, engine, log, changed, weights, sharded)

    def _prepared(self, placement: Placement) -> tuple[Device, Ring]:
        if self.device is None or self.ring is None:
            self.device = device_of(placement)
            self.ring = Ring(self.device)
            if self.base_place == "pinned" and self.device.torch_device.type != "cuda":
                raise DeviceError('base="pinned" needs a CUDA device; on the CPU the base is in host memory anyway')
            if self.base_place == "auto":
                needed = sum(shard.view.nbytes for placed in placement.values() for shard in placed)
                self.base_place = "device" if needed <= _ROOM * self.device.free_memory() else "pinned"
        return self.device, self.ring

    def _known(self, placement: Placement) -> Placement:
        """The placement with one ShardView per storage for all variants."""
        return {
            name: tuple(self._seen.setdefault((shard.box, storage_key(shard.live)), shard) for shard in placed)
            for name, placed in placement.items()
        }

    def _check(self, file: DeltaFile, placement: Placement, ring: Ring) -> None:
        """Check the base's bytes, on the pristine copies if they exist, because the live weights may be a variant's.

        With base="undo" there are no copies, but digests of the tensors that were checked before the first swap.
        """
        pristine = {
            name: tuple(ShardView(shard.box, self.bases.get(shard, shard.view)) for shard in placed)
            for name, placed in placement.items()
        }
        with located(file.path):
            check_live(
                file.manifest, pristine, ring=ring, workers=self.workers.count, group=self.group, known=self._checked
            )
        if self.base_place == "undo":
            bound = {entry.name: entry.base for entry in file.manifest.modules}
            self._checked |= {name: base.sha256 for name, base in bound.items() if base is not None}
            tied = file.manifest.tied
            self._checked |= {alias: self._checked[name] for name, alias in tied if name in self._checked}

    def _base_of(self, shard: ShardView) -> Tensor:
        """The base's weights of a shard, whatever variant the model is. With base="undo" they are computed."""
        if self.in_place is not None:
            return self.in_place.base_of(shard)
        return self.bases.get(shard, shard.view)

    def _anywhere_sharded(self, file: DeltaFile, placement: Placement) -> bool:
        return sharded_anywhere(here=is_sharded(placement, file.manifest), group=self.group)

    def _keep_base(self, placement: Placement) -> None:
        new = {name: tuple(p for p in placed if p not in self.bases) for name, placed in placement.items()}
        copies = copy_aside(new, pinned=self.base_place == "pinned")
        for shard, base in copies.items():
            inherit(base, shard.view)
        self.bases.update(copies)


def _residency(asked: Residency | None, device: Device, *, undo: bool) -> Residency:
    cuda = device.torch_device.type == "cuda"
    if undo and asked not in (None, "pinned"):
        raise DeviceError(
            f'base="undo" reverts a variant with its own payload, which must stay in host memory; '
            f'use residency="pinned", not {asked!r}'
        )
    if asked == "gpu" and not cuda:
        raise DeviceError('residency="gpu" needs a model on a CUDA device; on the CPU use "pinned" or "file"')
    return asked or ("gpu" if cuda and not undo else "pinned")
