"""A server that answers something else than a file, and errors about a fetched file: one line with a remedy."""

from __future__ import annotations

import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import peraxis_format as pxd
from peraxis_tools import apply
from peraxis_tools.errors import ToolError
from peraxis_tools.remote.files import RemoteFile
from peraxis_tools.verify import verify
from tests.factories import write_checkpoint
from tests.tools.test_remote import Server


@pytest.mark.parametrize(
    ("status", "part"),
    [
        (401, "answered 401, which means that a login"),
        (403, "answered 403, which means that a login"),
        (404, "check the address"),
        (410, "answered 410; check the address"),
        (429, "answered 429, which is a fault of the server; try again later"),
        (500, "answered 500, which is a fault of the server; try again later"),
        (302, "redirects without an end"),
        (307, "redirects to an address that is not http"),
    ],
)
def test_what_a_server_answers_instead_of_a_file_is_said_with_its_own_remedy(status: int, part: str) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return None

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            self.send_response(status)
            if status < 400:
                self.send_header("Location", self.path if status == 302 else "file:///etc/passwd")
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ToolError) as caught:
            RemoteFile(f"http://127.0.0.1:{server.server_address[1]}/delta.pxd")
    finally:
        server.shutdown()
        server.server_close()
    assert part in str(caught.value)
    assert "FileNotFoundError" not in str(caught.value) or status == 404


def test_an_error_about_a_fetched_file_names_the_url_and_no_temporary_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_checkpoint(tmp_path / "base", {"a.weight": (np.zeros((2, 2), np.uint16), pxd.DType.BF16)})
    (tmp_path / "page.pxd").write_bytes(b"<html>" + bytes(5000))
    running = Server(tmp_path / "page.pxd")
    try:
        with pytest.raises(pxd.PxdError) as caught:
            apply(base, running.url, tmp_path / "out")
        assert str(caught.value).count(running.url) == 1
        assert ".peraxis~" not in str(caught.value)
        [row] = verify(running.url, keep_going=True).files
        assert "after" not in str(row.checks[0].message)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(ToolError, match="has room for 0") as full:
            apply(base, running.url, tmp_path / "out")
        assert ".peraxis~" not in str(full.value)
    finally:
        running.close()
