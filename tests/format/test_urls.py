"""One function says what is a URL, and one constant how long a server may be silent."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from peraxis_format.urls import SILENCE_SECONDS, http_options, is_http, is_url
from peraxis_tools.remote.urls import local_path
from tests.test_architecture import ROOT, sources

# Files that ask for a part of a URL's text, and not whether a name is one.
EXCEPTIONS = {
    "peraxis_format/engines/vllm/source.py": "the host and the path of a URL, for display",
    "peraxis_format/urls.py": "the definition",
    "peraxis_tools/remote/urls.py": "a text that may contain URLs",
}


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("https://host/delta.pxd", True),
        ("s3://bucket/run", True),
        ("hf://org/repo/delta.pxd", True),
        ("simplecache::s3://bucket/run", True),
        ("memory://run", True),
        ("file:///tmp/delta.pxd", True),
        ("org/repo", False),
        ("C://delta.pxd", False),
        ("folder/s3://delta.pxd", False),
        ("://delta.pxd", False),
        ("delta.pxd", False),
        (Path("s3://bucket/run"), False),
    ],
)
def test_a_url_begins_with_a_scheme_and_is_no_path(name: str | Path, url: bool) -> None:
    assert is_url(name) is url
    if not str(name).startswith("file"):
        assert local_path(name) == (None if url else Path(name))


def test_a_file_url_is_the_path_that_it_names() -> None:
    assert local_path("file:///tmp/delta.pxd") == Path("/tmp/delta.pxd")


def test_only_http_gets_options_and_a_bound_on_silence() -> None:
    pytest.importorskip("aiohttp")
    assert http_options("s3://bucket/run") == {}
    timeout = http_options("https://host/run")["client_kwargs"]["timeout"]
    assert (timeout.total, timeout.sock_connect, timeout.sock_read) == (None, SILENCE_SECONDS, SILENCE_SECONDS)
    assert is_http("http://host/run")
    assert not is_http("hf://org/repo")


def test_no_other_file_decides_what_is_a_url() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in sources("peraxis_format", "peraxis_tools")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and node.value in ("://", "http://", "https://")
    }
    assert found == set(EXCEPTIONS)


def test_no_other_file_says_how_long_a_server_may_be_silent() -> None:
    names = {
        (str(path.relative_to(ROOT)), target.id)
        for path in sources("peraxis_format", "peraxis_tools")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.AnnAssign) and isinstance(target := node.target, ast.Name)
    }
    assert {place for place in names if "SILEN" in place[1]} == {("peraxis_format/urls.py", "SILENCE_SECONDS")}
