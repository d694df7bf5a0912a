"""HTTP routes for live swaps and updates without vLLM's development mode; an endpoint plug-in that
VLLM_PLUGINS=peraxis enables.

    GET  /v1/peraxis                             weight version, staged variants, the one in use, the chain followed
    POST /v1/peraxis/variants    {"name": "legal", "delta": "legal.pxd"}             check and stage; the model stays
    POST /v1/peraxis/use         {"variant": "legal" or null, "requests": "wait" or "abort", "timeout": 60}
    DELETE /v1/peraxis/variants/legal
    POST /v1/peraxis/update      {"update": "step-00000007.pxd"}                     apply one exact update
    POST /v1/peraxis/follow      {"folder": "chain", "every": 1.0}                   apply updates as the folder grows
    DELETE /v1/peraxis/follow

`use` and `update` are one call each: pause the scheduler, write, reset the prefix cache, resume. requests:
"wait" lets running requests finish with the old weights while new ones queue; "abort" ends them at once. In both cases
no output mixes two states. The routes are under /v1, so that vLLM's --api-key protects them. permitted.py has the files
that requests may name.

Errors are {"error": one line}: 400 for a bad request, file or base, 403 for a file that requests may not name, 404 for
an unknown variant, 409 for a name in use, 415 for a body that is not sent as JSON, 503 if requests did not end in time
(the previous weights are then still served), and 503 if a process of the engine has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastapi import FastAPI, Request  # type: ignore[import-not-found, unused-ignore]
from fastapi.responses import JSONResponse  # type: ignore[import-not-found, unused-ignore]

from peraxis_format.engines.vllm.control import Control, content_id_of, is_dead
from peraxis_format.engines.vllm.fetching import Fetching
from peraxis_format.engines.vllm.following import RequestError
from peraxis_format.engines.vllm.names import is_one_host
from peraxis_format.engines.vllm.permitted import Permitted

__all__ = ["PeraxisEndpoints"]

_PREFIX: Final = "/v1/peraxis"


async def _body(request: Request) -> dict[str, Any]:
    # A page of another origin may send any other type without asking the server first.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "the body is not JSON by its type; send it with Content-Type: application/json")
    try:
        found = await request.json()
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RequestError(400, "the body is not a JSON object")
    return found


async def _answer(request: Request, action: Callable[[Control], Awaitable[dict[str, Any]]]) -> JSONResponse:
    control: Control = request.app.state.peraxis_control
    try:
        return JSONResponse(await action(control))
    except RequestError as error:
        return JSONResponse({"error": str(error)}, status_code=error.status)
    except Exception as error:
        if not is_dead(error):
            raise
        return JSONResponse({"error": "a process of the engine has ended; start the server again"}, status_code=503)


async def get_status(request: Request) -> JSONResponse:
    """GET /v1/peraxis."""
    return await _answer(request, lambda control: control.status())


async def post_variant(request: Request) -> JSONResponse:
    """POST /v1/peraxis/variants."""

    async def action(control: Control) -> dict[str, Any]:
        return await control.add(await _body(request))

    return await _answer(request, action)


async def delete_variant(request: Request) -> JSONResponse:
    """DELETE /v1/peraxis/variants/NAME."""
    return await _answer(request, lambda control: control.remove(request.path_params["name"]))


async def post_use(request: Request) -> JSONResponse:
    """POST /v1/peraxis/use."""

    async def action(control: Control) -> dict[str, Any]:
        return await control.use(await _body(request))

    return await _answer(request, action)


async def post_update(request: Request) -> JSONResponse:
    """POST /v1/peraxis/update."""

    async def action(control: Control) -> dict[str, Any]:
        return await control.update(await _body(request))

    return await _answer(request, action)


async def post_follow(request: Request) -> JSONResponse:
    """POST /v1/peraxis/follow."""

    async def action(control: Control) -> dict[str, Any]:
        return await control.follow(await _body(request))

    return await _answer(request, action)


async def delete_follow(request: Request) -> JSONResponse:
    """DELETE /v1/peraxis/follow."""
    return await _answer(request, lambda control: control.stop_following())


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
        app.add_api_route(f"{_PREFIX}/update", post_update, methods=["POST"])
        app.add_api_route(f"{_PREFIX}/follow", post_follow, methods=["POST"])
        app.add_api_route(f"{_PREFIX}/follow", delete_follow, methods=["DELETE"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Store the engine's client; a server that started from a delta reports its content ID."""
        control = state.peraxis_control = Control(
            engine_client, Permitted.of_server(args), fetching=Fetching(one_host=is_one_host(engine_client.vllm_config))
        )
        config = engine_client.vllm_config.load_config
        delta = (config.model_loader_extra_config or {}).get("delta") if config.load_format == "peraxis" else None
        if delta is not None:
            control.base_version = await asyncio.to_thread(content_id_of, delta)
            await engine_client.update_weight_version(control.base_version)
