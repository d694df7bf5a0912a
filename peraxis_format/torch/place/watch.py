"""Detect that the tensors of a live model are no longer those that were placed.

`load_state_dict(assign=True)`, a new Parameter and `.to(dtype)` give a model other storages. A loader with views of the
old ones would then write into memory that no forward reads. The check of a tensor costs less than a microsecond.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peraxis_format.errors import LiveModelError
from peraxis_format.torch.place.shards import Placement, ShardView, Target

__all__ = ["LiveTensors"]


@dataclass(frozen=True, slots=True)
class _Slot:
    """One name of a tensor: the mapping where the model looks it up, and the tensor that was there."""

    name: str
    holder: Mapping[str, Any]
    key: str
    tensor: Tensor
    address: int
    dtype: torch.dtype

    @property
    def is_same(self) -> bool:
        return (
            self.holder.get(self.key) is self.tensor
            and _local(self.tensor).data_ptr() == self.address
            and self.tensor.dtype is self.dtype
        )


class LiveTensors:
    """The tensors of a model in the storages of placements, with their version counters."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._slots: dict[str, _Slot] = {}
        self._versions: dict[ShardView, int] = {}

    def add(self, placement: Placement) -> None:
        """Watch the tensors of a placement, from their present state on."""
        wanted = {shard.live.untyped_storage().data_ptr() for placed in placement.values() for shard in placed}
        for name, holder, key in _names(self._target):
            tensor = holder[key]
            if tensor is None or name in self._slots:
                continue
            local = _local(tensor)
            if local.device.type != "meta" and local.untyped_storage().data_ptr() in wanted:
                self._slots[name] = _Slot(name, holder, key, tensor, local.data_ptr(), tensor.dtype)
        self.remember(shard for placed in placement.values() for shard in placed if shard not in self._versions)

    def remember(self, placed: Iterable[ShardView]) -> None:
        """Record the present content of these storages as written by their owner."""
        for shard in placed:
            if not shard.live.is_inference():
                self._versions[shard] = shard.live._version

    def written(self) -> frozenset[ShardView]:
        """Storages that were written by other code than their owner."""
        return frozenset(shard for shard, version in self._versions.items() if shard.live._version != version)

    def check(self, *, overwrite: bool = False) -> None:
        """Raise LiveModelError if a tensor was replaced, or, unless `overwrite`, written by other code."""
        for slot in self._slots.values():
            if not slot.is_same:
                raise LiveModelError(
                    f"{slot.name}: the model has another tensor there since the variants were added (a new Parameter, "
                    "load_state_dict with assign=True, or a change of dtype or device); make a new VariantSwitch"
                )
        for shard in () if overwrite else self.written():
            raise LiveModelError(
                f"{self.name_of(shard)}: was written since the last swap, which a swap would undo; "
                "pass overwrite=True to discard these changes, or make a new VariantSwitch to keep them"
            )

    def name_of(self, shard: ShardView) -> str:
        """The name of a tensor in this storage."""
        at = shard.live.untyped_storage().data_ptr()
        named = (slot.name for slot in self._slots.values() if _local(slot.tensor).untyped_storage().data_ptr() == at)
        return next(named, "a weight")


def _local(tensor: Tensor) -> Tensor:
    """A DTensor's local piece, whose storage is written; other tensors are returned unchanged."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def _names(target: Target) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """(name, its mapping, its key there) of every tensor."""
    if not isinstance(target, nn.Module):
        yield from ((name, target, name) for name in target)
        return
    for prefix, module in target.named_modules():
        for holder in (module._parameters, module._buffers):
            for key in holder:
                yield f"{prefix}.{key}" if prefix else key, holder, key
