"""The completion of a shell: file names, also where an argument may be a hub id or a URL."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from peraxis_tools.cli import VERBS, cli

_COMPLETE = "_PERAXIS_TOOLS_COMPLETE"


def _program(folder: Path) -> Path:
    """A program `peraxis-tools` in this folder; its script of completion is beside it."""
    program = folder / "peraxis-tools"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m peraxis_tools "$@"\n')
    program.chmod(0o755)
    return program


def _typed_in_bash(typed: str, wanted: str, folder: Path) -> str:
    """Type a text in an interactive bash, and return its output up to the wanted text, or that of 200 seconds."""
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "TERM": "dumb", "PS1": "$ ", "HOME": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)
    shown, end = "", time.monotonic() + 200
    try:
        os.write(terminal, b"source <(peraxis-tools completion bash); echo rea''dy\n")
        while wanted not in shown and time.monotonic() < end:
            if not select.select([terminal], [], [], 0.1)[0]:
                continue
            before, shown = shown, shown + os.read(terminal, 4096).decode(errors="replace")
            if "ready" in shown and "ready" not in before:
                os.write(terminal, typed.encode())
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)
    return shown


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    "typed", ["inspect del", "compress base tuned --calibration del", "verify x.pxd --report sarif=del"]
)
def test_one_tab_in_bash_completes_a_file_name(tmp_path: Path, typed: str) -> None:
    _program(tmp_path)
    (tmp_path / "delta-of-mine.pxd").write_bytes(b"")
    shown = _typed_in_bash(f"peraxis-tools {typed}\t", "delta-of-mine.pxd", tmp_path)
    assert "delta-of-mine.pxd" in shown, shown


@pytest.mark.parametrize("verb", VERBS)
def test_every_plain_text_completes_as_a_file_name_in_every_shell(verb: str) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    context = click.Context(command)
    for parameter in command.params:
        if isinstance(parameter.type, click.types.StringParamType):
            found = parameter.shell_complete(context, "del")
            assert [item.type for item in found] == ["file"], parameter.name


def test_options_and_choices_still_complete_as_themselves() -> None:
    complete = ShellComplete(cli, {}, "peraxis-tools", _COMPLETE)
    assert [item.value for item in complete.get_completions(["compress", "base", "tuned"], "--calibration-s")] == [
        "--calibration-samples"
    ]
    assert "refined" in [item.value for item in complete.get_completions(["compress", "--fit"], "")]
