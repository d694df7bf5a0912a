"""Text as people read it: names from files in one line, without control characters; lists and counts."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Final

__all__ = ["counted", "listed", "printable_name", "size", "times_smaller", "visible", "visible_lines"]

_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})  # Unicode's categories

_CLOSE: Final = 1.05  # a ratio below it is written as a percentage


def visible(value: object) -> str:
    """The text with control, format, surrogate and private characters, and separators of lines, as escapes."""
    return "".join(c if unicodedata.category(c) not in _HIDDEN else f"\\u{ord(c):04x}" for c in str(value))


def visible_lines(text: str) -> str:
    """The text as `visible` gives it, with its line feeds and carriage returns."""
    return "".join(c if c in "\r\n" else visible(c) for c in text)


def listed(names: Sequence[str], shown: int = 5) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def counted(number: int, noun: str) -> str:
    """`1 module`, `2 modules`. noun: one whose plural ends in s."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def times_smaller(full: int, stored: int) -> str:
    """`6.7 times smaller`, or `1.2 times larger`; `4% larger` where that would be 1.0 times, `as large` below 0.5%.

    full, stored: bytes of the checkpoint and of the file.
    """
    full, stored = max(full, 1), max(stored, 1)
    word, ratio = ("smaller", full / stored) if full >= stored else ("larger", stored / full)
    if ratio >= _CLOSE:
        return f"{ratio:.1f} times {word}"
    percent = f"{100 * abs(stored - full) / full:.0f}%"
    return "as large" if percent == "0%" else f"{percent} {word}"


def size(count: float) -> str:
    """Format bytes: three digits, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def printable_name(path: str) -> str:
    """A name in one line of valid Unicode: all other characters of a file's name are escaped."""
    text = path.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
