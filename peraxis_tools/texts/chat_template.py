"""Render the chat template of a tokenizer, which is a program from a stranger's checkpoint, within bounds.

A template has no access to files or other code (Jinja's sandbox), but a few characters can loop for ever or fill the
memory, inside of one operation that no check in this process can stop. So another process renders, with a limit of
processor time and of memory (chat_template_child.py). It starts at the first conversation and serves all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from peraxis_tools.errors import ToolError

__all__ = ["Render", "chat_template_of"]

_CHILD: Final = Path(__file__).with_name("chat_template_child.py")
_SECONDS: Final = 2.0  # of processor time for all conversations together
_SECONDS_EACH: Final = 0.05  # more for each conversation; usual templates take a hundredth of it
_WAIT: Final = 120.0  # seconds for one answer, where the system has no limit of processor time
# The kernel's signal at the limit, and that of _WAIT.
_TIME_SIGNALS: Final = tuple(getattr(signal, name) for name in ("SIGXCPU", "SIGKILL") if hasattr(signal, name))
_FILES: Final = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")

# Turns -> the rendered conversation; None if the template refuses it.
Render: TypeAlias = Callable[[Sequence[Mapping[str, str]]], str | None]


@contextlib.contextmanager
def chat_template_of(tokenizer: Any) -> Iterator[Render | None]:
    """Yield the function that renders a conversation with the tokenizer's template; None if it has no template.

    A turn has `role` and `content`. Templates refuse roles or their order, and then the function returns None. It
    raises ToolError with the template's file if rendering goes beyond the bounds.
    """
    template = _template(tokenizer)
    if template is None:
        yield None
        return
    renderer = _Renderer(template, dict(tokenizer.special_tokens_map), _file_of(tokenizer))
    try:
        yield renderer.render
    finally:
        renderer.close()


def _template(tokenizer: Any) -> str | None:
    """The template for conversations without tools; None if there is none, or several without a default."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        return None
    return template if isinstance(template, str) else None


def _file_of(tokenizer: Any) -> str:
    """The path of the template's file, for errors."""
    folder = Path(str(getattr(tokenizer, "name_or_path", "") or "."))
    return next((str(folder / name) for name in _FILES if (folder / name).is_file()), f"{folder}: its chat template")


class _Renderer:
    """The other process, from its first conversation on."""

    def __init__(self, template: str, tokens: dict[str, Any], file: str) -> None:
        self._first = {"template": template, "tokens": tokens}
        self._file = file
        self._seconds = _SECONDS
        self._process: subprocess.Popen[str] | None = None

    def render(self, turns: Sequence[Mapping[str, str]]) -> str | None:
        """The rendered conversation; None if the template refuses it. Raises ToolError beyond the bounds."""
        if self._process is None:
            self._process = _started()
            self._send(self._process, self._first)
        self._seconds += _SECONDS_EACH
        timer = threading.Timer(_WAIT, self._process.kill)
        timer.start()
        try:
            self._send(self._process, {"turns": [dict(turn) for turn in turns], "seconds": self._seconds})
            line = self._process.stdout.readline() if self._process.stdout else ""
        finally:
            timer.cancel()
        if not line:
            raise self._beyond(_cause_of_end(self._process))
        answer: dict[str, str] = json.loads(line)
        if "beyond" in answer:
            raise self._beyond(f"takes too much {answer['beyond']}")
        return answer.get("text")

    def _send(self, process: subprocess.Popen[str], value: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its answer says so
            if process.stdin:
                process.stdin.write(json.dumps(value) + "\n")
                process.stdin.flush()

    def _beyond(self, cause: str) -> ToolError:
        return ToolError(
            f"{self._file}: its chat template {cause}; correct or remove the template, or use a text without turns"
        )

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    if stream:
                        stream.close()
            self._process.wait()


def _started() -> subprocess.Popen[str]:
    # -P: the folder of the script has modules that are named like those of the standard library.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-P", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
        encoding="ascii",
    )


def _cause_of_end(process: subprocess.Popen[str]) -> str:
    status = process.wait()
    if status > 0:
        return f"cannot be rendered: its process ended with status {status}"
    return "does not end" if -status in _TIME_SIGNALS else f"crashed with signal {-status}"
