"""Run one process of an adapter with limits on time and memory."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["AdapterError", "Reply", "Server", "call"]

LARGEST_REPLY = 64 << 20
SHOWN = 80  # bytes of an odd reply that an error shows


class AdapterError(Exception):
    """The adapter cannot be run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The reply: an exit status and a JSON value, or a problem. error: the last line of standard error.

    text: the beginning of standard output, if it is no JSON object.
    mib: the peak of resident memory, if the system gives it.
    """

    exit: int = -1
    result: Any = None
    problem: str = ""
    error: str = ""
    text: str = ""
    seconds: float = 0.0
    mib: int | None = None


def parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def last_line(stream: Any) -> str:
    """The last line of standard error, preferably one about an error; it is shown but not judged."""
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4096))
    lines = [line.strip() for line in stream.read().decode("utf-8", "replace").split("\n") if line.strip()]
    last: str = ([line for line in lines if "error" in line.lower()] or lines or [""])[-1]
    return last[:200]


def start(command: Sequence[str], **streams: Any) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, start_new_session=True, **streams)
    except OSError as error:
        script = f'; name its interpreter too, like "python {command[0]}"' if os.path.isfile(command[0]) else ""
        raise AdapterError(f"cannot start {command[0]!r}: {error.strerror}{script}") from None


def kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children, which are in its own session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


def resident_peak(pid: int) -> int | None:
    """The peak of resident memory in MiB, if the system gives it (Linux)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) >> 10
    return None


def limit_address_space(mib: int | None) -> Any:
    """A function that sets RLIMIT_AS in the child. Not for run-times that reserve address space they never use."""
    if mib is None:
        return None
    import resource

    return lambda: resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20))


def over(mib: int, peak: int | None) -> str:
    return f"used {peak} MiB of memory, {mib} MiB are allowed" if peak is not None and peak > mib else ""


def call(command: Sequence[str], *, seconds: float, mib: int, address_space_mib: int | None = None) -> Reply:
    """Run one command until it ends or reaches its time or memory limit."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        limit = limit_address_space(address_space_mib)
        process = start(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, preexec_fn=limit)
        pause, problem = 0.0005, ""
        peaks = [0]
        while not problem:
            # Peak memory is read while the process lives, because wait4's value also counts the memory of the
            # process that started it.
            peak = resident_peak(process.pid)
            peaks.append(peak or 0)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                ended = ended_peak(usage.ru_maxrss)
                peaks.append(ended or 0)
                problem = over(mib, ended) or over(mib, peak)
                break
            problem = over(mib, peak)
            if time.monotonic() - started > seconds:
                problem = f"no answer after {seconds} s"
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)
        if process.returncode is None:
            kill(process)
        elapsed = time.monotonic() - started
        if problem:
            return Reply(problem=problem, seconds=elapsed)
        if process.returncode < 0:
            return Reply(problem=f"ended by {signal.Signals(-process.returncode).name}", seconds=elapsed)
        stdout.seek(0)
        printed = stdout.read(LARGEST_REPLY)
        result, said = parse(printed), last_line(stderr)
        text = "" if isinstance(result, dict) else printed[:SHOWN].decode("utf-8", "replace").strip()
        peak = max(peaks) or None
        return Reply(exit=process.returncode, result=result, seconds=elapsed, error=said, text=text, mib=peak)


def ended_peak(maxrss: int) -> int | None:
    """ru_maxrss in MiB, unless it may be the memory of this process when it started the other."""
    import resource

    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maxrss >> (20 if sys.platform == "darwin" else 10) if maxrss > own else None


class Server:
    """`ADAPTER serve`: one JSON line in, one out (README.md, Serving)."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._buffer = b""
        self._number = 0

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, arguments: Sequence[str], *, seconds: float, mib: int) -> Reply:
        """Send one request. The process is ended if it is late, dead or over its memory limit."""
        started = time.monotonic()
        self._number += 1
        self._reset_peak()
        stdin = self._process.stdin
        line = json.dumps({"id": self._number, "argv": list(arguments)}).encode() + b"\n"
        try:
            if stdin is not None:
                stdin.write(line)
                stdin.flush()
            answer = self._line(started + seconds, mib)
        except BrokenPipeError:
            answer = b""
        elapsed = time.monotonic() - started
        peak = resident_peak(self._process.pid)
        problem = over(mib, peak) if isinstance(answer, bytes) else answer
        parsed = parse(answer) if isinstance(answer, bytes) else None
        said: dict[str, Any] = parsed if isinstance(parsed, dict) else {}
        if not problem and (said.get("id") != self._number or not isinstance(said.get("exit"), int)):
            problem = "the served process ended" if not answer else "the served process did not answer in the protocol"
        if problem:
            kill(self._process)
            return Reply(problem=str(problem), seconds=elapsed)
        return Reply(exit=said["exit"], result=said.get("result"), seconds=elapsed, mib=peak)

    def _line(self, deadline: float, mib: int) -> bytes | str:
        """The next line as bytes; a text with the problem if there is none."""
        stream = self._process.stdout
        descriptor = stream.fileno() if stream else -1
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                return "no answer in time"
            if problem := over(mib, resident_peak(self._process.pid)):
                return problem
            ready, _, _ = select.select([descriptor], [], [], min(left, 0.05))
            if ready:
                chunk = os.read(descriptor, 1 << 16)
                if not chunk:
                    return b""
                self._buffer += chunk
                if len(self._buffer) > LARGEST_REPLY:
                    return "the answer does not end"
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _reset_peak(self) -> None:
        """Reset the peak of memory for this request (Linux)."""
        try:
            Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")
        except OSError:
            return

    def close(self) -> None:
        """Close its input, wait a moment, then send a signal."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            kill(self._process)
