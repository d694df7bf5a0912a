"""Checks of arguments that callers give as plain strings and numbers, with the allowed values in the message."""

from __future__ import annotations

import math
from collections.abc import Iterable

from peraxis_format.errors import ArgumentError

__all__ = ["check_choice", "check_least"]


def check_choice(name: str, value: object, allowed: Iterable[str], *, error: type[Exception] = ArgumentError) -> None:
    """Raise `error` unless the value is one of those allowed."""
    choices = tuple(allowed)
    if value not in choices:
        raise error(f"{name} {value!r}: choose one of {', '.join(choices)}")


def check_least(name: str, value: float | None, least: int, *, error: type[Exception] = ArgumentError) -> None:
    """Raise `error` unless the value is a finite number of at least `least`, or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise error(f"{name} {value!r}: must be {least} or more")
