"""The chain of exact updates that a server follows: a folder is polled, and its updates after the model's state are
applied to the engine, one at a time.

The API server chooses the next file by headers alone; every rank then opens and checks it. The server does not know its
first state in the chain, so it begins with the newest anchor, which needs none.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peraxis_format.torch.updates import OtherFile, UpdateFile, list_updates, next_update, standing

__all__ = ["Following", "RequestError"]


class RequestError(Exception):
    """An error of a request. status: that of its HTTP answer; 400 if the request or its file is at fault."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class Following:
    """The progress along a chain. step: the step of the model's state; None before the first file.

    apply: applies one file to the engine, or raises RequestError. A faulty file is tried again when it or the state has
    changed. waiting: the reason why files ahead were not applied, by name.
    """

    folder: Path
    every: float
    apply: Callable[[Path], Awaitable[Any]]
    step: int | None = None
    lag: int = 0
    waiting: dict[str, str] = field(default_factory=dict)
    _state: str | None = None
    _noticed: str | None = None  # the reported other chain
    _known: dict[Path, UpdateFile | OtherFile] = field(default_factory=dict)
    _tried: dict[Path, tuple[Any, str]] = field(default_factory=dict)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None

    def report(self) -> dict[str, Any]:
        """The server's answer."""
        return {"folder": str(self.folder), "step": self.step, "lag": self.lag, "waiting": self.waiting}

    async def poll(self) -> None:
        """Apply all updates that can be applied."""
        files, problems = await asyncio.to_thread(list_updates, self.folder, self._known)
        waiting = dict(problems)
        while (chosen := next_update(files, self._state, self.step, skip=waiting)) is not None:
            tried = self._tried.get(chosen.path)
            if tried is not None and tried[0] == self._circumstances(chosen.path):
                waiting[chosen.path] = tried[1]
                continue
            try:
                await self.apply(chosen.path)
            except RequestError as error:
                waiting[chosen.path] = str(error)
                if error.status != 400:
                    break  # it is not tried again yet
                self._tried[chosen.path] = self._circumstances(chosen.path), str(error)
                continue
            self._state, self.step = chosen.result, chosen.step
            self._tried.clear()
        found = standing(files, self._state, self.step, waiting, source=self.folder, noticed=self._noticed)
        self.step, self.lag, self._noticed = found.step, found.lag, found.other
        self.waiting = {path.name: reason for path, reason in waiting.items()}

    def _circumstances(self, path: Path) -> Any:
        """The inputs of a refusal: the file's attributes, and the model's state."""
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns, self._state

    def start(self) -> None:
        """Poll repeatedly on the running loop, until `stop`."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self.every)
                return
            try:
                await self.poll()
            except Exception as error:  # the engine has ended, or the folder cannot be listed: say so, try again
                self.waiting = {self.folder.name: f"{type(error).__name__}: {error}"}

    async def stop(self) -> None:
        """Stop after the current update."""
        self._stopping.set()
        if self._task is not None:
            await self._task
