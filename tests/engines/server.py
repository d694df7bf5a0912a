"""A vLLM server in its own process, and requests to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.engines.jobs import ENVIRONMENT

__all__ = ["Server", "family_of", "serve", "together"]

_START_SECONDS = 900
_ANSWER_SECONDS = 900
KEY = "key-of-the-tests"


class Server:
    """Requests to one server, with its key. Each answers (status, parsed body)."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        self.url = f"http://127.0.0.1:{port}"
        self.process = process
        self.log = log

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.url + path, data=data, method=method, headers=self.headers)
        try:
            with urllib.request.urlopen(asked, timeout=_ANSWER_SECONDS) as answer:
                return answer.status, _parsed(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _parsed(error.read())

    def get(self, path: str) -> tuple[int, Any]:
        return self.request("GET", path)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        return self.request("POST", path, body)

    def stream(self, path: str, body: Any) -> Iterator[Any]:
        """Yield the events of a streamed answer as they arrive; an answer that is cut off ends with an error."""
        data = json.dumps(body | {"stream": True}).encode()
        asked = urllib.request.Request(self.url + path, data=data, headers=self.headers)
        with (
            urllib.request.urlopen(asked, timeout=_ANSWER_SECONDS) as answer,
            contextlib.suppress(http.client.HTTPException, OSError),
        ):
            for line in answer:
                event = line.decode().removeprefix("data:").strip()
                if event == "[DONE]":
                    return
                if event:
                    yield json.loads(event)
        yield {"error": "the answer was cut off"}

    def complete(self, model: str, prompt: Sequence[int], *, tokens: int = 12) -> Any:
        """Return [tokens, log-probabilities] of a greedy completion."""
        status, answer = self.post("/v1/completions", _greedy(model, prompt, tokens) | {"logprobs": 1})
        assert status == 200, (status, answer)
        choice = answer["choices"][0]
        return [choice["token_ids"], choice["logprobs"]["token_logprobs"]]

    def begin(self, model: str, prompt: Sequence[int], *, tokens: int) -> Callable[[], list[int]]:
        """Start a greedy completion and return after its first event; the result waits for its end: all tokens."""
        events = self.stream("/v1/completions", _greedy(model, prompt, tokens))
        first = next(events)
        return lambda: [token for event in (first, *events) for token in event["choices"][0]["token_ids"]]


def _greedy(model: str, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """Run calls at the same time and return their results."""
    found: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        found[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def family_of(server: Server) -> dict[int, str]:
    """Return process id -> command line of all processes of a server."""
    found = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()[1:]]
    family = {server.process.pid}
    for _ in range(4):
        family |= {int(pid) for pid, parent, _ in rows if int(parent) in family}
    return {int(pid): args for pid, _, args in rows if int(pid) in family}


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")


@contextmanager
def serve(model: str, *arguments: str, log: Path, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run a server of a base, named `base`, during the block. Raises AssertionError with its log if it ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "base"),
        *("--host", "127.0.0.1", "--port", str(port), "--api-key", KEY),
        *("--dtype", "bfloat16", "--enforce-eager", "--seed", "0"),
        *("--max-model-len", "256", "--max-num-seqs", "32", "--kv-cache-memory-bytes", str(64 << 20)),
        *arguments,
    ]
    settings = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **(environment or {})}
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=settings, stdout=output, stderr=output, start_new_session=True)
    server = Server(port, process, log)
    try:
        _wait(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(server: Server) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        try:
            if server.get("/health")[0] == 200:
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server did not start:\n" + server.log.read_text(errors="replace")[-5000:])
