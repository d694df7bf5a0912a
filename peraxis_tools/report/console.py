"""Consoles, escaping, JSON, progress and errors: what every verb's report shares.

Results go to standard output, all else to standard error. Colour and progress appear on terminals alone
(rich honours NO_COLOR). Text that comes from files passes through `text`, which shows control and
bidirectional characters as escapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.markup import escape

__all__ = ["Progress", "emit", "print_error", "print_note", "progress", "show", "size", "text", "to_json", "write"]

R = TypeVar("R")


class Progress(Protocol):
    """What long work calls with each number of units done."""

    def __call__(self, done: int, /) -> None: ...


def text(value: object) -> str:
    """A string from a file, fit for a terminal: no control, format or bidirectional characters, no markup."""
    shown = "".join(
        char if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else f"\\u{ord(char):04x}"
        for char in str(value)
    )
    return escape(shown)


def size(count: float) -> str:
    """Bytes for a person: three digits, decimal units as disks and hubs count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def to_json(value: Any) -> Any:
    """Results as JSON values: dataclasses by field, enums by value, paths as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def emit(result: R, render: Callable[[R, Console], None], *, schema: str, as_json: bool) -> None:
    """Print a result: `render` for a person, or JSON with its schema's name and version.

    schema: like `peraxis.inspect/1`; the number grows when a field changes its meaning or goes away.
    """
    if as_json:
        sys.stdout.write(json.dumps({"schema": schema, **to_json(result)}, ensure_ascii=False, indent=2) + "\n")
    else:
        show(result, render)


def show(result: R, render: Callable[[R, Console], None]) -> None:
    """Print a result for a person."""
    render(result, Console(highlight=False, soft_wrap=True))


def write(rendered: str) -> None:
    """Print what is formatted already."""
    sys.stdout.write(rendered)


def print_error(message: str) -> None:
    """One line on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error[/]: {text(message)}")


def print_note(message: str, *, quiet: bool = False) -> None:
    """One line on standard error that is no error."""
    if not quiet:
        Console(stderr=True, highlight=False, soft_wrap=True).print(text(message))


@contextlib.contextmanager
def progress(description: str, total: int, *, unit: str = "bytes", quiet: bool = False) -> Iterator[Progress]:
    """A bar with time left on standard error, where that is a terminal; yields the function that advances it."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)
