"""Sizes of bytes as a user writes them: `1200000`, `800KB`, `1.2GB` (powers of 1000) or `1GiB` (of 1024)."""

from __future__ import annotations

import re

from peraxis_tools.errors import OptionError

__all__ = ["parse_size"]


def parse_size(text: str | int) -> int:
    """The number of bytes. Raises OptionError for a text that is no size."""
    if not isinstance(text, str):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", text, re.IGNORECASE)
    if match is None:
        raise OptionError(f"size {text!r}: write it as 800MB, 1.2GB or 1GiB")
    power = "kmgt".index(match[2].lower()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
