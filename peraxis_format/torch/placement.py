"""Where the tensors of a checkpoint live in a model: one answer for whole, fused, tied and sharded weights.

A checkpoint tensor is a box of indices, [0, d0) x [0, d1) x ...; a Part says which box of it lies in which live
storage. That is all the rest of the loader knows:

    plain            one part, the whole box, the parameter itself
    tied             one part for each distinct storage among the module and its aliases (mostly one)
    fused            one part, the whole box, a range of rows of the fused parameter (qkv_proj, gate_up_proj, ...)
    sharded          one part, this rank's box, the local tensor (DTensor, or `shards` for plain local tensors)

Sharding along a dimension is torch.chunk's: pieces of ceil(d / n), the last ones shorter or empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from peraxis_format.errors import BindingError
from peraxis_format.manifest import Manifest, ModuleEntry
from peraxis_format.torch.errors import LiveModelError
from peraxis_format.torch.storage import dtype_of

__all__ = [
    "FUSED",
    "Box",
    "Part",
    "Placement",
    "Shard",
    "Target",
    "chunk",
    "copy_aside",
    "increment_versions",
    "place",
    "storage_key",
    "whole",
]

Box: TypeAlias = tuple[tuple[int, int], ...]
Target: TypeAlias = nn.Module | Mapping[str, Tensor]

FUSED: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""The last word of a fused parameter's owner -> the words in a checkpoint whose rows it holds, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A box of a checkpoint tensor and the live storage that holds it. view: a tensor of the box's shape."""

    box: Box
    view: Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's piece of a tensor that is split along one dimension. 0 <= index < count."""

    dim: int
    index: int
    count: int


Placement: TypeAlias = dict[str, tuple[Part, ...]]


def whole(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor."""
    return tuple((0, d) for d in shape)


def chunk(extent: tuple[int, int], index: int, count: int) -> tuple[int, int]:
    """Piece `index` of `count` of [begin, end), as torch.chunk cuts."""
    begin, end = extent
    step = -(-(end - begin) // count)
    return min(begin + index * step, end), min(begin + (index + 1) * step, end)


def place(
    target: Target,
    manifest: Manifest,
    *,
    views: Mapping[str, Tensor | Part | Sequence[Part]] | None = None,
    shards: Mapping[str, Shard] | None = None,
    fused: Mapping[str, tuple[str, ...]] = FUSED,
) -> Placement:
    """Find the live storage of every module of a manifest.

    views: explicit answers for names that the model does not have under this name (a tensor: the whole box). shards:
    names whose live tensor is a piece. fused: see FUSED.
    Raises BindingError (E401, E402, E403) where the model is not the base, LiveModelError where it cannot hold the
    fine-tune: transformed weights, a shape or dtype that changes, a tensor that would have to go away.
    """
    _refuse_quantised(target)
    _refuse_part(manifest)
    finder = _Finder(_named(target), manifest, dict(views or {}), dict(shards or {}), fused)
    aliases: dict[str, list[str]] = {}
    for name, alias in manifest.tied:
        aliases.setdefault(name, []).append(alias)
    placement: Placement = {}
    missing: list[str] = []
    for entry in manifest.modules:
        parts = [part for name in (entry.name, *aliases.get(entry.name, [])) for part in finder.find(name, entry)]
        if not parts:
            missing.append(entry.name)
            continue
        for part in parts:
            _check(entry, part)
        placement[entry.name] = _distinct(parts)
    _refuse_missing(manifest, missing)
    _refuse_dropped(manifest, finder)
    _refuse_shared(manifest, placement)
    return placement


def _refuse_part(manifest: Manifest) -> None:
    # SPEC 14: a part would leave the live model a mixture of base and fine-tune.
    if "peraxis.part" in manifest.metadata:
        raise LiveModelError("the file is a part of a delta; put the parts together with `peraxis-tools merge` first")


def _named(target: Target) -> dict[str, Tensor]:
    """Every tensor of a model under each of its names, or the state dict itself."""
    if not isinstance(target, nn.Module):
        return dict(target)
    return {
        **dict(target.named_buffers(remove_duplicate=False)),
        **dict(target.named_parameters(remove_duplicate=False)),
    }


def _refuse_quantised(target: Target) -> None:
    quantised = getattr(target, "hf_quantizer", None) is not None or getattr(target, "is_quantized", False)
    if quantised:
        raise LiveModelError(
            "the model is quantised: its weights are not the base's any more; load it without quantization_config, "
            "apply, then quantise"
        )


@dataclass(frozen=True, slots=True)
class _Finder:
    """Looks names up: explicit views, then the model's own names, then rows of fused parameters."""

    live: dict[str, Tensor]
    manifest: Manifest
    views: dict[str, Tensor | Part | Sequence[Part]]
    shards: dict[str, Shard]
    fused: Mapping[str, tuple[str, ...]]

    def find(self, name: str, entry: ModuleEntry) -> list[Part]:
        """The parts of a checkpoint tensor; none where the model lacks it."""
        if name in self.views:
            given = self.views[name]
            if isinstance(given, Tensor):
                return [Part(whole(entry.shape), given)]
            return [given] if isinstance(given, Part) else list(given)
        if name in self.live:
            return [_local(self.live[name], self._box(name, entry), name)]
        return list(self._rows(name, entry))

    def _box(self, name: str, entry: ModuleEntry) -> Box:
        box = whole(entry.shape)
        shard = self.shards.get(name)
        if shard is None:
            return box
        cut = chunk(box[shard.dim], shard.index, shard.count)
        return (*box[: shard.dim], cut, *box[shard.dim + 1 :])

    def _rows(self, name: str, entry: ModuleEntry) -> Iterator[Part]:
        """Rows of a fused parameter: those of the words before this one come first, by the manifest's shapes."""
        words = name.split(".")
        entries = {module.name: module for module in self.manifest.modules}
        for fused_word, members in self.fused.items():
            for i, word in enumerate(words):
                owner = ".".join([*words[:i], fused_word, *words[i + 1 :]])
                if word not in members or owner not in self.live:
                    continue
                names = [".".join([*words[:i], member, *words[i + 1 :]]) for member in members]
                if any(n not in entries for n in names):
                    continue
                boxes = [self._box(n, entries[n]) for n in names]
                begins = [sum(b[0][1] - b[0][0] for b in boxes[:k]) for k in range(len(boxes) + 1)]
                tensor = self.live[owner]
                if tensor.shape[0] != begins[-1]:
                    raise LiveModelError(
                        f"{owner}: {tensor.shape[0]} rows, but {', '.join(members)} have {begins[-1]} together; "
                        "say where they lie with `views`"
                    )
                k = members.index(word)
                yield Part(boxes[k], tensor.detach()[begins[k] : begins[k + 1]])
                return


def _local(tensor: Tensor, box: Box, name: str) -> Part:
    """The part that a live tensor holds: itself, or a DTensor's local shard."""
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return Part(box, tensor)
    sharded: Any = tensor
    return Part(_shard_box(sharded, box, placements, name), sharded.to_local())


def _shard_box(tensor: Any, box: Box, placements: Sequence[Any], name: str) -> Box:
    """This rank's box of a DTensor: mesh dimensions cut one after the other."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise LiveModelError(f"{name}: this rank is not in the tensor's device mesh")
    cut = list(box)
    for dim, placed in enumerate(placements):
        if placed.is_replicate():
            continue
        if type(placed).__name__ != "Shard":
            raise LiveModelError(f"{name}: placement {placed} cannot be written to; use Shard and Replicate")
        cut[placed.dim] = chunk(cut[placed.dim], coordinate[dim], tensor.device_mesh.size(dim))
    return tuple(cut)


def _check(entry: ModuleEntry, part: Part) -> None:
    """The live tensor is the base's (SPEC 7.2), and can hold the fine-tuned one in place."""
    name, view = entry.name, part.view
    if type(view) not in (Tensor, nn.Parameter, nn.Buffer):
        raise LiveModelError(f"{name}: {type(view).__name__} is no plain tensor; apply before quantising or wrapping")
    if view.device.type == "meta":
        raise LiveModelError(f"{name}: on the meta device, without storage; load the weights first")
    dtype = dtype_of(view, name)
    local = tuple(end - begin for begin, end in part.box)
    base = entry.base
    if base is not None:
        fits = part.box == whole(entry.shape) and base.shape != entry.shape
        expected = base.shape if fits else local
        if dtype is not base.dtype or tuple(view.shape) != expected:
            raise BindingError(
                "E403",
                f"{dtype.value} {list(view.shape)}, not {base.dtype.value} {list(expected)}",
                field=name,
            )
    if dtype is not entry.dtype or tuple(view.shape) != local or (base is not None and base.shape != entry.shape):
        raise LiveModelError(
            f"{name}: the fine-tune has {entry.dtype.value} {list(entry.shape)}, the live model {dtype.value} "
            f"{list(view.shape)}; storage cannot change in place: write the checkpoint with `peraxis-tools apply`"
        )


def storage_key(view: Tensor) -> tuple[Any, ...]:
    """Equal for views of the same storage in the same layout."""
    return view.device, view.data_ptr(), tuple(view.shape), view.stride()


def _distinct(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Each storage once: tied tensors are one."""
    return tuple({(part.box, storage_key(part.view)): part for part in parts}.values())


def _refuse_missing(manifest: Manifest, missing: list[str]) -> None:
    entries = {module.name: module for module in manifest.modules}
    bound = [module for module in manifest.modules if module.base is not None]
    lacking = [name for name in missing if entries[name].base is not None]
    if lacking and len(lacking) == len(bound):
        raise BindingError("E401", f"the live model has no {lacking[0]!r}, nor any other of {len(lacking)}")
    if lacking:
        detail = f"the live model has no {lacking[0]!r} ({len(lacking)} of {len(bound)} missing)"
        raise BindingError("E402", detail)
    if missing:
        raise LiveModelError(
            f"the live model has no {missing[0]!r}, which the fine-tune adds; write the checkpoint with "
            "`peraxis-tools apply`, or give the tensor a place with `views`"
        )


def _refuse_dropped(manifest: Manifest, finder: _Finder) -> None:
    left = [name for name in manifest.dropped if name in finder.live]
    if left:
        raise LiveModelError(
            f"the fine-tune has no {left[0]!r} any more, but the live model uses it; write the checkpoint with "
            "`peraxis-tools apply`"
        )


def _refuse_shared(manifest: Manifest, placement: Placement) -> None:
    """Two modules in one storage can only be one module under two names."""
    held: dict[tuple[Any, ...], ModuleEntry] = {}
    for entry in manifest.modules:
        for part in placement[entry.name]:
            if math.prod(part.view.shape) == 0:
                continue
            other = held.setdefault(storage_key(part.view), entry)
            same = (other.sha256, other.base, other.components) == (entry.sha256, entry.base, entry.components)
            if other is not entry and not same:
                raise LiveModelError(
                    f"{entry.name} and {other.name} share storage in the live model but differ in the fine-tune; "
                    "untie them first (tie_word_embeddings=False)"
                )


def copy_aside(placement: Placement, *, pinned: bool = False) -> dict[Part, Tensor]:
    """A contiguous copy of every live storage: beside it, or in page-locked host memory."""
    copies = {}
    for parts in placement.values():
        for part in parts:
            view = part.view.detach()
            if pinned:
                host = torch.empty(view.shape, dtype=view.dtype, pin_memory=True)
                copies[part] = host.copy_(view)
            else:
                copies[part] = view.clone(memory_format=torch.contiguous_format)
    return copies


def increment_versions(placement: Placement) -> None:
    """Tell autograd and whoever remembers digests that the weights changed (they are written behind torch's back)."""
    with torch.no_grad():
        for parts in placement.values():
            for part in parts:
                if not part.view.is_inference():
                    torch.autograd.graph.increment_version(part.view)
