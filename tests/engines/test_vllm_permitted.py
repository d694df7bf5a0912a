"""Which files, folders and URLs a request may name, and what errors show of a URL."""

from __future__ import annotations

import io
from argparse import Namespace
from pathlib import Path

import pytest

from peraxis_format.engines.vllm.permitted import ROOT_VARIABLE, Permitted
from peraxis_format.engines.vllm.source import copy_announced, open_delta, shown
from peraxis_format.errors import CheckpointError, LiveModelError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """deltas/legal.pxd below the root; beside it a secret, a folder whose name begins the same, and links to both."""
    folder = tmp_path / "deltas"
    (folder / "chain").mkdir(parents=True)
    (folder / "legal.pxd").touch()
    (tmp_path / "secret").touch()
    (tmp_path / "deltas-2").mkdir()
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to(tmp_path)
    monkeypatch.setenv(ROOT_VARIABLE, str(folder))
    return folder


@pytest.mark.parametrize("any_name", [False, True])
def test_below_a_root_relative_and_absolute_names_are_permitted(root: Path, any_name: bool) -> None:
    permitted = Permitted.of_environment(any_name=any_name)
    for name in ("legal.pxd", "chain", "chain/../legal.pxd", "./chain/none.pxd", str(root / "legal.pxd")):
        assert Path(permitted.source(name)) == (root / name).resolve()


@pytest.mark.parametrize(
    "name",
    [
        *("..", "../secret", "../deltas-2", "chain/../../secret", "/etc/passwd", "/"),
        *("out", "up/secret", "up/x/../secret"),
        *("hf://org/repo/x.pxd", "https://127.0.0.1/x.pxd", "http://169.254.169.254/", "file:///etc/passwd"),
        *("HTTP://127.0.0.1/x.pxd", "legal.pxd\0"),
    ],
)
def test_nothing_outside_a_root_is_permitted_by_any_spelling(root: Path, name: str) -> None:
    for any_name in (False, True):
        with pytest.raises(PermissionError, match="not a path below"):
            Permitted.of_environment(any_name=any_name).source(name)


def test_a_link_to_itself_is_a_path_that_cannot_be_opened(root: Path) -> None:
    (root / "loop").symlink_to(root / "loop")
    path = Permitted.of_environment(any_name=True).source("loop")
    with pytest.raises(OSError, match="symbolic links"):
        open_delta(path)


def test_a_name_on_the_hub_is_a_path_below_a_root(root: Path) -> None:
    assert Permitted.of_environment(any_name=True).source("org/repo") == str(root.resolve() / "org" / "repo")


@pytest.mark.parametrize(
    ("keys", "variable", "permitted"),
    [
        (None, None, False),
        ([], None, False),
        ([""], None, False),
        (["secret"], None, True),
        (None, "secret", True),
        (None, "", False),
        ([""], "secret", False),  # vLLM then checks no key
    ],
)
def test_without_a_root_files_can_be_named_only_if_the_server_has_a_key(
    keys: list[str] | None, variable: str | None, permitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if variable is not None:
        monkeypatch.setenv("VLLM_API_KEY", variable)
    rules = Permitted.of_server(Namespace(api_key=keys))
    for name in ("legal.pxd", "/tmp/legal.pxd", "https://127.0.0.1/legal.pxd"):
        if permitted:
            assert rules.source(name) == name
        else:
            with pytest.raises(PermissionError, match=f"{ROOT_VARIABLE}.*--api-key"):
                rules.source(name)


def test_a_root_that_is_not_a_folder_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(LiveModelError, match="not a folder"):
        Permitted.of_environment(any_name=True)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("https://host/a/b.pxd?token=SECRET#SECRET", "https://host/a/b.pxd"),
        ("https://user:SECRET@host:8000/b.pxd", "https://host:8000/b.pxd"),
        ("http://SECRET@host?x=SECRET", "http://host"),
        ("http://a@SECRET@host/b@c", "http://host/b@c"),
        ("/a?b#c@d.pxd", "/a?b#c@d.pxd"),
    ],
)
def test_errors_show_a_url_without_its_secrets(source: str, expected: str) -> None:
    assert shown(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "http://user:SECRET@127.0.0.1:1/x.pxd",
        "http://127.0.0.1:port/x.pxd?SECRET",
        "http://[:/x.pxd?SECRET",
        "http://127.0.0.1:1/x.pxd?a b=SECRET",
        "http://127.0.0.1:1/x.pxd?SECRET#SECRET",
    ],
)
def test_a_url_that_cannot_be_fetched_is_one_line_without_its_secrets(source: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_delta(source)
    message = str(caught.value)
    assert "\n" not in message
    assert "SECRET" not in message


@pytest.mark.parametrize(
    ("announced", "sent", "written"),
    [("5", b"12345", b"12345"), ("3", b"12345", b"123"), ("9", b"12345", None), (None, b"12345", None)],
)
def test_a_download_has_the_bytes_that_the_server_announced(
    announced: str | None, sent: bytes, written: bytes | None
) -> None:
    class Answer(io.BytesIO):
        headers = {} if announced is None else {"Content-Length": announced}

    target = io.BytesIO()
    if written is None:
        with pytest.raises(OSError, match="server"):
            copy_announced(Answer(sent), target)
    else:
        copy_announced(Answer(sent), target)
        assert target.getvalue() == written
