"""Kills each verb that writes at every step it takes in the file system, and checks what is there afterwards.

    python -m tests.tools.kill_driver FOLDER KILLS VERB...

No clock decides where a run is killed: a hook of the interpreter counts its calls to the file system, and the n-th
kills the process. KILLS of them for each verb and state of its output before, half of them among the last quarter of
the calls, where names are given; 0 for all. Runs are forks of this process, which has imported everything. Prints JSON:
how many kills there were, and what was wrong after them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from peraxis_tools.cli import main
from tests.tools.output_cases import FILE_VERBS, FOLDER_VERBS, make_inputs, snapshot

# Audit events of the interpreter that read or change the file system.
_EVENTS = ("open", "os.", "fcntl.", "shutil.", "ctypes.dlsym")
_counting: dict[str, int] = {}


def count(event: str, _: Any) -> None:
    """The hook: kills this process at the step that it is set to."""
    if _counting and event.startswith(_EVENTS):
        _counting["done"] += 1
        if _counting["done"] == _counting["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)


def fsync_counted() -> None:
    """os.fsync has no event of its own; a kill loses nothing that the system has, so that it need not be real."""
    os.fsync = lambda descriptor: count("os.fsync", descriptor)


def run(line: str, *, kill_at: int = 0) -> tuple[int, int]:
    """Exit status (-9 where it was killed) and steps of the command, in a fork. kill_at: 0 for never."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            sys.argv = ["peraxis-tools", *line.split()]
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                _counting.update(done=0, kill_at=kill_at)
                main()
        except SystemExit as done:
            code = int(done.code or 0)
        finally:
            os.write(writer, str(_counting["done"]).encode())
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        steps = told.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(steps or 0)


def chosen_steps(total: int, kills: int) -> list[int]:
    """Which of 1 to total: all for 0 kills, else evenly, half of them from the last quarter."""
    if kills == 0 or kills >= total:
        return list(range(1, total + 1))
    begin = 3 * total // 4
    early = {1 + i * begin // (kills // 2) for i in range(kills // 2)}
    late = {total - i * (total - begin) // (kills - kills // 2) for i in range(kills - kills // 2)}
    return sorted(early | late)


def look(path: Path) -> Any:
    """What is under an output's name: bytes, files by name, None for nothing; of a signature all but the numbers."""
    if not os.path.lexists(path):
        return None
    if path.is_dir():
        return snapshot(path)
    data = path.read_bytes()
    if path.suffix == ".sig" and data.startswith(b"{"):
        bundle = json.loads(data)
        return json.dumps({**bundle, "dsseEnvelope": {**bundle["dsseEnvelope"], "signatures": None}})
    return data


def spoil(path: Path) -> None:
    """Make an earlier output differ from the new one, and a folder hold something of its user's."""
    if path.is_dir():
        for file in path.iterdir():
            if file.suffix in (".safetensors", ".pxd"):
                file.write_bytes(b"earlier")
        (path / "notes.txt").write_text("mine")
    else:
        path.write_bytes(b"earlier")


def after_kill(folder: Path, line: str, output: Path, allowed: list[Any], wanted: Any, inputs: dict[str, bytes]) -> str:
    """What is wrong with a folder after a kill and after the next run; empty for nothing."""
    if look(output) not in allowed:
        return "half-written"
    if run(f"{line} --overwrite" if output.exists() else line)[0] != 0:
        return "the next run fails"
    if look(output) != wanted:
        return "the next run ends in another output"
    left = set(os.listdir(folder)) - {Path(name).parts[0] for name in inputs} - {output.name}
    left |= set(os.listdir(tempfile.gettempdir()))
    if left:
        return f"the next run leaves {sorted(left)}"
    if any((folder / name).read_bytes() != data for name, data in inputs.items()):
        return "an input has changed"
    return ""


def kills(folder: Path, line: str, output: Path, prepare: Callable[[], object], number: int) -> dict[str, Any]:
    """Kill the run at steps of it. prepare: brings the output's name into the state before it."""
    inputs = snapshot(folder)
    prepare()
    before = look(output)
    command = line if before is None else f"{line} --overwrite"
    status, total = run(command)
    wanted = look(output)
    wrong = [] if status == 0 else [f"the undisturbed run ends with {status}"]
    killed = 0
    for step in chosen_steps(total, number):
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
        prepare()
        status, _ = run(command, kill_at=step)
        found = after_kill(folder, line, output, [before, wanted], wanted, inputs)
        killed += status == -signal.SIGKILL
        # A run may have one step less than the first: what it reads ahead is a matter of threads.
        if found or status not in (-signal.SIGKILL, 0):
            wrong.append(f"step {step} of {total}: ended with {status}; {found}")
    return {"kills": killed, "steps": total, "wrong": wrong}


def report(folder: Path, verb: str, number: int) -> dict[str, dict[str, Any]]:
    """For one verb: killed where nothing was before, and where an earlier output is replaced."""
    pattern, name = FILE_VERBS[verb] if verb in FILE_VERBS else (FOLDER_VERBS[verb], "out")
    line, output = pattern.format(out=name), folder / name
    assert run(line)[0] == 0, verb
    earlier = folder.with_name(f"{folder.name}-{verb}-earlier")
    os.rename(output, earlier)
    spoil(earlier)

    def bring_back() -> None:
        shutil.copytree(earlier, output) if earlier.is_dir() else shutil.copy(earlier, output)

    found = {}
    for state, prepare in (("new", lambda: None), ("earlier", bring_back)):
        found[state] = kills(folder, line, output, prepare, number)
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
    return found


def warm(verbs: list[str]) -> None:
    """Import what the verbs import when they run."""
    import importlib

    modules = ["apply", "compress", "convert", "inspect", "merge", "publish", "sign", "split", "verify"]
    for module in modules:
        importlib.import_module(f"peraxis_tools.commands.{module}")
    import model_signing  # noqa: F401
    import numba  # noqa: F401

    import peraxis_tools.report.html  # noqa: F401

    if "lora" in verbs:
        import safetensors.torch  # noqa: F401
    if "plot" in verbs:
        import matplotlib.figure  # noqa: F401


if __name__ == "__main__":
    target, number, chosen = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    make_inputs(target)
    os.chdir(target)
    tempfile.tempdir = str(target.with_name(f"{target.name}-temporary"))
    os.mkdir(tempfile.tempdir)
    warm(chosen)
    fsync_counted()
    sys.addaudithook(count)
    results = {verb: report(target, verb, number) for verb in chosen}
    print(json.dumps(results))
