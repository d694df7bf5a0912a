"""Checks of arguments that callers give as plain strings, numbers and paths, with what is allowed in the message."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable
from typing import Final

from peraxis_format.errors import ArgumentError

__all__ = ["check_choice", "check_least", "check_path", "check_variant", "did_you_mean", "kind_of"]

_LONGEST: Final = 100  # characters of a name that are compared
_MOST: Final = 1 << 14  # names that it is compared with


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """`; did you mean NAME?` with the closest of the known names, for the end of a message; empty if none is close."""
    import difflib

    by_plain = {_plain(name): name for name in itertools.islice(known, _MOST)}
    close = difflib.get_close_matches(_plain(str(value)[:_LONGEST]), by_plain, n=1)
    return f"; did you mean {by_plain[close[0]]}?" if close else ""


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def check_choice(name: str, value: object, allowed: Iterable[str], *, error: type[Exception] = ArgumentError) -> None:
    """Raise `error` unless the value is one of those allowed."""
    choices = tuple(allowed)
    if value not in choices:
        raise error(f"{name} {value!r}: choose one of {', '.join(choices)}{did_you_mean(value, choices)}")


def check_variant(name: object, *, error: type[Exception] = ArgumentError) -> None:
    """Raise `error` unless the name of a variant is a text: None is the base, and numbers are indices."""
    if not isinstance(name, str) or not name:
        raise error(f"the variant's name {name!r}: must be a text that is not empty")


def check_least(name: str, value: float | None, least: int, *, error: type[Exception] = ArgumentError) -> None:
    """Raise `error` unless the value is a finite number of at least `least`, or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise error(f"{name} {value!r}: must be {least} or more")


def check_path(name: str, value: object, *, error: type[Exception] = ArgumentError) -> None:
    """Raise `error` unless the value is a text or a path."""
    if not isinstance(value, str | os.PathLike):
        raise error(f"{name} is {kind_of(value)}; pass a path")


def kind_of(value: object) -> str:
    """The type of a value with its article, for a message: `a list`, `an int`."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
