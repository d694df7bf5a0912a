"""The modules of a model that own a storage, and the slice of their parameter that a view is."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TypeAlias

from torch import Tensor, nn

__all__ = ["Owners", "Where"]

Where: TypeAlias = tuple[int, int, tuple[tuple[int, ...], tuple[int, ...], int] | None]  # Patch: begin, end, region


class Owners:
    """The modules that own a storage: all with the parameter (several if it is tied), and the slice of it."""

    def __init__(self, model: nn.Module) -> None:
        by_storage: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and tensor.numel():
                    by_storage.setdefault(tensor.data_ptr(), []).append((module, name))
        self._begins = sorted(by_storage)
        self._owners = by_storage

    def of(self, view: Tensor) -> tuple[Where, list[tuple[nn.Module, str]]]:
        """(where, owners) of a view into a parameter; owners is empty if there are none."""
        at = view.data_ptr()
        place = bisect_right(self._begins, at) - 1
        if place < 0:
            return (0, 0, None), []
        begin = self._begins[place]
        owners = self._owners[begin]
        tensor: Tensor = getattr(*owners[0])
        offset = (at - begin) // tensor.element_size()
        if offset >= tensor.numel():
            return (0, 0, None), []
        row = math.prod(tensor.shape[1:])
        if view.shape[1:] == tensor.shape[1:] and view.is_contiguous() and tensor.is_contiguous() and offset % row == 0:
            first = offset // row
            return (first, first + (view.shape[0] if view.ndim else 1), None), owners
        return (0, 0, (tuple(view.shape), view.stride(), offset)), owners
