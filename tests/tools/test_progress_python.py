"""progress= of the Python functions: a callable, True or nothing; messages of the logger `peraxis`; the time left."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

import peraxis
import peraxis_tools
from peraxis_tools.display import bars
from peraxis_tools.display import progress as progress_module
from peraxis_tools.display.remaining import Remaining, remaining_seconds
from peraxis_tools.merge import merge_parts
from tests.tools.output_cases import make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


CALLS: dict[str, Callable[[Path, Path, Any], Any]] = {
    "apply": lambda i, o, p: peraxis_tools.apply(i / "base", i / "a.pxd", o / "out", progress=p),
    "verify": lambda i, o, p: peraxis_tools.verify(i / "a.pxd", base=i / "base", progress=p),
    "diff": lambda i, o, p: peraxis_tools.diff(i / "a.pxd", i / "b.pxd", progress=p),
    "merge": lambda i, o, p: peraxis_tools.merge(
        [i / "a.pxd", i / "b.pxd"], o / "new.pxd", weights=[1.0, 1.0], progress=p
    ),
    "join": lambda i, o, p: merge_parts([i / "part-1.pxd", i / "part-2.pxd"], o / "new.pxd", progress=p),
    "split": lambda i, o, p: peraxis.split(i / "a.pxd", o / "parts", parts=2, progress=p),
    "sign": lambda i, o, p: peraxis.sign(i / "a.pxd", private_key=i / "key.pem", bundle=o / "a.sig", progress=p),
    "publish": lambda i, o, p: peraxis.publish("me/delta", i / "a.pxd", dry_run=o / "repo", progress=p),
    "pull": lambda i, o, p: peraxis.pull(f"file://{i / 'a.pxd'}", o / "here", progress=p),
    "compress": lambda i, o, p: peraxis_tools.compress(i / "base", i / "tuned", o / "new.pxd", fit="none", progress=p),
}

STAGES = {
    "join": "merge",
    "compress": "write",
    "sign": "verify",
    "publish": "copy",
    "pull": "verify",
}  # those with another name


@pytest.mark.parametrize("name", CALLS)
def test_a_callable_is_called_and_the_end_is_reached(name: str, inputs: Path, tmp_path: Path) -> None:
    calls: list[Any] = []
    CALLS[name](inputs, tmp_path, lambda *values: calls.append(values))
    if name == "compress":
        assert calls[-1][0] == "write"
        assert calls[-1][1] == calls[-1][2] > 0
    else:
        assert sum(done for (done,) in calls) > 0


@pytest.mark.parametrize("name", CALLS)
def test_true_shows_a_bar_on_a_terminal_and_nothing_elsewhere(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = io.StringIO()
    terminal = contextlib.nullcontext(Console(file=shown, force_terminal=True, width=80))
    monkeypatch.setattr(bars, "console_of_bar", lambda: terminal)
    monkeypatch.setattr(bars, "shows_progress", lambda: True)
    CALLS[name](inputs, tmp_path, True)
    stage = STAGES.get(name, name)
    assert stage in shown.getvalue()
    assert "\x1b[?25h" in shown.getvalue()  # the bar has ended, and the cursor is visible again
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", CALLS)
def test_the_logger_is_told_where_each_stage_begins_and_ends(
    name: str, inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "peraxis"):
        CALLS[name](inputs, tmp_path, None)
    stage = STAGES.get(name, name)
    assert f"{stage}: begins" in caplog.messages
    assert any(line.startswith(f"{stage}: done in") for line in caplog.messages)


def test_a_long_stage_is_told_with_the_time_that_is_left(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "peraxis"):
        CALLS["apply"](inputs, tmp_path, None)
    assert any("100%, about 0 s left" in line for line in caplog.messages)


def test_nothing_is_printed_or_logged_unless_asked_for(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in CALLS:
        (tmp_path / name).mkdir()
        CALLS[name](inputs, tmp_path / name, None)
    notes = [message for message in caplog.messages if "has no tokenizer" not in message]  # the pair has none
    assert (notes, capsys.readouterr()) == ([], ("", ""))


def test_the_time_left_is_known_after_one_step_however_long_it_took() -> None:
    assert remaining_seconds(done=0, total=4, at=0.0, now=500.0) is None
    assert remaining_seconds(done=1, total=4, at=100.0, now=100.0) == 300.0
    assert remaining_seconds(done=1, total=4, at=100.0, now=190.0) == 210.0
    assert remaining_seconds(done=2, total=4, at=200.0, now=900.0) == 0.0


def test_the_bar_shows_the_time_left_where_a_step_takes_minutes() -> None:
    clock = [0.0]
    shown = Progress(Remaining(), console=Console(file=io.StringIO()), get_time=lambda: clock[0])
    task = shown.add_task("fit", total=4)
    column = shown.columns[0]
    assert isinstance(column, Remaining)
    clock[0] = 90.0
    assert column.render(shown.tasks[0]).plain == "0:01:30 so far"
    shown.advance(task)
    assert column.render(shown.tasks[0]).plain == "0:04:30 left"
    clock[0] = 180.0
    assert column.render(shown.tasks[0]).plain == "0:03:00 left"
