"""Several processes (torchrun, accelerate launch); each runs the blocks on its share of the samples.

There is one process for each device, started by torchrun or `accelerate launch`. Process r of n takes batches r, r + n,
...; the moments G, E, F and their token counts are added over all processes, so that each has the moments of the whole
text, exactly and for any n (sums.py). Then one process fits each module of a stage and sends it to the others as
tensors. So all processes continue with the same student, and the file has the same bytes as with one process, if each
uses the same number of threads. Steps that need the whole model at once (generated text, a budget's sensitivities,
distillation) run in process 0 alone, on its device; a model that is too large for it can be fitted but not distilled.

Without such an environment every function here does nothing.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peraxis_tools.compress.run.types import FittedModule
from peraxis_tools.compress.run.work_folder import pack_modules, unpack_modules

__all__ = ["Processes"]


class Processes:
    """The group of processes of this run; a single process if no group was started."""

    def __init__(self, device: torch.device) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = device
        if self.count > 1 and not torch.distributed.is_initialized():
            # The others may wait for hours while one process works alone (distillation).
            torch.distributed.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=7)
            )

    def shard_indices(self, count: int) -> list[int]:
        """The indices, of `count` items, that this process works on."""
        return list(range(self.rank, count, self.count))

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors over all processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def largest(self, value: int) -> int:
        """The largest value over all processes."""
        if self.count == 1:
            return value
        tensor = torch.tensor([value], device=self.device)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return int(tensor)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the work folder and the file."""
        return self.rank == 0

    def broadcast(self, modules: Sequence[FittedModule] | None) -> list[FittedModule] | None:
        """Send the main process's modules to all processes; None if it passes None."""
        if self.count == 1:
            return None if modules is None else list(modules)
        if not self.largest(int(self.is_main_process and modules is not None)):
            return None
        index, data = pack_modules(modules or []) if self.is_main_process else ([], b"")
        index_bytes = self._send(json.dumps(index).encode(), 0)
        return unpack_modules(json.loads(index_bytes), self._send(data, 0))

    def broadcast_json(self, values: Any) -> Any:
        """Send the main process's JSON values to all processes."""
        if self.count == 1:
            return values
        return json.loads(self._send(json.dumps(values).encode() if self.is_main_process else b"", 0))

    def close(self) -> None:
        """Wait for all processes, then leave the group."""
        if self.count > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    def all_gather(self, modules: Sequence[FittedModule | None]) -> list[FittedModule]:
        """Collect each module from the process that fitted it (i: process i mod count). None: another's module."""
        if self.count == 1:
            return [module for module in modules if module is not None]
        result = []
        for i, module in enumerate(modules):
            index, data = pack_modules([module]) if module is not None else ([], b"")
            index_bytes = self._send(json.dumps(index).encode(), i % self.count)
            result.extend(unpack_modules(json.loads(index_bytes), self._send(data, i % self.count)))
        return result

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            torch.distributed.barrier()

    def _send(self, data: bytes | bytearray, source: int) -> bytearray:
        size = torch.tensor([len(data)], device=self.device)
        torch.distributed.broadcast(size, source)
        mine = self.rank == source
        array = np.frombuffer(bytes(data), np.uint8).copy() if mine else np.empty(int(size), np.uint8)
        if not len(array):
            return bytearray()
        tensor = torch.from_numpy(array).to(self.device)
        torch.distributed.broadcast(tensor, source)
        return bytearray(tensor.cpu().numpy().tobytes())
