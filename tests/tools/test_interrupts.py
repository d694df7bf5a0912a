"""Ctrl-C while Python loads the command line: one line, from the first module of ours on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from peraxis_tools.interrupts import interrupts_end

ROOT = Path(__file__).parents[2]


def test_what_is_imported_before_signals_are_handled_is_loaded_already() -> None:
    program = (
        "import sys; before = set(sys.modules); import peraxis_tools.interrupts; print(*set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); {program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) <= {"__future__", "peraxis_tools", "peraxis_tools.interrupts"}


def test_the_command_line_handles_signals_before_its_other_imports() -> None:
    program = (
        "import sys, importlib.abc\n"
        "class Interrupting(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name in ('click', 'peraxis_tools.process'):\n"
        "            import os, signal\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "import peraxis_tools.cli\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ
    )
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


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
