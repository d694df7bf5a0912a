"""Find the tensors of a checkpoint in a model, and check that they can become the fine-tune (see shards.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peraxis_format.dtypes import DType
from peraxis_format.errors import BindingError, LiveModelError
from peraxis_format.manifest import PART_KEY, Manifest, ModuleEntry
from peraxis_format.ops.tensors import dtype_of, torch_dtype
from peraxis_format.torch.place.finder import FUSED, Finder, untied_copies
from peraxis_format.torch.place.remedies import FOR_VARIANTS, Remedies
from peraxis_format.torch.place.shards import (
    Placement,
    Shard,
    ShardView,
    Target,
    Views,
    extent,
    own_piece,
    storage_key,
    whole,
)
from peraxis_format.torch.place.widened import holds_the_dtype, is_widened, narrowed

__all__ = ["place"]


def place(
    target: Target,
    manifest: Manifest,
    *,
    views: Views | None = None,
    shards: Mapping[str, Shard] | None = None,
    fused: Mapping[str, tuple[str, ...]] = FUSED,
    remedies: Remedies = FOR_VARIANTS,
    copies: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> Placement:
    """Find the live storage of every module of a manifest.

    views: the live tensor for a name that the model does not have. shards: names whose live tensor is a shard. fused:
    see FUSED. remedies: what the caller can do, for errors. copies: `untied_copies` of the model with the base's
    weights, if it may have others now. Tensors that transformers renames are found without these.
    Raises BindingError (E401, E402, E403) if the model is not the base. Raises LiveModelError if the model cannot
    become the fine-tune: transformed weights, another shape or dtype, or a tensor that the fine-tune lacks.
    """
    _refuse_quantised(target)
    _refuse_part(manifest)
    finder = Finder.of(target, manifest, views=views, shards=shards, fused=fused, remedies=remedies)
    names = manifest.names()
    placement: Placement = {}
    missing: list[str] = []
    for entry in manifest.modules:
        placed = [shard for name in names[entry.name] for shard in finder.find(name, entry)]
        if not placed:
            missing.append(entry.name)
            continue
        placement[entry.name] = tuple(placed)
    mixed = holds_the_dtype(placement, manifest.modules)
    for entry in manifest.modules:
        if entry.name in placement:
            placement[entry.name] = _distinct(
                [_checked(entry, shard, remedies, manifest, mixed=mixed) for shard in placement[entry.name]]
            )
    _refuse_composed(missing, finder, remedies)
    _refuse_missing(manifest, missing, finder, remedies)
    _refuse_dropped(manifest, finder, placement, remedies)
    for entry, shard in _copies_placed(untied_copies(target) if copies is None else copies, finder, placement):
        placement[entry.name] += (_checked(entry, shard, remedies, manifest, mixed=mixed),)
    _refuse_shared(manifest, placement)
    return placement


def _refuse_part(manifest: Manifest) -> None:
    # SPEC 14: a part would make the live model a mixture of base and fine-tune.
    if PART_KEY in manifest.metadata:
        raise LiveModelError("the file is a part of a delta; join the parts with `peraxis-tools merge` first")


def _refuse_quantised(target: Target) -> None:
    quantised = getattr(target, "hf_quantizer", None) is not None or getattr(target, "is_quantized", False)
    if quantised:
        raise LiveModelError(
            "the model is quantised, so its weights are not the base's; load it without quantization_config, "
            "apply, then quantise"
        )


def _checked(entry: ModuleEntry, shard: ShardView, remedies: Remedies, manifest: Manifest, *, mixed: bool) -> ShardView:
    """The shard, in the base's dtype if the live model has a wider one."""
    name, view = entry.name, shard.view
    if type(view) not in (Tensor, nn.Parameter, nn.Buffer):
        raise LiveModelError(
            f"{name}: {type(view).__name__} is not a plain tensor; apply before quantising or wrapping"
        )
    if view.device.type == "meta":
        raise LiveModelError(f"{name}: on the meta device, without storage; load the weights first")
    if mixed and is_widened(entry, view) and tuple(view.shape) == extent(shard.box):
        shard = narrowed(entry, shard)
    _check(entry, shard, remedies, manifest)
    return shard


def _check(entry: ModuleEntry, shard: ShardView, remedies: Remedies, manifest: Manifest) -> None:
    """Check that the live tensor is the base's (SPEC 7.2), and that the fine-tuned one fits into its storage."""
    name, view = entry.name, shard.view
    dtype = dtype_of(view, name)
    local = extent(shard.box)
    base = entry.base
    if base is not None:
        fits = shard.box == whole(entry.shape) and base.shape != entry.shape
        expected = base.shape if fits else local
        if dtype is not base.dtype and tuple(view.shape) == expected:
            if entry.dtype is not base.dtype:  # in no dtype of the live model is it both
                raise LiveModelError(
                    f"{name}: {entry.dtype.value} in the fine-tune, {base.dtype.value} in its base; "
                    f"{remedies.other(entry, base.dtype, base.shape)}"
                )
            raise BindingError(
                "E403", f"{dtype.value}, not {base.dtype.value}: {_loading(base.dtype, manifest)}", field=name
            )
        if tuple(view.shape) != expected:
            raise BindingError(
                "E403",
                f"{dtype.value} {list(view.shape)}, not {base.dtype.value} {list(expected)}",
                field=name,
            )
    if dtype is not entry.dtype or tuple(view.shape) != local or (base is not None and base.shape != entry.shape):
        raise LiveModelError(
            f"{name}: the fine-tune has {entry.dtype.value} {list(entry.shape)}, the live model {dtype.value} "
            f"{list(view.shape)}; {remedies.other(entry, dtype, tuple(view.shape))}"
        )


def _loading(dtype: DType, manifest: Manifest) -> str:
    """How the live model gets the base's dtype. transformers loads a model in one dtype, whatever its file has."""
    dtypes = {entry.base.dtype for entry in manifest.modules if entry.base is not None and entry.base.dtype.is_float}
    if dtypes == {dtype}:
        return f"load the model with dtype={torch_dtype(dtype)}"
    several = " and ".join(sorted(each.value for each in dtypes))
    return (
        f"the base has tensors in {several}; load the model in float32, and cast each tensor to its dtype in the base"
    )


def _copies_placed(
    copies: Sequence[tuple[Tensor, Tensor]], finder: Finder, placement: Placement
) -> Iterator[tuple[ModuleEntry, ShardView]]:
    """The copies that no module is placed in, as further shards of the modules that their sources have."""
    places = {storage_key(shard.live): name for name, placed in placement.items() for shard in placed}
    for copy, source in copies:
        if storage_key(source) in places and storage_key(copy) not in places:
            entry = finder.entries[places[storage_key(source)]]
            places[storage_key(copy)] = entry.name
            yield entry, finder.shard_of(copy, entry.name, entry)


def _distinct(placed: Sequence[ShardView]) -> tuple[ShardView, ...]:
    """The shards with distinct storages; tied tensors share one."""
    return tuple({(shard.box, storage_key(shard.live)): shard for shard in placed}.values())


def _refuse_composed(missing: list[str], finder: Finder, remedies: Remedies) -> None:
    composed = next((name for name in missing if name in finder.composed), None)
    if composed is not None:
        raise LiveModelError(
            f"{composed}: transformers stores it in several tensors, or in another order, so it is not one tensor "
            f"of the live model; {remedies.composed}"
        )


def _without_prefix(name: str, live: Mapping[str, Tensor]) -> str | None:
    """The name after its first word, if the live model has it: AutoModel has no prefix `model.`, files have one."""
    rest = name.partition(".")[2]
    return rest if rest in live else None


def _refuse_missing(manifest: Manifest, missing: list[str], finder: Finder, remedies: Remedies) -> None:
    entries = {module.name: module for module in manifest.modules}
    bound = [module for module in manifest.modules if module.base is not None]
    lacking = [name for name in missing if entries[name].base is not None]
    if lacking and len(lacking) == len(bound):
        shorter = next((name for name in lacking if _without_prefix(name, finder.live)), None)
        if shorter is not None:
            raise LiveModelError(
                f"the live model has {_without_prefix(shorter, finder.live)} in place of {shorter}, like a part of the "
                f"model; load all of it (AutoModelForCausalLM), or {remedies.unplaced}"
            )
        raise BindingError("E401", f"the live model has none of {len(lacking)} base tensors, like {lacking[0]!r}")
    if lacking:
        detail = f"the live model has no {lacking[0]!r} ({len(lacking)} of {len(bound)} missing)"
        raise BindingError("E402", detail)
    if missing:
        raise LiveModelError(f"the live model has no {missing[0]!r}, which the fine-tune adds; {remedies.added}")


def _refuse_dropped(manifest: Manifest, finder: Finder, placement: Placement, remedies: Remedies) -> None:
    # A checkpoint without the head of a tied model has all of it: the model ties the head itself, so its storage is
    # that of a module, and is written with it.
    held = {storage_key(shard.live) for placed in placement.values() for shard in placed}
    live = {name: finder.live[name] for name in manifest.dropped if name in finder.live}
    left = [name for name, tensor in live.items() if storage_key(own_piece(tensor)) not in held]
    if left:
        raise LiveModelError(f"the fine-tune has no {left[0]!r}, but the live model uses it; {remedies.dropped}")


def _content(entry: ModuleEntry) -> tuple[object, ...]:
    return entry.sha256, entry.base, entry.components, entry.result


def _refuse_shared(manifest: Manifest, placement: Placement) -> None:
    """Raise LiveModelError if two different modules share one storage."""
    held: dict[tuple[Any, ...], ModuleEntry] = {}
    for entry in manifest.modules:
        for shard in placement[entry.name]:
            if math.prod(shard.view.shape) == 0:
                continue
            other = held.setdefault(storage_key(shard.live), entry)
            if other is not entry and _content(other) != _content(entry):
                raise LiveModelError(
                    f"{entry.name} and {other.name} share storage in the live model but differ in the fine-tune; "
                    "untie them first (load with tie_word_embeddings=False, then copy the one into the other)"
                )
