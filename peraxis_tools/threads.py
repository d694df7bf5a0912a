"""The number of threads of a run: torch, the libraries of linear algebra, the pools of this package, child processes.

Libraries read their environment variables when they are loaded, so those that are not loaded yet follow them, and
those that are loaded are told.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

__all__ = ["pool_size", "threads"]

_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_limit: int | None = None


def pool_size() -> int:
    """The number of threads of a pool: the limit inside `threads`, else one for each processor."""
    return _limit or os.cpu_count() or 1


@contextmanager
def threads(count: int | None) -> Iterator[None]:
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


def _torch_threads() -> int | None:
    torch: Any = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


def _set_torch_threads(count: int) -> None:
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)
