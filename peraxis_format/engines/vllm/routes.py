"""HTTP routes for live swaps, without vLLM's development mode: an endpoint plug-in, asked for by VLLM_PLUGINS=peraxis.

    GET  /v1/peraxis                                                 weight version, staged variants, the one in use
    POST /v1/peraxis/variants    {"name": "legal", "delta": "legal.pxd"}             check and stage; the model stays
    POST /v1/peraxis/use         {"variant": "legal" or null, "requests": "wait" or "abort", "timeout": 60}
    DELETE /v1/peraxis/variants/legal

`use` is one call: pause the scheduler, swap, pack again, reset the prefix cache, resume. requests says what happens to
those that run: "wait" lets them end with the old weights while new ones queue; "abort" ends them at once. Either way no
output mixes two variants. The routes lie under /v1, so that vLLM's --api-key guards them.

Errors are {"error": one line}: 400 for a bad request, file or base, 404 for an unknown variant, 409 for a name in use,
503 where requests did not end in time; the variant before is then still served. 503 too where a process of the engine
has ended, which no request survives.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import FastAPI, Request  # type: ignore[import-not-found, unused-ignore]
from fastapi.responses import JSONResponse  # type: ignore[import-not-found, unused-ignore]

from peraxis_format.engines.vllm.offline import BASE_VERSION
from peraxis_format.engines.vllm.source import open_delta
from peraxis_format.errors import CheckpointError, LiveModelError, PxdError

__all__ = ["PeraxisEndpoints"]

_PREFIX: Final = "/v1/peraxis"
_WAIT_SECONDS: Final = 600.0
_WRAPPED: Final = re.compile(r"Worker failed with error '(?P<cause>.*)', please check the stack trace")


class _RequestError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class _Swaps:
    """What one API server knows. staged: name -> content ID. One swap or staging at a time."""

    client: Any
    staged: dict[str, str] = field(default_factory=dict)
    current: str | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def status(self) -> dict[str, Any]:
        """What GET answers."""
        version = await self.client.get_weight_version()
        variants = [{"name": name, "content_id": content_id} for name, content_id in self.staged.items()]
        return {"weight_version": version, "variant": self.current, "variants": variants}

    async def add(self, body: dict[str, Any]) -> dict[str, Any]:
        """Stage a variant on every rank."""
        name, delta = _text(body, "name"), _text(body, "delta")
        async with self.lock:
            if name in self.staged:
                raise _RequestError(409, f"variant {name!r} is staged already; remove it first")
            content_id = await asyncio.to_thread(_content_id, delta)
            await self._initialise({"add": {name: delta}})
            self.staged[name] = content_id
        return {"name": name, "content_id": content_id}

    async def remove(self, name: str) -> dict[str, Any]:
        """Forget a variant on every rank."""
        async with self.lock:
            if name not in self.staged:
                raise _RequestError(404, f"no variant {name!r}; staged: {', '.join(self.staged) or 'none'}")
            if name == self.current:
                raise _RequestError(409, f"variant {name!r} is in use; use another one, or null, first")
            await self._initialise({"remove": [name]})
            del self.staged[name]
        return {"name": name}

    async def use(self, body: dict[str, Any]) -> dict[str, Any]:
        """Pause, swap, reset the prefix cache, resume."""
        variant = None if body.get("variant") is None else _text(body, "variant")
        requests = body.get("requests", "wait")
        timeout = body.get("timeout", _WAIT_SECONDS)
        if requests not in ("wait", "abort"):
            raise _RequestError(400, f'requests is {requests!r}; it can be "wait" or "abort"')
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
            raise _RequestError(400, f"timeout is {timeout!r}; it is a number of seconds")
        async with self.lock:
            if variant is not None and variant not in self.staged:
                raise _RequestError(404, f"no variant {variant!r}; staged: {', '.join(self.staged) or 'none'}")
            loop = asyncio.get_running_loop()
            started = loop.time()
            try:
                await self._pause(requests, float(timeout))
                paused = loop.time()
                version = await self._swap(variant)
                self.current = variant
            finally:
                await self.client.resume_generation()
        return {
            "variant": variant,
            "weight_version": version,
            "waited_seconds": round(paused - started, 4),
            "paused_seconds": round(loop.time() - paused, 4),
        }

    async def _pause(self, mode: str, timeout: float) -> None:
        try:
            await asyncio.wait_for(self.client.pause_generation(mode=mode, clear_cache=True), timeout)
        except TimeoutError:
            raise _RequestError(
                503, f'requests did not end within {timeout:g} s; try again, or pass "requests": "abort"'
            ) from None

    async def _swap(self, variant: str | None) -> str:
        from peraxis_format.engines.vllm.layout import update_request

        version = BASE_VERSION if variant is None else self.staged[variant]
        with _engine_errors():
            await self.client.start_weight_update()
            await self.client.update_weights(update_request({"variant": variant}))
            await self.client.finish_weight_update(weight_version=version)
            if not await self.client.reset_prefix_cache():
                raise LiveModelError("the prefix cache could not be reset; use the variant again")
        return version

    async def _initialise(self, info: dict[str, Any]) -> None:
        from peraxis_format.engines.vllm.layout import init_request

        with _engine_errors():
            await self.client.init_weight_transfer_engine(init_request(info))


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """An error in a worker comes as text, with vLLM's words around it; a dead engine is not a bad request."""
    try:
        yield
    except Exception as error:
        if _is_dead(error):
            raise
        raise _RequestError(400, _line(error)) from None


def _is_dead(error: BaseException) -> bool:
    return "dead" in type(error).__name__.lower()


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    wrapped = _WRAPPED.search(text)
    return text if wrapped is None else wrapped["cause"]


def _text(body: dict[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not value:
        raise _RequestError(400, f"{key} is {value!r}; it is a text that is not empty")
    return value


def _content_id(delta: str) -> str:
    """Of a delta, from its header. Raises _RequestError."""
    try:
        with open_delta(delta) as file:
            return file.content_id
    except (PxdError, CheckpointError, LiveModelError, OSError) as error:
        raise _RequestError(400, _line(error)) from None


async def _body(request: Request) -> dict[str, Any]:
    try:
        found = await request.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _RequestError(400, "the body is not a JSON object")
    return found


async def _answer(request: Request, action: Callable[[_Swaps], Awaitable[dict[str, Any]]]) -> JSONResponse:
    swaps: _Swaps = request.app.state.peraxis_swaps
    try:
        return JSONResponse(await action(swaps))
    except _RequestError as error:
        return JSONResponse({"error": str(error)}, status_code=error.status)
    except Exception as error:
        if not _is_dead(error):
            raise
        return JSONResponse({"error": "a process of the engine has ended; start the server again"}, status_code=503)


async def get_status(request: Request) -> JSONResponse:
    """GET /v1/peraxis."""
    return await _answer(request, lambda swaps: swaps.status())


async def post_variant(request: Request) -> JSONResponse:
    """POST /v1/peraxis/variants."""

    async def action(swaps: _Swaps) -> dict[str, Any]:
        return await swaps.add(await _body(request))

    return await _answer(request, action)


async def delete_variant(request: Request) -> JSONResponse:
    """DELETE /v1/peraxis/variants/NAME."""
    return await _answer(request, lambda swaps: swaps.remove(request.path_params["name"]))


async def post_use(request: Request) -> JSONResponse:
    """POST /v1/peraxis/use."""

    async def action(swaps: _Swaps) -> dict[str, Any]:
        return await swaps.use(await _body(request))

    return await _answer(request, action)


class PeraxisEndpoints:
    """vLLM's EndpointPlugin."""

    name = "peraxis"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.add_api_route(_PREFIX, get_status, methods=["GET"])
        app.add_api_route(f"{_PREFIX}/variants", post_variant, methods=["POST"])
        app.add_api_route(f"{_PREFIX}/variants/{{name}}", delete_variant, methods=["DELETE"])
        app.add_api_route(f"{_PREFIX}/use", post_use, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the engine's client; a server that started from a delta reports its content ID."""
        state.peraxis_swaps = _Swaps(engine_client)
        config = engine_client.vllm_config.load_config
        delta = (config.model_loader_extra_config or {}).get("delta") if config.load_format == "peraxis" else None
        if delta is not None:
            await engine_client.update_weight_version(await asyncio.to_thread(_content_id, delta))
