"""Kill each verb that writes at each of its file system calls, and check the files that it leaves.

    python -m tests.tools.kill_driver FOLDER KILLS VERB...

The kill does not depend on a clock: an audit hook of the interpreter counts the calls to the file system, and the n-th
call kills the process. KILLS is the number of kills for each verb and each earlier state of its output; 0 kills at
every call. Half of the kills are among the last quarter of the calls, which give outputs their names. Runs are forks
of this process, which has imported what the first run imported, so no kill falls into an import. The command prints
JSON: the number of kills and the faults after them.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from peraxis_tools.cli import main
from tests.tools.output_cases import FILE_VERBS, FOLDER_VERBS, make_inputs, snapshot

# Audit events of the interpreter for reads and changes of the file system.
_EVENTS = ("open", "os.", "fcntl.", "shutil.", "ctypes.dlsym")
_counting: dict[str, int] = {}


def count(event: str, _: Any) -> None:
    """Kill this process at the chosen step. This is the audit hook."""
    if _counting and event.startswith(_EVENTS):
        _counting["done"] += 1
        if _counting["done"] == _counting["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)


def fsync_counted() -> None:
    """Count os.fsync, which has no audit event. It need not sync, because a kill loses no data of the system."""
    os.fsync = lambda descriptor: count("os.fsync", descriptor)


def run(line: str, *, kill_at: int = 0, import_after: bool = False) -> tuple[int, int]:
    """Run the command in a fork. Returns its exit status (-9 if killed) and steps. kill_at: 0 does not kill.

    import_after: import here what the fork imported.
    """
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
            with os.fdopen(writer, "w") as tell:
                tell.write(" ".join([str(_counting["done"]), *(sys.modules if import_after else ())]))
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as told:
        steps, *modules = told.read().split() or ["0"]
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for module in modules:
        with suppress(ImportError):  # some modules are made by others and have no file
            importlib.import_module(module)
    return status, int(steps)


def chosen_steps(total: int, kills: int) -> list[int]:
    """Choose steps from 1 to total: all for 0 kills, else evenly spread ones, half of them in the last quarter."""
    if kills == 0 or kills >= total:
        return list(range(1, total + 1))
    begin = 3 * total // 4
    early = {1 + i * begin // (kills // 2) for i in range(kills // 2)}
    late = {total - i * (total - begin) // (kills - kills // 2) for i in range(kills - kills // 2)}
    return sorted(early | late)


def look(path: Path) -> Any:
    """Return an output: bytes, files by name, or None if it is absent; a signature without its random numbers."""
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
    """Make an earlier output differ from the new one, and add a user's file to a folder."""
    if path.is_dir():
        for file in path.iterdir():
            if file.suffix in (".safetensors", ".pxd"):
                file.write_bytes(b"earlier")
        (path / "notes.txt").write_text("mine")
    else:
        path.write_bytes(b"earlier")


def after_kill(folder: Path, line: str, output: Path, allowed: list[Any], wanted: Any, inputs: dict[str, bytes]) -> str:
    """Return the faults of a folder after a kill and after the next run, or an empty result."""
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
    """Kill the run at the chosen steps. prepare: restores the earlier state of the output."""
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
        # A run may have one step less than the first, because reading ahead depends on threads.
        if found or status not in (-signal.SIGKILL, 0):
            wrong.append(f"step {step} of {total}: ended with {status}; {found}")
    return {"kills": killed, "steps": total, "wrong": wrong}


def report(folder: Path, verb: str, number: int) -> dict[str, dict[str, Any]]:
    """Report kills of one verb without an earlier output and with an earlier output that it replaces."""
    pattern, name = FILE_VERBS[verb] if verb in FILE_VERBS else (FOLDER_VERBS[verb], "out")
    line, output = pattern.format(out=name), folder / name
    assert run(line, import_after=True)[0] == 0, verb
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


if __name__ == "__main__":
    target, number, chosen = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    make_inputs(target)
    os.chdir(target)
    tempfile.tempdir = str(target.with_name(f"{target.name}-temporary"))
    os.mkdir(tempfile.tempdir)
    # torch makes a folder among the temporary ones when it is imported, unless it is told another place
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(target.with_name(f"{target.name}-inductor"))
    fsync_counted()
    sys.addaudithook(count)
    results = {verb: report(target, verb, number) for verb in chosen}
    print(json.dumps(results))
