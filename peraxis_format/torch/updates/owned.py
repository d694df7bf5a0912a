"""The tensors of a sharded model that one rank owns, from the files of a chain; whether the ranks have one model."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peraxis_format.delta import Encoding
from peraxis_format.dtypes import Array, DType
from peraxis_format.errors import LiveModelError
from peraxis_format.ops.rebuild import reconstruct
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.place.pieces import Layout
from peraxis_format.torch.updates.source import Way

__all__ = ["check_ranks", "owned_state"]


def owned_state(
    way: Way, folder: Path, dtypes: Mapping[str, DType], layouts: Mapping[str, Layout], *, mine: Container[str]
) -> dict[str, Array]:
    """The tensors `mine` in the last state of a chain. Raises LiveModelError if its files are of other tensors.

    folder: with the files of `way`, on this rank. dtypes, layouts: of all tensors.
    """
    state: dict[str, Array] = {}
    for file in (way.anchor, *way.updates):
        path = folder / file.path.name
        with DeltaFile(path) as delta:
            if delta.content_id != file.content_id:
                raise LiveModelError(f"{path}: is another file than on rank 0; all ranks must see one folder")
            known = {entry.name: entry for entry in delta.manifest.modules}
            for name, dtype in dtypes.items():
                entry = known.get(name)
                if entry is None or (entry.shape, entry.dtype) != (layouts[name].shape, dtype):
                    raise LiveModelError(f"{name}: has another shape or dtype than in {path}; use a new folder")
                if file is way.anchor and entry.base is not None:
                    raise LiveModelError(f"{path}: {name} has a base, so this is no anchor; use a new folder")
                if name in mine and entry.encoding is not Encoding.SAME:
                    state[name] = np.array(reconstruct(delta.load(name), state.get(name)))
            odd = sorted(known.keys() - dtypes.keys())
            if odd:
                raise LiveModelError(f"{odd[0]}: is in {path}, but not in the model; use a new folder")
    return state


def check_ranks(known: list[tuple[dict[str, Any], ...]]) -> None:
    """Raise LiveModelError, on all ranks, if a rank has other tensors than the first one."""
    for rank, (shapes, dtypes, tied) in enumerate(known):
        for name in sorted(shapes.keys() | known[0][0].keys()):
            if any(mine.get(name) != first.get(name) for mine, first in zip((shapes, dtypes), known[0], strict=False)):
                raise LiveModelError(f"{name}: rank {rank} has another shape or dtype than rank 0, or only one has it")
        if (list(shapes), tied) != (list(known[0][0]), known[0][2]):
            raise LiveModelError(f"rank {rank} has its tensors in another order than rank 0, or ties others")
