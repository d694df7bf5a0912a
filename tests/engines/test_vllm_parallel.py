"""Tensor parallelism on the real vLLM: two ranks against a stock engine of two ranks, which rounds in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engines.jobs import run_jobs

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TWO = {"tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def found(untied: dict[str, str], chain: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outputs of engines of two ranks."""
    one = untied["v1.pxd"]
    cold = {"load_format": "peraxis", "model_loader_extra_config": {"delta": one}}
    jobs: dict[str, dict[str, Any]] = {
        "base": {"job": "plain", "model": untied["base"]},
        "v1": {"job": "plain", "model": untied["v1"]},
        "cold": {"job": "plain", "model": untied["base"], **cold},
        "swaps": {"job": "swaps", "model": untied["base"], "sequence": [one, None], "bad": ["/no/such.pxd"]},
        "step2": {"job": "plain", "model": chain["step2"]},
        "updates": {
            "job": "updates",
            "model": untied["base"],
            "updates": [f"{chain['chain']}/{name}.pxd" for name in ("step-00000001", "step-00000002")],
            "bad": [f"{chain['chain']}/step-00000001.pxd"],
            "delta": one,
        },
        "variants": {
            "job": "variants",
            "model": untied["base"],
            "paths": {"v1": one},
            "batches": [["v1", None, "v1", None, "v1"]],
            "bad": ["/no/such.pxd"],
            "additional_config": {"peraxis": {"exact": True}},
        },
    }
    results = run_jobs([{**job, **TWO} for job in jobs.values()], Path(tmp_path_factory.mktemp("parallel")))
    return dict(zip(jobs, results, strict=True))


def test_a_cold_start_is_the_applied_folder_to_the_bit(found: dict[str, Any]) -> None:
    assert found["cold"] == found["v1"] != found["base"]


def test_a_swap_is_the_applied_folder_to_the_bit_and_errors_leave_every_rank_as_it_was(found: dict[str, Any]) -> None:
    outputs = [output for _, _, output, _ in found["swaps"]["swaps"]]
    assert outputs == [found["v1"], found["base"]]
    assert "/no/such.pxd" in found["swaps"]["errors"][0]
    assert found["swaps"]["again"] == "base"
    assert found["swaps"]["after"] == found["base"]


def test_a_mixed_batch_is_each_variants_own_model(found: dict[str, Any]) -> None:
    (batch,) = found["variants"]["batches"]
    expected = [found[name][i] for i, name in enumerate(["v1", "base", "v1", "base", "v1"])]
    assert [tokens for tokens, _, _ in batch] == [tokens for tokens, _, _ in expected]
    assert "/no/such.pxd" in found["variants"]["errors"][0]
    assert found["variants"]["again"]


def test_exact_updates_reach_every_rank_or_none(found: dict[str, Any]) -> None:
    assert found["updates"]["updates"][-1][2] == found["updates"]["after"] == found["step2"]
    assert all("E40" in error for error in found["updates"]["errors"][1:])
