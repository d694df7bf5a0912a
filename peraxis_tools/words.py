"""Numbers with their nouns."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, noun: str) -> str:
    """`1 module`, `2 modules`. noun: one whose plural ends in s."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
