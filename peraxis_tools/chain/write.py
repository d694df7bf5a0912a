"""The verbs update and compact: the lossless difference of two states as a .pxd that names its result."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, get_args

import numpy as np

import peraxis_format as pxd
from peraxis_format.urls import is_url
from peraxis_tools.arguments import check_choice, check_paths, sequence
from peraxis_tools.chain.opened import opened_in_order
from peraxis_tools.chain.order import Link
from peraxis_tools.chain.siblings import note_repeated, own_turn, refuse_disorder, refuse_other_name
from peraxis_tools.chain.sources import local_updates
from peraxis_tools.chain.state import ChainState, NoState, state_after
from peraxis_tools.checkpoints.assets import changed_groups
from peraxis_tools.checkpoints.checkpoint import Checkpoint, open_checkpoint
from peraxis_tools.checkpoints.completeness import note_no_configuration, refuse_foreign
from peraxis_tools.checkpoints.kinds import execution_key
from peraxis_tools.compress.plan.finite import count_not_finite
from peraxis_tools.compress.plan.pairing import OF_UPDATE, check_pair, tied_pairs
from peraxis_tools.deltas.blocks import count_blocks
from peraxis_tools.deltas.module_counts import count_encodings
from peraxis_tools.display.notes import note
from peraxis_tools.display.progress import Progress, Steps, watched
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.outputs.remote_output import output_file
from peraxis_tools.process.parallel import ordered_map
from peraxis_tools.remote.urls import without_secrets

__all__ = ["UpdateJob", "UpdateResult", "compact", "open_chain", "update", "write_update"]

_AHEAD_BYTES: Final = 512 << 20
_PACKED_BLOCK: Final = 3 << 18  # bytes; each 3 bytes are whole elements of 4 or 6 bits
_BYTES_IN_FLIGHT_PER_TENSOR: Final = 3  # times its own bytes: the new one, the old one, and the written one


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """The written file. Sizes in bytes; changed: weights that differ, of `weights`; encodings: modules by encoding.

    blocks: those of exact modules by mode (SPEC 5.6), chosen for `prefer`. path: or the URL that it was sent to.
    """

    path: Path | str
    content_id: str
    previous: str | None
    base: str
    result: str
    bytes: int
    full_bytes: int
    weights: int
    changed: int
    encodings: dict[str, int]
    blocks: dict[str, int]
    prefer: str


@contextlib.contextmanager
def open_chain(base: Checkpoint, updates: Sequence[str | Path]) -> Iterator[tuple[Checkpoint, list[Link]]]:
    """The state after these updates, in any order; folders, URLs and repositories mean all of theirs.

    Raises PxdError, CheckFailedError, ToolError, CheckpointError.
    """
    with local_updates(updates) as paths, opened_in_order(paths) as (links, files):
        yield state_after(base, files), links


def update(
    old: str | Path,
    new: str | Path,
    output: str | Path,
    *,
    after: str | Path | Sequence[str | Path] = (),
    prefer: pxd.Prefer = "size",
    overwrite: bool = False,
    progress: Progress = None,
) -> UpdateResult:
    """Write the changes from `old` to `new`, bit for bit.

    old, new: a folder, a safetensors file or a hub id; the old state is `old` after the updates `after`: files, a
    folder, a URL or a repository on the hub. Small files are stored by group (assets.py): all of a group in which one
    has changed. output: a path or a URL. prefer: size (the fewest bytes) or speed (the
    fastest to apply). progress is called with bytes of `new`. Raises ToolError, CheckpointError, PxdError.
    """
    check_paths(old=old, new=new, output=output)
    check_choice("prefer", prefer, get_args(pxd.Prefer))
    after = sequence(after)
    with (
        output_file(output, overwrite=overwrite, inputs=(old, new, *after)) as target,
        open_checkpoint(old) as before,
        open_checkpoint(new) as fine_tuned,
        open_chain(before, after) as (state, links),
    ):
        if links:
            refuse_other_name(output, links[-1])
        check_pair(state, fine_tuned, OF_UPDATE)
        note_no_configuration(fine_tuned)
        assets = changed_groups(dict(state.assets(checked=False)), dict(fine_tuned.assets()))
        job = UpdateJob(
            output=target,
            old=state.tensors,
            new=fine_tuned.tensors,
            ids=(before.identity, fine_tuned.identity),
            previous=links[-1].content_id if links else None,
            assets=assets,
            prefer=prefer,
            overwrite=overwrite,
            name=output,
            base=links[-1].result if links else None,
        )
        with watched(progress, "update", job.new.size) as step:
            result = write_update(job, step)
        if result.bytes > result.full_bytes:
            note(
                f"{without_secrets(str(output))}: takes {result.bytes} bytes, more than the {result.full_bytes} of the "
                "new checkpoint; publish the checkpoint itself, or a lossy delta of it (`compress`)"
            )
        return _named(result, output)


def compact(
    base: str | Path,
    updates: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    prefer: pxd.Prefer = "size",
    overwrite: bool = False,
    progress: Progress = None,
) -> UpdateResult:
    """Fold a chain into one update with the same result, which is checked before the file is written.

    base: the checkpoint that the first of them was made on; changes are coded relative to its weights. If the first one
    is an anchor, so is the result. updates: files, a folder, a URL or a repository on the hub. prefer: see `update`.
    Raises CheckFailedError if the results differ, ToolError, CheckpointError, PxdError.
    """
    check_paths(base=base, output=output)
    check_choice("prefer", prefer, get_args(pxd.Prefer))
    updates = sequence(updates)
    if not updates:
        raise ToolError("no updates to fold; pass at least one")
    with (
        output_file(output, overwrite=overwrite, inputs=(base, *updates)) as target,
        open_checkpoint(base) as checkpoint,
        open_chain(checkpoint, updates) as (state, links),
    ):
        with pxd.open(links[0].path) as file:
            refuse_foreign(file, checkpoint)
            bound = {entry.name for entry in file.manifest.modules if entry.base is not None}
        with pxd.open(links[-1].path) as file:
            fine_tuned = file.manifest.fine_tuned
        assets = dict(state.newer)
        if bound:  # an anchor's are relative to nothing
            assets = changed_groups(dict(checkpoint.assets(checked=False)), dict(state.assets(checked=False)))
        job = UpdateJob(
            output=target,
            old=ChainState(checkpoint.tensors, ()) if bound else NoState(checkpoint.tensors),
            new=state.tensors,
            ids=(checkpoint.identity, fine_tuned),
            previous=links[0].previous,
            assets=assets,
            prefer=prefer,
            overwrite=overwrite,
            name=output,
            base=links[0].base,
            result=links[-1].result,
            unbound=frozenset(checkpoint.tensors) - bound,  # dropped by the first update, and added again
        )
        with watched(progress, "compact", job.new.size) as step:
            return _named(write_update(job, step), output)


def _named(result: UpdateResult, output: str | Path) -> UpdateResult:
    """The result with the given name of the output."""
    return replace(result, path=without_secrets(str(output)) if is_url(output) else Path(output))


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateJob:
    """The file from one state to another. base, result: the digests that it must have, if they are known.

    name: of the output, a path or URL; output: where it is written first. unbound: tensors of the old state that are
    not used as a base, as if they were new.
    """

    output: Path
    old: pxd.Safetensors
    new: pxd.Safetensors
    ids: tuple[pxd.Identity, pxd.Identity]
    previous: str | None
    assets: dict[str, bytes]
    prefer: pxd.Prefer
    overwrite: bool
    name: str | Path
    base: str | None = None
    result: str | None = None
    unbound: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """A tensor for the writer. Numbers of its elements: changed since the old state; bad, NaN or infinite."""

    module: pxd.ModuleDelta
    changed: int
    bad: int


def _written(job: UpdateJob, name: str) -> _Written:
    array, dtype = job.new.read(name), job.new[name].dtype
    module, changed = _module(job, name, array)
    bad = 0 if module.encoding is pxd.Encoding.SAME else count_not_finite(array, dtype)
    return _Written(module=module, changed=changed, bad=bad)


def _module(job: UpdateJob, name: str, array: pxd.Array) -> tuple[pxd.ModuleDelta, int]:
    """A tensor for the writer, and the number of its elements that differ. array: its new elements."""
    dtype, shape = job.new[name].dtype, job.new[name].shape
    if name not in job.old or name in job.unbound:
        return pxd.lossless_module(name, array, dtype, shape=shape), math.prod(shape)
    before, info = job.old.read(name), job.old[name]
    ref = pxd.BaseRef(dtype=info.dtype, shape=info.shape, sha256=pxd.digest_of(before))
    module = pxd.lossless_module(name, array, dtype, shape=shape, old=before, base=ref, prefer=job.prefer, threads=1)
    resized = (info.dtype, info.shape) != (dtype, shape)
    if resized and module.encoding is pxd.Encoding.SAME:
        # SPEC 3.14: the result of `same` is known if the shape is the base's, and an update must have it.
        module = pxd.ModuleDelta(name=name, shape=shape, dtype=dtype, encoding=pxd.Encoding.FULL, base=ref, full=array)
    if dtype.is_packed:
        return module, math.prod(shape) if resized else _count_changed_packed(before, array, dtype)
    return module, pxd.count_changed(before, array)


def write_update(job: UpdateJob, step: Steps) -> UpdateResult:
    """Write the file. step: called with bytes of the new state. Raises CheckFailedError, PxdError, OSError."""
    tied = tied_pairs(job.new)
    aliases = {alias for _, alias in tied}
    names = sorted((name for name in job.new if name not in aliases), key=execution_key)
    changed, blocks, bad = 0, Counter[str](), Counter[str]()
    with pxd.DeltaWriter(
        job.output,
        base=job.ids[0],
        fine_tuned=job.ids[1],
        previous=job.previous,
        chained=True,
        overwrite=job.overwrite,
    ) as writer:
        for written in ordered_map(
            lambda name: _written(job, name),
            names,
            cost=lambda name: _BYTES_IN_FLIGHT_PER_TENSOR * job.new[name].size,
            budget=_AHEAD_BYTES,
        ):
            writer.add(written.module)
            blocks += count_blocks(written.module)
            changed += written.changed
            bad[written.module.name] += written.bad
            step(job.new[written.module.name].size)
        # The head of a tied model, which a trainer lists as an alias and transformers never saves, is dropped too: the
        # result is the new checkpoint, tensor by tensor. Whether the model still ties it, only its configuration says,
        # so an alias that is kept might be wrong. A live model that ties it takes the update as it is.
        removed = [name for name in (*job.old, *job.old.foreign) if name not in job.new]
        writer.add_rest(tied=tied, dropped=removed, assets=job.assets.items())
        writer.metadata[pxd.CHANGED_KEY] = str(changed)
        with own_turn(job.output):
            _prove(job, writer)
            for state in (job.old, job.new):
                state.check_unchanged()
            manifest = writer.finish()
    _note_not_finite(job, +bad)
    return UpdateResult(
        path=job.output,
        content_id=manifest.content_id,
        previous=job.previous,
        base=manifest.base.digest,
        result=manifest.result or "",
        bytes=writer.size,
        full_bytes=sum(job.new[name].size for name in names),
        weights=sum(math.prod(module.shape) for module in manifest.modules),
        changed=changed,
        encodings=count_encodings(module.encoding for module in manifest.modules),
        blocks=dict(blocks),
        prefer=job.prefer,
    )


def _note_not_finite(job: UpdateJob, bad: Counter[str]) -> None:
    """Say that weights are NaN or infinite. bad: their numbers by tensor."""
    if bad:
        name, count = next(iter(bad.items()))
        others = f", and {len(bad) - 1} other tensors have some" if len(bad) > 1 else ""
        note(
            f"{without_secrets(str(job.name))}: {name} has NaN or infinite weights ({count}){others}; their bits are "
            "kept, and servers of this state will have them"
        )


def _prove(job: UpdateJob, writer: pxd.DeltaWriter) -> None:
    """Check that the file fits into its chain and its folder. Raises CheckFailedError before it is written."""
    shown = without_secrets(str(job.name))
    if job.base is not None and writer.base_digest != job.base:
        raise CheckFailedError(
            f"{shown}: tensors were removed, or tied in another way, since the last update, so it cannot follow; start "
            "a new chain"
        )
    if job.result is None and writer.result is not None:  # folds on one base may stand side by side
        refuse_disorder(job.name, previous=job.previous, base=writer.base_digest, result=writer.result)
    if job.result is not None:
        if writer.result != job.result:
            raise CheckFailedError(f"{shown}: would result in {writer.result}, not in {job.result}")
        note_repeated(job.name, previous=job.previous, base=writer.base_digest, result=job.result)


def _count_changed_packed(old: pxd.Array, new: pxd.Array, dtype: pxd.DType) -> int:
    """The number of elements of a packed type whose bits differ. old, new: uint8 [bytes]."""
    count = 0
    for begin in range(0, old.size, _PACKED_BLOCK):
        differing: pxd.Array = old[begin : begin + _PACKED_BLOCK] ^ new[begin : begin + _PACKED_BLOCK]
        elements = np.unpackbits(differing, bitorder="little").reshape(-1, dtype.bits)
        count += int(np.count_nonzero(elements.any(axis=1)))
    return count
