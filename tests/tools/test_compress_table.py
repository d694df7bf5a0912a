"""The fit of an embedding table, which is read by rows."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peraxis_format as pxd
from peraxis_tools.compress import compress
from peraxis_tools.compress.fit.mean import mean_components
from peraxis_tools.compress.fit.table import FittedTable, fit_table, importance
from peraxis_tools.compress.model.components import apply_components
from tests.tools.compress_pairs import llama_config, write_pair, write_text


def fit(delta: torch.Tensor, counts: torch.Tensor, axis: pxd.Axis | None, components: int, *, signs: bool = True):
    start = mean_components(
        np.zeros(delta.shape, np.float32),
        delta.numpy(),
        base_dtype=pxd.DType.F32,
        dtype=pxd.DType.F32,
        axis=axis,
        components=components,
    )
    return start, fit_table(lambda rows: delta[rows], importance(counts), start, signs=signs)


def error(delta: torch.Tensor, components: tuple[pxd.Component, ...]) -> torch.Tensor:
    """Return the squared error of each row."""
    applied = apply_components(torch.zeros_like(delta), components, torch.float32)
    return (delta - applied).double().square().sum(1)


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 20),
    axis=st.sampled_from([None, *pxd.Axis]),
    components=st.integers(1, 4),
    signs=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=60)
def test_a_fitted_table_is_never_worse_than_mean_magnitudes_and_says_its_error(
    rows: int, width: int, axis: pxd.Axis | None, components: int, signs: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    delta = torch.randn(rows, width) * torch.rand(rows, 1) * torch.rand(width)
    delta[torch.rand(rows) < 0.2] = 0.0
    counts = torch.randint(0, 50, (rows,))
    start, found = fit(delta, counts, axis, components, signs=signs)
    n = importance(counts).double()
    before, after = (float(n @ error(delta, c) / n.sum()) for c in (start, found.components))
    assert after <= before
    assert [c.axis for c in found.components] == [c.axis for c in start]
    if found.report.error is not None:
        assert found.report.error == pytest.approx(after, rel=1e-3, abs=1e-9)
        assert found.report.error_none == pytest.approx(before, rel=1e-3, abs=1e-9)
        assert found.report.error_same == pytest.approx(float(n @ delta.double().square().sum(1) / n.sum()), rel=1e-5)
    if not signs:
        flips = [np.unpackbits(a.mask ^ b.mask).sum() for a, b in zip(start, found.components, strict=True)]
        assert not any(flips)


def test_several_masks_are_fitted_together() -> None:
    torch.manual_seed(0)
    delta = torch.randn(300, 48) * (0.2 + torch.rand(300, 1))
    for components, gain in ((2, 0.96), (3, 0.9), (4, 0.85)):
        start, found = fit(delta, torch.ones(300), pxd.Axis.ROW_COL, components)
        assert error(delta, found.components).sum() < gain * error(delta, start).sum()
    start, found = fit(delta, torch.ones(300), pxd.Axis.ROW, 3, signs=False)
    assert error(delta, found.components).sum() < 0.97 * error(delta, start).sum()


def test_columns_go_where_frequent_rows_need_them() -> None:
    torch.manual_seed(0)
    often = torch.arange(200) < 20
    delta = torch.randn(200, 32) * torch.where(often[:, None], torch.linspace(0.1, 2, 32), torch.linspace(2, 0.1, 32))
    fits: list[FittedTable] = [fit(delta, torch.where(often, n, 1), pxd.Axis.ROW_COL, 1)[1] for n in (1, 10**6)]
    plain, weighted = (error(delta, found.components) for found in fits)
    assert weighted[often].sum() < 0.9 * plain[often].sum()
    assert weighted[~often].sum() > plain[~often].sum()


def test_how_many_rows_are_looked_at_together_changes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    delta, counts = torch.randn(100, 16), torch.randint(0, 9, (100,))
    whole = fit(delta, counts, pxd.Axis.ROW_COL, 3)[1].report.error
    monkeypatch.setattr(importlib.import_module("peraxis_tools.compress.fit.table"), "_CHUNK", 7 * 16 * 3)
    assert fit(delta, counts, pxd.Axis.ROW_COL, 3)[1].report.error == pytest.approx(whole, rel=1e-3)


def test_an_untied_embedding_is_fitted_and_reports_it(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, llama_config(tie_word_embeddings=False))
    options = {"calibration": str(write_text(tmp_path / "text.jsonl")), "calibration_samples": 8, "sequence_length": 16}
    for fitted in ("refined", "closed-form"):
        compress(base, tuned, tmp_path / "delta.pxd", fit=fitted, masks=3, overwrite=True, **options)
        with pxd.open(tmp_path / "delta.pxd") as delta:
            report = json.loads(delta.manifest.metadata["peraxis.report"])["errors"]
            place = list(delta).index("model.embed_tokens.weight")
        error, none, same = map(float, report[place])
        assert error < none < same
