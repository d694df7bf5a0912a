"""The arithmetic of the benchmarks is right, and each benchmark runs on the CPU with small shapes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("harness", FOLDER / "harness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "harness", module)
    spec.loader.exec_module(module)
    return module


def test_percentiles_are_measured_values_and_ratios_compare_rates_or_speeds(harness: Any) -> None:
    timing = harness.Timing((4.0, 1.0, 3.0, 2.0, 10.0))
    assert (timing.median, timing.percentile(5), timing.percentile(95)) == (3.0, 1.0, 10.0)
    bench = harness.Benchmark("b")
    copy = bench.add("copy", harness.Timing((2.0,)), moved=8)
    assert bench.add("half the bytes in half the time", harness.Timing((1.0,)), moved=4, against=copy).ratio == 1.0
    assert bench.add("four times as slow", harness.Timing((8.0,)), against=copy).ratio == 0.25
    lines = bench.table().splitlines()
    assert len(lines) == 5
    assert json.loads(bench.to_json())["results"][1]["against"] == "copy"


def test_a_bound_is_met_or_missed_and_said(harness: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench = harness.Benchmark("b")
    bench.check("as fast", 4.0, at_least=4.0)
    bench.check("as long", 1.0, at_most=1.35, note="limited by link")
    assert bench.finish()
    bench.check("too slow", 3.99, at_least=4.0)
    assert not bench.finish()
    assert capsys.readouterr().out.endswith("missed  too slow: 3.99, at least 4\n")
    assert [check["ok"] for check in json.loads(bench.to_json())["checks"]] == [True, True, False]


def test_ratios_of_turns_are_compared_turn_by_turn(harness: Any) -> None:
    quiet, busy = harness.Timing((1.0, 4.0, 1.0)), harness.Timing((2.0, 8.0, 2.0))
    assert quiet.speed_over(busy) == 2.0


def test_actions_are_measured_in_turns(harness: Any) -> None:
    order: list[str] = []
    timings = harness.timed_together([lambda: order.append("a"), lambda: order.append("b")], repeat=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert [len(timing.seconds) for timing in timings] == [2, 2]


def test_an_update_that_changes_nothing_is_left_out_and_named(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    target = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / "updates.py"), "--weights", "1000", "--repeat", "1", "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "step 3e-09: changes nothing; left out"
    assert all(result["changed"] > 0 for result in json.loads(target.read_text())["results"] if "changed" in result)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("apply_cpu.py", ["--rows", "128", "--columns", "256"]),
        ("load.py", ["--preset", "tiny", "--device", "cpu"]),
        ("undo.py", ["--preset", "tiny", "--device", "cpu"]),
        ("serve.py", ["--preset", "tiny", "--variants", "1", "2", "--prompt", "8", "--device", "cpu"]),
        ("updates.py", ["--weights", "65536"]),
    ],
)
def test_every_benchmark_runs_small_and_writes_json(script: str, options: list[str], tmp_path: Path) -> None:
    pytest.importorskip("numba")
    target = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / script), *options, "--repeat", "2", "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(target.read_text())
    assert document["benchmark"] == script.removesuffix(".py")
    assert all(result["median"] > 0 for result in document["results"])
    assert all(result["name"] in done.stdout for result in document["results"])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="small shapes miss the bounds of a device")
def test_the_checks_of_a_gpu_run_small_anywhere_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    target = tmp_path / "gpu.json"
    command = [sys.executable, str(FOLDER / "gpu.py"), "--small", "--limit", "3600", "--json", str(target), "--steps"]
    for steps in (["updates"], ["updates", "load", "sanitizer"]):
        done = subprocess.run([*command, *steps], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        document = json.loads(target.read_text())
        assert set(document["steps"]) == set(steps)
        assert document["failed"] == []
    assert "updates" not in done.stdout  # the finished step did not run again
    assert "tests" in document["missing"]
