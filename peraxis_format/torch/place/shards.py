"""A checkpoint tensor is a box of indices, [0, d0) x [0, d1) x ...; a ShardView gives the place of a box.

    plain            one shard, the whole box, the parameter itself
    tied             one shard for each distinct storage among the module and its aliases (usually one)
    fused            one shard, the whole box, a slice of the fused parameter (qkv_proj, gate_up_proj, experts)
    sharded          one shard, this rank's box, the local tensor (DTensor, or `shards` for plain local tensors)

The rest of the loader uses only this description of a model, which placement.py makes. Sharding along a dimension
follows torch.chunk: pieces of ceil(d / n), the last ones shorter or empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from peraxis_format.torch.modes import writes

__all__ = [
    "Box",
    "ShardView",
    "Placement",
    "Shard",
    "Target",
    "Views",
    "chunk",
    "copy_aside",
    "extent",
    "increment_versions",
    "own_piece",
    "slices",
    "storage_key",
    "whole",
]

Box: TypeAlias = tuple[tuple[int, int], ...]
Target: TypeAlias = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class ShardView:
    """A box of a checkpoint tensor and its live storage. view: a tensor of the box's shape.

    wide: the live tensor in F32, if the view is a copy of it in the checkpoint's dtype (widened.py); `publish` then
    copies the view's values into the model.
    """

    box: Box
    view: Tensor
    wide: Tensor | None = None

    @property
    def live(self) -> Tensor:
        """The tensor in the model's own storage."""
        return self.view if self.wide is None else self.wide

    def publish(self) -> None:
        """Copy the view's values into the model."""
        if self.wide is not None:
            with writes():
                self.wide.copy_(self.view)


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's piece of a tensor that is split along one dimension; 0 <= index < count."""

    dim: int
    index: int
    count: int


Placement: TypeAlias = dict[str, tuple[ShardView, ...]]
Views: TypeAlias = Mapping[str, Tensor | ShardView | Sequence[ShardView]]


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return tuple((0, d) for d in shape)


def extent(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(end - begin for begin, end in box)


def slices(box: Box) -> tuple[slice, ...]:
    """A box as an index."""
    return tuple(slice(begin, end) for begin, end in box)


def chunk(span: tuple[int, int], index: int, count: int) -> tuple[int, int]:
    """Piece `index` of `count` of [begin, end), as torch.chunk cuts it."""
    begin, end = span
    step = -(-(end - begin) // count)
    return min(begin + index * step, end), min(begin + (index + 1) * step, end)


def own_piece(tensor: Any) -> Tensor:
    """This rank's piece of a DTensor; any other tensor itself."""
    piece: Tensor = tensor.to_local() if hasattr(tensor, "placements") else tensor
    return piece


def storage_key(view: Tensor) -> tuple[Any, ...]:
    """A key that is equal for views of the same storage in the same layout."""
    return view.device, view.data_ptr(), tuple(view.shape), view.stride()


def copy_aside(placement: Placement, *, host: bool = False, pinned: bool = False) -> dict[ShardView, Tensor]:
    """A contiguous copy of every live storage, on its device or in host memory, page-locked or not."""
    copies = {}
    for placed in placement.values():
        for shard in placed:
            view = shard.view.detach()
            if host or pinned:
                copies[shard] = torch.empty(view.shape, dtype=view.dtype, pin_memory=pinned).copy_(view)
            else:
                copies[shard] = view.clone(memory_format=torch.contiguous_format)
    return copies


def increment_versions(placed: Iterable[ShardView]) -> None:
    """Increment torch's version counters, for autograd and cached digests, because torch does not see these writes."""
    with torch.no_grad():
        for shard in placed:
            if not shard.live.is_inference():
                torch.autograd.graph.increment_version(shard.live)
