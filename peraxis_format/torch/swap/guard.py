"""Block swaps while a model's forward runs, and release them whatever ends the forward, Ctrl-C included.

Rejected: forward hooks. torch calls a hook with `always_call=True` after an Exception, but not after KeyboardInterrupt,
so Ctrl-C inside `generate` left the lock held for ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from peraxis_format.torch.swap.lock import SwapLock

__all__ = ["Guard"]


class Guard:
    """Replaces a module's forward, on the instance, until `remove`."""

    def __init__(self, model: nn.Module, lock: SwapLock) -> None:
        self._model = model
        self._lock: SwapLock | None = lock
        self._own: Callable[..., Any] | None = model.__dict__.get("forward")
        plain: Callable[..., Any] = model.forward

        @functools.wraps(plain)  # `generate` reads the signature of forward
        def forward(*args: Any, **kwargs: Any) -> Any:
            lock = self._lock
            if lock is None:  # removed, but another wrapper still refers to this one
                return plain(*args, **kwargs)
            with lock.shared():
                return plain(*args, **kwargs)

        self._forward = forward
        model.__dict__["forward"] = forward

    def remove(self) -> None:
        """Restore the model's own forward."""
        self._lock = None
        if self._model.__dict__.get("forward") is self._forward:
            del self._model.__dict__["forward"]
            if self._own is not None:
                self._model.__dict__["forward"] = self._own
