"""The places of checkpoint tensors in vLLM's layers.

vLLM layer                    checkpoint tensor                          piece of rank r of n
QKVParallelLinear             q_proj, k_proj, v_proj, or one fused       heads; k and v heads may be repeated
MergedColumnParallelLinear    gate_proj, up_proj, or one fused           rows [r, r + 1) / n of each
ColumnParallelLinear          itself                                     rows [r, r + 1) / n
RowParallelLinear             itself                                     columns [r, r + 1) / n; the bias whole
VocabParallelEmbedding        itself, without the padding rows           rows of the vocabulary
any other layer               itself                                     whole
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from peraxis_format.engines.vllm.names import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from peraxis_format.errors import LiveModelError
from peraxis_format.manifest import Manifest
from peraxis_format.torch import FUSED, ShardView

__all__ = ["Placed", "placed_tensors", "plain_tensors", "refuse_uncovered", "views"]

_Box: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A piece of a checkpoint tensor in a layer of this rank.

    box: of the checkpoint tensor. rows: [begin, end) of the layer's parameter.
    """

    module: nn.Module
    parameter: str
    rows: tuple[int, int]
    box: _Box

    @property
    def view(self) -> Tensor:
        """The live storage, as a plain tensor of the box's shape."""
        tensor = plain(getattr(self.module, self.parameter))
        return tensor[self.rows[0] : self.rows[1]] if tensor.ndim else tensor


def plain(tensor: Tensor) -> Tensor:
    """The same storage without vLLM's parameter class."""
    return tensor.detach().as_subclass(Tensor)


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter under each of its names, as plain tensors."""
    return {name: plain(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)}


def views(model: nn.Module, manifest: Manifest) -> dict[str, tuple[ShardView, ...]]:
    """The live storages of this rank for each name in a manifest; names that the model lacks are left out."""
    found = placed_tensors(model, manifest)
    return {name: tuple(ShardView(p.box, p.view) for p in places) for name, places in found.items()}


def placed_tensors(model: nn.Module, manifest: Manifest) -> dict[str, tuple[Placed, ...]]:
    """The pieces in the layers of this rank for each name in a manifest; names that the model lacks are left out."""
    live: dict[str, list[Placed]] = {}
    packed = getattr(model, "packed_modules_mapping", None) or FUSED
    for owner, module in model.named_modules():
        for name, piece in _pieces(owner, module, packed):
            live.setdefault(name, []).append(piece)
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    rename = (lambda name: name) if mapper is None else mapper.get_rename_mapper().map_name
    names = [*(entry.name for entry in manifest.modules), *(alias for _, alias in manifest.tied)]
    found = {name: live.get(rename(name) or "") for name in names}
    return {name: tuple(pieces) for name, pieces in found.items() if pieces}


def refuse_uncovered(model: nn.Module, manifest: Manifest) -> None:
    """Raise LiveModelError if a linear, an embedding or lm_head has a tensor that the fine-tune does not have.

    A manifest names every tensor (SPEC 3.7), so the layer would still use the base's weights.
    """
    pieces = [piece for found in placed_tensors(model, manifest).values() for piece in found]
    covered = {getattr(piece.module, piece.parameter).data_ptr() for piece in pieces}
    for owner, module in model.named_modules():
        if not isinstance(module, LinearBase | VocabParallelEmbedding):
            continue
        for parameter, tensor in module._parameters.items():
            if tensor is not None and tensor.numel() and tensor.data_ptr() not in covered:
                raise LiveModelError(f"the fine-tune has nothing for {owner}.{parameter}, which the model uses")


def _pieces(owner: str, module: nn.Module, packed: Any) -> Iterator[tuple[str, Placed]]:
    """(name, piece) for each checkpoint tensor in a layer's own parameters."""
    for parameter, tensor in module._parameters.items():
        if tensor is None or not tensor.numel():
            continue
        prefix, _, word = owner.rpartition(".")
        members = (
            list(packed.get(word, ())) if isinstance(module, QKVParallelLinear | MergedColumnParallelLinear) else []
        )
        segments = _segments(module, tensor)
        if len(members) != len(segments):
            name, at = f"{owner}.{parameter}" if owner else parameter, 0
            for full, begin, rows in segments:
                yield name, Placed(module, parameter, rows, _box(module, parameter, tensor, at + begin, rows))
                at += full
            continue
        for member, (_, begin, rows) in zip(members, segments, strict=True):
            name = f"{prefix}.{member}.{parameter}" if prefix else f"{member}.{parameter}"
            yield name, Placed(module, parameter, rows, _box(module, parameter, tensor, begin, rows))


_Segment: TypeAlias = tuple[int, int, tuple[int, int]]  # rows in the checkpoint, first row here, rows of the parameter


def _segments(module: Any, tensor: Tensor) -> list[_Segment]:
    """The ranges of rows of a layer's parameter, in order."""
    rank = int(getattr(module, "tp_rank", 0))
    count = tensor.shape[0] if tensor.ndim else 1
    if isinstance(module, VocabParallelEmbedding):
        indices = module.shard_indices
        begin, end = int(indices.org_vocab_start_index), int(indices.org_vocab_end_index)
        return [(end, begin, (0, end - begin))]
    if isinstance(module, QKVParallelLinear):
        key_rank = rank // module.num_kv_head_replicas
        sizes = [
            (module.total_num_heads, module.num_heads, module.head_size, rank),
            (module.total_num_kv_heads, module.num_kv_heads, module.head_size, key_rank),
            (module.total_num_kv_heads, module.num_kv_heads, module.v_head_size, key_rank),
        ]
        return _stacked([(total * size, own * size, at) for total, own, size, at in sizes])
    if isinstance(module, MergedColumnParallelLinear):
        return _stacked([(size, size // module.tp_size, rank) for size in module.output_sizes])
    if isinstance(module, ColumnParallelLinear):
        return [(module.output_size, rank * count, (0, count))]
    return [(count, 0, (0, count))]


def _stacked(sizes: Sequence[tuple[int, int, int]]) -> list[_Segment]:
    """Consecutive segments, from (rows in the checkpoint, rows here, index of the piece)."""
    found, at = [], 0
    for full, own, piece in sizes:
        found.append((full, piece * own, (at, at + own)))
        at += own
    return found


def _box(module: Any, parameter: str, tensor: Tensor, begin: int, rows: tuple[int, int]) -> _Box:
    if not tensor.ndim:
        return ()
    rest = [(0, size) for size in tensor.shape[1:]]
    if isinstance(module, RowParallelLinear) and parameter == "weight":
        width = tensor.shape[1]
        rest[0] = (module.tp_rank * width, (module.tp_rank + 1) * width)
    return ((begin, begin + rows[1] - rows[0]), *rest)
