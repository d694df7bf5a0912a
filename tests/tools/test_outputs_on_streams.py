"""Outputs that go to standard output or standard error: nothing else is written there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tools.output_cases import FILE_VERBS, make_inputs
from tests.tools.test_outputs import run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("verb", [*(verb for verb in FILE_VERBS if verb != "plot"), "update", "compact"])
def test_an_output_on_standard_output_is_alone_there_and_the_report_on_standard_error(
    verb: str,
    as_json: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    more = {
        "update": "update base tuned -q -o {out}",
        "compact": "compact step.pxd --base base -q -o {out}",
    }
    if verb == "compact":
        assert run(monkeypatch, "update base tuned -q -o {out}", out="step.pxd") == 0
    line = more[verb] if verb in more else FILE_VERBS[verb][0]
    if as_json and verb not in ("output", "report"):
        line += " --json"
    assert run(monkeypatch, line, out="file.pxd") == 0
    expected = (folder / "file.pxd").read_bytes()
    capfdbinary.readouterr()
    assert run(monkeypatch, line, out="/dev/stdout") == 0
    found = capfdbinary.readouterr()
    if verb == "sign":  # a signature of an elliptic curve is another one each time
        json.loads(found.out)
    elif verb in ("report", "output"):
        json.loads(found.out)
        assert len(found.out) == len(expected)
    else:
        assert found.out == expected
    if "--json" in line:
        assert json.loads(found.err)["schema"].startswith("peraxis.")
    elif verb not in ("report", "output"):
        assert found.err


def test_two_reports_do_not_go_to_one_pipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "verify a.pxd --base base -q --report sarif={out} --report json={out}"
    assert run(monkeypatch, line, out="/dev/stdout") == 2
    assert run(monkeypatch, line, out="/dev/null") == 0


def test_a_delta_is_not_written_where_notes_go(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, FILE_VERBS["compress"][0], out="/dev/stderr") == 2
    assert "standard error too" in capfd.readouterr().err
