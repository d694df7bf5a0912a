"""Tensors by index (hidden states of a batch, logits of a sample): in memory up to a limit, in files beyond it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peraxis_format import DType
from peraxis_format.ops.tensors import dtype_of, from_storage, storage_array

__all__ = ["SpilledTensors"]


class SpilledTensors:
    """A list of tensors. Those in memory stay on their device; those in files are read to their former device."""

    def __init__(self, folder: Path, label: str, *, limit: int) -> None:
        self._folder, self._label, self._limit = folder, label, limit
        self._held: dict[int, Tensor] = {}
        self._files: dict[int, tuple[Path, DType, torch.device]] = {}

    @property
    def in_memory(self) -> int:
        """The bytes in memory."""
        return sum(value.numel() * value.element_size() for value in self._held.values())

    def __contains__(self, number: int) -> bool:
        return number in self._held or number in self._files

    def __setitem__(self, number: int, value: Tensor) -> None:
        self._held.pop(number, None)
        size = value.numel() * value.element_size()
        if size + self.in_memory <= self._limit:
            self._held[number] = value
            return
        path = self._folder / f"{self._label}-{number}.npy"
        dtype = dtype_of(value, path.name)
        np.save(path, storage_array(value.detach().cpu().contiguous()))
        self._files[number] = path, dtype, value.device

    def __getitem__(self, number: int) -> Tensor:
        if number in self._held:
            return self._held[number]
        path, dtype, device = self._files[number]
        return from_storage(np.load(path), dtype).to(device)
