"""Checks of the arguments of functions: allowed strings, numbers, and one value in place of a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from peraxis_format import arguments
from peraxis_tools.errors import OptionError

__all__ = ["check_choice", "check_least", "check_mapping", "check_workers", "refuse_idle", "sequence"]

T = TypeVar("T", str, "str | Path")


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise OptionError unless the value is one of those allowed."""
    arguments.check_choice(name, value, allowed, error=OptionError)


def check_least(name: str, value: float | None, least: int) -> None:
    """Raise OptionError unless the value is a finite number of at least `least`, or None."""
    arguments.check_least(name, value, least, error=OptionError)


def check_workers(workers: int | None) -> None:
    """Raise OptionError for a number of threads below 1. None means the default."""
    check_least("workers", workers, 1)


def check_mapping(name: str, value: object, example: str) -> None:
    """Raise OptionError unless the value is a mapping."""
    if not isinstance(value, Mapping):
        raise OptionError(f"{name} is a {type(value).__name__}; pass a mapping, like {example}")


def refuse_idle(why: str, **given: object) -> None:
    """Raise OptionError for the first argument that was given (not None, False or empty), because it does nothing."""
    for name, value in given.items():
        if value is not None and value is not False and value != () and value != []:
            raise OptionError(f"{name} does nothing {why}; leave it out")


def sequence(value: T | Sequence[T]) -> list[T]:
    """The items of a sequence. A string or a path is one item, never its letters. Raises OptionError for others."""
    if isinstance(value, str | Path):
        return [value]
    if not isinstance(value, Iterable):
        raise OptionError(f"{value!r} is a {type(value).__name__}; pass a text or a path, or several")
    return list(value)
