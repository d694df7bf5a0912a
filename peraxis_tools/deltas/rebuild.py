"""Rebuild fine-tuned tensors and assets from base + delta, in order (steps 9 to 12 of SPEC 8).

Every tensor of the base is read once, so the hashed bytes are the bytes that are used. Reading, hashing and rebuilding
run on a few threads, at most a fixed number of bytes ahead of the consumer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Final

import peraxis_format as pxd
from peraxis_format.errors import BindingError, located
from peraxis_tools.checkpoints.assets import asset_group
from peraxis_tools.checkpoints.checkpoint import Checkpoint
from peraxis_tools.checkpoints.completeness import has_vocabulary, is_update, takes_tokenizer
from peraxis_tools.checkpoints.shards import TensorSpec
from peraxis_tools.process.parallel import ordered_map

__all__ = ["assets_of", "checkpoint_bytes", "payload_first", "rebuild", "rebuild_all", "tensor_specs"]

_AHEAD_BYTES: Final = 384 << 20
_WORKERS: Final = 4


def rebuild(delta: pxd.DeltaFile, base: pxd.Safetensors, name: str) -> pxd.Array:
    """One module's fine-tuned tensor. The base's bytes and the payload are read once and checked by their digests.

    Returns a storage array. Raises PayloadError, BindingError (E404). Names, dtypes and shapes of the base
    must have been checked (`check_base_names`).
    """
    entry = delta.entry(name)
    tensor = None
    with located(delta.path):
        if entry.base is not None and entry.encoding is pxd.Encoding.FULL:
            pxd.check_base_digest(entry, base.sha256(name))  # the base is bound, but the result does not need it
        elif entry.base is not None:
            tensor = base.read(name)
            pxd.check_base_bytes(entry, tensor)
        return pxd.reconstruct(delta.load(name), tensor)


@contextmanager
def payload_first(delta: pxd.DeltaFile) -> Iterator[None]:
    """Report a damaged payload rather than a base that does not fit: the first of SPEC 8 that fails.

    A tensor's payload and its base are checked together, so that each is read once, and only a failure costs a pass.
    """
    try:
        yield
    except BindingError:
        delta.verify()
        raise


def rebuild_all(
    delta: pxd.DeltaFile, base: pxd.Safetensors, *, workers: int | None = None
) -> Generator[tuple[pxd.ModuleEntry, pxd.Array]]:
    """Yield every module in file order with its fine-tuned tensor; a few are in flight at a time.

    Memory: about twice the bytes in flight, which are at most _AHEAD_BYTES or one tensor. Raises BindingError before
    the first tensor if names, dtypes or shapes do not match.
    """
    pxd.check_base_names(delta.manifest, base)

    def work(entry: pxd.ModuleEntry) -> tuple[pxd.ModuleEntry, pxd.Array]:
        return entry, rebuild(delta, base, entry.name)

    def size(entry: pxd.ModuleEntry) -> int:
        return TensorSpec(entry.name, entry.dtype, entry.shape).size

    return ordered_map(work, delta.manifest.modules, cost=size, budget=_AHEAD_BYTES, workers=workers or _WORKERS)


def tensor_specs(manifest: pxd.Manifest) -> Iterator[TensorSpec]:
    """The tensors of the fine-tuned checkpoint; an alias follows its module (SPEC 6.5)."""
    names = manifest.names()
    for module in manifest.modules:
        for name in names[module.name]:
            yield TensorSpec(name, module.dtype, module.shape)


def checkpoint_bytes(manifest: pxd.Manifest) -> int:
    """The bytes of the whole fine-tuned checkpoint."""
    return sum(spec.size for spec in tensor_specs(manifest))


def assets_of(delta: pxd.DeltaFile, base: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """The delta's assets, and those of the base in groups without an asset in the delta.

    The settings of a tokenizer without its vocabulary are no tokenizer: the base's other files of that group are added.
    An update has all files of each group that changed, so nothing is added to such a group.
    """
    own = dict.fromkeys(asset.path for asset in delta.manifest.assets)
    groups = {asset_group(path) for path in own}
    if not is_update(delta.manifest):
        if takes_tokenizer(delta, base):
            groups.discard("tokenizer")
        elif not has_vocabulary(own):
            groups.add("tokenizer")  # that of the base has a vocabulary of another size
    for path in own:
        yield path, delta.asset(path)
    found = base.folder_assets()
    for path in found.carried:
        if path not in own and asset_group(path) not in groups:
            yield path, found.read(path)
