"""Wires that are malformed, damaged or of another model are refused with the tensor and the position."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peraxis_tools.apply import apply
from peraxis_tools.chain import update
from peraxis_tools.convert import from_wire, to_wire
from peraxis_tools.errors import CheckFailedError, ToolError
from tests.factories import write_checkpoint
from tests.tools.wire_files import (
    DOWN,
    NORM,
    UP,
    arrow,
    assert_holds,
    index_value,
    nemo,
    start,
    stepped,
    xor,
)

# --- refused wires -----------------------------------------------------------------------------------------------


def saved_patch(folder: Path, **tensors: torch.Tensor) -> Path:
    save_file({f"{UP}.{key}": value for key, value in tensors.items()}, folder / "patch.safetensors")
    return folder / "patch.safetensors"


VALUES = torch.zeros(3, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("tensors", "words_of_error"),
    [
        ({"indices": torch.tensor([0, 6144, 2], dtype=torch.int32), "values": VALUES}, r"index 6144 at 1 is outside"),
        ({"indices": torch.tensor([0, 1, -2], dtype=torch.int32), "values": VALUES}, r"index -2 at 2 is outside"),
        ({"indices": torch.tensor([5, 1, 5], dtype=torch.int32), "values": VALUES}, r"index 5 at 2 occurs twice"),
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
        ({"index_end": 1 << 30}, r"locations \d+ to 1073741824 are not gaps"),
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
    with safe_open(shard, "pt") as file:
        sums = file.metadata()
    short = arrow.Codec("zstd").compress(b"\0" * 100, asbytes=True)
    save_file({**saved, UP: torch.frombuffer(bytearray(short), dtype=torch.uint8)}, shard, metadata=sums)
    refused(CheckFailedError, rf"{UP}: ends at byte 100; the base's tensor has 12288 bytes")
    long = arrow.Codec("zstd").compress(b"\0" * (1 << 20), asbytes=True)
    save_file({**saved, UP: torch.frombuffer(bytearray(long), dtype=torch.uint8)}, shard, metadata=sums)
    refused(ToolError, rf"{UP}: unpacks to more than the 12288 bytes")
    save_file({**saved, UP: saved[UP].float()}, shard, metadata=sums)
    refused(ToolError, rf"{UP}: is F32 .*, not U8")
    save_file({**saved, UP: torch.zeros(9, dtype=torch.uint8)}, shard, metadata=sums)
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
    with pytest.raises(ToolError, match=r"extra\.weight: was added"):
        to_wire(tmp_path / "grown.pxd", base, tmp_path / "sent", wire="index-value")
    update(base, fewer, tmp_path / "fewer.pxd")
    with pytest.raises(ToolError, match="is not in the result"):
        to_wire(tmp_path / "fewer.pxd", base, tmp_path / "sent", wire="xor")


@pytest.mark.parametrize("value", [None, 5, ["0a0b0c0d"], ""])
def test_an_xor_wire_that_declares_checksums_must_have_one_for_each_tensor(value: object, tmp_path: Path) -> None:
    old, new = start(), stepped(start(), 1)
    base = write_checkpoint(tmp_path / "base", old)
    source = xor(tmp_path, old, new)
    shard = source / "model-00001-of-00001.safetensors"
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] |= {UP: value}
    if value is None:
        del header["__metadata__"][UP]
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ToolError, match=rf"{UP}: .*checksum"):
        from_wire(source, base, tmp_path / "out.pxd")
    assert not (tmp_path / "out.pxd").exists()
