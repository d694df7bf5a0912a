"""Write an exact module of a host payload: the base's weights, then its blocks in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from peraxis_format.delta import ModuleDelta
from peraxis_format.dtypes import Array
from peraxis_format.ops.exact import apply
from peraxis_format.torch.place.proof import block_ranges

__all__ = ["exact_jobs"]


def exact_jobs(module: ModuleDelta, base: Array, out: Array) -> Iterator[Callable[[], None]]:
    """Jobs that write the new weights to `out`. base: C-contiguous; it may be `out`.

    The caller has proved that the module decodes on this base.
    """
    if not out.flags.c_contiguous:
        yield partial(_strided, module, base, out)
        return
    flat, source = out.reshape(-1), base.reshape(-1)
    for weights, update in block_ranges(module):
        yield partial(_decode, source[weights], flat[weights], update)


def _decode(base: Array, out: Array, update: dict[str, Any]) -> None:
    np.copyto(out, base)
    apply(out, **update, threads=1)


def _strided(module: ModuleDelta, base: Array, out: Array) -> None:
    new = base.copy()
    for weights, update in block_ranges(module):
        apply(new.reshape(-1)[weights], **update, threads=1)
    np.copyto(out, new)
