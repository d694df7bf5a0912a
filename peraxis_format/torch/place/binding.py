"""Step 12 of SPEC 8 on a live model: check that its weights are the base of the delta.

Every storage is hashed once (digests.py). If ranks have only pieces of a tensor, the pieces are sent to one rank, in
turns, which hashes the whole. Copies of a piece are sent once, and compared (replicas.py). Nothing is written before
all ranks agree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from peraxis_format.binding import check_base_digest
from peraxis_format.errors import BindingError, LiveModelError, PxdError, base_advice
from peraxis_format.manifest import Manifest, ModuleEntry
from peraxis_format.torch.place.digests import digests
from peraxis_format.torch.place.pieces import Layout, assembled_digest
from peraxis_format.torch.place.ranks import KeptError, Ranks, agree, graver, is_distributed
from peraxis_format.torch.place.replicas import check_replicas
from peraxis_format.torch.place.shards import Placement, whole
from peraxis_format.torch.ring import Ring

__all__ = ["check_live", "is_sharded", "sharded_anywhere"]


def is_sharded(placement: Placement, manifest: Manifest) -> bool:
    """Whether some module is only partly on this rank."""
    return any(shard.box != whole(entry.shape) for entry in manifest.modules for shard in placement[entry.name])


def check_live(
    manifest: Manifest,
    placement: Placement,
    *,
    ring: Ring,
    workers: int | None = None,
    group: Any = None,
    known: Mapping[str, str] | None = None,
) -> None:
    """Check the bytes of every base tensor (SPEC 7.3).

    ring: the reserved ring of their device. group: the torch.distributed group whose ranks have the pieces of sharded
    tensors (default: all ranks). known: hex digests of base tensors that were checked before; their weights are not
    read. Raises BindingError (E404) for the first module that differs, on all ranks.
    """
    known = known or {}
    for entry in manifest.modules:
        if entry.base is not None and entry.name in known:
            try:
                check_base_digest(entry, known[entry.name])
            except PxdError as failure:
                raise _named(failure, manifest) from None
    bound = [entry for entry in manifest.modules if entry.base is not None and entry.name not in known]
    local = [(entry, shard) for entry in bound for shard in placement[entry.name] if shard.box == whole(entry.shape)]
    piece = next((e for e in bound if any(shard.box != whole(e.shape) for shard in placement[e.name])), None)
    error: BaseException | None = None
    try:
        views = [shard.view for _, shard in local]
        with contextlib.closing(digests(views, device=ring.device, ring=ring, workers=workers)) as found:
            for (entry, _), digest in zip(local, found, strict=True):
                check_base_digest(entry, digest)
    except PxdError as failure:
        error = _named(failure, manifest)
    except BaseException as failure:
        error = failure
    if sharded_anywhere(here=piece is not None, group=group):
        try:
            _check_pieces(bound, placement, group)
        except PxdError as failure:
            error = graver(error, _named(failure, manifest))
        except BaseException as failure:
            error = graver(error, failure)
        agree(error, group)
    elif error is not None:
        raise error
    elif piece is not None:
        raise LiveModelError(f"{piece.name}: only a piece of it is on this rank; initialise torch.distributed")


def _named(failure: PxdError, manifest: Manifest) -> PxdError:
    """The error with the name of the delta's base, or of the update before it."""
    error = BindingError(failure.code, failure.detail, field=failure.field)
    error.advice = (
        base_advice(manifest.base.id, manifest.base.revision)
        if manifest.previous is None
        else f"it follows update {manifest.previous}: apply that update to the model first"
    )
    return error


# --- pieces on several ranks ---------------------------------------------------------------------------


def sharded_anywhere(*, here: bool, group: Any = None) -> bool:
    """Whether any rank has only a piece of a module, so that all ranks have to act together."""
    return is_distributed() and any(Ranks(group).all_gather(here))


def _check_pieces(bound: Sequence[ModuleEntry], placement: Placement, group: Any) -> None:
    """Hash each module that is sharded on one rank, which differs each time. Equal pieces are sent once, and compared.

    A failure is raised last, the gravest. Raises LiveModelError if the ranks do not have all of a tensor.
    """
    ranks, failure = Ranks(group), KeptError()
    boxes = ranks.all_gather({entry.name: placement[entry.name][0].box for entry in bound})
    # One rank may have all of a short tensor, so only all ranks together know which tensors are sharded.
    pieces = [entry for entry in bound if any(found[entry.name] != whole(entry.shape) for found in boxes)]
    layouts = {entry.name: Layout.of(entry.shape, [found[entry.name] for found in boxes]) for entry in pieces}
    for name, layout in layouts.items():
        layout.check_complete(name, "check `shards`")  # equal on all ranks
    for turn, entry in enumerate(pieces):
        layout, shard = layouts[entry.name], placement[entry.name][0]
        digest = assembled_digest(ranks, turn % ranks.count, layout, shard, entry.dtype, failure)
        with failure:
            if digest is not None:
                check_base_digest(entry, digest)
    with failure:  # it fails on all ranks or on none
        check_replicas({entry.name: placement[entry.name][0] for entry in pieces}, boxes, ranks.all_gather)
    if failure.error is not None:
        raise failure.error
