"""The benchmarks' inputs and judgement of answers, without an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.vllm_load import counted, possible, verdict
from benchmarks.vllm_memory import report
from benchmarks.vllm_walkthrough import STATES, applied_chain
from tests.engines.pair import make_base

BATCH = [[5, 6, 7], [-0.5, -1.0, -0.25]]
ALONE = [[5, 6, 8], [-0.5, -1.0625, -0.3]]
OTHER = [[5, 9, 9], [-0.5, -3.0, -2.0]]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (BATCH, "equal"),
        (ALONE, "equal"),
        ([[5, 6, 7], [-0.5, -1.0, -0.2500001]], "rounded"),
        ([[5, 6, 4], [-0.5, -1.0625, -0.27]], "rounded"),  # another token of the same probability, at the end
        ([[5, 4, 1], [-0.5, -1.02, -9.0]], "rounded"),  # and in the middle: what follows cannot be compared
        ([[5, 4, 1], [-0.5, -1.5, -0.25]], "wrong"),
        ([[5, 6, 7], [-0.5, -1.5, -0.25]], "wrong"),  # the tokens of a reference with other probabilities
        ([[4, 6, 7], [-2.5, -1.0, -0.25]], "wrong"),
        (OTHER, "wrong"),
    ],
)
def test_an_answer_is_that_of_a_stock_engine_or_near_it_or_wrong(answer: list[list[float]], expected: str) -> None:
    references = {"v1": {"batch": [BATCH], "alone": [ALONE]}, "v2": {"batch": [OTHER], "alone": [OTHER]}}
    assert verdict(answer, possible(references, ["v1"], 0)) == expected
    assert verdict(OTHER, possible(references, ["v1", "v2"], 0)) == "equal"


def test_every_verdict_is_counted() -> None:
    assert counted(["equal", "wrong", "equal"]) == {"equal": 2, "rounded": 0, "wrong": 1}


def test_the_memory_of_variants_is_counted_by_files_by_tensors_and_by_growth() -> None:
    # Growth is from one variant to all, so it is of one less than all.
    found = {"weights": 100, "variants": [10] * 5, "one": 1000, "every": 1048, "answered": 1050}
    lines = report(found, [14] * 5).splitlines()
    assert [line.partition("times")[0].split()[-1] for line in lines[1:]] == ["1.70", "1.50", "1.60"]


def test_the_walkthrough_makes_a_chain_and_applies_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    paths = applied_chain(tmp_path, str(base))
    assert sorted(path.name for path in Path(paths["chain"]).iterdir() if path.suffix == ".pxd") == [
        "anchor-00000000.pxd",
        "step-00000001.pxd",
        "step-00000002.pxd",
    ]
    for name in STATES:
        applied = load_file(f"{paths[name]}/model.safetensors")
        trained = load_file(tmp_path / "trainer" / name / "model.safetensors")
        assert all(bool((applied[key] == tensor).all()) for key, tensor in trained.items())
