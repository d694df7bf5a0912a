"""Check before any work that two checkpoints are a pair; errors name the difference."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from peraxis_format import NAME, Safetensors, TensorInfo
from peraxis_tools.checkpoints.checkpoint import Checkpoint, parse_identity
from peraxis_tools.checkpoints.completeness import with_configuration
from peraxis_tools.checkpoints.kinds import kind_of
from peraxis_tools.compress.plan.plan import TABLES, table_or_kind
from peraxis_tools.compress.plan.quantised import quantisation_of, unmerged_adapter
from peraxis_tools.compress.plan.renaming import base_names, renaming_text
from peraxis_tools.display.notes import note
from peraxis_tools.display.shown import listed
from peraxis_tools.errors import ToolError

__all__ = ["OF_UPDATE", "Roles", "check_pair", "matched", "quantised_side", "tied_pairs"]

_SHOWN: Final = 3
_DIMENSIONS_MAX: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """What a verb calls its two checkpoints. remedy: what to do if they are of two models."""

    base: str = "base"
    fine_tuned: str = "fine-tune"
    remedy: str = "pass the fine-tune's own base"


OF_UPDATE: Final = Roles(
    base="old checkpoint", fine_tuned="new checkpoint", remedy="pass two checkpoints of one model, the old one first"
)
_OF_FINE_TUNE: Final = Roles()


def _infos(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    return {info.name: info for info in checkpoint.tensors.infos()}


def matched(base: Checkpoint, fine_tuned: Checkpoint, base_id: str | None) -> tuple[Checkpoint, Checkpoint]:
    """The checked pair: fine-tune under the base's names, base under its hub id. A note names the files left out."""
    if base_id is not None:
        base = replace(base, identity=parse_identity(base_id))
    fine_tuned = _named_as_base(base, fine_tuned)
    check_pair(base, fine_tuned)
    left = fine_tuned.folder_assets().left
    if left:
        note(f"{fine_tuned.tensors.label}: not carried by a .pxd: {listed(left)}")
    return base, with_configuration(base, fine_tuned)


def _named_as_base(base: Checkpoint, fine_tuned: Checkpoint) -> Checkpoint:
    """The fine-tuned checkpoint with the base's names if they differ by a prefix; a note says what was renamed."""
    names = base_names(_infos(fine_tuned), _infos(base))
    if not names:
        return fine_tuned
    note(f"{fine_tuned.tensors.label}: {renaming_text(names)}; the applied checkpoint has these names")
    return replace(fine_tuned, tensors=fine_tuned.tensors.renamed(names))


def check_pair(base: Checkpoint, fine_tuned: Checkpoint, roles: Roles = _OF_FINE_TUNE) -> None:
    """Raise ToolError unless the fine-tuned checkpoint can be a fine-tune of the base.

    It must share tensors with the base, and shared tensors must have equal shapes, except for the rows of a vocabulary.
    Tensors may be added and dropped: the former are stored, the latter are listed in the manifest.
    """
    base_infos, tuned_infos = _infos(base), _infos(fine_tuned)
    fine_tuned.tensors.check_dtypes()
    _check_tensors(fine_tuned, base)
    base.tensors.check_dtypes(tuned_infos)  # SPEC 7: others of the base are ignored
    pair = f"{base.tensors.label} and {fine_tuned.tensors.label}"
    shared = [name for name in tuned_infos if name in base_infos]
    reason = quantised_side(base, fine_tuned, roles)
    if not shared:
        theirs, ours = listed(sorted(base_infos), _SHOWN), listed(sorted(tuned_infos), _SHOWN)
        why = (
            reason or f"no tensor has the same name (the {roles.base} has {theirs}; the {roles.fine_tuned} has {ours})"
        )
        raise ToolError(f"{pair} are no pair: {why}")
    resized = _vocabularies(base, fine_tuned)
    differing = []
    for name in shared:
        ours_shape, base_shape = tuned_infos[name].shape, base_infos[name].shape
        if ours_shape != base_shape and not _is_resized(name, ours_shape, base_shape, resized):
            differing.append(
                f"{name} is {list(base_shape)} in the {roles.base} and {list(ours_shape)} in the {roles.fine_tuned}"
            )
    if differing:
        raise ToolError(f"{pair} are no pair: {listed(differing, _SHOWN)}; {reason or roles.remedy}")
    if reason is not None:
        note(reason)
    dropped = sorted(name for name in (*base_infos, *base.tensors.foreign) if name not in tuned_infos)
    if dropped:
        lacking = f"{len(dropped)} of the {roles.base}'s tensors"
        note(f"{fine_tuned.tensors.label}: lacks {lacking}: {listed(dropped, _SHOWN)}")


def quantised_side(base: Checkpoint, fine_tuned: Checkpoint, roles: Roles = _OF_FINE_TUNE) -> str | None:
    """Text that names the quantised checkpoint and its remedy; None if neither is quantised."""
    for side, checkpoint in ((roles.base, base), (roles.fine_tuned, fine_tuned)):
        found = quantisation_of(checkpoint.tensors.infos(), _config(checkpoint))
        if found is not None:
            return f"the {side} is quantised ({found.method}: {found.example}); pass the unquantised {side}"
    return None


def _check_tensors(fine_tuned: Checkpoint, base: Checkpoint) -> None:
    """Raise ToolError for a tensor that a .pxd cannot store, bind or name (SPEC 2.14, 3.5)."""
    base_infos, base_label = _infos(base), base.tensors.label
    label, infos = fine_tuned.tensors.label, fine_tuned.tensors.infos()
    if not infos:
        raise ToolError(f"{label}: holds no tensors; fetch the checkpoint again")
    lora = unmerged_adapter(info.name for info in infos)
    if lora is not None:
        raise ToolError(f"{label}: {lora} is of an adapter that is not merged; call merge_and_unload and save it again")
    for side, names in ((label, [info.name for info in infos]), (base_label, [*base_infos, *base.tensors.foreign])):
        odd = next((name for name in names if not NAME.fullmatch(name)), None)
        if odd is not None:
            raise ToolError(
                f"{side}: tensor {odd!r} has a name that PXD does not allow (SPEC 3.5); save it under another name"
            )
    for info in infos:
        shapes = [(label, info.shape)]
        if info.name in base_infos:
            shapes.append((base_label, base_infos[info.name].shape))
        for side, shape in shapes:
            where = f"{side}: tensor {info.name!r}"
            if 0 in shape:
                raise ToolError(f"{where} has no elements (shape {list(shape)}); save the checkpoint without it")
            if len(shape) > _DIMENSIONS_MAX:
                raise ToolError(f"{where} has {len(shape)} dimensions; PXD allows {_DIMENSIONS_MAX} (SPEC 2.14)")


def _config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The content of config.json; {} if it cannot be read."""
    path = None if checkpoint.folder is None else checkpoint.folder / "config.json"
    try:
        found = json.loads(path.read_bytes()) if path is not None and path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _vocabularies(base: Checkpoint, fine_tuned: Checkpoint) -> set[tuple[int, int]]:
    """(rows of the base, of the fine-tune) of resized vocabularies, from the tables and from config.json."""
    base_infos = _infos(base)
    found = {
        (base_infos[info.name].shape[0], info.shape[0])
        for info in fine_tuned.tensors.infos()
        if info.name in base_infos and _is_table(info.name, info.shape, base_infos[info.name].shape)
    }
    before, after = (_config(side).get("vocab_size") for side in (base, fine_tuned))
    if isinstance(before, int) and isinstance(after, int):
        found.add((before, after))
    return found


def _is_table(name: str, shape: tuple[int, ...], base_shape: tuple[int, ...]) -> bool:
    """Whether this is a vocabulary's table of which only the number of rows differs."""
    alike = len(shape) == len(base_shape) > 0 and shape[1:] == base_shape[1:]
    return alike and table_or_kind(name, shape) in TABLES


def _is_resized(
    name: str, shape: tuple[int, ...], base_shape: tuple[int, ...], vocabularies: set[tuple[int, int]]
) -> bool:
    if _is_table(name, shape, base_shape):
        return True
    same_rest = bool(shape) and len(shape) == len(base_shape) and shape[1:] == base_shape[1:]
    return same_rest and (base_shape[0], shape[0]) in vocabularies


def tied_pairs(tensors: Safetensors) -> list[tuple[str, str]]:
    """(module, alias) for matrices of a vocabulary that have the same bytes under two names, or share them."""
    by_shape = defaultdict(list)
    for info in tensors.infos():
        if kind_of(info.name, info.shape) in TABLES:
            by_shape[info.dtype, info.shape].append(info)
    pairs = []
    for infos in by_shape.values():
        if len(infos) < 2:
            continue
        first: dict[str, str] = {}
        # The embedding is first; the head is its alias.
        for info in sorted(infos, key=lambda info: (kind_of(info.name, info.shape), info.name)):
            digest = tensors.sha256(info.name)
            if digest in first:
                pairs.append((first[digest], info.name))
            else:
                first[digest] = info.name
    return pairs
