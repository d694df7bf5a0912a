"""Processes that tests start: forks of one process that has imported the libraries, which takes seconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from torch import multiprocessing

_IMPORTED = [
    "datasets",
    "numba",
    "peraxis_format.torch.serve.api",
    "peraxis_format.torch.updates",
    "peraxis_tools.compress.run.calibrated",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
]


def _context() -> ForkServerContext:
    # The server keeps the environment of its first start.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def fork(job: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """Start job(*arguments) in a process. Its errors go to stderr and end it with 1."""
    process = _context().Process(target=job, args=arguments)
    process.start()
    return process


def run_ranks(job: Callable[..., None], world: int, folder: Path, *arguments: Any) -> None:
    """Run job(rank, world, str(folder), *arguments) in `world` processes. Raises the first error of theirs."""
    _context()
    multiprocessing.start_processes(
        job, args=(world, str(folder), *arguments), nprocs=world, join=True, start_method="forkserver"
    )
