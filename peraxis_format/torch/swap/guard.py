"""Holds swaps off while a model's forward runs, and gives way whatever ends the forward: Ctrl-C too.

Rejected: forward hooks. torch calls a hook with `always_call=True` after an Exception, but not after KeyboardInterrupt,
so that Ctrl-C inside `generate` left the lock held for ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from peraxis_format.torch.swap.lock import SwapLock

__all__ = ["Guard"]


class Guard:
    """Stands in for a module's forward, on the instance, until `remove`."""

    def __init__(self, model: nn.Module, lock: SwapLock) -> None:
        self._model = model
        self._lock: SwapLock | None = lock
        self._own: Callable[..., Any] | None = model.__dict__.get("forward")
        plain: Callable[..., Any] = model.forward

        @functools.wraps(plain)  # `generate` reads the signature of forward
        def forward(*args: Any, **kwargs: Any) -> Any:
            lock = self._lock
            if lock is None:  # removed, while another wrapper still holds this one
                return plain(*args, **kwargs)
            with lock.shared():
                return plain(*args, **kwargs)

        self._forward = forward
        model.__dict__["forward"] = forward

    def remove(self) -> None:
        """Put the model's own forward back."""
        self._lock = None
        if self._model.__dict__.get("forward") is self._forward:
            del self._model.__dict__["forward"]
            if self._own is not None:
                self._model.__dict__["forward"] = self._own
