"""A bounded run of the fuzzers (`make fuzz` is the long run), and a check that they find wrong readers."""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import peraxis_format as pxd
from tests.conformance.fuzz_reader import Failure, Fuzzer, main, seed_files
from tests.conformance.mutations import LEVELS, mutate


def test_only_pxd_errors_come_out_of_mutated_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--runs", "6000", "--crashes", str(tmp_path)]) == 0
    found = re.search(
        r"([\d,]+) inputs .* ([\d,]+) passed the header's checks, ([\d,]+) every check", capsys.readouterr().out
    )
    assert found is not None
    inputs, headers, files = (int(number.replace(",", "")) for number in found.groups())
    # A fuzzer whose inputs all fail the first checks would show little.
    assert inputs == 6000
    assert headers > 100
    assert 50 < files < headers


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_a_bounded_run_guided_by_coverage_finds_nothing(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.conformance.fuzz_reader",
        "--engine",
        "atheris",
        "--runs",
        "3000",
        "--crashes",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3,000 inputs" in done.stdout
    assert list(tmp_path.iterdir()) == []


def read(data: bytes) -> Any:
    return pxd.read_header(lambda offset, size: data[offset : offset + size], len(data))


def lenient(data: bytes) -> Any:
    """A reader that accepts a file without its last byte, as many do."""
    try:
        return read(data)
    except pxd.ContainerError as error:
        if error.code != "E124":
            raise
        return read(data + b"\0")


def crashing(data: bytes) -> Any:
    """A reader that trusts an index."""
    header, manifest = read(data)
    return header, [manifest.modules[1] for _ in range(1)] and manifest


def test_the_fuzzer_finds_a_reader_that_accepts_too_much(tmp_path: Path) -> None:
    assert found(tmp_path, lenient) is Failure


def test_the_fuzzer_finds_a_reader_that_crashes(tmp_path: Path) -> None:
    assert found(tmp_path, crashing) is IndexError


def found(folder: Path, reader: Any) -> type[BaseException] | None:
    """Return the failure that the fuzzer finds within 5,000 inputs."""
    fuzzer, seeds, source = Fuzzer(folder, reader), seed_files(), random.Random(5)
    for _ in range(5000):
        try:
            fuzzer.check(mutate(lambda n: int(source.random() * n), seeds))
        except Exception as error:
            return type(error)
    return None


@pytest.mark.parametrize("level", sorted({level.__name__ for level in LEVELS}))
def test_every_level_of_mutation_gives_files_that_differ(level: str) -> None:
    """A level that changes nothing would waste its share of the inputs."""
    source, seeds = random.Random(1), seed_files()
    function = next(function for function in LEVELS if function.__name__ == level)
    made = [(seed, function(lambda n: int(source.random() * n), seed)) for seed in seeds[:60]]
    assert sum(seed != data for seed, data in made) > 40
