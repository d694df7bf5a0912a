"""The choice of a backend: the table, the argument, the environment, and the errors if one cannot run."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

import peraxis_format as pxd
from peraxis_format.ops import backend as backends
from peraxis_format.ops.backend import available, choose


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERAXIS_BACKEND", raising=False)


def test_a_small_tensor_runs_on_the_reference_and_a_large_one_on_numba() -> None:
    pytest.importorskip("numba")
    assert choose("rebuild", 100) == "numpy"
    assert choose("rebuild", 1 << 20) == "numba"
    assert choose("rebuild_tensor", 100) == choose("sign_search", 0, "mps") == "torch"


def test_without_numba_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_installed", lambda package: package != "numba")
    assert choose("rebuild", 1 << 30) == choose("delta_sums", 1 << 30) == "numpy"
    with pytest.raises(pxd.BackendError, match=r'backend="numba" needs numba, which is not installed: pip install'):
        choose("rebuild", 1, backend="numba")


def test_the_environment_forces_a_backend_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERAXIS_BACKEND", "torch")
    assert choose("rebuild_tensor", 1 << 30) == "torch"
    assert choose("rebuild", 1 << 30) == "numpy"  # has no torch backend, so the reference runs
    monkeypatch.setenv("PERAXIS_BACKEND", "numpy")
    assert choose("merge_rows", 1 << 30) == "numpy"
    assert choose("sign_search", 1 << 30) == "torch"


def test_an_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERAXIS_BACKEND", "numba")
    assert choose("rebuild", 1, backend="numpy") == "numpy"


@pytest.mark.parametrize("operation", ["rebuild", "sign_search"])
def test_an_unknown_backend_is_an_error_wherever_it_is_named(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    match = "'cupy' is unknown; use one of numpy, numba, torch, triton"
    with pytest.raises(pxd.BackendError, match=match):
        choose(operation, 1, backend="cupy")  # type: ignore[arg-type]
    with pytest.raises(pxd.BackendError, match=match):
        available("cupy")
    monkeypatch.setenv("PERAXIS_BACKEND", "cupy")
    with pytest.raises(pxd.BackendError, match=match):
        choose(operation, 1)  # type: ignore[arg-type]


def test_a_backend_that_an_operation_does_not_have_is_an_error() -> None:
    with pytest.raises(pxd.BackendError, match=r'backend="torch": rebuild on device cpu has numba, numpy'):
        choose("rebuild", 1, backend="torch")


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not available("triton")
    assert available("triton", "cuda")
    with pytest.raises(pxd.BackendError, match=r'"triton" needs weights on a CUDA device; use "torch"'):
        choose("signed_matmul", 1, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("signed_matmul", 1, backend="triton") == "triton"
    assert choose("signed_matmul", 1 << 30) != "triton"  # the interpreter runs only on request


def test_each_choice_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="peraxis"):
        choose("rebuild", 7)
    assert [record.getMessage() for record in caplog.records] == ["rebuild: numpy (size 7, device cpu)"]


@pytest.mark.parametrize(
    ("level", "said"),
    [("debug", "peraxis: rebuild: numpy (size 4, device cpu)"), ("", ""), ("loud", "PERAXIS_LOG=loud is not a level")],
)
def test_the_environment_turns_the_log_on(level: str, said: str) -> None:
    code = "from peraxis_format.ops.backend import choose; choose('rebuild', 4)"
    environment = {"PERAXIS_LOG": level, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert said in done.stderr
    assert bool(done.stderr) == bool(said)


def test_a_forced_backend_that_cannot_run_is_one_line_of_the_command_line(tmp_path: object) -> None:
    command = [sys.executable, "-m", "peraxis_tools", "apply", "nowhere", "nothing.pxd", "-o", "out"]
    environment = {"PERAXIS_BACKEND": "cupy", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
