"""The modes of torch in which the loader allocates tensors and writes weights, whatever mode its caller is in.

A tensor that was allocated in inference mode can only be written in that mode; any other one can be written in both.
Threads do not inherit the mode. So what the loader keeps is allocated outside, and weights, which may come from a model
that was loaded in inference mode, are written inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["allocates", "writes"]


@contextmanager
def allocates() -> Iterator[None]:
    """Allocate tensors that can be written in each mode, and record no gradients. It is also a decorator."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def writes() -> Iterator[None]:
    """Write tensors that were allocated in any mode. It is also a decorator."""
    with torch.inference_mode():
        yield
