"""The number of modules by encoding, as every result of a verb shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from peraxis_format import Encoding

__all__ = ["count_encodings", "encodings_text"]


def count_encodings(encodings: Iterable[Encoding]) -> dict[str, int]:
    """Modules by the name of their encoding (SPEC 4), in the order of the names; only those that occur."""
    return dict(sorted(Counter(encoding.value for encoding in encodings).items()))


def encodings_text(counts: Mapping[str, int]) -> str:
    """`2 full, 30 sign`."""
    return ", ".join(f"{count} {encoding}" for encoding, count in counts.items())
