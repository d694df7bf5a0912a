"""mask_compare in numpy, the reference: one table lookup per byte."""

from __future__ import annotations

from typing import Final

import numpy as np

from peraxis_tools.ops.mask_compare import Columns, Counts, Mask, Sums

__all__ = ["differing"]

_BYTE_COUNT: Final = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1).astype(np.uint8)
_BLOCK: Final = 1 << 20


def differing(a: Mask, b: Mask, columns: Columns | None) -> tuple[Counts, Sums]:
    """See mask_compare.differing."""
    count = getattr(np, "bitwise_count", _BYTE_COUNT.__getitem__)  # numpy 2
    step = max(1, _BLOCK // a.shape[1])
    blocks = [a[i : i + step] ^ b[i : i + step] for i in range(0, a.shape[0], step)]
    counts = np.concatenate([count(block).sum(axis=1, dtype=np.int64) for block in blocks])
    if columns is None:
        return counts, counts.astype(np.float64)
    sums = np.zeros(a.shape[0])
    for part, table in columns.tables():
        places = np.arange(len(table))[: a.shape[1] - part.start]
        sums += np.concatenate([table[places, block[:, part]].sum(axis=1, dtype=np.float64) for block in blocks])
    return counts, sums
