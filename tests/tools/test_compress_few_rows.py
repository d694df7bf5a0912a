"""A change of a few rows is stored, although no sample of rows and no token of the text shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peraxis_format as pxd
from peraxis_tools.apply import apply
from peraxis_tools.compress import compress
from tests.tools.compress_pairs import llama_config, write_pair, write_text

TABLE, MATRIX = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
FEW: dict[str, Any] = {"calibration_samples": 4, "sequence_length": 16, "generated_samples": 0}


def with_few_rows(folder: Path, changed: dict[str, tuple[int, ...]], *, tied: bool) -> tuple[Path, Path]:
    """A pair whose fine-tune is the base but for these rows."""
    config = llama_config(vocab_size=4096, intermediate_size=2048, tie_word_embeddings=tied)
    base, tuned = write_pair(folder, config)
    tensors = load_file(base / "model.safetensors")
    for name, rows in changed.items():
        for row in rows:
            tensors[name][row] += 0.25
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    return base, tuned


@pytest.mark.parametrize("options", [{}, {"calibration": True}, {"calibration": True, "target_size": 800_000}])
@pytest.mark.parametrize("tied", [False, True])
def test_a_change_that_no_sample_shows_is_in_the_file(options: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    base, tuned = with_few_rows(tmp_path, {TABLE: (3000,), MATRIX: (700, 701)}, tied=tied)
    if options.get("calibration"):
        options = {**options, **FEW, "calibration": str(write_text(tmp_path / "text.jsonl"))}
    found = compress(base, tuned, tmp_path / "d.pxd", force=True, **options)
    apply(base, found.path, tmp_path / "applied")
    before, after, wanted = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "applied", tuned))
    for name in (TABLE, MATRIX):
        missing = (wanted[name].float() - after[name].float()).norm() / (
            wanted[name].float() - before[name].float()
        ).norm()
        assert float(missing) < 0.5, name
    with pxd.open(found.path) as delta:
        stored = {entry.name for entry in delta.manifest.modules if entry.encoding is not pxd.Encoding.SAME}
    assert stored == {TABLE, MATRIX}


def test_only_what_equals_the_base_is_called_unchanged(tmp_path: Path) -> None:
    base, tuned = with_few_rows(tmp_path, {TABLE: (3000,)}, tied=False)
    planned: list[Any] = []
    compress(base, tuned, tmp_path / "d.pxd", force=True, show_plan=planned.append)
    same = {module.name for module in planned[0].modules if module.reason == "unchanged"}
    assert TABLE not in same
    assert MATRIX in same


def test_signed_zeros_alone_are_a_change(tmp_path: Path) -> None:
    base, tuned = with_few_rows(tmp_path, {}, tied=False)
    tensors = load_file(base / "model.safetensors")
    tensors[MATRIX][5] = 0.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    tensors[MATRIX][5] = -torch.zeros_like(tensors[MATRIX][5])
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    compress(base, tuned, tmp_path / "d.pxd", force=True)  # has a price, and no error


@pytest.mark.parametrize(("rows", "told"), [(range(2), True), (range(2048), False)])
def test_where_a_tensor_changed_in_part_a_note_names_the_smaller_encoding(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: range, told: bool
) -> None:
    base, tuned = with_few_rows(tmp_path, {MATRIX: tuple(rows)}, tied=True)
    signed = compress(base, tuned, tmp_path / "signed.pxd", force=True, masks=4)
    notes = [record.message for record in caplog.records if "changed only in part" in record.message]
    assert bool(notes) is told
    if told:
        assert notes[0].startswith("1 tensor ")
        exact = compress(base, tuned, tmp_path / "exact.pxd", exact="auto", force=True)
        saved = int(notes[0].split("in about ")[1].split()[0])
        assert signed.bytes - exact.bytes == pytest.approx(saved, abs=4096)


def test_the_note_counts_tables_that_are_stored_whole_and_names_what_excludes_exact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned = with_few_rows(tmp_path, {TABLE: tuple(range(5))}, tied=True)

    def told(output: str, **options: Any) -> list[str]:
        caplog.clear()
        compress(base, tuned, tmp_path / output, force=True, **options)
        return [record.message for record in caplog.records if "changed only in part" in record.message]

    (whole,) = told("whole.pxd", embeddings="full")
    assert "exact (--exact auto) would store" in whole
    (target,) = told("target.pxd", target_size=1_100_000, embeddings="full")
    assert "exact (--exact auto, without a target) would store" in target
