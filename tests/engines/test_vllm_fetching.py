"""URLs in requests are fetched by the API server, and neither the engine nor other requests wait for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from peraxis_format.engines.vllm.fetching import Fetching
from peraxis_format.engines.vllm.following import RequestError


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Lets `slow` answer."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def slow(released: threading.Event) -> Iterator[str]:
    """The URL of a file that arrives when `released` is set."""

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            released.wait(300)
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"bytes")

        def log_message(self, *_: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/legal.pxd?token=secret"
        released.set()
        server.shutdown()


def test_ranks_get_a_path_that_is_gone_afterwards(slow: str, released: threading.Event, temporary: Path) -> None:
    released.set()

    async def session() -> None:
        async with Fetching(one_host=True).local(slow) as path:
            assert Path(path).read_bytes() == b"bytes"
            assert Path(path).is_relative_to(temporary)

    asyncio.run(session())
    assert list(temporary.iterdir()) == []


def test_an_error_of_a_rank_names_the_url_and_not_the_path(
    slow: str, released: threading.Event, temporary: Path
) -> None:
    released.set()

    async def session() -> None:
        async with Fetching(one_host=True).local(slow) as path:
            raise RequestError(409, f"{path}: is refused")

    with pytest.raises(RequestError, match=r"http://[^/]*/legal\.pxd: is refused") as caught:
        asyncio.run(session())
    assert caught.value.status == 409
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("one_host", "source"), [(True, "legal.pxd"), (True, "org/repo"), (False, "http://a/b.pxd")])
def test_other_names_and_names_for_several_hosts_are_left_to_the_ranks(one_host: bool, source: str) -> None:
    async def session() -> str:
        async with Fetching(one_host=one_host).local(source) as name:
            return name

    assert asyncio.run(session()) == source


def test_a_url_that_cannot_be_fetched_is_a_bad_request() -> None:
    async def session() -> None:
        async with Fetching(one_host=True).local("http://127.0.0.1:1/x.pxd?token=secret"):
            raise AssertionError

    with pytest.raises(RequestError, match=r"http://127\.0\.0\.1:1/x\.pxd: cannot be fetched") as caught:
        asyncio.run(session())
    assert "secret" not in str(caught.value)


@pytest.mark.vllm
def test_while_a_url_arrives_the_server_swaps(slow: str, released: threading.Event, temporary: Path) -> None:
    from peraxis_format.engines.vllm.control import Control
    from peraxis_format.engines.vllm.permitted import Permitted

    class Engine:
        def __getattr__(self, name: str) -> Any:
            async def call(*_: Any, **__: Any) -> Any:
                return [None] if name == "collective_rpc" else True

            return call

    async def session() -> None:
        control = Control(Engine(), Permitted(root=None, any_name=True))
        adding = [asyncio.create_task(control.add({"name": f"v{i}", "delta": slow})) for i in range(40)]
        await asyncio.sleep(0.2)
        answer = await asyncio.wait_for(control.use({"variant": None}), 60)
        assert answer["weight_version"] == "base"
        assert not any(task.done() for task in adding)
        released.set()
        for task in adding:
            with pytest.raises(RequestError, match=r"E109: http://.*/legal\.pxd: "):  # five bytes are no delta
                await task

    asyncio.run(session())
    assert list(temporary.iterdir()) == []
