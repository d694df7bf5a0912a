"""Hidden states between two blocks, batch by batch: in memory up to a limit, beyond it in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peraxis_format import DType
from peraxis_tools.compress.modules import from_torch, to_torch

__all__ = ["HiddenStates"]

_DTYPES = {torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.float16: DType.F16}


class HiddenStates:
    """A list of tensors by batch number. Tensors that are given in memory stay where they are (CPU or device)."""

    def __init__(self, folder: Path, label: str, *, limit: int) -> None:
        self._folder, self._label, self._limit = folder, label, limit
        self._held: dict[int, Tensor] = {}
        self._files: dict[int, tuple[Path, DType, torch.device]] = {}

    @property
    def in_memory(self) -> int:
        """Bytes that are held in memory."""
        return sum(value.numel() * value.element_size() for value in self._held.values())

    def __setitem__(self, batch: int, value: Tensor) -> None:
        self._held.pop(batch, None)
        size = value.numel() * value.element_size()
        if size + self.in_memory <= self._limit:
            self._held[batch] = value
            return
        path = self._folder / f"hidden-{self._label}-{batch}.npy"
        dtype = _DTYPES[value.dtype]
        np.save(path, from_torch(value, dtype))
        self._files[batch] = path, dtype, value.device

    def __getitem__(self, batch: int) -> Tensor:
        if batch in self._held:
            return self._held[batch]
        path, dtype, device = self._files[batch]
        return to_torch(np.load(path), dtype).to(device)
