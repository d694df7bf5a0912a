"""Small .pt files and payloads that ask for much memory, or hold anything but plain tensors, are refused."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peraxis_tools.convert import from_wire, to_pxd
from peraxis_tools.convert.torch_files import load_plain
from peraxis_tools.convert.wires import nemo as wire
from peraxis_tools.errors import CheckFailedError, ToolError
from tests.factories import write_checkpoint
from tests.tools.test_convert import MODULES, SHAPES, make_base
from tests.tools.wire_files import arrow, nemo, start, stepped

LONG = 1 << 22  # bytes or elements that a few stored bytes stand for
PROJ = MODULES[0]


def payload(folder: Path, edit: Callable[[list[Any]], None]) -> tuple[Path, Path]:
    """A base, and a payload of nemo-rl whose [locations, groups, items] `edit` changes."""
    old = start()
    data = nemo(folder, old, stepped(old, 1)).read_bytes()
    parts = list(torch.load(io.BytesIO(arrow.input_stream(arrow.BufferReader(data), compression="zstd").read())))
    edit(parts)
    torch.save(tuple(parts), folder / "n.bin")
    return write_checkpoint(folder / "base", old), folder / "n.bin"


def with_group(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[list[Any]], None]:
    def edit(parts: list[Any]) -> None:
        parts[1] = (make(parts[1][0]), *parts[1][1:])

    return edit


ODD_TENSORS: dict[str, Callable[[Any], Any]] = {
    "repeated": lambda x: x[:1].expand(LONG),
    "overlapping": lambda x: torch.as_strided(x, (LONG,), (0,)),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor([x.float()]),
    "conjugate": lambda x: torch.complex(x.float(), x.float()).conj(),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "strided": lambda x: torch.stack([x, x], dim=1)[:, 0],
    "matrix": lambda x: x.reshape(1, -1),
    "single": lambda x: x[0].clone(),
    "wide": lambda x: x.to(torch.complex128),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_a_value_group_that_is_not_a_flat_stored_tensor_is_refused(kind: str, tmp_path: Path) -> None:
    base, source = payload(tmp_path, with_group(ODD_TENSORS[kind]))
    with pytest.raises(ToolError, match=r"n\.bin: "):
        from_wire(source, base, tmp_path / "out.pxd", wire="nemo-rl")


@pytest.mark.parametrize("kind", ["repeated", "sparse", "meta"])
def test_locations_that_are_not_a_flat_stored_tensor_are_refused(kind: str, tmp_path: Path) -> None:
    def edit(parts: list[Any]) -> None:
        parts[0] = ODD_TENSORS[kind](parts[0])

    base, source = payload(tmp_path, edit)
    with pytest.raises(ToolError, match=r"n\.bin: "):
        from_wire(source, base, tmp_path / "out.pxd", wire="nemo-rl")


def test_a_payload_unpacks_to_no_more_than_the_base_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_LIMIT_SLACK", 1 << 10)
    base = write_checkpoint(tmp_path / "base", start())
    (tmp_path / "bomb.zst").write_bytes(arrow.Codec("zstd").compress(bytes(LONG), asbytes=True))
    with pytest.raises(ToolError, match=r"bomb\.zst: unpacks to more than the \d{6} bytes that the base allows"):
        from_wire(tmp_path / "bomb.zst", base, tmp_path / "out.pxd")


def test_the_largest_payload_of_a_base_is_within_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_LIMIT_SLACK", 1 << 13)
    old = start()
    new = {name: (array.copy(), dtype) for name, (array, dtype) in old.items()}
    for array, _ in new.values():
        array.view(f"<u{array.dtype.itemsize}")[...] ^= 1
    embedding = new["model.embed_tokens.weight"][0].reshape(-1)
    embedding[1 : (1 << 16) + 2] = old["model.embed_tokens.weight"][0].reshape(-1)[1 : (1 << 16) + 2]  # 4-byte gaps
    base = write_checkpoint(tmp_path / "base", old)
    assert from_wire(nemo(tmp_path, old, new), base, tmp_path / "out.pxd").changed > 0


def bitdelta(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    d_out, d_in = SHAPES[f"{PROJ}.weight"]
    found = {f"{PROJ}.mask": torch.zeros(d_in // 32, d_out, dtype=torch.int32), f"{PROJ}.coeff": torch.tensor(1.0)}
    return found | {name.replace("__", "."): value for name, value in more.items()}


@pytest.mark.parametrize(
    ("extra", "words_of_error"),
    [
        ({"model.norm.weight": torch.zeros(1).expand(LONG, 1)}, "'model.norm.weight' repeats bytes of the file"),
        ({f"{PROJ}.coeff": torch.zeros(1).expand(LONG)}, "coeff' repeats bytes of the file"),
        ({f"{PROJ}.mask": torch.zeros(1, 1, dtype=torch.int32).expand(2048, 2048)}, "mask' repeats bytes of the file"),
        ({"model.norm.weight": torch.zeros(64).to_sparse()}, "_rebuild_sparse_tensor, which is not part of a dense"),
        ({"model.norm.weight": torch.zeros(64, device="meta")}, "_rebuild_meta_tensor_no_storage, which is not part"),
    ],
)
def test_a_pt_file_with_tensors_that_are_not_stored_is_refused(
    extra: dict[str, torch.Tensor], words_of_error: str, tmp_path: Path
) -> None:
    base, _ = make_base(tmp_path)
    torch.save(bitdelta() | extra, tmp_path / "d.pt")
    with pytest.raises(ToolError, match=words_of_error):
        to_pxd(tmp_path / "d.pt", base, tmp_path / "out.pxd")
    assert not (tmp_path / "out.pxd").exists()


def test_a_mask_is_compared_with_the_base_before_its_scales_are_read(tmp_path: Path) -> None:
    base, _ = make_base(tmp_path)
    wide = {
        f"{PROJ}.mask_col": torch.zeros(1, 4096, dtype=torch.int32),
        f"{PROJ}.coeff_col": torch.full((4096,), float("nan")),  # the read would refuse it
    }
    torch.save(wide, tmp_path / "d.pt")
    with pytest.raises(CheckFailedError, match=r"is of \[4096, 32\]"):
        to_pxd(tmp_path / "d.pt", base, tmp_path / "out.pxd")


def test_tied_parameters_may_share_their_bytes_but_other_views_may_not(tmp_path: Path) -> None:
    base, _ = make_base(tmp_path)
    head = torch.randn(50, 64).bfloat16()
    tied = {"lm_head.weight": head, "model.embed_tokens.weight": head}
    torch.save(bitdelta() | tied, tmp_path / "d.pt")
    to_pxd(tmp_path / "d.pt", base, tmp_path / "out.pxd")
    torch.save(bitdelta() | {**tied, "model.embed_tokens.weight": head[:49]}, tmp_path / "d.pt")
    with pytest.raises(ToolError, match="repeats bytes"):
        to_pxd(tmp_path / "d.pt", base, tmp_path / "two.pxd")


class Allocates:
    """Pickled, it calls one of the types that weights_only allows, with a size."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return self.kind, (LONG,)


@pytest.mark.parametrize("kind", [bytearray, torch.Tensor, torch.FloatTensor])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pt_file_that_allocates_by_a_number_is_not_loaded(kind: Any, legacy: bool, tmp_path: Path) -> None:
    torch.save({"a": Allocates(kind)}, tmp_path / "d.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ToolError, match=kind.__name__):
        load_plain(tmp_path / "d.pt", where="d.pt", kind="a .pt file")


def test_a_pt_file_with_packed_or_repeated_records_is_refused(tmp_path: Path) -> None:
    torch.save(bitdelta(), tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
        zipfile.ZipFile(tmp_path / "two.pt", "w") as two,
    ):
        for record in good.infolist():
            packed.writestr(record.filename, good.read(record))
            two.writestr(record.filename, good.read(record))
        two.writestr("other/data.pkl", pickle.dumps({}, protocol=2))
    assert len(load_plain(tmp_path / "good.pt", where="good.pt", kind="a .pt file")) == 2
    for name, words_of_error in (("packed", "records are compressed"), ("two", "2 records data.pkl")):
        with pytest.raises(ToolError, match=words_of_error):
            load_plain(tmp_path / f"{name}.pt", where=name, kind="a .pt file")


@pytest.mark.parametrize("data", [b"", bytes(5000), b"PK\x03\x04" + bytes(90), b"\x80\x02", struct.pack("<Q", 9) * 9])
def test_bytes_that_are_no_torch_file_are_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "d.pt").write_bytes(data)
    for source in (tmp_path / "d.pt", data):
        with pytest.raises(ToolError, match=r"^d\.pt: not a \.pt file, or damaged \(.+\)$"):
            load_plain(source, where="d.pt", kind="a .pt file")


def test_files_older_than_torch_1_6_are_read(tmp_path: Path) -> None:
    saved = bitdelta()
    torch.save(saved, tmp_path / "d.pt", _use_new_zipfile_serialization=False)
    found = load_plain(tmp_path / "d.pt", where="d.pt", kind="a .pt file")
    assert all(torch.equal(found[name], saved[name]) for name in saved)
