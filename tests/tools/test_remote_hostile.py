"""Servers that send more than was asked for, something else, or less."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from peraxis_tools.errors import ToolError
from peraxis_tools.extract import extract
from peraxis_tools.inspect import inspect_remote
from peraxis_tools.pull import pull
from peraxis_tools.remote.files import RemoteFile, local_copy
from tests.factories import random_storage, sign_module, write_delta

pytest.importorskip("aiohttp")
ENDLESS = 256 << 20  # bytes; a client that reads all of them is wrong
BUFFERS = 32 << 20  # bytes in the buffers of the sockets and the client, at most


class Server:
    """Announces one file, and answers each GET by `way`; counts what it sends."""

    def __init__(self, data: bytes, way: str) -> None:
        self.sent = 0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                return None

            def do_HEAD(self) -> None:
                self.start(200, {"Content-Length": str(len(data)), "Accept-Ranges": "bytes"})

            def do_GET(self) -> None:
                ranged = self.headers.get("Range") is not None
                size = {"Content-Range": f"bytes 0-4095/{len(data)}"} if ranged else {}
                packed = {"Content-Encoding": "gzip"} if way == "gzip" else {}
                self.start(206 if ranged and way != "whole" else 200, {**size, **packed})
                body = gzip.compress(data) if way == "gzip" else data[: len(data) // 2] if way == "short" else data
                self.send(body)
                while way in ("endless", "whole") and owner.sent < ENDLESS and self.send(bytes(1 << 16)):
                    pass

            def start(self, status: int, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def send(self, part: bytes) -> bool:
                try:
                    self.wfile.write(part)
                except OSError:
                    return False
                owner.sent += len(part)
                return True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/{way}.pxd"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def served(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    rng = np.random.default_rng(0)
    module = sign_module(rng, "a.weight", random_storage(rng, (64, 96)))
    path = write_delta(tmp_path / "local.pxd", [module], assets={"config.json": b"{}"})
    server = Server(path.read_bytes(), request.param)
    yield server
    server.server.shutdown()
    server.server.server_close()


WORDS = {
    "endless": "sent more than the 4096 bytes of a range",
    "whole": "does not send ranges",
    "gzip": "sent 'gzip' data",
}


@pytest.mark.parametrize("served", WORDS, indirect=True)
def test_a_header_is_read_to_the_end_of_its_range_and_no_further(served: Server, tmp_path: Path) -> None:
    words = WORDS[served.url.rpartition("/")[2].removesuffix(".pxd")]
    with pytest.raises(ToolError, match=rf"^{served.url}: the server {words}"):
        inspect_remote(served.url)
    with pytest.raises(ToolError, match=rf"^{served.url}: "):
        extract(served.url, tmp_path / "out")
    assert served.sent < BUFFERS


@pytest.mark.parametrize("served", ["whole"], indirect=True)
def test_a_whole_file_is_not_taken_for_a_range_of_it(served: Server) -> None:
    remote = RemoteFile(served.url)
    with pytest.raises(ToolError, match="does not send ranges"):
        remote.read(4096, remote.size - 4096)
    assert served.sent < BUFFERS


@pytest.mark.parametrize("served", ["endless", "gzip", "short"], indirect=True)
def test_a_download_ends_at_the_announced_size_and_names_the_url(served: Server, tmp_path: Path) -> None:
    words = {
        "endless": r"sends more than the \d+ bytes that it announced",
        "gzip": "sent 'gzip' data",
        "short": r"sent \d+ of \d+ bytes",
    }[served.url.rpartition("/")[2].removesuffix(".pxd")]
    with pytest.raises(ToolError, match=rf"^{served.url}: the server {words}"):
        pull(served.url, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["local.pxd"]
    assert served.sent < BUFFERS


@pytest.mark.parametrize("served", ["endless"], indirect=True)
def test_a_file_that_the_disk_has_no_room_for_is_not_fetched(served: Server, tmp_path: Path) -> None:
    remote = RemoteFile(served.url)
    remote.size = 1 << 52
    with pytest.raises(ToolError, match=rf"^{served.url}: has 4503599627370496 bytes; .* has room for \d+"):
        remote.download(tmp_path / "copy.pxd")
    assert served.sent == 0
    assert not (tmp_path / "copy.pxd").exists()


def test_a_store_that_sends_more_than_it_said_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pxd").write_bytes(bytes(5000))
    url = f"file://{tmp_path}/a.pxd"
    remote = RemoteFile(url)
    remote.size = 4000
    with pytest.raises(ToolError, match=rf"^{url}: "):
        remote.download(tmp_path / "copy.pxd")
    with local_copy(url) as path:
        assert path.read_bytes() == bytes(5000)
