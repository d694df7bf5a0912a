"""Map checkpoint tensors to model parameters: the parameter of each tensor, and the matrix within it.

Usually both have the same name. Some checkpoints omit the base model's prefix (GPT-2's `h.0...`), or have a prefix
that the model lacks. And `transformers` fuses tensors that many checkpoints store separately: experts become one 3-D
parameter, gate and up become its rows. The mapping comes from transformers itself: its save-time conversion is run on
tensors of positions and shows the place of each checkpoint tensor in the parameter.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["NameMap", "ParameterSlice", "map_names"]

_PROBE_WIDTH: Final = 2
_PROBES_MAX: Final = 1 << 29  # elements of all probes; a model of 671B parameters has two thirds of them


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """A checkpoint tensor is parameter[index] (batch element), rows [first, last) of it; None: all of it."""

    tensor: str
    parameter: str
    index: int | None = None
    rows: tuple[int, int] | None = None

    def select(self, value: Tensor) -> Tensor:
        """This slice of the parameter's value, a view."""
        if self.index is not None:
            value = value[self.index]
        return value if self.rows is None else value[..., self.rows[0] : self.rows[1], :]


@dataclass(frozen=True, slots=True)
class NameMap:
    """Slices by parameter, and by tensor. unmapped: checkpoint tensors that are in no parameter of the model."""

    by_parameter: Mapping[str, tuple[ParameterSlice, ...]]
    by_tensor: Mapping[str, ParameterSlice]
    unmapped: tuple[str, ...]


def map_names(model: PreTrainedModel, tensors: Iterable[str]) -> NameMap:
    """Map every tensor of a checkpoint to the parameters (or persistent buffers) of a model, which may be on meta."""
    state: dict[str, Tensor] = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "") + "."
    wanted = set(tensors)
    pieces: dict[str, ParameterSlice] = {}
    for tensor in sorted(wanted):
        for parameter in (tensor, prefix + tensor, tensor.removeprefix(prefix)):
            if parameter in state:
                pieces[tensor] = ParameterSlice(tensor, parameter)
                break
    converted = _converted(model, state) if len(pieces) < len(wanted) else {}
    for tensor, piece in converted.items():
        if tensor in wanted and tensor not in pieces:
            pieces[tensor] = piece
    by_parameter: dict[str, list[ParameterSlice]] = {}
    for piece in pieces.values():
        by_parameter.setdefault(piece.parameter, []).append(piece)
    return NameMap(
        by_parameter={name: tuple(found) for name, found in by_parameter.items()},
        by_tensor=pieces,
        unmapped=tuple(sorted(wanted - set(pieces))),
    )


def _converted(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, ParameterSlice]:
    """Slices by checkpoint name, from transformers' own conversion; empty if it has none.

    The probes are narrow replacements of the parameters: each element is its own position, so that the result shows the
    origin of each element, whether the conversion makes views or copies.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {}
    probes: dict[str, Tensor] = {}
    parameters: list[str] = []
    start = 0
    starts: list[int] = []
    shapes = {name: _probe_shape(value) for name, value in state.items()}
    if sum(map(math.prod, shapes.values())) > _PROBES_MAX:
        return {}  # the model is on meta, and its configuration names any size
    for name, shape in shapes.items():
        size = math.prod(shape)
        probes[name] = torch.arange(start, start + size, dtype=torch.int64).reshape(shape)
        parameters.append(name)
        starts.append(start)
        start += size
    try:
        reverted: dict[str, Any] = revert_weight_conversion(model, dict(probes))
    except (RuntimeError, ValueError, IndexError, KeyError):
        # The conversion needs the true width. Its tensors are unmapped, and an error names them if they are needed.
        return {}
    pieces: dict[str, ParameterSlice] = {}
    for tensor, values in reverted.items():
        first = int(values.reshape(-1)[0])
        i = bisect.bisect_right(starts, first) - 1
        piece = _locate(tensor, parameters[i], probes[parameters[i]], values, first - starts[i])
        if piece is not None:
            pieces[tensor] = piece
    return pieces


def _probe_shape(value: Tensor) -> tuple[int, ...]:
    return (*value.shape[:-1], min(_PROBE_WIDTH, value.shape[-1])) if value.dim() > 1 else (1,)


def _locate(tensor: str, parameter: str, probe: Tensor, values: Tensor, first: int) -> ParameterSlice | None:
    """The place of the values in the probe: a batch element and a range of rows; None if they are not such a range."""
    width = probe.shape[-1]
    consecutive = torch.equal(values.reshape(-1), int(values.reshape(-1)[0]) + torch.arange(values.numel()))
    if not consecutive or values.shape[-1] != width:
        return None
    if values.shape == probe.shape:
        return ParameterSlice(tensor, parameter)
    rows = probe.shape[-2]
    index, row = divmod(first // width, rows)
    if values.dim() != 2 or row + values.shape[0] > rows:
        return None
    span = None if values.shape[0] == rows else (row, row + values.shape[0])
    return ParameterSlice(tensor, parameter, index if probe.dim() == 3 else None, span)
