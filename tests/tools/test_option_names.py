"""An error names an option as the caller writes it: `masks` in Python, `--masks` on the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peraxis_tools.compress import CompressOptions
from peraxis_tools.display.option_names import on_the_command_line
from peraxis_tools.errors import ToolError


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("a.pxd: exists; pass overwrite (--overwrite)", "a.pxd: exists; pass --overwrite"),
        ("pass the base (--base), which is 'b'", "pass --base, which is 'b'"),
        ("give texts (--text domain=file) or tasks (--tasks)", "give --text domain=file or --tasks"),
        ("pass normalize=False (--no-normalize)", "pass --no-normalize"),
        ("held_out 2.0: must be", "--held-out 2.0: must be"),
        ("seed does nothing without a fit", "--seed does nothing without a fit"),
        ("seed: no such file", "seed: no such file"),
        ("other 3: must be 1", "other 3: must be 1"),
    ],
)
def test_names_become_options(message: str, shown: str) -> None:
    assert on_the_command_line(message, ["--held-out", "--seed", "--output", "-o"]) == shown


def said(*arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "peraxis_tools.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    return run.stderr


def test_the_command_line_and_python_each_say_their_own_name(tmp_path: Path) -> None:
    arguments = ("compress", "base", "tuned", "-o", str(tmp_path / "a.pxd"), "--calibration", "t.txt")
    assert said(*arguments, "--sequence-length", "1") == "error: --sequence-length 1: must be 2 to 16777216\n"
    with pytest.raises(ToolError, match=r"^sequence_length 1: must be 2"):
        CompressOptions(calibration="t.txt", sequence_length=1)


def test_an_error_of_usage_is_one_line_of_plain_characters() -> None:
    assert "Choose from: bash, zsh, fish" in said("completion")
