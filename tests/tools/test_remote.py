"""URLs work in the place of paths: headers are read by ranges, payloads once, and every failure is one line."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import peraxis_format as pxd
from peraxis_format.urls import is_url
from peraxis_tools.cli import main
from peraxis_tools.commands import inspect as inspect_command
from peraxis_tools.commands import verify as verify_command
from peraxis_tools.errors import ToolError
from peraxis_tools.inspect import inspect, inspect_remote
from peraxis_tools.remote import files as remote
from peraxis_tools.remote.files import RemoteFile, hub_form
from peraxis_tools.remote.urls import without_secrets
from peraxis_tools.verify import verify
from tests.factories import random_storage, sign_module, write_delta

pytest.importorskip("aiohttp")


class Server:
    """Serves one file with ranges, and counts what it sends."""

    def __init__(self, path: Path, *, ranges: bool = True) -> None:
        self.sent = 0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                return None

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                if self.path != "/delta.pxd":
                    self.send_response(404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                size = path.stat().st_size
                begin, end = 0, size
                wanted = self.headers.get("Range")
                if wanted and ranges:
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    begin, end = int(first), min(size, int(last) + 1 if last else size)
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
                else:
                    self.send_response(200)
                if ranges:
                    self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(end - begin))
                self.end_headers()
                if body:
                    with open(path, "rb") as file:
                        file.seek(begin)
                        while begin < end:
                            chunk = file.read(min(1 << 16, end - begin))
                            try:
                                self.wfile.write(chunk)
                            except OSError:
                                return
                            owner.sent += len(chunk)
                            begin += len(chunk)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/delta.pxd"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    return write_delta(tmp_path / "local.pxd", [sign_module(rng, "a.weight", random_storage(rng, (64, 96)))])


@pytest.fixture
def server(delta: Path) -> Iterator[Server]:
    running = Server(delta)
    yield running
    running.close()


def sparse_gigabyte(path: Path) -> Path:
    """A sparse file: a valid header with 8B-like shapes and a hole as payload, because `inspect` reads only headers."""
    modules = []
    for i in range(224):
        shape = (14336, 2600)
        ref = pxd.BaseRef(dtype=pxd.DType.BF16, shape=shape, sha256="0" * 64)
        modules.append(
            pxd.ModuleEntry(
                name=f"model.layers.{i // 7}.part{i % 7}.weight",
                shape=shape,
                dtype=pxd.DType.BF16,
                encoding=pxd.Encoding.SIGN,
                components=(pxd.ComponentEntry(axis=pxd.Axis.ROW, exponent=-20),),
                sha256="1" * 64,
                base=ref,
            )
        )
    rows = pxd.canonical_json(
        [[m.name, "BF16", list(m.shape), "0" * 64] for m in sorted(modules, key=lambda m: m.name)]
    )

    manifest = pxd.Manifest(
        base=pxd.BaseIdentity(id="base", digest="sha256:" + hashlib.sha256(rows).hexdigest()),
        fine_tuned=pxd.Identity(id="tuned"),
        producer=pxd.Producer(name="test", version="1"),
        modules=tuple(modules),
    )
    records = pxd.layout(manifest.modules, [])
    header = pxd.header_bytes(manifest.to_bytes(), records)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + records[-1].end)
    return path


def test_inspect_of_a_gigabyte_asks_for_less_than_200_kilobytes(tmp_path: Path) -> None:
    path = sparse_gigabyte(tmp_path / "big.pxd")
    assert path.stat().st_size > 1_000_000_000
    running = Server(path)
    try:
        remote = RemoteFile(running.url)
        remote.header()
        with pxd.open(path) as local:  # it reads the header once and no other byte
            assert remote.requested == local.header_size < 200_000
        found = inspect_remote(running.url)
        assert found.modules == inspect(path).modules
        assert running.sent < 2 * 200_000
    finally:
        running.close()


def test_inspect_says_the_same_of_a_url_as_of_the_file(delta: Path, server: Server) -> None:
    shown = [
        json.loads(CliRunner().invoke(inspect_command.command, [s, "--json"]).stdout) for s in (server.url, str(delta))
    ]
    for found in shown:
        found.pop("path")
    assert shown[0] == shown[1]


def test_verify_fetches_and_names_the_url(server: Server, delta: Path) -> None:
    good = CliRunner().invoke(verify_command.command, [server.url, "--json"])
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout)["files"][0]["path"] == server.url
    assert server.sent == delta.stat().st_size
    data = bytearray(delta.read_bytes())
    data[-1] ^= 1
    delta.write_bytes(data)
    assert CliRunner().invoke(verify_command.command, [server.url]).exit_code == 1


def test_a_download_asks_for_each_byte_once_and_says_how_far_it_is(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(20_000_000)
    (tmp_path / "delta.pxd").write_bytes(content)
    running = Server(tmp_path / "delta.pxd")
    steps: list[int] = []
    try:
        RemoteFile(running.url).download(tmp_path / "copy", progress=steps.append)
    finally:
        running.close()
    assert (tmp_path / "copy").read_bytes() == content
    assert running.sent == len(content) == sum(steps)
    assert len(steps) > 2


def test_a_missing_file_and_a_dead_server_are_one_line_each(server: Server) -> None:
    for url in (server.url.replace("delta", "nothing"), "http://127.0.0.1:9/delta.pxd", "nosuch://x/y.pxd"):
        with pytest.raises(ToolError) as caught:
            RemoteFile(url)
        assert "\n" not in str(caught.value)
        assert url in str(caught.value)


def test_a_server_without_ranges_is_told_from_one_with_a_broken_file(delta: Path) -> None:
    running = Server(delta, ranges=False)
    try:
        with pytest.raises(ToolError, match="does not send ranges; fetch the whole file with `pull`"):
            RemoteFile(running.url).header()
        assert verify(running.url).status.exit_status == 0  # which fetches all of it, as pull does
    finally:
        running.close()


def test_other_file_systems_work_too(delta: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/delta.pxd", delta.read_bytes())
    assert inspect_remote("memory://delta.pxd").content_id == inspect(delta).content_id


def test_hub_addresses_carry_their_revision_at_either_place() -> None:
    assert hub_form("hf://org/repo/sub/file.pxd@v1.0") == "hf://org/repo@v1.0/sub/file.pxd"
    assert hub_form("hf://org/repo/file.pxd@refs/pr/1") == "hf://org/repo@refs%2Fpr%2F1/file.pxd"
    assert hub_form("hf://org/repo@v1/file.pxd") == "hf://org/repo@v1/file.pxd"
    assert is_url("hf://org/repo/file.pxd")
    assert not is_url("C:/x.pxd")
    assert not is_url("org/repo")


SECRETS = (
    ("http://me:hunter2@127.0.0.1:9/x.pxd", "http://***@127.0.0.1:9/x.pxd"),
    (
        "https://me:hunter2%2F@h/x.pxd?X-Amz-Signature=hunter2&part=1",
        "https://***@h/x.pxd?X-Amz-Signature=***&part=1",
    ),
    ("http://ghp_hunter2@host/x.pxd", "http://***@host/x.pxd"),
    ("s3://bucket/x.pxd?versionId=7&token=hunter2", "s3://bucket/x.pxd?versionId=7&token=***"),
    ("hf://org/repo/x.pxd@v1", "hf://org/repo/x.pxd@v1"),
)


@pytest.mark.parametrize(("url", "shown"), SECRETS)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert without_secrets(url) == shown
    assert without_secrets(f"{url}: Cannot connect to {url}, message") == f"{shown}: Cannot connect to {shown}, message"


@pytest.mark.parametrize("path", ["delta.pxd", "none.pxd"])
def test_no_verb_echoes_a_password(server: Server, tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"{server.url.replace('//', '//me:hunter2@').rpartition('/')[0]}/{path}"
    base = tmp_path / "base"
    for arguments in (
        ["inspect", url],
        ["inspect", url, "--json"],
        ["inspect", url, "--html", "page.html"],
        ["verify", url],
        *(["verify", url, "--format", kind] for kind in ("json", "sarif", "junit", "github")),
        ["diff", url, url],
        ["diff", url, str(base), "--base", str(base)],
        ["convert", url, "-o", "out"],
        ["convert", url, "--to", "lora", "-o", "lora"],
        ["apply", str(base), url, "-o", "applied"],
        ["merge", url, url, "-o", "merged.pxd"],
        ["split", url, "--parts", "2", "-o", "parts"],
    ):
        monkeypatch.setattr(sys, "argv", ["peraxis-tools", *arguments])
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit):
            main()
        said = out.getvalue() + err.getvalue()
        assert said, arguments
        assert "hunter2" not in said, arguments
    assert "hunter2" not in "".join(page.read_text() for page in tmp_path.glob("*.html"))


def test_a_server_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SILENCE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/delta.pxd"
        with pytest.raises(ToolError, match=r"sent nothing for 0.3 s"):
            RemoteFile(url)


def test_a_server_may_be_slow_for_as_long_as_it_says_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole answer takes longer than the bound on silence."""
    monkeypatch.setattr(remote, "SILENCE_SECONDS", 5.0)
    whole = b"x" * 24

    class Slow(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return None

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            for byte in whole:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.25)

    running = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        found = RemoteFile(f"http://127.0.0.1:{running.server_address[1]}/delta.pxd")
        begin = time.monotonic()
        assert found._fetch(0, len(whole)) == whole
        assert time.monotonic() - begin > 5.0
    finally:
        running.shutdown()
        running.server_close()
