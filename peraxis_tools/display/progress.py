"""Progress of work with one or several stages, independent of its display.

Functions with `progress` take a callable, True for bars on standard error if it is a terminal, or None. Each stage also
logs to the logger `peraxis` at level INFO: its beginning, its end, and its progress every ten seconds.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Final, TypeAlias

from peraxis_tools.display import bars

__all__ = [
    "Progress",
    "ProgressOf",
    "StageOpener",
    "Staged",
    "StagedProgress",
    "Steps",
    "silent",
    "staged",
    "stages_of",
    "watched",
    "watched_stages",
]

# progress(description, total) opens a stage and yields the function that is called with each number of units done in
# it; the total is None if it is unknown.
ProgressOf: TypeAlias = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
# progress(done): called with each number of units done, from any thread.
Steps: TypeAlias = Callable[[int], None]


class StageOpener:
    """Opens the stages of work: a ProgressOf that functions of one stage can distinguish from a plain callable."""

    def __init__(self, opened: ProgressOf) -> None:
        self._opened = opened

    def __call__(self, description: str, total: int | None) -> AbstractContextManager[Steps]:
        return self._opened(description, total)


# The argument of a function that counts in one unit: a function called with numbers of units done, True for a bar, or
# a StageOpener.
Progress: TypeAlias = Steps | StageOpener | bool | None
# progress(stage, done, total): the name of the stage, the units done, and their total.
Staged: TypeAlias = Callable[[str, int, int], None]
# The argument of a function with several stages: a Staged, or True for bars.
StagedProgress: TypeAlias = Staged | bool | None

_LOG: Final = logging.getLogger("peraxis")
LOG_SECONDS: Final = 10.0


@contextlib.contextmanager
def silent(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A stage without display."""
    yield lambda _: None


def staged(*, quiet: bool = False) -> StageOpener:
    """A StageOpener that opens a bar for each stage."""
    return StageOpener(lambda description, total: bars.progress(description, total, quiet=quiet))


@contextlib.contextmanager
def watched(progress: Progress, stage: str, total: int | None) -> Iterator[Steps]:
    """Yield the function to call with numbers of units done in one stage. total: all units, None if it is unknown."""
    with ExitStack() as stack:
        show: Steps | None = None
        if progress is True:
            show = stack.enter_context(bars.progress(stage, total))
        elif isinstance(progress, StageOpener):
            show = stack.enter_context(progress(stage, total))
        elif callable(progress):
            show = progress
        log = stack.enter_context(_logged(stage, total))

        def step(done: int) -> None:
            log.add(done)
            if show is not None:
                show(done)

        yield step


def stages_of(progress: Progress) -> ProgressOf:
    """`watched` for a function with several stages that count in one unit, like bytes."""
    return lambda stage, total: watched(progress, stage, total)


@contextlib.contextmanager
def watched_stages(progress: StagedProgress) -> Iterator[Staged]:
    """Yield the function to call with (stage, done, total) in a function of several stages."""
    with ExitStack() as stack:
        show: Staged | None = None
        if progress is True:
            show = stack.enter_context(bars.Stages())
        elif callable(progress):
            show = progress
        logs = stack.enter_context(ExitStack())
        current: list[_StageLog] = []

        def step(stage: str, done: int, total: int) -> None:
            if not current or current[0].stage != stage:
                logs.close()
                current[:] = [logs.enter_context(_logged(stage, total))]
            current[0].reach(done)
            if show is not None:
                show(stage, done, total)

        yield step


@contextlib.contextmanager
def _logged(stage: str, total: int | None) -> Iterator[_StageLog]:
    log = _StageLog(stage, total)
    yield log
    _LOG.info("%s: done in %.1f s", stage, time.monotonic() - log.begin)


class _StageLog:
    """Logs the progress of one stage, from any thread."""

    def __init__(self, stage: str, total: int | None) -> None:
        self.stage = stage
        self.begin = time.monotonic()
        self._total, self._done = total, 0
        self._due = self.begin + LOG_SECONDS
        self._lock = threading.Lock()
        _LOG.info("%s: begins", stage)

    def add(self, count: int) -> None:
        """Count units."""
        with self._lock:
            self._done += count
            self._tell()

    def reach(self, done: int) -> None:
        """Count up to this many units."""
        with self._lock:
            self._done = done
            self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if now < self._due or not self._total:
            return
        self._due = now + LOG_SECONDS
        share = min(1.0, self._done / self._total)
        left = (now - self.begin) * (1 - share) / share if share else float("nan")
        _LOG.info("%s: %.0f%%, about %.0f s left", self.stage, 100 * share, left)
