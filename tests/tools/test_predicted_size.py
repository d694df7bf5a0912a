"""The plan predicts the size of the file: header, assets and data, counted by the functions that write them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import peraxis_format as pxd
from peraxis_tools.checkpoints.assets import FolderAssets
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.compress import Plan, compress
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.plan import record, size
from peraxis_tools.compress.plan.plan import plan
from peraxis_tools.compress.run import delta_file
from peraxis_tools.errors import ToolError
from tests.tools.compress_pairs import FEW, llama_config, write_pair, write_text


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("axis", ["row", "col", "row+col"])
def test_the_plan_foretells_the_file_within_one_block(tmp_path: Path, bits: int, axis: str) -> None:
    base, tuned = write_pair(tmp_path, llama_config())
    plans: list[Plan] = []
    result = compress(
        base, tuned, tmp_path / "d.pxd", fit="none", masks=bits, axis=axis, show_plan=plans.append, force=True
    )
    assert plans[0].file_bytes is not None
    # Exponents may have one digit more or less, and the header is a multiple of 4096 bytes.
    assert abs(plans[0].file_bytes - result.bytes) <= 4096


@pytest.mark.parametrize("encoding", list(pxd.Encoding))
@pytest.mark.parametrize("shape", [(7, 9), (3, 5, 17), (64, 64)])
@pytest.mark.parametrize("base_rows", [2, 99])
def test_one_size_serves_module_record_and_plan(encoding: pxd.Encoding, shape: tuple[int, ...], base_rows: int) -> None:
    base = pxd.BaseRef(dtype=pxd.DType.BF16, shape=(base_rows, *shape[1:]), sha256="0" * 64)
    axes = (pxd.Axis.ROW_COL, pxd.Axis.TENSOR) if encoding is pxd.Encoding.SIGN else ()
    entry = pxd.ModuleEntry(
        name="w",
        shape=shape,
        dtype=pxd.DType.BF16,
        encoding=encoding,
        components=tuple(pxd.ComponentEntry(axis=axis, exponent=0) for axis in axes),
        sha256="0" * 64,
        base=base,
    )
    parts = pxd.tensor_shapes(shape=shape, dtype=entry.dtype, encoding=encoding, axes=axes, base_shape=base.shape)
    wanted = pxd.payload_size(parts)
    records = pxd.layout([entry], [])
    assert pxd.aligned(records[-1].end if records else 0) == wanted


def test_a_header_that_no_reader_takes_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = write_pair(tmp_path, llama_config())

    def too_large(*_: object) -> bytes:
        raise pxd.ContainerError("E110", "99999999 bytes for this many modules")

    monkeypatch.setattr(size, "header_bytes", too_large)
    options = CompressOptions.from_mapping({"fit": "none"})
    with open_checkpoint(base) as a, open_checkpoint(tuned) as b:
        planned = plan(
            fine_tuned={i.name: i for i in b.tensors.infos()},
            base={i.name: i for i in a.tensors.infos()},
            options=options,
        )
        with pytest.raises(ToolError, match=r"do not fit into one header .*use fewer masks"):
            size.with_file_bytes(planned, b, options)


def test_a_run_reads_each_asset_twice_however_often_it_predicts_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = write_pair(tmp_path, llama_config())
    (tuned / "tokenizer.json").write_text("{}")
    read, seen = FolderAssets.read, Counter[str]()

    def counted(assets: FolderAssets, path: str, *, checked: bool = True) -> bytes:
        seen[path] += assets.folder == tuned
        return read(assets, path, checked=checked)

    monkeypatch.setattr(FolderAssets, "read", counted)
    compress(base, tuned, tmp_path / "delta.pxd", fit="none", force=True)
    assert seen["tokenizer.json"] == 2  # for the plan, and for the file


@pytest.mark.parametrize("most", [100_000, 103_000])
def test_notes_of_a_fit_never_make_a_file_larger_than_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Each module has a note, of a few hundred bytes, which the plan cannot foretell."""
    base, tuned = write_pair(tmp_path, llama_config(num_hidden_layers=20))
    text = write_text(tmp_path / "text.jsonl")
    real = record.report_text

    def longer(names: Sequence[str], lines: Mapping[str, record.Line]) -> str:
        noted = any(line[3] for line in lines.values())
        return real(names, {name: (*line[:3], "a note " * 40 * noted) for name, line in lines.items()})

    monkeypatch.setattr(delta_file, "report_text", longer)
    made = compress(base, tuned, tmp_path / "d.pxd", calibration=str(text), target_size=most, **FEW)
    assert made.notes
    assert (tmp_path / "d.pxd").stat().st_size <= most
