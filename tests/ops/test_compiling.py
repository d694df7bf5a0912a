"""The first use of a compiled kernel says that it compiles, once and only then."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

SAID = "compiling the kernels for this machine"
PROGRAM = """
import logging, sys
import peraxis_format.ops.compiling as compiling
from peraxis_format.ops.backend import choose
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
choose("rebuild", 1 << 30)
from own import add, times
print(add(1, 2), times(3, 4))
"""
KERNELS = "import numba\n" + "".join(
    f"@numba.njit(cache=True)\ndef {name}(a, b):\n    return a {sign} b\n"
    for name, sign in (("add", "+"), ("times", "*"))
)
COMMAND = """
import sys
from peraxis_tools.cli import main
from peraxis_format.ops import compiling
import peraxis_tools.commands.inspect as command
def inspect(path):
    compiling.PROGRESS.info("COMPILING")
    raise SystemExit(0)
command.inspect = inspect
sys.argv = ["peraxis-tools", *sys.argv[1:]]
main()
"""


def run_program(folder: Path) -> str:
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join((str(folder), str(Path(__file__).parents[2]))),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True, cwd=folder
    )
    return done.stdout


def test_a_cold_cache_is_told_once_and_a_warm_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(KERNELS)
    cold = run_program(tmp_path).splitlines()
    assert [SAID in line for line in cold] == [True, False]  # one line for two kernels
    assert run_program(tmp_path) == "3 12\n"


@pytest.mark.parametrize(
    ("options", "terminal", "shown"), [((), True, True), (("-q",), True, False), ((), False, False)]
)
def test_the_command_line_shows_it_where_it_shows_bars(options: tuple[str, ...], terminal: bool, shown: bool) -> None:
    ours, theirs = pty.openpty() if terminal else os.pipe()
    with os.fdopen(theirs, "wb") as errors:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, "inspect", "a.pxd", *options],
            stderr=errors,
            capture_output=False,
            check=False,
        )
    data = b""
    try:
        while part := os.read(ours, 4096):
            data += part
    except OSError:  # the end of a terminal
        pass
    finally:
        os.close(ours)
    assert done.returncode == 0
    assert (b"COMPILING" in data) == shown, data
