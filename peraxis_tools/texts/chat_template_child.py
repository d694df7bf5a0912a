"""The process that renders chat templates: see chat_template.py. A script of its own that imports nothing of ours.

It reads lines of JSON: first {"template", "tokens"}, then {"turns", "seconds"} for each conversation. It answers each
conversation with {"text"}, or {"refused"} with the reason of the template, or {"beyond"} with the limit.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from typing import IO, Any

MEMORY = 512 << 20  # bytes beyond what the imports take
FACTOR, LEAST = 16, 1 << 20  # characters of a rendered conversation: FACTOR times those of its turns, and LEAST more


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # not every system has this limit
        import resource

        with open("/proc/self/statm", "rb") as file:
            now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def _limit_time(seconds: float) -> None:
    """End this process when it has taken `seconds` of processor time in all since its start."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, hard))


def _answer(template: str, tokens: dict[str, Any], turns: list[dict[str, str]]) -> dict[str, str]:
    from transformers.utils import chat_template_utils

    try:
        result: Any = chat_template_utils.render_jinja_template(conversations=[turns], chat_template=template, **tokens)
        text = str(result[0][0])
    except MemoryError:
        return {"beyond": "memory"}
    except Exception as error:  # a template is a program: any error is its own
        return {"refused": f"{type(error).__name__}: {error}"[:200]}
    if len(text) > LEAST + FACTOR * sum(len(turn["content"]) for turn in turns):
        return {"beyond": "size"}
    return {"text": text}


def _serve(lines: IO[str], answers: IO[str]) -> None:
    given = json.loads(lines.readline())
    importlib.import_module("transformers.utils.chat_template_utils")  # its time and memory do not count
    start = time.process_time()
    _limit_memory()
    for line in lines:
        asked = json.loads(line)
        _limit_time(start + asked["seconds"])
        answers.write(json.dumps(_answer(given["template"], given["tokens"], asked["turns"])) + "\n")
        answers.flush()


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # libraries that print do not disturb the answers
    _serve(sys.stdin, own)
