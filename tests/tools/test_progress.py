"""Progress: every long stage has a bar on a terminal, but not with --quiet."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import peraxis_format as pxd
from peraxis_tools.display.bars import _Steps, progress
from peraxis_tools.verify_files import Wanted, verify_files
from tests.factories import random_storage, sign_module, write_checkpoint, write_delta

pty = pytest.importorskip("pty")
NEEDS_SIGNING = pytest.mark.skipif(importlib.util.find_spec("model_signing") is None, reason="no model-signing")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with base/, a.pxd and b.pxd of that base, and key.pem."""
    rng = np.random.default_rng(0)
    base = random_storage(rng, (32, 48))
    write_checkpoint(tmp_path / "base", {"a.weight": (base, pxd.DType.BF16)})
    for name in ("a", "b"):
        module = sign_module(rng, "a.weight", base)
        write_delta(tmp_path / f"{name}.pxd", [module], assets={"config.json": b'{"model_type": "llama"}'})
    return tmp_path


def on_terminal(folder: Path, *arguments: str, program: tuple[str, ...] = ("-m", "peraxis_tools")) -> str:
    """Return the text that the program writes to standard error on a terminal."""
    mine, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=its,
        env={**os.environ, "TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    os.close(its)
    shown = b""
    while True:
        try:
            part = os.read(mine, 1 << 16)
        except OSError:  # the error of Linux for the end
            break
        if not part:
            break
        shown += part
    os.close(mine)
    assert process.wait() in (0, 1), shown
    return shown.decode()


def test_a_note_stands_on_a_line_of_its_own_above_the_bar(tmp_path: Path) -> None:
    program = (
        "from peraxis_tools.display.bars import progress\n"
        "from peraxis_tools.report.console import print_note\n"
        "with progress('check', 100) as step:\n"
        "    step(10)\n"
        "    print_note('note: one')\n"
        "    with progress('inner', 100):\n"
        "        print_note('note: two')\n"
    )
    shown = on_terminal(tmp_path, program=("-c", program))
    for note in ("one", "two"):
        assert f"\x1b[2Knote: {note}\r\n" in shown  # the line of the bar is cleared first


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        (("verify", "a.pxd", "--base", "base"), ("verify", "base")),
        (("diff", "a.pxd", "b.pxd"), ("diff",)),
        (("inspect", "a.pxd", "--html", "a.html"), ("scales",)),
        (("merge", "a.pxd", "b.pxd", "--weights", "1,1", "-o", "c.pxd"), ("merge",)),
        (("apply", "base", "a.pxd", "-o", "out"), ("apply",)),
        (("publish", "me/delta", "a.pxd", "--dry-run", "repo"), ("verify", "copy")),
        (("convert", "a.pxd", "--to", "checkpoint", "--base", "base", "-o", "full"), ("apply",)),
        pytest.param(("sign", "a.pxd", "--private-key", "key.pem"), ("verify", "sign"), marks=NEEDS_SIGNING),
    ],
)
def test_each_stage_has_its_bar_on_a_terminal_and_none_with_quiet(folder: Path, arguments, stages) -> None:
    if arguments[0] == "sign":
        from tests.tools.test_sign import write_key

        write_key(folder, "key")
    shown = on_terminal(folder, *arguments)
    assert "\x1b[?25l" in shown  # a bar hides the cursor
    for stage in stages:
        assert f"{stage} \x1b" in shown or f"{stage} ━" in shown, (stage, shown)
    again = () if arguments[0] in ("verify", "diff") else ("--overwrite",)
    assert on_terminal(folder, *arguments, *again, "--quiet") == ""


def test_the_kl_check_of_verify_is_a_stage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = pytest.importorskip("peraxis_tools.evaluate")
    stages: list[tuple[str, bool]] = []

    @contextmanager
    def progress(description: str, total: int | None) -> Iterator:
        stages.append((description, total is None))
        yield lambda _: None

    monkeypatch.setattr(evaluation, "worst_kl", lambda *_: ("chat", 0.0))
    (folder / "chat.jsonl").touch()
    wanted = Wanted(base=folder / "base", fine_tuned="tuned", max_kl=1.0, texts={"chat": str(folder / "chat.jsonl")})

    @contextmanager
    def open_file(name: str) -> Iterator[Path]:
        yield Path(name)

    report = verify_files([str(folder / "a.pxd")], wanted, open_file=open_file, progress=progress)
    assert report.status.value == "passed"
    assert stages == [("verify", False), ("base", False), ("kl", True)]


def test_steps_from_many_threads_add_up() -> None:
    seen: list[int] = []
    steps = _Steps(seen.append)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(steps, [1] * 4000))
    steps.flush()
    assert sum(seen) == 4000
    assert len(seen) < 400


@pytest.mark.parametrize("force", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_variable_that_forces_colour_shows_no_bar_where_there_is_no_terminal(folder: Path, force: str) -> None:
    """CI systems set it for logs, where a bar would be a line for each step, with codes that move the cursor."""
    done = subprocess.run(
        [sys.executable, "-m", "peraxis_tools", "verify", "a.pxd", "--base", "base"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, force: "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0
    assert done.stderr == ""


def test_a_name_that_looks_like_markup_or_an_emoji_is_shown_as_it_is(folder: Path) -> None:
    name = "[bold]a:-1:b:smile:.pxd"
    done = subprocess.run(
        [sys.executable, "-m", "peraxis_tools", "inspect", f"gone-{name}"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stderr == f"error: gone-{name}: No such file or directory\n"


def test_a_bar_shows_a_name_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("fetch [red]a:smile:\x1b[2J.pxd", 3) as step:
        step(3)
    shown = capsys.readouterr().err
    assert "fetch [red]a:smile:\\u001b[2J.pxd" in shown
