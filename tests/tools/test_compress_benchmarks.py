"""The benchmarks of the compressor at a small size: their claims and their counts of operations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from peraxis_tools.compress import compress
from peraxis_tools.compress.fit.fit import FitOptions
from tests.tools.compress_pairs import llama_config, write_pair, write_text

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put benchmarks/ on the path, because its modules import each other as scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("rate", [3e-6, 3e-5])
def test_in_a_fine_tune_of_many_zero_deltas_every_module_is_better_than_the_base_and_one_scalar_or_the_base(
    rate: float, tmp_path: Path
) -> None:
    import low_rate

    base, _ = write_pair(tmp_path, llama_config(hidden_size=48, intermediate_size=72), dtype=torch.bfloat16)
    text = write_text(tmp_path / "text.jsonl", documents=200)
    ids = torch.randint(3, 30, (20_000,), generator=torch.Generator().manual_seed(0))
    low_rate.fine_tune(base, tmp_path / "low", ids, rate=rate, steps=25, length=32)
    # In F32, as on the CPU, because a forward pass in BF16 does not resolve steps of 3e-6.
    options: dict[str, Any] = {"calibration": str(text), "sequence_length": 64, "compute_dtype": "float32"}
    compress(base, tmp_path / "low", tmp_path / "low.pxd", **options)
    modules = list(low_rate.module_errors(base, tmp_path / "low", tmp_path / "low.pxd", ids[-4096:].view(-1, 64)))
    assert len(modules) == 3 * 7
    assert 0.3 < sum(module.zeros for module in modules) / len(modules) < 1.0
    assert not [module for module in modules if not module.fine]


def test_a_block_is_timed_step_by_step() -> None:
    import compress_block
    from harness import Benchmark

    bench = Benchmark("block")
    block = compress_block.SHAPES["llama-3.1-8b"].scaled(64)
    compress_block.one_block(
        bench, block, samples=10, length=16, device=torch.device("cpu"), dtype=torch.float32, repeat=1
    )
    assert len(bench.results) == 1 + 2 * len(block.stages) + 1
    assert bench.results[-1].median == pytest.approx(sum(result.median for result in bench.results[:-1]))
    assert all(result.extra["bound"] > 0 for result in bench.results)


@pytest.mark.parametrize(("d_in", "outs"), [(768, (300, 64)), (1100, (64,)), (768, (1000,))])
def test_the_operations_of_a_fit_are_those_that_its_bound_counts(d_in: int, outs: tuple[int, ...]) -> None:
    import compress_block

    device = torch.device("cpu")
    statistics = compress_block._statistics(d_in, 10, 16, device, torch.float32)
    run = compress_block._fits(outs, statistics, device, torch.float32, FitOptions())
    with FlopCounterMode(display=False) as counter:
        run()
    single, _ = compress_block._fit_work(d_in, outs, FitOptions())
    # Matrix products are counted. The sweeps over signs are not.
    assert counter.get_total_flops() == pytest.approx(single, rel=0.1)


def test_the_random_model_of_published_shapes_is_one_that_transformers_loads(tmp_path: Path) -> None:
    import compress_block
    import compress_model
    from transformers import AutoModelForCausalLM

    block = dataclasses.replace(compress_block.SHAPES["llama-3.1-8b"].scaled(64), layers=2)
    base, tuned = compress_model.write_pair(tmp_path, block, 300, torch.device("cpu"))
    models = [AutoModelForCausalLM.from_pretrained(path, output_loading_info=True) for path in (base, tuned)]
    for model, told in models:
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.config.num_hidden_layers == 2
    changed = [not torch.equal(a, b) for (_, a), (_, b) in zip(*(m.named_parameters() for m, _ in models), strict=True)]
    assert all(changed)
