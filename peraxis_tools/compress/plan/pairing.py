"""Do two checkpoints belong together? Asked before any work, answered by naming what differs."""

from __future__ import annotations

from collections import defaultdict

from peraxis_format import Safetensors
from peraxis_tools.checkpoint import Checkpoint
from peraxis_tools.compress.plan.plan import TABLES
from peraxis_tools.errors import ToolError
from peraxis_tools.kinds import kind_of

__all__ = ["check_pair", "tied_pairs"]

_SHOWN = 3


def check_pair(base: Checkpoint, fine_tuned: Checkpoint) -> None:
    """Raise ToolError unless the fine-tuned checkpoint can be a fine-tune of the base.

    It must share tensors with the base, and shared matrices must have equal shapes, but for the rows of a
    vocabulary. Added and dropped tensors are fine: they are stored, and named in the manifest.
    """
    base_infos = {info.name: info for info in base.tensors.infos()}
    tuned_infos = {info.name: info for info in fine_tuned.tensors.infos()}
    pair = f"{base.tensors.label} and {fine_tuned.tensors.label}"
    if not tuned_infos:
        raise ToolError(f"{fine_tuned.tensors.label}: holds no tensors")
    shared = [name for name in tuned_infos if name in base_infos]
    if not shared:
        theirs = ", ".join(sorted(base_infos)[:_SHOWN])
        ours = ", ".join(sorted(tuned_infos)[:_SHOWN])
        raise ToolError(f"{pair} are no pair: no tensor has the same name (base has {theirs}; fine-tuned {ours})")
    differing = []
    for name in shared:
        ours_shape, base_shape = tuned_infos[name].shape, base_infos[name].shape
        resized = kind_of(name, ours_shape) in TABLES and ours_shape[1:] == base_shape[1:]
        if ours_shape != base_shape and not resized:
            differing.append(f"{name} is {list(base_shape)} in the base and {list(ours_shape)} in the fine-tuned")
    if differing:
        more = f", and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise ToolError(f"{pair} are no pair: {'; '.join(differing[:_SHOWN])}{more}; pass the fine-tune's own base")


def tied_pairs(tensors: Safetensors) -> list[tuple[str, str]]:
    """(module, alias) for matrices of a vocabulary that hold the same bytes under two names, or share them."""
    by_shape = defaultdict(list)
    for info in tensors.infos():
        if kind_of(info.name, info.shape) in TABLES:
            by_shape[info.dtype, info.shape].append(info)
    pairs = []
    for infos in by_shape.values():
        if len(infos) < 2:
            continue
        first: dict[str, str] = {}
        # The embedding stands first, the head is its alias.
        for info in sorted(infos, key=lambda info: (kind_of(info.name, info.shape), info.name)):
            digest = tensors.sha256(info.name)
            if digest in first:
                pairs.append((first[digest], info.name))
            else:
                first[digest] = info.name
    return pairs
