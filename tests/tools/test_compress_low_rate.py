"""A fine-tune in BF16 at a low learning rate: most deltas are zero, and still no module may become worse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peraxis_tools.compress import compress
from tests.tools.compress_pairs import llama_config, write_pair, write_text

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("rate", [3e-6, 3e-5])
def test_every_module_is_better_than_the_base_and_than_one_scalar_or_is_the_base(
    rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import low_rate

    base, _ = write_pair(tmp_path, llama_config(hidden_size=48, intermediate_size=72), dtype=torch.bfloat16)
    text = write_text(tmp_path / "text.jsonl", documents=200)
    ids = torch.randint(3, 30, (20_000,), generator=torch.Generator().manual_seed(0))
    low_rate.fine_tune(base, tmp_path / "low", ids, rate=rate, steps=25, length=32)
    compress(base, tmp_path / "low", tmp_path / "low.pxd", calibration=str(text), sequence_length=64)
    modules = list(low_rate.module_errors(base, tmp_path / "low", tmp_path / "low.pxd", ids[-4096:].view(-1, 64)))
    assert len(modules) == 3 * 7
    assert 0.3 < sum(module.zeros for module in modules) / len(modules) < 1.0
    assert not [module for module in modules if not module.fine]
