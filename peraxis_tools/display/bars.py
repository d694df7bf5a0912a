"""Progress bars on standard error, if it is a terminal; otherwise nothing is shown."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, Protocol

from peraxis_tools.display.consoles import console_of_bar, shows_progress
from peraxis_tools.display.remaining import Remaining
from peraxis_tools.display.shown import visible

__all__ = ["Advance", "Stages", "progress"]

_OF_BYTES: Final = ("check", "write")  # stages of a run that count bytes
_REFRESH_SECONDS: Final = 0.05


class Advance(Protocol):
    """The function that long work calls with each number of units done."""

    def __call__(self, done: int, /) -> None: ...


@contextlib.contextmanager
def progress(description: str, total: int | None, *, unit: str = "bytes", quiet: bool = False) -> Iterator[Advance]:
    """A bar on standard error, if it is a terminal; yields the function that advances it, from any thread.

    total: with it the bar shows the share that is done and the time left; without it (None) the time so far.
    """
    if quiet or not shows_progress():
        yield lambda _: None
        return
    from rich import progress as bars

    columns: list[bars.ProgressColumn] = [bars.TextColumn("{task.description}", markup=False), bars.BarColumn()]
    if total is None:
        columns += [bars.TimeElapsedColumn()]
    else:
        columns += [bars.DownloadColumn() if unit == "bytes" else bars.MofNCompleteColumn(), Remaining()]
    with console_of_bar() as console, bars.Progress(*columns, console=console, transient=True) as bar:
        steps = _Steps(partial(bar.advance, bar.add_task(visible(description), total=total)))
        yield steps
        steps.flush()


class _Steps:
    """Passes steps on a few times a second, because advancing a bar takes longer than many steps."""

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
    """One bar after the other, each opened at the first call for its stage: progress(stage, done, total).

    This is a context manager; the last bar is closed at its end.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._stack, self._quiet = contextlib.ExitStack(), quiet
        self._stage = ""
        self._done = 0
        self._advance: Advance | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stack.close()
            unit = "bytes" if stage in _OF_BYTES else "steps"
            self._advance = self._stack.enter_context(progress(stage, total, unit=unit, quiet=self._quiet))
            self._stage, self._done = stage, 0
        if self._advance is not None:
            self._advance(done - self._done)
        self._done = done

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
