"""An interrupted run says what is left of it: an output that was not written, and work that is kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from peraxis_tools import cli
from peraxis_tools.compress import compress
from peraxis_tools.outputs import claim_file, claim_folder
from peraxis_tools.process import Terminated
from tests.tools.compress_pairs import FEW, llama_pair

FIT: dict[str, Any] = dict(FEW)


def notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, lambda: Terminated(15)])
@pytest.mark.parametrize("claim", [claim_file, claim_folder])
def test_an_output_that_was_not_written_is_named(
    claim: Callable[..., AbstractContextManager[None]], stop: Callable[[], BaseException], tmp_path: Path
) -> None:
    error = stop()
    with pytest.raises(type(error)) as found, claim(tmp_path / "out", overwrite=False):
        raise error
    assert notes(found.value) == [f"{tmp_path / 'out'} was not written"]


@pytest.mark.parametrize("there", [False, True])
def test_an_output_that_was_written_before_the_interrupt_is_not_called_unwritten(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "out").write_text("before")
    (tmp_path / "new").write_text("after")

    def write() -> None:
        (tmp_path / "new").replace(tmp_path / "out")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as found, claim_file(tmp_path / "out", overwrite=True):
        write()
    assert not notes(found.value)


@pytest.mark.parametrize(
    ("stop", "line"),
    [
        (KeyboardInterrupt(), "error: interrupted; kept"),
        (Terminated(15), "error: ended by SIGTERM; kept"),
        (MemoryError(), "error: out of memory; use a machine with more memory, or smaller batches and samples; kept"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device; kept"),
    ],
)
def test_the_command_line_prints_what_is_left(
    stop: BaseException, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        stop.add_note("kept")
        raise stop

    monkeypatch.setattr(cli, "_run", run)
    monkeypatch.setattr(sys, "argv", ["peraxis-tools", "eval"])
    assert cli._exit_code() != 0
    assert " ".join(capsys.readouterr().err.split()) == line


def test_an_interrupted_fit_says_what_it_kept_and_the_next_run_that_it_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned, text = llama_pair(tmp_path)
    output = tmp_path / "delta.pxd"

    def interrupt(step: str, done: int, total: int) -> None:
        if step == "write" or (step == "fit" and done == total):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as found:
        compress(base, tuned, output, calibration=str(text), progress=interrupt, **FIT)
    kept = f"{output}.peraxis-work keeps 3 blocks; the same command continues"
    assert notes(found.value) == [kept, f"{output} was not written"]
    assert not any("continued" in message for message in caplog.messages)
    compress(base, tuned, output, calibration=str(text), **FIT)
    assert any("is continued after 3 blocks" in message and "--no-resume" in message for message in caplog.messages)
