"""The demo prints commands that give what it shows."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from peraxis_tools.cli import cli
from peraxis_tools.demo import DemoStep, demo
from peraxis_tools.pair import PairSize
from peraxis_tools.report.console import plain_text
from peraxis_tools.report.demo import render_step

pytestmark = pytest.mark.slow

SMALL = PairSize(vocabulary=300, width=32, mlp_width=44, layers=2, heads=2, kv_heads=1, base_steps=2, fine_tune_steps=2)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[DemoStep]:
    return list(demo(tmp_path_factory.mktemp("demo") / "a folder", size=SMALL))


def test_each_command_of_the_demo_prints_the_report_that_the_demo_shows(steps: list[DemoStep]) -> None:
    commands = [step for step in steps if step.command is not None]
    assert [shlex.split(step.command or "")[0] for step in commands] == [
        "compress", "inspect", "verify", "apply", "eval",
    ]  # fmt: skip
    for step in commands:
        words = shlex.split(step.command or "")
        found = CliRunner().invoke(cli, words)
        assert found.exit_code == 0, found.output
        shown = plain_text(step, render_step).split("\n", 2)[2]
        assert " ".join(shown.split()) in " ".join(found.output.split()), words[0]


def test_the_demo_ends_with_commands_that_are_valid(steps: list[DemoStep]) -> None:
    assert steps[-1].command is None
    lines = plain_text(steps[-1], render_step).splitlines()
    after = lines[lines.index("try next") + 1 :]
    assert len(after) == 3
    for line in after:
        words = shlex.split(line)[1:]
        assert Path(words[1]).exists()
        command = cli.get_command(None, words[0])  # type: ignore[arg-type]
        assert command is not None
        command.make_context(words[0], words[1:])
