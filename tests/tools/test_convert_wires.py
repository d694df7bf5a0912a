"""`convert` and the wires of other systems: fixtures written here from their descriptions, and the way back."""

from __future__ import annotations

import io
import json
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
from peraxis_tools.convert import WIRES, WireName, convert, from_wire, to_wire
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
    # It is the update that the two checkpoints give, but for the names of its sides.
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
    """In the middle of a chain: each way is made on the base and the updates so far."""
    states = [start(), stepped(start(), 1)]
    states.append(stepped(states[1], 2))
    folders = [write_checkpoint(tmp_path / str(i), state) for i, state in enumerate(states)]
    files = [tmp_path / f"step-{i}.pxd" for i in range(3)]
    update(folders[0], folders[1], files[1])
    update(folders[0], folders[2], files[2], after=[files[1]])
    target = tmp_path / "sent"
    sent = to_wire(files[2], folders[0], target, wire=wire, after=[files[1]])
    assert sent.tensors == 4
    assert sent.bytes > 0
    back = from_wire(target, folders[0], tmp_path / "back.pxd", wire=wire, after=[files[1]], name="2")
    with pxd.open(files[2]) as first, pxd.open(tmp_path / "back.pxd") as second:
        assert back.previous == first.manifest.previous
        assert first.manifest.result == second.manifest.result
        assert [m.sha256 for m in first.manifest.modules] == [m.sha256 for m in second.manifest.modules]


def test_what_is_written_is_what_the_projects_read(tmp_path: Path) -> None:
    """Their readers, as they are described, on our wires."""
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


# --- what is refused ---------------------------------------------------------------------------------------------


def saved_patch(folder: Path, **tensors: torch.Tensor) -> Path:
    save_file({f"{UP}.{key}": value for key, value in tensors.items()}, folder / "patch.safetensors")
    return folder / "patch.safetensors"


VALUES = torch.zeros(3, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("tensors", "words_of_error"),
    [
        ({"indices": torch.tensor([0, 6144, 2], dtype=torch.int32), "values": VALUES}, r"index 6144 at 1 is outside"),
        ({"indices": torch.tensor([0, 1, -2], dtype=torch.int32), "values": VALUES}, r"index -2 at 2 is outside"),
        ({"indices": torch.tensor([5, 1, 5], dtype=torch.int32), "values": VALUES}, r"index 5 at 2 is named twice"),
        ({"indices": torch.tensor([5, 1], dtype=torch.int32), "values": VALUES}, r"I32 \[2\] for 3 values"),
        ({"indices": torch.tensor([5.0, 1.0, 2.0]), "values": VALUES}, r"F32 \[3\] for 3 values"),
        ({"indices": torch.tensor([5, 1, 2], dtype=torch.int32), "values": VALUES.float()}, r"values are F32, .* BF16"),
        ({"indices": torch.tensor([5, 1, 2], dtype=torch.int32)}, rf"has no tensor {UP}\.values"),
    ],
)
def test_a_malformed_index_value_wire_is_refused_by_tensor_and_place(
    tensors: dict[str, torch.Tensor], words_of_error: str, tmp_path: Path
) -> None:
    base = write_checkpoint(tmp_path / "base", start())
    source = saved_patch(tmp_path, **tensors)
    with pytest.raises(ToolError, match=words_of_error) as caught:
        from_wire(source, base, tmp_path / "out.pxd")
    assert UP in str(caught.value)
    assert not (tmp_path / "out.pxd").exists()


def test_unsorted_indices_are_read(tmp_path: Path) -> None:
    old = start()
    base = write_checkpoint(tmp_path / "base", old)
    index = torch.tensor([5, 1, 3], dtype=torch.int32)
    from_wire(saved_patch(tmp_path, indices=index, values=VALUES), base, tmp_path / "out.pxd")
    new = {**old, UP: (old[UP][0].copy(), old[UP][1])}
    new[UP][0].reshape(-1)[[5, 1, 3]] = 0
    apply(base, tmp_path / "out.pxd", tmp_path / "out")
    assert_holds(tmp_path / "out", new)


def edited_payload(path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    data = arrow.input_stream(arrow.BufferReader(path.read_bytes()), compression="zstd").read()
    locations, groups, items = torch.load(io.BytesIO(data), weights_only=True)
    edit(next(item for item in items if item["name"] == UP))
    buffer = io.BytesIO()
    torch.save((locations, groups, items), buffer)
    path.write_bytes(arrow.Codec("zstd").compress(buffer.getvalue(), asbytes=True))
    return path


@pytest.mark.parametrize(
    ("edit", "words_of_error"),
    [
        ({"value_group": 7}, "value_group is 7"),
        ({"value_end": 1 << 40}, "are not within group 0"),
        ({"value_start": -1}, "value_start is -1"),
        ({"index_end": 1 << 30}, r"locations \d+ to 1073741824 are no gaps"),
        ({"index_encoding": "varint"}, "index_encoding is 'varint'"),
        ({"operation": "add"}, "operation is 'add'"),
        ({"dtype": "float16"}, "is float16"),
        ({"shape": (96, 63)}, r"is bfloat16 \[96, 63\]"),
        ({"index_encoding": "range", "range_start": 6143}, "index 6144 at 1 is outside"),
        ({"shape": 7}, "its shape is int, not a tuple"),
        ({"shape": torch.zeros(2)}, "its shape is Tensor, not a tuple"),
        ({"operation": torch.zeros(2)}, "its operation is Tensor, not a word"),
        ({"value_start": 1.5}, "its value_start is float, not a number"),
    ],
)
def test_a_malformed_nemo_payload_is_refused_by_tensor_and_place(
    edit: dict[str, Any], words_of_error: str, tmp_path: Path
) -> None:
    old = start()
    base = write_checkpoint(tmp_path / "base", old)
    source = edited_payload(nemo(tmp_path, old, stepped(old, 1)), lambda item: item.update(edit))
    with pytest.raises(ToolError, match=words_of_error) as caught:
        from_wire(source, base, tmp_path / "out.pxd")
    assert UP in str(caught.value)


def test_a_payload_that_would_run_code_or_is_damaged_is_not_opened(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", start())
    torch.save((torch.zeros(1, dtype=torch.uint8), (), [Path("x")]), tmp_path / "evil.bin")
    with pytest.raises(ToolError, match="could run code"):
        from_wire(tmp_path / "evil.bin", base, tmp_path / "out.pxd", wire="nemo-rl")
    path = nemo(tmp_path, start(), stepped(start(), 1))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ToolError, match=r"payload\.bin: not"):
        from_wire(path, base, tmp_path / "out.pxd")


def test_a_malformed_xor_folder_is_refused_by_tensor_and_place(tmp_path: Path) -> None:
    old, new = start(), stepped(start(), 1)
    base = write_checkpoint(tmp_path / "base", old)
    source = xor(tmp_path, old, new)
    shard, index = source / "model-00001-of-00001.safetensors", source / "model.safetensors.index.json"
    good = shard.read_bytes()

    def refused(error: type[ToolError], words_of_error: str) -> None:
        with pytest.raises(error, match=words_of_error):
            from_wire(source, base, tmp_path / "out.pxd")

    saved = load_file(shard)
    short = arrow.Codec("zstd").compress(b"\0" * 100, asbytes=True)
    save_file({**saved, UP: torch.frombuffer(bytearray(short), dtype=torch.uint8)}, shard)
    refused(CheckFailedError, rf"{UP}: ends at byte 100; the base's tensor has 12288 bytes")
    long = arrow.Codec("zstd").compress(b"\0" * (1 << 20), asbytes=True)
    save_file({**saved, UP: torch.frombuffer(bytearray(long), dtype=torch.uint8)}, shard)
    refused(ToolError, rf"{UP}: unpacks to more than the 12288 bytes")
    save_file({**saved, UP: saved[UP].float()}, shard)
    refused(ToolError, rf"{UP}: is F32 .*, not U8")
    save_file({**saved, UP: torch.zeros(9, dtype=torch.uint8)}, shard)
    refused(ToolError, rf"{UP}: not zstd data")
    shard.write_bytes(good)
    other = write_checkpoint(tmp_path / "other", stepped(old, 9))
    with pytest.raises(CheckFailedError, match=r"the result has checksum .* another base"):
        from_wire(source, other, tmp_path / "out.pxd")
    index.write_text(index.read_text().replace('"zstd"', '"lz4"'))
    refused(ToolError, "compression_format is 'lz4'")
    assert not (tmp_path / "out.pxd").exists()


def test_a_wire_of_another_model_and_a_delta_that_no_wire_can_say_are_refused(tmp_path: Path) -> None:
    old, new = start(), stepped(start(), 1)
    base = write_checkpoint(tmp_path / "base", old)
    fewer = write_checkpoint(tmp_path / "fewer", {name: old[name] for name in (DOWN, NORM)})
    with pytest.raises(CheckFailedError, match=r"changes model\.\S+, which .* lacks"):
        from_wire(index_value(tmp_path, old, new), fewer, tmp_path / "out.pxd")
    grown = {**new, "extra.weight": new[NORM]}
    update(base, write_checkpoint(tmp_path / "grown", grown), tmp_path / "grown.pxd")
    with pytest.raises(ToolError, match=r"extra\.weight: came"):
        to_wire(tmp_path / "grown.pxd", base, tmp_path / "sent", wire="index-value")
    update(base, fewer, tmp_path / "fewer.pxd")
    with pytest.raises(ToolError, match="is not in the result"):
        to_wire(tmp_path / "fewer.pxd", base, tmp_path / "sent", wire="xor")


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
    convert(sent, tmp_path / "again.pxd", to="pxd", base=base, layout=wire)
    assert (tmp_path / "again.pxd").stat().st_size > 0
    done = CliRunner().invoke(cli, ["convert", step, "--to", wire, "-o", str(tmp_path / "x")])
    assert isinstance(done.exception, ToolError)
    assert "pass --base" in str(done.exception)
    done = CliRunner().invoke(cli, ["convert", base, "--base", base, "-o", str(tmp_path / "x")])
    assert isinstance(done.exception, ToolError)
    assert "is a folder, but no xor wire" in str(done.exception)
