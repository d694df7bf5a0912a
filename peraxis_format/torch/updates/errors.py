"""UpdateError, and the check that a file is an exact update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peraxis_format.delta import Encoding
from peraxis_format.errors import BindingError, LiveModelError
from peraxis_format.reader import DeltaFile
from peraxis_format.torch.place.shards import Placement

__all__ = ["UpdateError", "advised", "refuse_others"]


class UpdateError(LiveModelError):
    """An update does not continue the model's state; the message names it and the reason."""


def refuse_others(file: DeltaFile, placement: Placement) -> None:
    """Raise UpdateError unless this is an exact update, or an anchor, of contiguous tensors."""
    for entry in file.manifest.modules:
        if entry.encoding is Encoding.SIGN or (entry.base is not None and entry.base.dtype is not entry.dtype):
            raise UpdateError(f"{file.path}: {entry.name} is not an exact update; use it as a variant")
        if not all(shard.view.is_contiguous() for shard in placement[entry.name]):
            raise UpdateError(f"{entry.name}: is strided, which exact updates do not support; make it contiguous")


@contextlib.contextmanager
def advised(previous: str | None, *, base: str = "", follows: bool = False) -> Iterator[None]:
    """Give a BindingError the remedy for a live model, which takes neither another base nor several updates at once.

    previous: content ID of the update before; None for a first update, which was made on `base`.
    follows: whether a Follower applies it, to the state that it was made on.
    """
    try:
        yield
    except BindingError as error:
        changed = error.code in ("E404", "E405")
        if changed and follows:
            error.advice = (
                "if other code has changed the model's weights, the next anchor replaces them; or load the model "
                "again, and follow again"
            )
        elif changed:
            first = f"load {base}, which it was made on" if previous is None else f"apply update {previous} first"
            error.advice = f"{first}; if other code has changed the model's weights, apply an anchor, or load it again"
        elif error.code == "E403":
            error.advice = (
                "the model must have the shapes that the trainer publishes, and the dtypes (its option `dtype`)"
            )
        else:
            error.advice = "load the model that the trainer publishes"
        raise
