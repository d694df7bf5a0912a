"""The results of `diff`: by module, by group, in total."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["NEEDS_BASE", "DiffResult", "GroupDiff", "ManifestChange", "ModuleDiff", "group", "relative_distance"]

NEEDS_BASE: Final = "stored exactly; pass base (--base) for its delta"  # a note of ModuleDiff


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestChange:
    """One field that differs between the manifests, as texts; None if one lacks it."""

    field: str
    a: str | None
    b: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleDiff:
    """One module in both.

    identical: the payloads are equal, or both store the same weights without loss (with a checkpoint: the weights after
    apply are equal). changes: differences of its entries, like `axis row -> col`. sign_agreement: the share of equal
    bits of the first masks (with a checkpoint: of the changed weights). scale_change: the mean |first component| of B
    divided by that of A. norm_a, norm_b, distance: of the deltas; relative = distance / norm_a. Each is None if it is
    unknown, and note gives the reason.
    """

    name: str
    group: str
    identical: bool
    changes: tuple[str, ...] = ()
    sign_agreement: float | None = None
    scale_change: float | None = None
    norm_a: float | None = None
    norm_b: float | None = None
    distance: float | None = None
    relative: float | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupDiff:
    """Several modules together. relative is over the `measured` ones, by root of sums of squares."""

    label: str
    module_count: int
    different: int
    measured: int
    sign_agreement: float | None
    relative: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffResult:
    """The result of `diff`: of two deltas, or of a delta and a fine-tuned checkpoint.

    content_id_b: None for a checkpoint. equal: whether both have the same content; with a checkpoint, whether all
    tensors are equal bit for bit.
    """

    a: str
    b: str
    content_id_a: str
    content_id_b: str | None
    equal: bool
    manifest_changes: tuple[ManifestChange, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    total: GroupDiff
    by_group: tuple[GroupDiff, ...]
    modules: tuple[ModuleDiff, ...]


def relative_distance(distance: float | None, norm: float | None) -> float | None:
    """||dA - dB|| / ||dA||; None if either is unknown, or if dA is zero and they differ."""
    if distance is None or norm is None:
        return None
    if distance == 0.0:
        return 0.0
    return distance / norm if norm > 0.0 else None


def group(
    label: str, modules: Iterable[ModuleDiff], weights: Callable[[str], int], *, against: Literal["a", "b"] = "a"
) -> GroupDiff:
    """Sum up modules. weights: the number of weights of each module; it weights the mean of sign agreement.

    against: the delta whose norm the relative distance is divided by.
    """
    modules = list(modules)
    norms = {m.name: m.norm_a if against == "a" else m.norm_b for m in modules}
    measured = [m for m in modules if m.distance is not None and norms[m.name] is not None]
    distance = math.sqrt(math.fsum((m.distance or 0.0) ** 2 for m in measured))
    norm = math.sqrt(math.fsum((norms[m.name] or 0.0) ** 2 for m in measured))
    signed = [(m.sign_agreement, weights(m.name)) for m in modules if m.sign_agreement is not None]
    count = sum(weight for _, weight in signed)
    return GroupDiff(
        label=label,
        module_count=len(modules),
        different=sum(not m.identical for m in modules),
        measured=len(measured),
        sign_agreement=math.fsum(share * weight for share, weight in signed) / count if count else None,
        relative=relative_distance(distance, norm) if measured else None,
    )
