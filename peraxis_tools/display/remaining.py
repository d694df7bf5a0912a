"""The time left of a progress bar, also if one step takes minutes."""

from __future__ import annotations

import datetime

from rich.progress import ProgressColumn, Task
from rich.text import Text

__all__ = ["Remaining", "remaining_seconds"]


def remaining_seconds(*, done: float, total: float, at: float, now: float) -> float | None:
    """Seconds left. at: seconds of the steps so far; now: seconds since the beginning.

    None before the first step is done. rich's own column uses the last 30 seconds alone, and shows nothing if fewer
    than two steps ended in them.
    """
    if done <= 0:
        return None
    return max(0.0, at * (total - done) / done - (now - at))


class Remaining(ProgressColumn):
    """The time left by the mean of all steps so far; before the first step is done, the time so far."""

    max_refresh = 0.5

    def __init__(self) -> None:
        super().__init__()
        self._reached: dict[int, tuple[float, float]] = {}

    def render(self, task: Task) -> Text:
        now = task.elapsed or 0.0
        done, at = self._reached.get(task.id, (0.0, 0.0))
        if task.completed != done:
            done, at = task.completed, now
            self._reached[task.id] = done, at
        left = remaining_seconds(done=done, total=task.total or 0.0, at=at, now=now)
        shown = datetime.timedelta(seconds=round(now if left is None else left))
        return Text(f"{shown} so far" if left is None else f"{shown} left", style="progress.remaining")
