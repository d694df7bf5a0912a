"""Memory that runs out is an error of the machine, in one line, and not an internal error."""

from __future__ import annotations

import sys

import pytest
import torch

from peraxis_tools import cli
from peraxis_tools.process.memory_errors import out_of_memory

OF_DEVICE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 1 GiB")


def allocation_error() -> BaseException:
    """What torch raises where the system refuses memory."""
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 55, dtype=torch.uint8)
    return found.value


def test_the_processor_and_the_device_each_have_a_remedy() -> None:
    assert "machine with more memory" in str(out_of_memory(MemoryError()))
    assert out_of_memory(allocation_error()) == out_of_memory(MemoryError())
    said = str(out_of_memory(OF_DEVICE))
    assert said.startswith("CUDA out of memory; use a device with more memory, --device cpu")
    assert "--compute-dtype" not in said
    assert "--compute-dtype bfloat16" in str(out_of_memory(OF_DEVICE, ["--compute-dtype"]))


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2"), ValueError("out of memory"), OSError(12, "memory")])
def test_other_errors_are_not_of_memory(error: Exception) -> None:
    assert out_of_memory(error) is None


@pytest.mark.parametrize("error", [OF_DEVICE, allocation_error()], ids=["device", "processor"])
def test_the_command_line_prints_one_line_without_internal_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        raise error

    monkeypatch.setattr(cli, "_run", run)
    monkeypatch.setattr(sys, "argv", ["peraxis-tools", "compress"])
    assert cli._exit_code() == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "out of memory" in printed
    assert "internal error" not in printed
    assert ("--compute-dtype bfloat16" in printed) == (error is OF_DEVICE)
