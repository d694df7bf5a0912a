"""Laws of the plug-in over HTTP: swaps during running requests, variants by the `model` field."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import peraxis_format as pf
from tests.engines.jobs import PROMPTS, WORKER, run_jobs
from tests.engines.server import Server, serve, together

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def references(
    untied: dict[str, str], chain: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The outputs of stock engines on the base and on the applied folders."""
    names = ["base", "v1", "v2", "step1", "step2"]
    folder = tmp_path_factory.mktemp("references")
    found = run_jobs([{"job": "plain", "model": (untied | chain)[name]} for name in names], folder)
    return dict(zip(names, found, strict=True))


@pytest.fixture(scope="module")
def swapping(untied: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the swap routes, behind its key and without vLLM's development mode."""
    with serve(
        untied["base"],
        *("--load-format", "peraxis", "--weight-transfer-config", '{"backend": "peraxis"}'),
        log=tmp_path_factory.mktemp("swapping") / "log",
        environment={"VLLM_PLUGINS": "peraxis"},
    ) as server:
        for name in ("v1", "v2"):
            assert server.post("/v1/peraxis/variants", {"name": name, "delta": untied[f"{name}.pxd"]})[0] == 200
        yield server


@pytest.fixture(scope="module")
def mixing(untied: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of variants in exact mode."""
    with serve(
        untied["base"],
        *("--worker-cls", WORKER, "--enable-lora", "--max-loras", "3"),
        *("--additional-config", '{"peraxis": {"exact": true}}'),
        *("--lora-modules", f"v1={untied['v1.pxd']}", f"v2={untied['v2.pxd']}"),
        log=tmp_path_factory.mktemp("mixing") / "log",
        environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    ) as server:
        yield server


def tokens(references: dict[str, Any], name: str, prompt: int) -> list[int]:
    found: list[int] = references[name][prompt][0]
    return found


def test_after_a_swap_the_server_is_the_variant_and_reports_its_content_id(
    swapping: Server, references: dict[str, Any]
) -> None:
    for name in ("v1", "v2", None, "v1"):
        status, answer = swapping.post("/v1/peraxis/use", {"variant": name})
        assert status == 200, answer
        staged = {v["name"]: v["content_id"] for v in swapping.get("/v1/peraxis")[1]["variants"]}
        assert swapping.get("/v1/peraxis")[1]["weight_version"] == staged.get(name, "base") == answer["weight_version"]
        # The blocks of this long prompt would be in the prefix cache if the cache were not reset.
        assert swapping.complete("base", PROMPTS[2])[0] == tokens(references, name or "base", 2)


def test_requests_that_run_end_with_the_old_weights_and_queued_ones_get_the_new(
    swapping: Server, references: dict[str, Any]
) -> None:
    assert swapping.post("/v1/peraxis/use", {"variant": None})[0] == 200
    alone = swapping.complete("base", PROMPTS[0], tokens=150)[0]
    running = [swapping.begin("base", PROMPTS[0], tokens=150) for _ in range(4)]
    assert swapping.post("/v1/peraxis/use", {"variant": "v1", "requests": "wait"})[0] == 200
    assert [ended() for ended in running] == [alone] * 4
    assert alone[:12] == tokens(references, "base", 0)
    assert swapping.complete("base", PROMPTS[0])[0] == tokens(references, "v1", 0)


def test_a_swap_that_would_wait_too_long_is_given_up_and_nothing_changes(
    swapping: Server, references: dict[str, Any]
) -> None:
    assert swapping.post("/v1/peraxis/use", {"variant": "v1"})[0] == 200
    alone = swapping.complete("base", PROMPTS[0], tokens=200)[0]
    running = swapping.begin("base", PROMPTS[0], tokens=200)
    status, answer = swapping.post("/v1/peraxis/use", {"variant": "v2", "timeout": 0.01})
    assert status == 503, answer
    assert "abort" in answer["error"]
    assert running() == alone
    assert swapping.get("/v1/peraxis")[1]["variant"] == "v1"
    assert swapping.complete("base", PROMPTS[0])[0] == tokens(references, "v1", 0)


def test_abort_ends_what_runs_at_once_and_swaps(swapping: Server, references: dict[str, Any]) -> None:
    assert swapping.post("/v1/peraxis/use", {"variant": None})[0] == 200
    body = {"model": "base", "prompt": PROMPTS[0], "max_tokens": 240, "temperature": 0, "ignore_eos": True}
    for variant in ("v2", "v1") * 10:  # on a busy machine a request may end by itself before it is aborted
        events = swapping.stream("/v1/completions", body)
        next(events)  # it runs
        assert swapping.post("/v1/peraxis/use", {"variant": variant, "requests": "abort"})[0] == 200
        *_, last = events
        if last["choices"][0]["finish_reason"] == "abort":
            break
    assert last["choices"][0]["finish_reason"] == "abort"
    assert swapping.complete("base", PROMPTS[0])[0] == tokens(references, variant, 0)


def test_a_stream_of_requests_under_swaps_never_mixes_two_variants(
    swapping: Server, references: dict[str, Any]
) -> None:
    stop = threading.Event()

    def requests() -> list[list[int]]:
        found = []
        while not stop.is_set():
            found.append(swapping.complete("base", PROMPTS[1])[0])
        return found

    def swaps() -> list[int]:
        try:
            return [swapping.post("/v1/peraxis/use", {"variant": ("v1", "v2", None)[i % 3]})[0] for i in range(30)]
        finally:
            stop.set()

    *streams, statuses = together([requests, requests, swaps])
    assert statuses == [200] * 30
    possible = [tokens(references, name, 1) for name in ("base", "v1", "v2")]
    seen = [output for stream in streams for output in stream]
    assert all(output in possible for output in seen)
    assert len({tuple(output) for output in seen}) > 1


def test_bad_requests_get_a_clear_answer_and_the_server_goes_on(
    swapping: Server, untied: dict[str, str], references: dict[str, Any]
) -> None:
    assert swapping.post("/v1/peraxis/use", {"variant": "v2"})[0] == 200
    wrong = [
        ("/v1/peraxis/use", {"variant": "nobody"}, 404, "nobody"),
        ("/v1/peraxis/use", {"variant": "v1", "requests": "keep"}, 400, "wait"),
        ("/v1/peraxis/use", {"variant": 7}, 400, "variant"),
        ("/v1/peraxis/use", ["v1"], 400, "object"),
        ("/v1/peraxis/variants", {"name": "v1", "delta": untied["v1.pxd"]}, 409, "v1"),
        ("/v1/peraxis/variants", {"name": "x", "delta": "/no/such.pxd"}, 400, "/no/such.pxd"),
        ("/v1/peraxis/variants", {"name": "x", "delta": untied["base"] + "/config.json"}, 400, "E109"),
        ("/v1/peraxis/variants", {"name": "x"}, 400, "delta"),
        ("/v1/peraxis/update", {"update": untied["v1.pxd"]}, 409, "staged"),
    ]
    for path, body, status, word in wrong:
        found, answer = swapping.post(path, body)
        assert (found, word in answer["error"]) == (status, True), (path, body, found, answer)
        assert "\n" not in answer["error"]
    assert swapping.request("DELETE", "/v1/peraxis/variants/v2")[0] == 409
    assert swapping.get("/health")[0] == 200
    assert swapping.complete("base", PROMPTS[0])[0] == tokens(references, "v2", 0)


def test_without_the_key_nothing_is_swapped_or_opened(swapping: Server) -> None:
    keyless = Server(int(swapping.url.rpartition(":")[2]), swapping.process, swapping.log)
    keyless.headers = {"Content-Type": "application/json"}
    before = swapping.get("/v1/peraxis")
    assert keyless.get("/v1/peraxis")[0] == 401
    assert keyless.post("/v1/peraxis/use", {"variant": None})[0] == 401
    assert keyless.post("/v1/peraxis/variants", {"name": "x", "delta": "/no/such.pxd"})[0] == 401
    assert swapping.get("/v1/peraxis") == before


def until(condition: Callable[[], bool], *, seconds: float = 300.0) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return met


def test_a_server_follows_a_chain_as_it_grows(
    swapping: Server, chain: dict[str, str], references: dict[str, Any], tmp_path: Path
) -> None:
    def arrive(name: str) -> Path:
        return Path(shutil.copy(Path(chain["chain"]) / name, tmp_path / name))

    anchor, first = arrive("anchor-00000000.pxd"), arrive("step-00000001.pxd")
    swapping.post("/v1/peraxis/use", {"variant": None})
    status, answer = swapping.post("/v1/peraxis/follow", {"folder": str(tmp_path)})
    assert (status, "staged" in str(answer)) == (200, True), answer  # reported and tried again
    for name in ("v1", "v2"):
        assert swapping.request("DELETE", f"/v1/peraxis/variants/{name}")[0] == 200
    assert until(lambda: swapping.get("/v1/peraxis")[1]["follow"]["step"] == 1)
    assert swapping.complete("base", PROMPTS[2])[0] == tokens(references, "step1", 2)
    (tmp_path / "step-00000002.pxd").write_bytes(first.read_bytes()[:5000])  # the update is on its way
    assert until(lambda: "step-00000002.pxd" in swapping.get("/v1/peraxis")[1]["follow"]["waiting"])
    second = arrive("step-00000002.pxd")
    assert until(lambda: swapping.get("/v1/peraxis")[1]["follow"]["step"] == 2)
    with pf.open(second) as file:
        assert swapping.get("/v1/peraxis")[1]["weight_version"] == file.content_id
    assert swapping.complete("base", PROMPTS[2])[0] == tokens(references, "step2", 2)
    assert swapping.post("/v1/peraxis/update", {"update": str(anchor)})[0] == 409
    assert swapping.request("DELETE", "/v1/peraxis/follow")[0] == 200
    for path, body, status in (
        ("/v1/peraxis/update", {"update": str(first)}, 400),
        ("/v1/peraxis/update", {"update": "/no/such.pxd"}, 400),
        ("/v1/peraxis/follow", {"folder": "/no/such"}, 400),
        ("/v1/peraxis/follow", {"folder": str(tmp_path), "every": 0}, 400),
        ("/v1/peraxis/update", {"update": str(anchor)}, 200),
    ):
        assert swapping.post(path, body)[0] == status, (path, body)
    assert swapping.complete("base", PROMPTS[2])[0] == tokens(references, "base", 2)


def test_the_model_field_chooses_the_variant_in_one_batch(mixing: Server, references: dict[str, Any]) -> None:
    assert [model["id"] for model in mixing.get("/v1/models")[1]["data"]] == ["base", "v1", "v2"]
    asked = [(name, i) for i in range(len(PROMPTS)) for name in ("base", "v1", "v2")]

    def call(name: str, i: int) -> Callable[[], Any]:
        return lambda: mixing.complete(name, PROMPTS[i])[0]

    found = together([call(name, i) for name, i in asked])
    assert found == [tokens(references, name, i) for name, i in asked]


def test_variants_are_loaded_and_unloaded_while_the_server_runs(mixing: Server, untied: dict[str, str]) -> None:
    body = {"lora_name": "v3", "lora_path": untied["v3.pxd"]}
    assert mixing.post("/v1/load_lora_adapter", body)[0] == 200
    assert len(mixing.complete("v3", PROMPTS[0])[0]) == 12
    assert mixing.post("/v1/unload_lora_adapter", {"lora_name": "v3"})[0] == 200
    assert mixing.post("/v1/completions", {"model": "v3", "prompt": "w1"})[0] == 404
    missing = mixing.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/no/such.pxd"})
    assert missing[0] == 404
    assert "No adapter found" in str(missing[1])


def test_chat_and_streaming_work_as_with_any_model(mixing: Server) -> None:
    body = {"model": "v1", "messages": [{"role": "user", "content": "w5 w6"}], "max_tokens": 5, "temperature": 0}
    status, answer = mixing.post("/v1/chat/completions", body)
    assert (status, answer["model"]) == (200, "v1")
    status, events = mixing.post("/v1/chat/completions", {**body, "stream": True})
    assert status == 200
    assert events.rstrip().endswith("data: [DONE]")
