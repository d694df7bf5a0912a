"""The number of threads of a run: torch, OpenBLAS, OpenMP, the pools of this package, and child processes.

Libraries read their environment variables when they are loaded. So those that are not loaded yet follow the variables,
and those that are loaded are told.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from peraxis_tools.process.process_context import ProcessContext

__all__ = ["THREADS_MAX", "limit_torch", "one_blas_thread", "pool_size", "threads_asked_for", "use_threads"]

THREADS_MAX: Final = 4096  # more than machines have; OpenMP ends the process where it cannot start so many
_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_limit: int | None = None


def pool_size() -> int:
    """The number of threads of a pool: the limit inside `use_threads`, else one for each processor."""
    return _limit or os.cpu_count() or 1


def threads_asked_for() -> int | None:
    """The limit inside `use_threads`; None outside."""
    return _limit


@contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Use this many threads inside the context, here and in child processes; None changes nothing."""
    global _limit
    if count is None:
        yield
        return
    before, variables = _limit, {name: os.environ.get(name) for name in _VARIABLES}
    torch_before = _torch_threads()
    _limit = count
    os.environ.update(dict.fromkeys(_VARIABLES, str(count)))
    _set_torch_threads(count)
    try:
        with _blas_threads(count):
            yield
    finally:
        _limit = before
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if torch_before is not None:
            _set_torch_threads(torch_before)


@contextmanager
def _blas_threads(count: int) -> Iterator[None]:
    """Limit OpenBLAS, which numpy's wheels have."""
    from threadpoolctl import ThreadpoolController  # not for every verb

    with ThreadpoolController().select(internal_api="openblas").limit(limits=count):
        yield


def limit_torch() -> None:
    """Give torch the limit of `use_threads`, for a caller that may have loaded it inside that context."""
    if _limit is not None:
        _set_torch_threads(_limit)


def _torch_threads() -> int | None:
    torch: Any = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


def _set_torch_threads(count: int) -> None:
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)


# numpy's products use one thread inside this context: for small products, or where a pool has the threads.
one_blas_thread: Final = ProcessContext(partial(_blas_threads, 1))
