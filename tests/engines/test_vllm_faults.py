"""On the real server, over HTTP, a fault fails only the requests that it concerns."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peraxis_format.engines.vllm.permitted import ROOT_VARIABLE
from tests.engines.jobs import PROMPTS, WORKER, run_jobs
from tests.engines.pair import make_delta
from tests.engines.server import Server, family_of, serve, together

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

EXACT = '{"peraxis": {"exact": true}}'


@pytest.fixture(scope="module")
def references(untied: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Tokens of stock engines for one prompt, by name."""
    names = ["base", "v1", "v2"]
    found = run_jobs([{"job": "plain", "model": untied[name]} for name in names], tmp_path_factory.mktemp("references"))
    return {name: outputs[0][0] for name, outputs in zip(names, found, strict=True)}


@pytest.fixture(scope="module")
def deltas(untied: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """v1 and v2, which tests may overwrite, a delta with a changed byte, and a delta of another base."""
    folder = tmp_path_factory.mktemp("deltas")
    paths = {name: Path(shutil.copy(untied[f"{name}.pxd"], folder / f"{name}.pxd")) for name in ("v1", "v2")}
    paths["damaged"] = folder / "damaged.pxd"
    paths["damaged"].write_bytes(flipped(paths["v2"].read_bytes()))
    paths["alien"] = make_delta(folder / "alien.pxd", Path(untied["v1"]), seed=9)
    paths["outside"] = folder / "outside.pxd"
    paths["outside"].symlink_to(untied["v3.pxd"])
    return paths


@pytest.fixture(scope="module")
def crowded(
    untied: dict[str, str], deltas: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of two variants with room for one of them; adapters have to be in their folder."""
    with serve(
        untied["base"],
        *("--worker-cls", WORKER, "--enable-lora", "--max-loras", "1", "--max-cpu-loras", "1"),
        *("--additional-config", EXACT),
        *("--lora-modules", f"v1={deltas['v1']}", f"v2={deltas['v2']}"),
        log=tmp_path_factory.mktemp("crowded") / "log",
        environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", ROOT_VARIABLE: str(deltas["v1"].parent)},
    ) as server:
        yield server


def flipped(data: bytes) -> bytes:
    """Return the bytes with one changed bit in the middle, which is payload."""
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    return bytes(changed)


def ask(server: Server, model: str) -> tuple[int, Any]:
    body = {"model": model, "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    status, answer = server.post("/v1/completions", body | {"return_token_ids": True})
    return status, answer["choices"][0]["token_ids"] if status == 200 else answer


def test_an_evicted_variant_whose_file_was_overwritten_fails_its_own_requests_alone(
    crowded: Server, deltas: dict[str, Path], references: dict[str, list[int]]
) -> None:
    good = deltas["v1"].read_bytes()
    assert ask(crowded, "v1") == (200, references["v1"])
    assert ask(crowded, "v2") == (200, references["v2"])  # v1 is evicted
    deltas["v1"].write_bytes(flipped(good))
    for _ in range(2):
        found = together([lambda name=name: ask(crowded, name) for name in ("base", "v1", "v2", "v1", "base")])
        statuses = [status for status, _ in found]
        assert statuses == [200, 500, 200, 500, 200]
        assert [answer for _, answer in found if isinstance(answer, list)] == [
            references[name] for name in ("base", "v2", "base")
        ]
        assert "error" in found[1][1]
    log = crowded.log.read_text(errors="replace")
    assert f"variant v1: {deltas['v1']} cannot be read again, so its requests fail" in log
    assert "E301" in log
    assert crowded.get("/health")[0] == 200
    # After a repair in place it is served again. The prefix cache holds nothing of the failed step.
    deltas["v1"].write_bytes(good)
    assert ask(crowded, "v1") == (200, references["v1"])


def test_a_truncated_file_is_no_more_than_an_error_either_and_a_good_one_takes_its_place(
    crowded: Server, deltas: dict[str, Path], references: dict[str, list[int]]
) -> None:
    good = deltas["v1"].read_bytes()
    assert ask(crowded, "v2")[0] == 200
    os.truncate(deltas["v1"], len(good) // 2)
    assert ask(crowded, "v1")[0] == 500
    assert ask(crowded, "v2") == (200, references["v2"])
    deltas["v1"].write_bytes(good)
    body = {"lora_name": "v1", "lora_path": str(deltas["v1"]), "load_inplace": True}
    assert crowded.post("/v1/load_lora_adapter", body)[0] == 200
    assert ask(crowded, "v1") == (200, references["v1"])


def test_a_stream_of_a_variant_that_cannot_be_read_ends_with_an_error_event(
    crowded: Server, deltas: dict[str, Path]
) -> None:
    good = deltas["v1"].read_bytes()
    assert ask(crowded, "v2")[0] == 200
    deltas["v1"].write_bytes(flipped(good))
    body = {"model": "v1", "prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0}
    assert any("error" in event for event in crowded.stream("/v1/completions", body))
    deltas["v1"].write_bytes(good)


def test_another_file_under_the_name_and_path_of_a_first_one_is_refused_because_prefixes_are_cached(
    crowded: Server, deltas: dict[str, Path], references: dict[str, list[int]]
) -> None:
    path = deltas["v1"].with_name("new.pxd")
    body = {"lora_name": "new", "lora_path": str(path)}

    def load() -> tuple[int, Any]:
        return crowded.post("/v1/load_lora_adapter", body)

    shutil.copy(deltas["v1"], path)
    assert load()[0] == 200
    assert crowded.post("/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 200
    shutil.copy(deltas["v2"], path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
    status, answer = load()
    assert (status, "give the new file another path" in str(answer)) == (500, True), answer
    path = path.rename(path.with_name("newer.pxd"))
    body["lora_path"] = str(path)
    assert load()[0] == 200
    assert ask(crowded, "new") == (200, references["v2"])
    assert crowded.post("/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 200


@pytest.mark.parametrize(("name", "word"), [("damaged", "E301"), ("alien", "E404"), ("outside", ROOT_VARIABLE)])
def test_a_bad_adapter_is_refused_with_its_reason_and_the_others_are_served(
    crowded: Server, deltas: dict[str, Path], references: dict[str, list[int]], name: str, word: str
) -> None:
    status, answer = crowded.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(deltas[name])})
    assert status in (400, 500)
    assert word in str(answer)
    assert ask(crowded, name)[0] == 404
    assert ask(crowded, "v1") == (200, references["v1"])


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "\0", "x" * 201])
def test_a_name_that_would_break_a_log_is_refused(crowded: Server, deltas: dict[str, Path], name: str) -> None:
    for body in ({"lora_name": name, "lora_path": str(deltas["v2"])}, {"lora_name": "n", "lora_path": 40 * name}):
        status, answer = crowded.post("/v1/load_lora_adapter", body)
        assert status in (400, 404, 500), answer
        assert len(str(answer)) < 1000
    assert crowded.get("/health")[0] == 200
    assert len(crowded.get("/v1/models")[1]["data"]) == 3


def test_a_rank_that_is_killed_ends_requests_with_an_error_and_the_server_with_a_status(
    untied: dict[str, str], deltas: dict[str, Path], tmp_path: Path
) -> None:
    with serve(
        untied["base"],
        *("--load-format", "peraxis", "--weight-transfer-config", '{"backend": "peraxis"}'),
        *("--tensor-parallel-size", "2"),
        log=tmp_path / "log",
        environment={"VLLM_PLUGINS": "peraxis"},
    ) as server:
        for name, word in (("damaged", "E301"), ("alien", "E404")):
            status, answer = server.post("/v1/peraxis/variants", {"name": name, "delta": str(deltas[name])})
            assert (status, word in answer["error"]) == (400, True), answer
        assert server.post("/v1/peraxis/variants", {"name": "v1", "delta": str(deltas["v1"])})[0] == 200
        before = ask(server, "base")
        assert server.post("/v1/peraxis/use", {"variant": "v1"})[0] == 200
        after = ask(server, "base")
        assert before[0] == after[0] == 200
        assert before != after
        killed, *_ = [number for number, command in family_of(server).items() if "Worker" in command]
        body = {"model": "base", "prompt": PROMPTS[0], "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        streams = [server.stream("/v1/completions", body) for _ in range(8)]
        for events in streams:
            next(events)
        os.kill(killed, signal.SIGKILL)
        # On a busy machine the first requests may have ended before.
        assert any("error" in event for event in itertools.chain(*streams))
        try:
            status, answer = server.post("/v1/peraxis/use", {"variant": None})
            assert (status, "start the server again" in answer["error"]) == (503, True)
        except OSError:
            pass  # it has ended already
        end = time.monotonic() + 600
        while server.process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        assert server.process.poll() is not None
