"""The changes of weights by an API server: stage, swap, update, follow. routes.py is the HTTP side.

Each change is one sequence in one call: check the file on every rank, pause the scheduler, write, reset the prefix
cache, resume. One change or staging runs at a time.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from peraxis_format.engines.vllm.fetching import Fetching
from peraxis_format.engines.vllm.following import Following, RequestError
from peraxis_format.engines.vllm.offline import BASE_VERSION
from peraxis_format.engines.vllm.permitted import Permitted
from peraxis_format.engines.vllm.source import LONGEST_SOURCE, NAME_RULE, open_delta, quoted, shown
from peraxis_format.engines.vllm.transfer import CALL_WORKER, Calls, changing, staging
from peraxis_format.errors import CheckpointError, LiveModelError, PxdError

__all__ = ["Control", "content_id_of", "is_dead"]

_WAIT_SECONDS: Final = 600.0
_FOLLOW_SECONDS: Final = 1.0
_SHORTEST_SECONDS: Final = 0.01
_LONGEST_SECONDS: Final = 86400.0
_NAME: Final = re.compile(r"\w[\w.:@-]{0,199}")  # fits into a URL's path and into one line


@dataclass(slots=True)
class Control:
    """The state of one API server. permitted: the files that requests may name. staged: name -> content ID.
    base_version: that of the weights without a variant.
    """

    client: Any
    permitted: Permitted
    staged: dict[str, str] = field(default_factory=dict)
    current: str | None = None
    base_version: str = BASE_VERSION
    following: Following | None = None
    fetching: Fetching = field(default_factory=lambda: Fetching(one_host=True))
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def status(self) -> dict[str, Any]:
        """The weight version, the variant in use, the staged ones, and the followed chain."""
        version = await self.client.get_weight_version()
        variants = [{"name": name, "content_id": content_id} for name, content_id in self.staged.items()]
        follow = None if self.following is None else self.following.report()
        return {"weight_version": version, "variant": self.current, "variants": variants, "follow": follow}

    # --- variants --------------------------------------------------------------------------------------

    async def add(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Stage a variant on every rank."""
        name, delta = _text(body, "name"), self._source(body, "delta")
        if not _NAME.fullmatch(name):
            raise RequestError(400, f"name is {quoted(name)}; use letters, digits and . _ : @ -, at most 200")
        self._refuse_staging(name)  # before a URL is fetched, and again afterwards
        async with self.fetching.local(delta) as path, self._lock:
            self._refuse_staging(name)
            content_id = await asyncio.to_thread(content_id_of, path)
            await self._initialise({"add": {name: path}, "content_ids": {name: content_id}})
            self.staged[name] = content_id
        return {"name": name, "content_id": content_id}

    async def remove(self, name: str) -> dict[str, Any]:
        """Remove a variant on every rank."""
        async with self._lock:
            self._check_known(name)
            if name == self.current:
                raise RequestError(409, f"variant {name!r} is in use; use another one, or null, first")
            await self._initialise({"remove": [name]})
            del self.staged[name]
        return {"name": name}

    async def use(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Swap the model to a variant, or to the base."""
        variant = None if body.get("variant") is None else _text(body, "variant")
        pause = _Pause.of(body)
        async with self._lock:
            if variant is not None:
                self._check_known(variant)
            version = self.base_version if variant is None else self.staged[variant]
            times = await self._change({"variant": variant}, version, pause)
            self.current = variant
        return {"variant": variant, "weight_version": version, **times}

    # --- exact updates ---------------------------------------------------------------------------------

    async def update(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Apply one exact update to the weights, permanently."""
        path, pause = self._source(body, "update"), _Pause.of(body)
        self._refuse_following()
        async with self.fetching.local(path) as local:
            return await self._updated(local, pause)

    async def follow(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Follow the chain of a folder; the first poll runs before this answers."""
        folder, pause = Path(self._source(body, "folder")), _Pause.of(body)
        every = _seconds(body, "every", _FOLLOW_SECONDS)
        if not await asyncio.to_thread(os.path.isdir, folder):
            raise RequestError(400, f"{folder}: is not a folder that the server can read; name another")
        self._refuse_following()

        async def apply(path: Path) -> None:
            await self._updated(str(path), pause)

        following = self.following = Following(folder, every, apply)
        try:
            await following.poll()
        except BaseException:
            self.following = None
            raise
        following.start()
        return following.report()

    async def stop_following(self) -> dict[str, Any]:
        """Stop following; the model keeps its state."""
        following = self.following
        if following is None:
            raise RequestError(404, "no folder is followed")
        await following.stop()
        self.following = None
        return following.report()

    async def _updated(self, path: str, pause: _Pause) -> dict[str, Any]:
        async with self._lock:
            if self.staged:
                names = ", ".join(self.staged)
                raise RequestError(409, f"variants of the present weights are staged: {names}; remove them first")
            content_id = await asyncio.to_thread(content_id_of, path)
            await self._initialise({"update": path})
            times = await self._change({"update": content_id}, content_id, pause)
            self.base_version = content_id
        return {"weight_version": content_id, **times}

    # --- one change ------------------------------------------------------------------------------------

    async def _change(self, info: dict[str, Any], version: str, pause: _Pause) -> dict[str, float]:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            await self._paused(pause)
            paused = loop.time()
            await self._write(info, version)
        finally:
            await self.client.resume_generation()
        return {"waited_seconds": round(paused - started, 4), "paused_seconds": round(loop.time() - paused, 4)}

    async def _paused(self, pause: _Pause) -> None:
        try:
            await asyncio.wait_for(self.client.pause_generation(mode=pause.requests, clear_cache=True), pause.timeout)
        except TimeoutError:
            raise RequestError(
                503, f'requests did not end within {pause.timeout:g} s; try again, or pass "requests": "abort"'
            ) from None

    async def _write(self, info: dict[str, Any], version: str) -> None:
        await self._call(changing(info))
        await self.client.update_weight_version(version)
        if not await self.client.reset_prefix_cache():
            raise RequestError(503, "the prefix cache could not be reset; use the variant again")

    async def _initialise(self, info: dict[str, Any]) -> None:
        await self._call(staging(info))

    async def _call(self, calls: Calls) -> None:
        """Make calls on every rank. Raises RequestError with the first error."""
        errors = [error for error in await self.client.collective_rpc(CALL_WORKER, args=(calls,)) if error is not None]
        if errors:
            raise RequestError(400, errors[0])

    def _source(self, body: Mapping[str, Any], key: str) -> str:
        try:
            return self.permitted.source(_text(body, key))
        except PermissionError as error:
            raise RequestError(403, str(error)) from None

    def _check_known(self, name: str) -> None:
        if name not in self.staged:
            raise RequestError(404, f"no variant {quoted(name)}; staged: {', '.join(self.staged) or 'none'}")

    def _refuse_staging(self, name: str) -> None:
        self._refuse_following()
        if name in self.staged:
            raise RequestError(409, f"variant {name!r} is staged already; remove it first")

    def _refuse_following(self) -> None:
        if self.following is not None:
            raise RequestError(409, f"the server follows {self.following.folder}; DELETE /v1/peraxis/follow first")


@dataclass(frozen=True, slots=True)
class _Pause:
    """The handling of running requests: "wait", at most `timeout` seconds, or "abort"."""

    requests: str
    timeout: float

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> _Pause:
        requests = body.get("requests", "wait")
        if requests not in ("wait", "abort"):
            raise RequestError(400, f'requests is {quoted(requests)}; it can be "wait" or "abort"')
        return cls(requests, _seconds(body, "timeout", _WAIT_SECONDS))


def _seconds(body: Mapping[str, Any], key: str, default: float) -> float:
    value = body.get(key, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not _SHORTEST_SECONDS <= value <= _LONGEST_SECONDS:
        raise RequestError(
            400, f"{key} is {quoted(value)}; it must be a number of seconds, {_SHORTEST_SECONDS} to a day"
        )
    return float(value)


def _text(body: Mapping[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= LONGEST_SOURCE:
        raise RequestError(400, f"{key} is {quoted(value)}; {NAME_RULE.format(LONGEST_SOURCE)}")
    return value


def is_dead(error: BaseException) -> bool:
    """Whether an error means that a process of the engine has ended."""
    return "dead" in type(error).__name__.lower()


def content_id_of(delta: str) -> str:
    """The content ID of a delta, from its header. Raises RequestError."""
    try:
        with open_delta(delta) as file:
            return file.content_id
    except OSError as error:
        raise RequestError(
            400, f"{shown(delta)}: {error.strerror or error}; name a file that the server can read"
        ) from None
    except (PxdError, CheckpointError, LiveModelError) as error:
        raise RequestError(400, " ".join(str(error).split())) from None
