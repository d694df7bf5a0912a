"""Consoles, escaping, JSON, progress and errors: what every verb's report shares.

Results go to standard output, all else to standard error. Colour and progress appear on terminals alone
(rich honours NO_COLOR). Text that comes from files passes through `text`, which shows control and
bidirectional characters as escapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from rich.console import Console
from rich.markup import escape

from peraxis_tools.optional import require
from peraxis_tools.progress import StageOpener
from peraxis_tools.urls import without_secrets

__all__ = [
    "Progress",
    "Stages",
    "emit",
    "hub_progress",
    "json_text",
    "print_error",
    "print_note",
    "print_notes",
    "progress",
    "show",
    "size",
    "staged",
    "text",
    "to_json",
    "write",
]

_REFRESH_SECONDS: Final = 0.05

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


def json_text(value: Any, *, encoding: str | None = "utf-8") -> str:
    """JSON in lines, with its characters as they are where an encoding has them all, else as escapes."""
    plain = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    try:
        plain.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=2) + "\n"
    return plain


def emit(result: R, render: Callable[[R, Console], None], *, schema: str, as_json: bool) -> None:
    """Print a result: `render` for a person, or JSON with its schema's name and version.

    schema: like `peraxis.inspect/1`; the number grows when a field changes its meaning or goes away.
    """
    if as_json:
        write(json_text({"schema": schema, **to_json(result)}, encoding=sys.stdout.encoding))
    else:
        show(result, render)


def show(result: R, render: Callable[[R, Console], None]) -> None:
    """Print a result for a person."""
    with _standard_output():
        render(result, Console(highlight=False, soft_wrap=True))


def write(rendered: str) -> None:
    """Print what is formatted already."""
    with _standard_output():
        sys.stdout.write(rendered)
        sys.stdout.flush()


@contextlib.contextmanager
def _standard_output() -> Iterator[None]:
    """Give errors of the stream its name; that its reader went away is told by its class."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, "standard output") from None


def print_error(message: str) -> None:
    """One line on standard error; a URL in it loses its password."""
    shown = text(without_secrets(message))
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error[/]: {shown}")


def print_note(message: str, *, quiet: bool = False) -> None:
    """One line on standard error that is no error."""
    if not quiet:
        Console(stderr=True, highlight=False, soft_wrap=True).print(text(message))


class _NoteHandler(logging.Handler):
    """Prints each sentence of a logger as a note, once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._said:
            self._said.add(message)
            print_note(f"note: {message}")


def print_notes(logger: logging.Logger) -> None:
    """Print what this logger is told from now on."""
    logger.handlers[:] = [_NoteHandler()]


@contextlib.contextmanager
def progress(description: str, total: int | None, *, unit: str = "bytes", quiet: bool = False) -> Iterator[Progress]:
    """A bar on standard error, where that is a terminal; yields the function that advances it, from any thread.

    total: with it the bar says how much is done and how long the rest takes, without it (None) how long it took so far.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    from rich import progress as bars

    from peraxis_tools.report.remaining import Remaining

    columns: list[bars.ProgressColumn] = [bars.TextColumn("{task.description}"), bars.BarColumn()]
    if total is None:
        columns += [bars.TimeElapsedColumn()]
    else:
        columns += [bars.DownloadColumn() if unit == "bytes" else bars.MofNCompleteColumn(), Remaining()]
    with bars.Progress(*columns, console=console, transient=True) as bar:
        steps = _Steps(partial(bar.advance, bar.add_task(description, total=total)))
        yield steps
        steps.flush()


class _Steps:
    """Passes steps on a few times a second: a bar takes longer to advance than many a step takes."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._lock = threading.Lock()
        self._waiting = 0
        self._due = 0.0

    def __call__(self, done: int, /) -> None:
        with self._lock:
            self._waiting += done
            if time.monotonic() < self._due:
                return
            self._due = time.monotonic() + _REFRESH_SECONDS
        self.flush()

    def flush(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, 0
        self._advance(waiting)


class Stages:
    """One bar after the other, each opened when its stage is first heard of: progress(stage, done, total).

    A context manager: the last bar goes at its end.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._stack, self._quiet = contextlib.ExitStack(), quiet
        self._stage = ""
        self._done = 0
        self._advance: Progress | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stack.close()
            unit = "bytes" if stage == "write" else "steps"
            self._advance = self._stack.enter_context(progress(stage, total, unit=unit, quiet=self._quiet))
            self._stage, self._done = stage, 0
        if self._advance is not None:
            self._advance(done - self._done)
        self._done = done

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def staged(*, quiet: bool = False) -> StageOpener:
    """What opens a bar for each stage of work that has several."""
    return StageOpener(lambda description, total: progress(description, total, quiet=quiet))


@contextlib.contextmanager
def hub_progress(*, quiet: bool = False) -> Iterator[None]:
    """The hub library's own bars of an upload, where ours would be shown."""
    require("an upload", "huggingface_hub")
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or (Console(stderr=True).is_terminal and not quiet):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
