"""The routes behind vLLM's own key check, with an engine that only notes what reaches it."""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peraxis_format.engines.vllm.permitted import ROOT_VARIABLE

pytestmark = pytest.mark.vllm

KEY = {"Authorization": "Bearer secret"}
JSON = {"Content-Type": "application/json"}
ROUTES = [
    ("GET", "", None),
    ("POST", "/variants", {"name": "v", "delta": "v1.pxd"}),
    ("DELETE", "/variants/v", None),
    ("POST", "/use", {"variant": None}),
    ("POST", "/update", {"update": "v1.pxd"}),
    ("POST", "/follow", {"folder": "."}),
    ("DELETE", "/follow", None),
]


class Engine:
    """vLLM's client, without an engine."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.vllm_config = SimpleNamespace(
            load_config=SimpleNamespace(load_format="peraxis", model_loader_extra_config={}),
            parallel_config=SimpleNamespace(nnodes=1, distributed_executor_backend="mp"),
        )

    def __getattr__(self, name: str) -> Any:
        async def call(*_: Any, **__: Any) -> Any:
            self.calls.append(name)
            return [None] if name == "collective_rpc" else True

        return call


@pytest.fixture
def engine() -> Engine:
    return Engine()


def client_of(engine: Engine, key: str | None) -> Any:
    """Requests to the routes, behind vLLM's middleware if there is a key."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    from peraxis_format.engines.vllm import endpoints

    app, plugin = FastAPI(), endpoints()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(engine, app.state, Namespace(api_key=[key] if key else None)))
    if key:
        app.add_middleware(AuthenticationMiddleware, tokens=[key])
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def behind_a_key(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with client_of(engine, "secret") as client:
        yield client


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_without_the_key_no_route_is_reached(
    behind_a_key: Any, engine: Engine, method: str, path: str, body: dict[str, Any] | None
) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        assert behind_a_key.request(method, f"/v1/peraxis{path}", json=body, headers=headers).status_code == 401
    assert engine.calls == []
    assert behind_a_key.request(method, f"/v1/peraxis{path}", json=body, headers=KEY).status_code != 401


def test_every_route_of_the_plug_in_is_among_those_tested(engine: Engine) -> None:
    routes = client_of(engine, None).app.routes
    found = {(method, route.path) for route in routes if "peraxis" in route.path for method in route.methods}
    tested = {(method, f"/v1/peraxis{path}") for method, path, _ in ROUTES}
    assert found == {(method, path.replace("/variants/v", "/variants/{name}")) for method, path in tested}


@pytest.mark.parametrize(("path", "key"), [("/variants", "delta"), ("/update", "update"), ("/follow", "folder")])
def test_a_server_without_key_and_root_opens_nothing_that_a_request_names(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, key: str
) -> None:
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with client_of(engine, None) as client:
        answers = [
            client.post(f"/v1/peraxis{path}", json={"name": "v", key: name})
            for name in (str(tmp_path), str(tmp_path / "none"), "http://127.0.0.1:1/x.pxd")
        ]
    assert {(answer.status_code, answer.json()["error"]) for answer in answers} == {
        (403, answers[0].json()["error"])  # whether the file exists cannot be told
    }
    assert engine.calls == []


def test_below_a_root_files_are_opened_and_outside_they_are_not(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "deltas").mkdir()
    (tmp_path / "outside.pxd").write_bytes(b"secret of another program")
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "deltas"))
    with client_of(engine, None) as client:
        for name, status, word in (
            ("none.pxd", 400, "No such file"),
            ("../outside.pxd", 403, ROOT_VARIABLE),
            (str(tmp_path / "outside.pxd"), 403, ROOT_VARIABLE),
        ):
            answer = client.post("/v1/peraxis/variants", json={"name": "v", "delta": name})
            assert (answer.status_code, word in answer.json()["error"]) == (status, True), answer.text
        assert client.post("/v1/peraxis/follow", json={"folder": "."}).status_code == 200
        assert client.post("/v1/peraxis/follow", json={"folder": ".."}).status_code == 403


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/variants", {"name": "a/b", "delta": "v1.pxd"}),
        ("/variants", {"name": "a\nb", "delta": "v1.pxd"}),
        ("/variants", {"name": "x" * 201, "delta": "v1.pxd"}),
        ("/variants", {"name": "v", "delta": "v1\0.pxd"}),
        ("/variants", {"name": "v", "delta": "\ud800"}),
        ("/variants", {"name": "v", "delta": "x" * 100_000}),
        ("/variants", {"name": "v", "delta": "http://user:SECRET@127.0.0.1:1/x"}),
        ("/variants", {"name": "v", "delta": "http://127.0.0.1:port/x"}),
        ("/use", {"variant": None, "timeout": 1e300}),
        ("/use", {"variant": None, "timeout": 10**400}),
        ("/use", {"variant": None, "timeout": float("nan")}),
        ("/follow", {"folder": ".", "every": 1e-9}),
        ("/follow", {"folder": ".", "every": float("inf")}),
        ("/follow", {"folder": "x" * 300}),  # longer than a name on the disk can be
        ("/follow", {"folder": "x" * 100_000}),
        ("/update", {"update": "x" * 300}),
        ("/update", {"update": ["x" * 100_000]}),
        ("/use", {"variant": "x" * 100_000}),
        ("/use", {"variant": {"x": "x" * 100_000}}),
        ("/use", {"variant": None, "requests": "x" * 100_000}),
        ("/use", {"variant": None, "timeout": "x" * 100_000}),
    ],
)
def test_a_strange_request_is_refused_in_one_line(behind_a_key: Any, engine: Engine, path: str, body: Any) -> None:
    import json

    answer = behind_a_key.post(f"/v1/peraxis{path}", content=json.dumps(body), headers={**KEY, **JSON})
    assert answer.status_code == 400, answer.text
    assert "\n" not in answer.json()["error"]
    assert "SECRET" not in answer.json()["error"]
    assert len(answer.json()["error"]) < 500
    assert engine.calls == []


@pytest.mark.parametrize("name", ["x" * 5000, "%0A", "%00", "%FF", "null", "%E2%80%AE"])
def test_an_unknown_variant_is_one_short_line_whatever_its_name(behind_a_key: Any, engine: Engine, name: str) -> None:
    answer = behind_a_key.delete(f"/v1/peraxis/variants/{name}", headers=KEY)
    assert (answer.status_code, engine.calls) == (404, [])
    assert answer.json()["error"].isprintable()
    assert len(answer.json()["error"]) < 200


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "loop", "process"])
def test_a_file_that_cannot_be_read_is_named_with_the_reason(
    behind_a_key: Any, engine: Engine, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("loop", "process"):
        path.symlink_to(path if kind == "loop" else "/proc/self/mem")
    for route, key in (("/variants", "delta"), ("/update", "update")):
        answer = behind_a_key.post(f"/v1/peraxis{route}", json={"name": "v", key: str(path)}, headers=KEY)
        assert (answer.status_code, str(path) in answer.json()["error"]) == (400, True), answer.text
    assert engine.calls == []


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"null", b'{"variant"'])
def test_a_body_that_is_no_object_is_refused(behind_a_key: Any, content: bytes) -> None:
    answer = behind_a_key.post("/v1/peraxis/use", content=content, headers={**KEY, **JSON})
    assert (answer.status_code, "object" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_body_that_a_page_of_another_origin_could_send_is_refused(engine: Engine, kind: str) -> None:
    with client_of(engine, None) as client:
        headers = {"Content-Type": kind, "Origin": "https://evil.example"}
        answer = client.post("/v1/peraxis/use", content=b'{"variant": null}', headers=headers)
        assert answer.status_code == 415
        assert engine.calls == []
        sent_as_json = client.post("/v1/peraxis/use", content=b'{"variant": null}', headers=JSON)
        assert sent_as_json.status_code == 200
