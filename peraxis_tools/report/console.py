"""Consoles, escaping, JSON, progress and errors, which all reports share.

Results go to standard output, everything else to standard error, and a result too whose output takes standard output.
Colour and progress appear only on terminals (rich honours NO_COLOR). Text from files passes through `text`, which
escapes control and bidirectional characters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.markup import escape

from peraxis_tools.display.consoles import shows_progress, standard_error, standard_output
from peraxis_tools.display.option_names import on_the_command_line
from peraxis_tools.display.shown import size, visible
from peraxis_tools.outputs.standard_streams import report_stream
from peraxis_tools.process.optional import require
from peraxis_tools.remote.urls import without_secrets

__all__ = [
    "emit",
    "hub_progress",
    "json_text",
    "plain_text",
    "print_error",
    "print_note",
    "print_notes",
    "print_progress",
    "show",
    "size",
    "text",
    "to_json",
    "write",
]

R = TypeVar("R")


def text(value: object) -> str:
    """A string from a file, safe for a terminal: without control, format or bidirectional characters and markup."""
    return escape(visible(value))


def to_json(value: Any) -> Any:
    """Convert results to JSON values: dataclasses by field, enums by value, paths as strings."""
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
    """Indented JSON; characters are escaped if the encoding does not have all of them."""
    plain = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    try:
        plain.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=2) + "\n"
    return plain


def emit(
    result: R,
    render: Callable[[R, Console], None],
    *,
    schema: str,
    as_json: bool,
    written: Path | str | None = None,
) -> None:
    """Print a result: `render` for a person, or JSON with its schema's name and version.

    schema: like `peraxis.inspect/1`; the number grows when a field changes its meaning or is removed. written: what the
    verb wrote. An error of standard output says so; with --quiet a report that has no standard output is left out.
    """
    try:
        _emit(result, render, schema=schema, as_json=as_json)
    except BrokenPipeError:
        raise
    except OSError as error:
        if written is None:
            raise
        if error.errno == errno.EBADF and _is_quiet() and not as_json:
            return
        error.add_note(f"{without_secrets(str(written))} was written")
        raise


def _is_quiet() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.params.get("quiet"))


def _emit(result: R, render: Callable[[R, Console], None], *, schema: str, as_json: bool) -> None:
    if as_json:
        write(json_text({"schema": schema, **to_json(result)}, encoding=report_stream().encoding))
    else:
        show(result, render)


def show(result: R, render: Callable[[R, Console], None]) -> None:
    """Print a result as text."""
    console = standard_output() if report_stream() is sys.stdout else standard_error()
    if not console.is_terminal:
        write(plain_text(result, render, width=console.width))
        return
    with _standard_output():
        render(result, console)


def plain_text(result: R, render: Callable[[R, Console], None], *, width: int = 120) -> str:
    """The text of a result for a file: without colours or blanks at the ends of lines. width: that of tables."""
    lines = io.StringIO()
    render(result, Console(file=lines, highlight=False, soft_wrap=True, color_system=None, width=width, emoji=False))
    return re.sub(" +\n", "\n", lines.getvalue())


def write(rendered: str) -> None:
    """Print formatted text."""
    stream = report_stream()
    with _standard_output():
        stream.write(rendered)
        stream.flush()


@contextlib.contextmanager
def _standard_output() -> Iterator[None]:
    """Add the stream's name to its errors, except BrokenPipeError (the reader closed it)."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, "standard output") from None


def print_error(message: str) -> None:
    """Print one line on standard error, without passwords of URLs."""
    shown = text(without_secrets(message))
    standard_error().print(f"[bold red]error[/]: {shown}")


def print_note(message: str, *, quiet: bool = False) -> None:
    """Print a note, one line on standard error."""
    if not quiet:
        standard_error().print(text(message))


class _NoteHandler(logging.Handler):
    """Prints each message of a logger as a note, once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._said:
            self._said.add(message)
            print_note(f"note: {on_the_command_line(message)}")


class _ProgressHandler(logging.Handler):
    """Prints messages where bars would be shown: on a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        if shows_progress():
            standard_error().print(text(record.getMessage()))


def print_progress(logger: logging.Logger) -> None:
    """Print the messages of this logger from now on, where bars are shown."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers[:] = [_ProgressHandler()]


def print_notes(logger: logging.Logger) -> None:
    """Print the messages of this logger from now on."""
    logger.handlers[:] = [_NoteHandler()]


@contextlib.contextmanager
def hub_progress(work: str, *, quiet: bool = False) -> Iterator[None]:
    """Show the hub library's bars if ours would be shown. work: what needs the library, for the error without it."""
    require(work, "huggingface_hub")
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or (shows_progress() and not quiet):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
