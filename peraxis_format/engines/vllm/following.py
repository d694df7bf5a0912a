"""The chain of exact updates that a server follows: a folder is looked into once in a while, and what it holds beyond
the model's state is brought to the engine, an update at a time.

The API server decides which file is next, by headers alone; every rank then opens it, and proves it. The server begins
at no state of the chain that it knows of, and so with the newest anchor, which needs none.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peraxis_format.engines.vllm.bridge import UpdateFile, list_updates, next_update

__all__ = ["Following", "RequestError"]


class RequestError(Exception):
    """An error of a request. status: of its HTTP answer; 400 where the request or its file is at fault."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class Following:
    """What is known of the chain. step: of the state that the model is at; None before the first file.

    apply: brings one file to the engine, or raises RequestError. A file that is at fault is tried again when it or the
    state has changed. waiting: why files ahead were not applied, by name.
    """

    folder: Path
    every: float
    apply: Callable[[Path], Awaitable[Any]]
    step: int | None = None
    lag: int = 0
    waiting: dict[str, str] = field(default_factory=dict)
    _state: str | None = None
    _known: dict[Path, UpdateFile] = field(default_factory=dict)
    _tried: dict[Path, tuple[Any, str]] = field(default_factory=dict)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None

    def report(self) -> dict[str, Any]:
        """What the server answers."""
        return {"folder": str(self.folder), "step": self.step, "lag": self.lag, "waiting": self.waiting}

    async def poll(self) -> None:
        """Apply what can be applied."""
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
                    break  # its time has not come
                self._tried[chosen.path] = self._circumstances(chosen.path), str(error)
                continue
            self._state, self.step = chosen.result, chosen.step
            self._tried.clear()
        ahead = [file for file in files if not file.is_anchor and file.step > (-1 if self.step is None else self.step)]
        for file in ahead:
            waiting.setdefault(file.path, f"{file.path}: does not continue the state that the model is in")
        self.lag = len(ahead)
        self.waiting = {path.name: reason for path, reason in waiting.items()}

    def _circumstances(self, path: Path) -> Any:
        """What a refusal depends on: the file as it is, and the model's state."""
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns, self._state

    def start(self) -> None:
        """Poll again and again on the running loop, until `stop`."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self.every)
                return
            try:
                await self.poll()
            except Exception as error:  # the engine has ended, or the folder cannot be listed: said, and tried again
                self.waiting = {self.folder.name: f"{type(error).__name__}: {error}"}

    async def stop(self) -> None:
        """End it, behind the update that it is at."""
        self._stopping.set()
        if self._task is not None:
            await self._task
