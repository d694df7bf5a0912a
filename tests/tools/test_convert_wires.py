"""`convert` reads and writes the wires of other systems. The fixtures follow their published descriptions."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import peraxis_format as pxd
from peraxis_tools.apply import apply
from peraxis_tools.chain import update
from peraxis_tools.cli import cli
from peraxis_tools.convert import WIRES, WireName, from_wire, to_wire
from peraxis_tools.errors import ToolError
from tests.factories import write_checkpoint
from tests.tools.wire_files import (
    Tensors,
    arrow,
    assert_holds,
    index_value,
    nemo,
    start,
    stepped,
    tensor,
    words,
    xor,
)

FIXTURES: dict[WireName, Callable[[Path, Tensors, Tensors], Path]] = {
    "index-value": index_value,
    "nemo-rl": nemo,
    "xor": xor,
}


# --- laws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
def test_a_wire_becomes_an_exact_update_with_its_result_bit_for_bit(wire: WireName, tmp_path: Path) -> None:
    old, new = start(), stepped(start(), 1)
    base = write_checkpoint(tmp_path / "base", old)
    source = FIXTURES[wire](tmp_path, old, new)
    result = from_wire(source, base, tmp_path / "step.pxd")
    assert result.changed == sum(int((words(a) != words(old[n][0])).sum()) for n, (a, _) in new.items())
    apply(base, tmp_path / "step.pxd", tmp_path / "out")
    assert_holds(tmp_path / "out", new)
    # It equals the update of the two checkpoints except for the names of its sides.
    update(base, write_checkpoint(tmp_path / "new", new), tmp_path / "own.pxd")
    with pxd.open(tmp_path / "step.pxd") as ours, pxd.open(tmp_path / "own.pxd") as own:
        assert (ours.manifest.base.digest, ours.manifest.result) == (own.manifest.base.digest, own.manifest.result)
        assert [m.sha256 for m in ours.manifest.modules] == [m.sha256 for m in own.manifest.modules]


def test_values_that_nemo_overwrites_are_new_values(tmp_path: Path) -> None:
    old, new = start(), stepped(start(), 1)
    base = write_checkpoint(tmp_path / "base", old)
    from_wire(nemo(tmp_path, old, new, operation="overwrite"), base, tmp_path / "step.pxd")
    apply(base, tmp_path / "step.pxd", tmp_path / "out")
    assert_holds(tmp_path / "out", new)


@pytest.mark.parametrize("wire", WIRES)
def test_there_and_back_again_is_the_same_update(wire: WireName, tmp_path: Path) -> None:
    """In the middle of a chain, each direction works on the base and the updates so far."""
    states = [start(), stepped(start(), 1)]
    states.append(stepped(states[1], 2))
    folders = [write_checkpoint(tmp_path / str(i), state) for i, state in enumerate(states)]
    files = [tmp_path / f"step-{i}.pxd" for i in range(3)]
    update(folders[0], folders[1], files[1])
    update(folders[0], folders[2], files[2], after=[files[1]])
    target = tmp_path / "sent"
    sent = to_wire(files[2], folders[0], target, wire=wire, after=[files[1]])
    assert sent.tensors == 4
    files_of_it = target.glob("[!.]*") if target.is_dir() else [target]
    assert sent.bytes == sum(path.stat().st_size for path in files_of_it)
    back = from_wire(target, folders[0], tmp_path / "back.pxd", wire=wire, after=[files[1]], name="2")
    with pxd.open(files[2]) as first, pxd.open(tmp_path / "back.pxd") as second:
        assert back.previous == first.manifest.previous
        assert first.manifest.result == second.manifest.result
        assert [m.sha256 for m in first.manifest.modules] == [m.sha256 for m in second.manifest.modules]


@pytest.mark.parametrize("wire", ["index-value", "nemo-rl"])
def test_a_wire_on_a_pipe_has_the_size_of_its_bytes(wire: WireName, tmp_path: Path) -> None:
    old, new = (
        write_checkpoint(tmp_path / name, state) for name, state in (("0", start()), ("1", stepped(start(), 1)))
    )
    update(old, new, tmp_path / "step.pxd")
    command = ["convert", str(tmp_path / "step.pxd"), "--to", wire, "--base", str(old), "-o", "/dev/stdout", "--json"]
    done = subprocess.run([sys.executable, "-m", "peraxis_tools", *command], capture_output=True, check=True)
    assert json.loads(done.stderr)["bytes"] == len(done.stdout) > 0


def test_what_is_written_is_what_the_projects_read(tmp_path: Path) -> None:
    """Readers that follow the descriptions of the projects read our wires."""
    old, new = start(), stepped(start(), 1)
    base, tuned = write_checkpoint(tmp_path / "base", old), write_checkpoint(tmp_path / "new", new)
    update(base, tuned, tmp_path / "step.pxd")
    for wire in WIRES:
        to_wire(tmp_path / "step.pxd", base, tmp_path / wire, wire=wire)
    got = {name: tensor(array, dtype).reshape(-1) for name, (array, dtype) in old.items()}
    patch = load_file(tmp_path / "index-value")
    for name, weights in got.items():
        assert patch[f"{name}.indices"].dtype is torch.int32
        weights[patch[f"{name}.indices"].long()] = patch[f"{name}.values"]
        assert weights.view(torch.uint8).numpy().tobytes() == new[name][0].tobytes()

    data = arrow.input_stream(arrow.BufferReader((tmp_path / "nemo-rl").read_bytes()), compression="zstd").read()
    locations, groups, items = torch.load(io.BytesIO(data), weights_only=True)
    for item in items:
        values = groups[item["value_group"]][item["value_start"] : item["value_end"]].numpy()
        if item["index_encoding"] == "range":
            index = np.arange(values.size) + item["range_start"]
        else:
            raw = locations[item["index_start"] : item["index_end"]].numpy()
            gaps = raw.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[raw.size // values.size])
            index = np.cumsum(gaps.astype(np.int64) + 1) - 1
        weights = words(old[item["name"]][0].copy())
        weights[index] ^= values.view(weights.dtype)
        assert weights.tobytes() == new[item["name"]][0].tobytes()

    for name, packed in load_file(tmp_path / "xor" / "model-00001-of-00001.safetensors").items():
        stream = arrow.input_stream(arrow.BufferReader(packed.numpy().tobytes()), compression="zstd")
        xored = np.frombuffer(stream.read(), np.uint8)
        assert (xored ^ np.frombuffer(old[name][0].tobytes(), np.uint8)).tobytes() == new[name][0].tobytes()


def test_a_step_that_changes_nothing_is_written_and_read(tmp_path: Path) -> None:
    base, same = write_checkpoint(tmp_path / "base", start()), write_checkpoint(tmp_path / "same", start())
    update(base, same, tmp_path / "step.pxd")
    for wire in ("nemo-rl", "xor"):
        assert to_wire(tmp_path / "step.pxd", base, tmp_path / wire, wire=wire).changed == 0  # type: ignore[arg-type]
    assert from_wire(tmp_path / "nemo-rl", base, tmp_path / "back.pxd").changed == 0


def test_a_wire_on_the_state_after_its_step_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = start(), stepped(start(), 1)
    wire = index_value(tmp_path, old, new)
    states = [write_checkpoint(tmp_path / name, state) for name, state in (("before", old), ("after", new))]
    assert from_wire(wire, states[0], tmp_path / "right.pxd").changed > 0
    assert not [message for message in caplog.messages if "changes no weight" in message]
    caplog.clear()
    assert from_wire(wire, states[1], tmp_path / "wrong.pxd").changed == 0
    assert ["changes no weight of" in message for message in caplog.messages] == [True]
    assert str(states[1]) in caplog.messages[0]


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
def test_the_command_recognises_a_wire_and_writes_one(wire: WireName, tmp_path: Path) -> None:
    old, new = start(), stepped(start(), 1)
    base = str(write_checkpoint(tmp_path / "base", old))
    source, step, sent = str(FIXTURES[wire](tmp_path, old, new)), str(tmp_path / "step.pxd"), str(tmp_path / "sent")
    done = CliRunner().invoke(cli, ["convert", source, "--base", base, "-o", step, "-q"])
    assert done.exit_code == 0, done.output
    assert "changed" in done.output
    done = CliRunner().invoke(cli, ["convert", step, "--to", wire, "--base", base, "-o", sent, "-q", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["wire"] == wire
    done = CliRunner().invoke(cli, ["convert", sent, "--base", base, "-o", str(tmp_path / "again.pxd"), "-q"])
    assert done.exit_code == 0, done.output  # `sent` has no suffix
    with pxd.open(step) as first, pxd.open(tmp_path / "again.pxd") as again:
        assert first.manifest.result == again.manifest.result
    done = CliRunner().invoke(cli, ["convert", step, "--to", wire, "-o", str(tmp_path / "x")])
    assert isinstance(done.exception, ToolError)
    assert "pass --base" in str(done.exception)
    done = CliRunner().invoke(cli, ["convert", base, "--base", base, "-o", str(tmp_path / "x")])
    assert isinstance(done.exception, ToolError)
    assert "nor an xor wire" in str(done.exception)
