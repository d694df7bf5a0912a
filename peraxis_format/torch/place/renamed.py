"""Find the checkpoint's tensors in a transformers model with other names and shapes.

Since version 5 such models are loaded through a mapping (experts `...experts.3.w1.weight` become rows of one tensor
`...experts.gate_up_proj`; prefixes change), and saved through its reverse. The reverse is run on the live tensors, with
copies suppressed, and gives a view into live storage for each name in the checkpoint. This works for any model; the
base's digest, which is checked before anything is written, proves that a view is the right one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peraxis_format.errors import LiveModelError
from peraxis_format.torch.place.remedies import FOR_VARIANTS, Remedies

__all__ = ["CheckpointViews", "checkpoint_views"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointViews:
    """views: name in the checkpoint -> view into live storage. composed: names without a view, because the mapping
    composes them of several live tensors, or reorders their elements.
    """

    views: dict[str, Tensor]
    composed: frozenset[str]


class _NoCopies(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """A copy into another layout (`contiguous`) returns a view of its source. Other copies are made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            return torch.ops.aten.alias.default(args[0])
        if func in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            return torch.ops.aten.reshape.default(*args)
        return func(*args, **(kwargs or {}))


def checkpoint_views(model: nn.Module, remedies: Remedies = FOR_VARIANTS) -> CheckpointViews:
    """The views of the checkpoint's tensors; empty for a model that transformers does not rename.

    Raises LiveModelError if the mapping cannot be reversed.
    """
    state = model.state_dict()
    plain = all(type(tensor) is Tensor for tensor in state.values())
    nothing = CheckpointViews(views={}, composed=frozenset())
    if not plain or not any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__):
        return nothing
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5, models had the checkpoint's names
        return nothing
    try:
        converted: Any = model
        without_copies: Any = _NoCopies
        with torch.no_grad(), without_copies():
            found: dict[str, Any] = revert_weight_conversion(converted, dict(state))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise LiveModelError(
            f"{type(model).__name__}: the names of its checkpoint cannot be determined ({error}); {remedies.unplaced}"
        ) from error
    live = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    views = {
        name: tensor
        for name, tensor in found.items()
        if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in live
    }
    return CheckpointViews(views=views, composed=frozenset(found.keys() - views.keys()))
