"""Find a checkpoint's tensors in a model: under their own names, in fused rows, in shards, or under other names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from peraxis_format.arguments import kind_of
from peraxis_format.errors import LiveModelError
from peraxis_format.manifest import Manifest, ModuleEntry
from peraxis_format.torch.place.remedies import FOR_VARIANTS, Remedies
from peraxis_format.torch.place.renamed import checkpoint_views
from peraxis_format.torch.place.shards import Box, Shard, ShardView, Target, Views, chunk, whole
from peraxis_format.torch.place.wrappers import checkpoint_names, names_by_words

__all__ = ["FUSED", "Finder", "check_target", "local_shard", "named", "untied_copies"]

FUSED: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""The last word of a fused parameter's owner -> the words of its rows in a checkpoint, in order."""


@dataclass(frozen=True, slots=True)
class Finder:
    """Looks names up in this order: explicit views, the model's names, fused parameters, transformers' renamings.

    composed: names that transformers composes of several live tensors, or of one in another order.
    """

    live: dict[str, Tensor]
    views: Views
    shards: Mapping[str, Shard]
    fused: Mapping[str, tuple[str, ...]]
    entries: dict[str, ModuleEntry]
    renamed: dict[str, Tensor] = field(default_factory=dict)
    composed: set[str] = field(default_factory=set)
    remedies: Remedies = FOR_VARIANTS

    @classmethod
    def of(
        cls, target: Target, manifest: Manifest, *, views: Views | None, shards: Mapping[str, Shard] | None,
        fused: Mapping[str, tuple[str, ...]], remedies: Remedies,
    ) -> Finder:  # fmt: skip
        """The options are those of placement.place. transformers is used only if the names are not sufficient."""
        entries = {entry.name: entry for entry in manifest.modules}
        finder = cls(named(target), views or {}, shards or {}, fused, entries, remedies=remedies)
        missing = any(not finder.find(name, entry) for name, entry in entries.items())
        if missing and isinstance(target, nn.Module) and not finder.shards:
            found = checkpoint_views(_inner(target), remedies)
            finder.renamed.update(found.views)
            finder.composed.update(found.composed)
        return finder

    def find(self, name: str, entry: ModuleEntry) -> list[ShardView]:
        """The shards of a checkpoint tensor; empty if the model lacks it."""
        if name in self.views:
            given = self.views[name]
            if isinstance(given, Tensor):
                return [ShardView(whole(entry.shape), given)]
            return [given] if isinstance(given, ShardView) else list(given)
        if name in self.live:
            return [self.shard_of(self.live[name], name, entry)]
        found = list(self._rows(name))
        if not found and name in self.renamed:
            found = [ShardView(whole(entry.shape), self.renamed[name])]
        return found

    def shard_of(self, live: Tensor, name: str, entry: ModuleEntry) -> ShardView:
        """A live tensor as the shard of a checkpoint tensor, under its own name or that of an alias."""
        return local_shard(live, self._box(name, entry), name)

    def _box(self, name: str, entry: ModuleEntry) -> Box:
        box = whole(entry.shape)
        shard = self.shards.get(name)
        if shard is None:
            return box
        cut = chunk(box[shard.dim], shard.index, shard.count)
        return (*box[: shard.dim], cut, *box[shard.dim + 1 :])

    def _rows(self, name: str) -> Iterator[ShardView]:
        """Rows of a fused parameter; the manifest's shapes give the rows before them."""
        words = name.split(".")
        for fused_word, members in self.fused.items():
            for i, word in enumerate(words):
                owner = ".".join([*words[:i], fused_word, *words[i + 1 :]])
                if word not in members or owner not in self.live:
                    continue
                names = [".".join([*words[:i], member, *words[i + 1 :]]) for member in members]
                if any(n not in self.entries for n in names):
                    continue
                boxes = [self._box(n, self.entries[n]) for n in names]
                begins = [sum(b[0][1] - b[0][0] for b in boxes[:k]) for k in range(len(boxes) + 1)]
                tensor = self.live[owner]
                if tensor.shape[0] != begins[-1]:
                    raise LiveModelError(
                        f"{owner}: {tensor.shape[0]} rows, but {', '.join(members)} have {begins[-1]} together; "
                        f"{self.remedies.unplaced}"
                    )
                k = members.index(word)
                yield ShardView(boxes[k], tensor.detach()[begins[k] : begins[k + 1]])
                return


def local_shard(tensor: Tensor, box: Box, name: str) -> ShardView:
    """The shard in a live tensor: the tensor itself, or a DTensor's local shard. box: that of all ranks together."""
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return ShardView(box, tensor)
    sharded: Any = tensor
    return ShardView(_shard_box(sharded, box, placements, name), sharded.to_local())


def _shard_box(tensor: Any, box: Box, placements: Sequence[Any], name: str) -> Box:
    """This rank's box of a DTensor; mesh dimensions are cut one after the other."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise LiveModelError(
            f"{name}: this rank is not in the tensor's device mesh; call this on the ranks of the mesh alone"
        )
    cut = list(box)
    for dim, placed in enumerate(placements):
        if placed.is_replicate():
            continue
        if type(placed).__name__ != "Shard":
            raise LiveModelError(f"{name}: placement {placed} cannot be written to; use Shard and Replicate")
        cut[placed.dim] = chunk(cut[placed.dim], coordinate[dim], tensor.device_mesh.size(dim))
    return tuple(cut)


def _inner(model: nn.Module) -> nn.Module:
    """The transformers model inside wrappers, or the model itself."""
    kinds = ((module, [kind.__name__ for kind in type(module).__mro__]) for module in model.modules())
    return next((module for module, names in kinds if "PreTrainedModel" in names), model)


def untied_copies(target: Target) -> list[tuple[Tensor, Tensor]]:
    """The copies of tensors that transformers ties if the configuration says so, each with its source: the head of a
    model that was untied from its embeddings, as long as both have the same values, also if one of them is in F32. A
    checkpoint of the tied model has one tensor for both.

    DTensors, and patterns in place of names, which few models have, are passed over.
    """
    inner = _inner(target) if isinstance(target, nn.Module) else None
    tied = getattr(inner, "_tied_weights_keys", None)
    if inner is None or not isinstance(tied, Mapping):  # before version 5 of transformers, a list of the copies
        return []
    live = named(inner)  # the names of tied tensors have no words of wrappers
    pairs = ((live[copy], live[source]) for copy, source in tied.items() if copy in live and source in live)
    return [(copy, source) for copy, source in pairs if _is_copy(copy, source)]


def _is_copy(copy: Tensor, source: Tensor) -> bool:
    """Whether a tensor has the values of another one, in a storage of its own."""
    if copy.is_meta or any(type(tensor) is not nn.Parameter for tensor in (copy, source)):
        return False
    if copy.data_ptr() == source.data_ptr() or not copy.dim():
        return False
    if (copy.device, copy.shape) != (source.device, source.shape):
        return False
    if copy.dtype is not source.dtype and torch.float32 not in (copy.dtype, source.dtype):
        return False
    # Two tables differ in the first row, so a whole one is seldom converted.
    return _have_equal_values(copy[:1], source[:1]) and _have_equal_values(copy, source)


def _have_equal_values(one: Tensor, other: Tensor) -> bool:
    if one.dtype is other.dtype:
        return torch.equal(one, other)
    return torch.equal(one.float(), other.float())


def check_target(target: object) -> None:
    """Raise LiveModelError unless this is a module or a mapping of names to tensors."""
    if not isinstance(target, nn.Module | Mapping):
        raise LiveModelError(f"the model is {kind_of(target)}; pass a module, or a mapping of names to tensors")


def named(target: Target) -> dict[str, Tensor]:
    """Every tensor of a model under each of its names, or the state dict itself; also under its name in a checkpoint.

    A module's names in a checkpoint come before its own names, and those of a state dict before all others.
    """
    if isinstance(target, nn.Module):
        live = {
            **dict(target.named_buffers(remove_duplicate=False)),
            **dict(target.named_parameters(remove_duplicate=False)),
        }
    else:
        check_target(target)
        live = dict(target)
    flat = next((name for name in live if "_flat_param" in name), None)
    if flat is not None:
        raise LiveModelError(
            f"{flat}: FSDP1 has flattened the weights; wrap the model with fully_shard (FSDP2) instead"
        )
    by_words = {name: live[own] for own, name in names_by_words(live).items()}
    if not isinstance(target, nn.Module):
        return {**by_words, **live}
    stored = {name: live[own] for own, name in checkpoint_names(target, live).items()}
    return {**live, **by_words, **stored}
