"""Whether a checkpoint is the fine-tune that a delta was made from; another one has a KL of its own.

The manifest names the fine-tune, and has the digests of those of its tensors that are stored exactly. A tensor that is
stored as `same` is that of the fine-tune in an update alone: a small target leaves changed tensors as in the base.
"""

from __future__ import annotations

from typing import Final

import peraxis_format as pxd
from peraxis_tools.checkpoints.checkpoint import Checkpoint

__all__ = ["other_fine_tune"]

_MOST: Final = 1 << 28  # bytes of tensors that are hashed at most, which takes less than a second
_MADE_FROM: Final = "the checkpoint that this delta was made from"


def other_fine_tune(manifest: pxd.Manifest, checkpoint: Checkpoint) -> str | None:
    """The reason why a checkpoint is not the fine-tune of a delta, or may not be; None if nothing speaks against it.

    A tensor that is stored exactly decides. Where none has changed, the names are compared, which a copy may not keep.
    Raises OSError.
    """
    tensors, left, decided = checkpoint.tensors, _MOST, False
    exact = manifest.result is not None
    known = [
        (module, digest) for module in manifest.modules if (digest := _known_digest(module, exact=exact)) is not None
    ]
    for module, digest in sorted(known, key=lambda each: each[0].dtype.size_of(each[0].shape)):
        if module.name not in tensors:
            continue
        info = tensors[module.name]
        left -= info.size
        if left < 0:
            break
        if (info.dtype, info.shape) != (module.dtype, module.shape) or tensors.sha256(module.name) != digest:
            return f"is not {_MADE_FROM}: {module.name} differs"
        decided = decided or module.encoding is not pxd.Encoding.SAME
    made_from, given = manifest.fine_tuned, checkpoint.identity
    if decided or _own_name(made_from.id) == _own_name(given.id):
        return None
    return f"may not be {_MADE_FROM}, which was named {made_from.id}"


def _known_digest(module: pxd.ModuleEntry, *, exact: bool) -> str | None:
    """The hex digest of the fine-tune's tensor, if the manifest has it. exact: whether it is that of an update."""
    if module.encoding is pxd.Encoding.SAME:
        if not exact or module.base is None:
            return None
        unchanged = (module.base.dtype, module.base.shape) == (module.dtype, module.shape)
        return module.base.sha256 if unchanged else None
    return module.sha256 if module.encoding is pxd.Encoding.FULL else module.result


def _own_name(name: str) -> str:
    """The last part of a name: a hub id and a folder with a download of it have it in common."""
    return name.rpartition("/")[2]
