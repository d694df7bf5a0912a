"""`peraxis.verify` makes every check of the verb, on several files, and raises unless it is told to keep going."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import peraxis
import peraxis_format as pxd
from peraxis_tools.errors import NotVerifiableError
from peraxis_tools.verify_files import Status
from tests.tools.output_cases import make_inputs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def damaged(folder: Path) -> Path:
    data = bytearray((folder / "a.pxd").read_bytes())
    data[-1] ^= 1
    target = folder / "damaged.pxd"
    target.write_bytes(data)
    return target


def checks(result: Any) -> dict[str, str]:
    return {check.name: check.status.value for verdict in result.files for check in verdict.checks}


def test_several_files_a_folder_and_a_glob_have_a_verdict_each(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "a.pxd").rename(folder / "sub" / "a.pxd")
    result = peraxis.verify([folder / "sub", "[b].pxd", "b.pxd"], base="base")
    assert [verdict.path for verdict in result.files] == [str(folder / "sub" / "a.pxd"), "b.pxd", "b.pxd"]
    assert result.status is Status.PASSED
    assert checks(result) == {"structure": "passed", "payload": "passed", "base": "passed"}


def test_a_link_without_a_target_is_a_file_of_its_folder_that_cannot_be_read(folder: Path) -> None:
    """As git-annex leaves it for a file that was not fetched."""
    (folder / "sub").mkdir()
    (folder / "a.pxd").rename(folder / "sub" / "a.pxd")
    (folder / "sub" / "lost.pxd").symlink_to(folder / "nowhere")
    result = peraxis.verify(folder / "sub", keep_going=True)
    assert [(Path(verdict.path).name, verdict.status.value) for verdict in result.files] == [
        ("a.pxd", "passed"),
        ("lost.pxd", "error"),
    ]


def test_a_pipe_is_a_file_of_its_folder_that_cannot_be_read(folder: Path) -> None:
    os.mkfifo(folder / "pipe.pxd")
    found = peraxis.verify(folder / "pipe.pxd", keep_going=True), peraxis.verify(folder, keep_going=True)
    assert [verdict.path for result in found for verdict in result.files if verdict.status.value == "error"] == [
        str(folder / "pipe.pxd")
    ] * 2


def test_the_first_failure_is_raised_as_it_is(folder: Path) -> None:
    with pytest.raises(pxd.PxdError, match="E3"):
        peraxis.verify(["b.pxd", damaged(folder), "a.pxd"])
    with pytest.raises(FileNotFoundError):
        peraxis.verify("gone.pxd")
    with pytest.raises(NotVerifiableError, match="gone"):
        peraxis.verify("a.pxd", base="gone")


def test_all_failures_are_returned_if_it_keeps_going(folder: Path) -> None:
    result = peraxis.verify([damaged(folder), "gone.pxd", "b.pxd"], keep_going=True)
    assert [verdict.status for verdict in result.files] == [Status.FAILED, Status.ERROR, Status.PASSED]
    assert result.status is Status.FAILED


def test_a_content_id_is_pinned(folder: Path) -> None:
    with pxd.open(folder / "a.pxd") as file:
        own = file.content_id
    assert checks(peraxis.verify("a.pxd", expect_content_id=own))["content id"] == "passed"
    assert peraxis.verify("a.pxd", expect_content_id=["0" * 64, own.removeprefix("sha256:")]).status is Status.PASSED
    with pytest.raises(peraxis.CheckFailedError, match="this is another file"):
        peraxis.verify("b.pxd", expect_content_id=own)


def test_a_missing_signature_is_not_verified(folder: Path) -> None:
    for asked in ({"signature": True}, {"public_key": "key.pub"}, {"certificate_chain": "root.pem"}, {"bundle": "b"}):
        with pytest.raises(NotVerifiableError):
            peraxis.verify("a.pxd", **asked)  # type: ignore[arg-type]


def test_a_signature_is_checked_with_a_key(folder: Path) -> None:
    pytest.importorskip("model_signing")
    from tests.tools.test_sign import write_key

    _, private, public = write_key(folder, "own")
    peraxis.sign("a.pxd", private_key=private)
    assert checks(peraxis.verify("a.pxd", public_key=public))["signature"] == "passed"
    _, _, stranger = write_key(folder, "other")
    with pytest.raises(peraxis.CheckFailedError):
        peraxis.verify("a.pxd", public_key=stranger)


def test_a_bound_on_the_error_is_checked(folder: Path) -> None:
    assert checks(peraxis.verify("a.pxd", base="base", fine_tuned="tuned", max_error=10.0))["error"] == "passed"
    with pytest.raises(peraxis.CheckFailedError, match="relative error"):
        peraxis.verify("a.pxd", base="base", fine_tuned="tuned", max_error=1e-9)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"texts": {"a": "b"}}, "texts does nothing without max_kl"),
        ({"fine_tuned": "tuned"}, "fine_tuned does nothing without max_error"),
        ({"max_error": -1.0}, "max_error -1"),
        ({"max_kl": float("nan")}, "max_kl nan"),
        ({"expect_content_id": "abc"}, "not a content ID"),
        ({"max_error": 1.0}, "fine_tuned"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_a_file_is_opened(
    given: dict[str, Any], said: str
) -> None:
    with pytest.raises(peraxis.ToolError, match=said):
        peraxis.verify("gone.pxd", **given)
    with pytest.raises(peraxis.ToolError, match="pass at least one"):
        peraxis.verify([])
