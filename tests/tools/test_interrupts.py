"""Ctrl-C while Python loads the command line: one line, from the first module of ours on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from peraxis_format import __version__
from peraxis_tools import cli
from peraxis_tools.errors import ToolError
from peraxis_tools.process.interrupts import interrupts_end

ROOT = Path(__file__).parents[2]


def test_what_is_imported_before_signals_are_handled_is_loaded_already() -> None:
    program = "import sys; before = set(sys.modules); import peraxis_tools.entry; print(*set(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); {program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    ours = {f"peraxis_tools{name}" for name in ("", ".entry", ".process", ".process.interrupts")}
    assert set(done.stdout.split()) <= {"__future__", *ours}


def test_the_command_line_handles_signals_before_its_other_imports() -> None:
    program = (
        "import sys, importlib.abc\n"
        "class Interrupting(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name in ('click', 'peraxis_tools.process.command_line'):\n"
        "            import os, signal\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "import peraxis_tools.cli\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ
    )
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


ENDS = pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGINT, 130, "error: interrupted\n"),
        (signal.SIGTERM, 143, "error: ended by SIGTERM\n"),
        (signal.SIGHUP, 129, "error: ended by SIGHUP\n"),
    ],
)


@ENDS
@pytest.mark.parametrize(
    "losing",
    [
        "ctypes.CFUNCTYPE(None)(end)()",
        "type('Lost', (), {'__del__': lambda self: end()})()",
        "for _ in range(3): ctypes.CFUNCTYPE(None)(end)()",
    ],
    ids=["ctypes", "del", "often"],
)
def test_a_signal_whose_exception_python_discards_ends_the_run_in_one_line(
    number: signal.Signals, status: int, said: str, losing: str
) -> None:
    """numba compiles within callbacks of ctypes."""
    program = (
        "import ctypes, os, signal, time\n"
        f"signal.signal({int(number)}, signal.default_int_handler if {int(number)} == 2 else signal.SIG_DFL)\n"
        "from peraxis_tools import cli\n"
        f"def end(): os.kill(os.getpid(), {int(number)})\n"
        "def verb():\n"
        f"    {losing}\n"
        "    for _ in range(3000): time.sleep(0.01)\n"
        "cli._run_verb = verb\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT, timeout=25
    )
    assert (done.returncode, done.stderr) == (status, said)


def test_another_exception_that_python_discards_is_reported_as_usual() -> None:
    program = (
        "from peraxis_tools import cli\n"
        "cli._run_verb = lambda: type('Lost', (), {'__del__': lambda self: 1 / 0})() and None\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0
    assert "Exception ignored" in done.stderr
    assert "ZeroDivisionError" in done.stderr


@ENDS
@pytest.mark.parametrize(
    "wrapping",
    [
        "class Broken:\n    def __set_name__(self, owner, name): end()\ntype('Owner', (), {'name': Broken()})",
        "try: end()\nexcept BaseException as error: raise ImportError('no module') from error",
        "try: end()\nexcept BaseException as error: raise ToolError('cannot be loaded') from None",
        "try: end()\nexcept BaseException as error: raise OSError(5, 'cannot be read') from error",
        "try: end()\nexcept BaseException: pass\nlen(3)",
    ],
    ids=["set-name", "import", "tool", "system", "swallowed"],
)
def test_a_signal_that_a_library_turns_into_an_error_of_its_own_ends_the_run_as_itself(
    number: signal.Signals,
    status: int,
    said: str,
    wrapping: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """CPython 3.11 turns what `__set_name__` raises into a RuntimeError, as while numba is imported."""

    def verb() -> None:
        exec(wrapping, {"end": lambda: os.kill(os.getpid(), number), "ToolError": ToolError})

    monkeypatch.setattr(cli, "_run_verb", verb)
    before = signal.getsignal(number)
    signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)  # nohup ignores it
    try:
        with pytest.raises(SystemExit) as done:
            cli.main()
    finally:
        signal.signal(number, before)
    assert (done.value.code, capsys.readouterr().err) == (status, said)


def test_an_interrupt_within_a_text_that_is_run_leaves_the_exit_status(tmp_path: Path) -> None:
    """Python ends `-m` by SIGINT itself, after our own exit status, if one passed `exec` or `eval` of a text."""
    (tmp_path / "program.py").write_text(
        "from peraxis_tools import cli\n"
        "cli._run_verb = lambda: exec('import os, signal; os.kill(os.getpid(), signal.SIGINT)')\n"
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\ncli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "program"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


@pytest.mark.parametrize("first", ["SIGTERM", "SIGHUP", "SIGINT"])
@pytest.mark.parametrize("second", ["SIGTERM", "SIGHUP", "SIGINT"])
@pytest.mark.parametrize("when", ["cleanup", "report", "both at once"])
def test_a_second_signal_does_not_end_what_the_first_one_began(
    first: str, second: str, when: str, tmp_path: Path
) -> None:
    """The exit code is that of the first signal, the cleanup is done, and there is no traceback."""
    if (first, when) == ("SIGINT", "cleanup"):
        pytest.skip("a second Ctrl-C may end a cleanup that hangs")
    (tmp_path / "program.py").write_text(
        "import os, signal, sys\n"
        f"first, second, when = signal.{first}, signal.{second}, {when!r}\n"
        "for number in (signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_DFL)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def end(*numbers):\n"
        "    for number in numbers: os.kill(os.getpid(), number)\n"
        "    len([])\n"
        "import peraxis_tools.cli as cli\n"
        "def verb():\n"
        "    try:\n"
        "        signal.pthread_sigmask(signal.SIG_BLOCK, {first, second})\n"
        "        end(first, *([second] if when == 'both at once' else []))\n"
        "        signal.pthread_sigmask(signal.SIG_UNBLOCK, {first, second})\n"
        "    finally:\n"
        "        if when == 'cleanup': end(second)\n"
        "        print('cleaned', flush=True)\n"
        "cli._run_verb = verb\n"
        "told = cli._with_notes\n"
        "def notes(line, error):\n"
        "    if when == 'report': end(second)\n"
        "    return told(line, error)\n"
        "cli._with_notes = notes\n"
        "from peraxis_tools.entry import main\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "program.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    said = {"SIGINT": (130, "error: interrupted\n")}
    said |= {name: (128 + getattr(signal, name), f"error: ended by {name}\n") for name in ("SIGTERM", "SIGHUP")}
    # Of two signals at once the system may deliver either first.
    possible = [said[first], said[second]] if when == "both at once" else [said[first]]
    assert (done.returncode, done.stderr) in possible, done
    assert when == "both at once" or done.stdout == "cleaned\n"


MOMENTS = {
    "before the verb": ("import peraxis_tools.cli as c; c.print_notes = lambda *_: end()", 130, "error: interrupted\n"),
    "before signals are exceptions": ("import peraxis_tools.cli as c; c.hush_hub = end", 130, "error: interrupted\n"),
    "after the verb": ("import gc; gc.freeze = end", 130, "error: interrupted\n"),
    "at exit": ("import atexit; atexit.register(end)", 0, ""),
    "while threads end": ("import threading; threading._register_atexit(end)", 0, ""),
    "while modules are freed": ("sys.late = type('Late', (), {'__del__': end})()", 0, ""),
    "after a failure": ("import atexit, sys; atexit.register(end); sys.argv = ['peraxis-tools', 'nonsense']", 2, None),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_before_or_after_the_verb_is_no_traceback(moment: str) -> None:
    prepare, status, said = MOMENTS[moment]
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def end(*_, kill=os.kill, it=os.getpid()): kill(it, 2); len([])\n"
        f"sys.argv = ['peraxis-tools', '--version']\n{prepare}\n"
        "from peraxis_tools.entry import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == status, done.stderr
    if said is None:
        assert done.stderr.startswith("error: no command 'nonsense'")
        assert done.stderr.count("\n") == 1
    else:
        assert done.stderr == said
    assert status != 0 or done.stdout == f"peraxis-tools, version {__version__}\n"


def test_the_script_starts_with_the_module_that_handles_signals() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["peraxis-tools"] == "peraxis_tools.entry:main"


def test_the_former_handler_is_restored_and_a_program_keeps_its_own() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts_end():
        assert (signal.getsignal(signal.SIGINT) is before) == (before is not signal.default_int_handler)
    assert signal.getsignal(signal.SIGINT) is before
    own = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_end():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, own)


def test_a_thread_leaves_signals_alone() -> None:
    seen: list[object] = []

    def enter() -> None:
        with interrupts_end():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
