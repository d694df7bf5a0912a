"""Checks of the arguments of functions: allowed strings, numbers, paths, and one value in place of a sequence."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from peraxis_format import arguments
from peraxis_tools.errors import OptionError

__all__ = [
    "check_choice",
    "check_least",
    "check_paths",
    "check_texts_by_domain",
    "check_workers",
    "refuse_idle",
    "sequence",
]

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


def check_paths(*, optional: bool = False, **given: object) -> None:
    """Raise OptionError unless all these arguments, by name, are texts or paths; or None, if they are optional."""
    for name, value in given.items():
        if not (optional and value is None):
            arguments.check_path(name, value, error=OptionError)


def check_texts_by_domain(texts: object) -> None:
    """Raise OptionError unless `texts` is a mapping to texts or paths."""
    if not isinstance(texts, Mapping):
        raise OptionError(f"texts is {arguments.kind_of(texts)}; pass a mapping, like {{'chat': 'held-out.jsonl'}}")
    check_paths(**{f"texts[{domain!r}]": text for domain, text in texts.items()})


def refuse_idle(why: str, **given: object) -> None:
    """Raise OptionError for the first argument that was given (not None, False or empty), because it does nothing."""
    for name, value in given.items():
        if value is not None and value is not False and value != () and value != []:
            raise OptionError(f"{name} does nothing {why}; leave it out")


def sequence(value: T | Sequence[T]) -> list[T]:
    """The items of a sequence. A string or a path is one item, never its letters. Raises OptionError for others."""
    if isinstance(value, str | Path):
        return [value]
    items = list(value) if isinstance(value, Iterable) else [value]
    for item in items:
        if not isinstance(item, str | os.PathLike):
            raise OptionError(f"{item!r} is {arguments.kind_of(item)}; pass a text or a path, or several")
    return items
