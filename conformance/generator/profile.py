"""Files with one fault in the content of the manifest, or in the tensors (SPEC 3.5 to 4.2)."""

from __future__ import annotations

from collections.abc import Iterator

from .entry import Entry
from .fits import assets, encodings
from .names import limits, names
from .tensors import orders, tensors

__all__ = ["profile"]


def profile() -> Iterator[Entry]:
    """Every case of this module."""
    for group in (names, limits, encodings, assets, tensors, orders):
        yield from group()
