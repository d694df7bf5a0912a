"""The process of a command: signals at any moment, streams that are closed, full or not UTF-8, names in bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import peraxis_format as pxd
from peraxis_tools.cli import VERBS, main
from peraxis_tools.process.command_line import prepared_process
from tests.tools.output_cases import make_inputs

ROOT = Path(__file__).parents[2]
BYTES = os.fsdecode(b"\xff")  # in a file name, not UTF-8


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    shutil.copy(folder / "a.pxd", folder / f"{BYTES}a.pxd")
    shutil.copytree(folder / "tuned", folder / f"{BYTES}tuned")
    return folder


def tool(folder: Path, *arguments: str, shell: str = '"$@"', **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in its own process, with streams redirected by `shell`."""
    command = ["sh", "-c", shell, "sh", sys.executable, "-m", "peraxis_tools", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# --- signals -----------------------------------------------------------------------------------------------------

# Sends a signal at the import of a module, before it is imported, a moment that no waiting could hit.
SIGNALLED = """
import importlib.abc, os, signal, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.{number})
sys.meta_path.insert(0, Finder())
sys.argv = ["peraxis-tools", *{arguments!r}]
from peraxis_tools.entry import main
main()
"""


def signalled(folder: Path, module: str, number: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = SIGNALLED.format(module=module, number=number, arguments=arguments)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize(
    "module", ["click", "numpy", "rich.console", "peraxis_format.reader", "peraxis_tools.commands.split", "unittest"]
)
def test_an_interrupt_during_imports_is_one_line_and_130(inputs: Path, tmp_path: Path, module: str) -> None:
    verb = ("convert", "a.pxd", "--to", "lora") if module == "unittest" else ("split", "a.pxd", "--parts", "2")
    done = signalled(inputs, module, "SIGINT", *verb, "-o", str(tmp_path / "out"))
    assert "interrupted" in one_line(done, 130)
    assert os.listdir(tmp_path) == []


WRITING = """
import os, signal, sys
import peraxis_format as pxd
signal.signal(signal.{number}, signal.default_int_handler if "{number}" == "SIGINT" else signal.SIG_DFL)
old = pxd.DeltaWriter.finish
def finish(self):
    os.kill(os.getpid(), signal.{number})
    return old(self)
pxd.DeltaWriter.finish = finish
sys.argv = ["peraxis-tools", *{arguments!r}]
from peraxis_tools.entry import main
main()
"""


@pytest.mark.parametrize("second", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_process_that_lost_the_exception_of_a_signal_ends_at_a_later_one(second: str) -> None:
    """A library may catch all exceptions. For those that Python discards, see test_interrupts.py."""
    program = (
        "import os, signal, time\n"
        "from peraxis_tools.process import command_line\n"
        "for number in (signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_DFL)  # as without nohup\n"
        "with command_line.prepared_process():\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)\n"
        "    except BaseException: pass\n"
        f"    os.kill(os.getpid(), signal.{second})  # within the time of a cleanup, so it is dropped\n"
        "    command_line._terminated_at[0] -= 11.0\n"
        "    try:\n"
        f"        os.kill(os.getpid(), signal.{second}); time.sleep(5)\n"
        "    except command_line.Terminated as ended: print(ended.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == f"{second}\n", done.stderr


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_while_writing_cleans_up_and_is_told_by_the_exit_code(
    inputs: Path, tmp_path: Path, number: str, code: int
) -> None:
    script = WRITING.format(number=number, arguments=("split", "a.pxd", "--parts", "2", "-o", str(tmp_path / "out")))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=inputs, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert f"{tmp_path / 'out'} was not written" in one_line(done, code)
    assert os.listdir(tmp_path) == []


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with prepared_process():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# --- streams -----------------------------------------------------------------------------------------------------


def test_a_closed_or_full_standard_output_is_one_line(inputs: Path) -> None:
    for verb in ("inspect", "verify"):
        for more in ((), ("--json",) if verb == "inspect" else ("--format", "sarif")):
            closed = tool(inputs, verb, "a.pxd", *more, shell='"$@" >&-')
            assert "standard output: is closed" in one_line(closed, 2)
            full = tool(inputs, verb, "a.pxd", *more, shell='"$@" >/dev/full')
            assert "standard output: No space left on device" in one_line(full, 2)


def test_a_reader_that_goes_away_is_no_error(inputs: Path) -> None:
    for more in ((), ("--json",)):
        done = tool(inputs, "inspect", "a.pxd", *more, shell='{ sleep 0.2; "$@"; echo "code $?" >&2; } | true')
        assert done.stderr == "code 0\n"


def test_the_work_goes_on_without_a_reader_of_standard_error(inputs: Path, tmp_path: Path) -> None:
    more = ("--parts", "2", "-o", str(tmp_path / "out"))
    shell = '{ sleep 0.2; "$@" 2>&1 >&3; echo "code $?" >&3; } 3>"$RESULT" | true'
    code = f"""
import sys
sys.argv = ["peraxis-tools", "split", "a.pxd", *{more!r}]
from peraxis_tools.report.console import print_note
print_note("nobody reads this")
print_note("nor this")
from peraxis_tools.entry import main
main()
"""
    done = subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-c", code],
        cwd=inputs, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RESULT": str(tmp_path / "result")},
    )  # fmt: skip
    assert done.stderr == ""
    assert (tmp_path / "result").read_text().endswith("code 0\n")
    assert len(list((tmp_path / "out").glob("*.pxd"))) == 2


def test_closed_streams_do_not_give_their_numbers_to_files(inputs: Path, tmp_path: Path) -> None:
    done = tool(inputs, "split", "a.pxd", "--parts", "2", "-o", str(tmp_path / "out"), shell='"$@" <&- >&- 2>&-')
    assert (done.returncode, done.stderr) == (2, "")
    for part in (tmp_path / "out").glob("*.pxd"):
        with pxd.open(part) as delta:
            delta.verify()


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "utf-8:strict"},
    ],
)
def test_any_encoding_of_the_streams_takes_any_text(inputs: Path, environment: dict[str, str]) -> None:
    name = f"{BYTES}a.pxd"
    shown = tool(inputs, "inspect", name, **environment)
    assert (shown.returncode, shown.stderr) == (0, "")
    report = tool(inputs, "verify", name, "--format", "json", **environment)
    assert json.loads(report.stdout)["files"][0]["path"] == name
    missing = tool(inputs, "inspect", f"{BYTES}no.pxd", **environment)
    assert missing.stderr == "error: \\udcffno.pxd: No such file or directory\n"


def test_names_that_are_not_utf8_go_through_every_verb_or_are_refused_in_one_line(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(inputs)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["peraxis-tools", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0)

    delta, out = f"{BYTES}a.pxd", os.fsdecode(bytes(tmp_path)) + f"/{BYTES}"
    for arguments in (
        ("verify", delta, "--format", "sarif"),
        ("verify", delta, "--format", "junit"),
        ("verify", delta, "--format", "github"),
        ("verify", delta, "--report", f"json={out}.json"),
        ("inspect", delta, "--html", f"{out}.html"),
        ("compress", "base", f"{BYTES}tuned", "--fit", "none", "-o", f"{out}.pxd"),
        ("apply", "base", delta, "-o", f"{out}applied"),
        ("split", delta, "--parts", "2", "-o", f"{out}parts"),
        ("merge", delta, "b.pxd", "--weights", "1,1", "-o", f"{out}merged.pxd"),
        ("diff", delta, "a.pxd"),
    ):
        assert run(*arguments) == 0, (arguments, capsys.readouterr().err)
        assert "error" not in capsys.readouterr().err
    assert run("publish", "me/x", delta, "--dry-run", f"{out}repo") == 2
    assert "rename the file" in capsys.readouterr().err
    with pxd.open(f"{out}.pxd") as written:
        assert written.manifest.fine_tuned.id == "\ufffdtuned"


# --- unexpected errors ---------------------------------------------------------------------------------------------


def test_an_error_that_nothing_foresaw_is_one_line_that_asks_for_a_report(inputs: Path) -> None:
    code = (
        "import sys, peraxis_tools.inspect, peraxis_tools.commands.inspect as c\nsys.argv = ['x', 'inspect', 'a.pxd']\n"
        "def broken(*a): raise KeyError('odd')\nc.inspect = broken\nfrom peraxis_tools.cli import main\nmain()"
    )

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        return subprocess.run(
            [sys.executable, "-c", code], cwd=inputs, capture_output=True, text=True, check=False, env=environment
        )

    assert "internal error: KeyError: 'odd'" in one_line(run(), 2)
    assert "Traceback" in run(PERAXIS_TRACEBACK="1").stderr


def test_verbs_are_known_without_importing_numpy() -> None:
    code = "import sys, peraxis_tools; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"
    assert VERBS
