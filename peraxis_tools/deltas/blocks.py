"""Count the modes of the blocks of exact tensors (SPEC 5.6)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

import numpy as np

import peraxis_format as pxd

__all__ = ["blocks_text", "count_blocks"]

_MODES: Final = ("keyed", "gaps", "raw", "unchanged")
_RAW: Final = 255


def count_blocks(module: pxd.ModuleDelta) -> Counter[str]:
    """The number of blocks of an exact module in each mode; empty for any other module."""
    found: Counter[str] = Counter()
    if module.index is None:
        return found
    modes, lengths = module.index & np.uint32(255), module.index >> np.uint32(8)
    found["raw"] = int(np.count_nonzero(modes == _RAW))
    found["unchanged"] = int(np.count_nonzero(lengths == 0))
    found["keyed"] = int(np.count_nonzero((modes > 0) & (modes != _RAW)))
    found["gaps"] = module.index.size - found["raw"] - found["unchanged"] - found["keyed"]
    return found


def blocks_text(blocks: Mapping[str, int], prefer: str) -> str:
    """The counts as a text, with the writer's preference."""
    counted = ", ".join(f"{blocks[mode]} {mode}" for mode in _MODES if blocks.get(mode))
    return f"{counted or 'none'} (SPEC 5.6); written for {prefer} (--prefer)"
