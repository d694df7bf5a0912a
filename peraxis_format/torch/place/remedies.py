"""What the caller of `place` can do about a tensor that the live model does not have, or cannot take.

`apply_`, a VariantSwitch and `serve` take the place of a tensor in `views`, and the same result can be had as a
checkpoint. An exact update has neither way: its model must be like that of the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from peraxis_format.dtypes import DType
from peraxis_format.manifest import ModuleEntry
from peraxis_format.ops.tensors import torch_dtype

__all__ = ["FOR_UPDATES", "FOR_VARIANTS", "Remedies"]

_WRITE: Final = "write the checkpoint with `peraxis-tools apply`"
_SAME: Final = "load the model that the trainer publishes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedies:
    """Remedies, as imperative phrases. other: for a live tensor of this dtype and shape in place of a module.

    added, composed, dropped: for a tensor that the live model lacks, that it has in several tensors, that the file
    lacks. unplaced: for tensors whose places in the live model are not known.
    """

    other: Callable[[ModuleEntry, DType, tuple[int, ...]], str]
    added: str
    composed: str
    dropped: str
    unplaced: str


def _another_dtype(entry: ModuleEntry, dtype: DType, shape: tuple[int, ...]) -> str:
    """The remedy for a followed model in another dtype; one of another shape is another model."""
    if dtype is entry.dtype or shape != entry.shape:
        return _SAME
    load = f"load the model with dtype={torch_dtype(entry.dtype)}"
    if not (dtype.is_float and entry.dtype.is_float):
        return load
    # A trainer publishes F32 tensors in the dtype of its option, and the others as they are.
    if dtype is DType.F32:
        return f"{load}, or publish in F32 (dtype=None)"
    return f"{load}, or publish with dtype={torch_dtype(dtype)}" if entry.dtype is DType.F32 else load


FOR_VARIANTS: Final = Remedies(
    other=lambda *_: f"storage cannot change in place; {_WRITE}",
    added=f"{_WRITE}, or pass the tensor in `views`",
    composed=f"{_WRITE}, or use peraxis.load",
    dropped=_WRITE,
    unplaced="give the places of its tensors with `views`",
)
FOR_UPDATES: Final = Remedies(
    other=_another_dtype,
    added=_SAME,
    composed="publish the model with UpdateWriter, whose names are those of the live model",
    dropped="load the model as the trainer has it (tie_word_embeddings), or publish one that has the tensor",
    unplaced=f"{_SAME}, under the same names",
)
