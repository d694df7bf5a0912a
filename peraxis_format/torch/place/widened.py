"""Tensors that are F32 in the live model and BF16 or F16 in the base.

transformers loads some modules this way (`_keep_in_fp32_modules`: routers, state-space parameters), and training tools
cast norms. Every BF16 and F16 value is an F32 value, so such a tensor has the base's values unless it was changed. It
is checked, rebuilt and swapped as a copy in the base's dtype, and the copy is cast into the live storage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

from peraxis_format.dtypes import DType
from peraxis_format.errors import BindingError
from peraxis_format.manifest import ModuleEntry
from peraxis_format.ops.tensors import TORCH_DTYPES
from peraxis_format.torch.place.shards import ShardView

__all__ = ["holds_the_dtype", "is_widened", "narrowed"]

_NARROW: Final = (DType.BF16, DType.F16)


def is_widened(entry: ModuleEntry, view: Tensor) -> bool:
    """Whether a live tensor is F32 but base (if any) and fine-tune are both BF16, or both F16."""
    base = entry.dtype if entry.base is None else entry.base.dtype
    return base in _NARROW and entry.dtype is base and view.dtype is torch.float32


def holds_the_dtype(found: Mapping[str, Iterable[ShardView]], entries: Iterable[ModuleEntry]) -> bool:
    """Whether some live tensor has the file's BF16 or F16; otherwise the whole model was loaded in another dtype."""
    return any(
        shard.view.dtype is TORCH_DTYPES[entry.dtype]
        for entry in entries
        if entry.dtype in _NARROW
        for shard in found.get(entry.name, ())
    )


@torch.no_grad()
def narrowed(entry: ModuleEntry, shard: ShardView) -> ShardView:
    """The shard with a copy in the base's dtype as its view, and the live tensor as `wide`.

    Raises BindingError (E404) if there is a base and the live values are not exactly values of that dtype.
    """
    wide = shard.view.detach()
    view = wide.to(TORCH_DTYPES[entry.dtype], memory_format=torch.contiguous_format)
    if entry.base is not None and not torch.equal(view.float().view(torch.int32), wide.contiguous().view(torch.int32)):
        raise BindingError("E404", f"F32, with values that {entry.dtype.value} does not have", field=entry.name)
    return ShardView(shard.box, view, wide)
