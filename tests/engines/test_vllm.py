"""Laws of the plug-in on the real vLLM. The reference is always a stock engine on the applied folder.

`make test-vllm` creates the environment. All engines run in forks of one process (jobs.py) before the tests, so that
each engine starts once for all tests that use its outputs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.engines.jobs import PROMPTS, run_jobs
from tests.engines.pair import make_delta

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MIXED = ["v1", None, "v2", "v1", "v3"]
STEPS = ("anchor-00000000", "step-00000001", "step-00000002")
EXACT = {"peraxis": {"exact": True}}
V2 = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
TWO_OF_THREE = [["v1", None, "v2", "v1", "v2"], ["v3", "v3", "v1", None, "v3"], ["v2", "v1", None, "v1", "v2"]]
LAST = ["v1", "v3", None, "v3", "v1"]
Found = dict[str, Any]


def damaged(path: Path, source: str) -> str:
    """Write a copy of a delta with one changed byte in its payload."""
    data = bytearray(Path(source).read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return str(path)


@pytest.fixture(scope="module")
def found(
    untied: dict[str, str], tied: dict[str, str], chain: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Found:
    """The outputs of every engine, by name."""
    folder = tmp_path_factory.mktemp("engines")
    broken = damaged(folder / "damaged.pxd", untied["v2.pxd"])
    alien = str(make_delta(folder / "alien.pxd", Path(tied["v1"]), seed=9))
    other_base = str(make_delta(folder / "other-base.pxd", Path(tied["v2"]), seed=8))
    other_template = folder / "chat_template.jinja"
    other_template.write_text("another template")
    dressed = str(make_delta(folder / "dressed.pxd", Path(untied["base"]), seed=4, assets=[other_template]))
    deltas = {name: untied[f"{name}.pxd"] for name in ("v1", "v2", "v3")}
    one, two = untied["v1.pxd"], untied["v2.pxd"]
    updates = [f"{chain['chain']}/{name}.pxd" for name in STEPS]
    jobs: dict[str, dict[str, Any]] = {
        "base": {"job": "plain", "model": untied["base"]},
        **{name: {"job": "plain", "model": untied[name]} for name in deltas},
        "tied base": {"job": "plain", "model": tied["base"]},
        "tied v1": {"job": "plain", "model": tied["v1"]},
        "cold": {
            "job": "plain",
            "model": untied["base"],
            "load_format": "peraxis",
            "model_loader_extra_config": {"delta": one},
        },
        "cold packed": {
            "job": "plain",
            "model": untied["base"],
            "load_format": "peraxis",
            "model_loader_extra_config": {"delta": one, "packed": True},
        },
        "swaps": {
            "job": "swaps",
            "model": untied["base"],
            "sequence": [one, None, two, one],
            "bad": ["/no/such.pxd", broken, alien, dressed],
        },
        "tied swaps": {
            "job": "swaps",
            "model": tied["base"],
            "sequence": [tied["v1.pxd"], None],
            "bad_first": [other_base],
        },
        "step1": {"job": "plain", "model": chain["step1"]},
        "step2": {"job": "plain", "model": chain["step2"]},
        "updates": {
            "job": "updates",
            "model": untied["base"],
            "updates": updates,
            "bad": [updates[1], damaged(folder / "anchor.pxd", updates[0]), one],
            "delta": two,
        },
        "variants": {
            "job": "variants",
            "model": untied["base"],
            "paths": deltas,
            "batches": [MIXED, ["v2"] * 5, [None] * 5],
            "bad": ["/no/such.pxd", broken, alien, dressed],
        },
        "exact": {
            "job": "variants",
            "model": untied["base"],
            "paths": deltas,
            "batches": [MIXED, ["v1", "v1", "v2", "v2", None], ["v3"] * 5],
            "additional_config": EXACT,
            "max_loras": 3,
            "max_cpu_loras": 3,
        },
        "evicting": {
            "job": "variants",
            "model": untied["base"],
            "paths": deltas,
            "batches": [["v1"] * 5, ["v2"] * 5, ["v1"] * 5],
            "loads": 8,
            "additional_config": EXACT,
            "max_loras": 1,
            "max_cpu_loras": 1,
        },
        "tied exact": {
            "job": "variants",
            "model": tied["base"],
            "paths": {"v1": tied["v1.pxd"]},
            "batches": [["v1", None, "v1", None, "v1"]],
            "additional_config": EXACT,
        },
    }
    results = run_jobs(list(jobs.values()), folder)
    return dict(zip(jobs, results, strict=True))


@pytest.fixture(scope="module")
def second(untied: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The outputs of an engine with Model Runner V2, the default on a GPU. Here its Triton kernels are interpreted."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("second")
    job = {
        "job": "failing",
        "model": untied["base"],
        "paths": {name: str(shutil.copy(untied[f"{name}.pxd"], folder)) for name in ("v1", "v2", "v3")},
        "batches": TWO_OF_THREE,
        "fails": "v3",
        "last": LAST,
        "additional_config": EXACT,
        "max_loras": 2,
        "max_cpu_loras": 2,
        "max_num_batched_tokens": 128,  # the long prompts come in pieces
    }
    (found,) = run_jobs([job], folder, **V2)
    assert found["runner"] == "vllm.v1.worker.gpu.model_runner"
    return dict(found)


def mixed(found: Found, names: list[str | None], prefix: str = "") -> list[Any]:
    """Return the expected outputs of a batch of these variants: for each prompt those of its own stock engine."""
    return [found[prefix + (name or "base")][i] for i, name in enumerate(names)]


def test_the_variants_differ_so_that_a_mistake_would_show(found: Found) -> None:
    outputs = [found[name] for name in ("base", "v1", "v2", "v3")]
    for i in range(len(PROMPTS)):
        assert len({tuple(output[i][0]) for output in outputs}) == 4


def test_a_cold_start_is_the_applied_folder_to_the_bit(found: Found) -> None:
    assert found["cold"] == found["cold packed"] == found["v1"]


def test_a_swap_is_the_applied_folder_to_the_bit_and_the_base_comes_back(found: Found) -> None:
    outputs = [output for _, _, output, _ in found["swaps"]["swaps"]]
    assert outputs == [found["v1"], found["base"], found["v2"], found["v1"]]


def test_after_a_swap_no_keys_and_values_of_the_variant_before_are_used(found: Found) -> None:
    cached = [tokens for _, _, _, tokens in found["swaps"]["swaps"]]
    assert cached == [found[name][2][0] for name in ("v1", "base", "v2", "v1")]


def test_a_swap_of_a_tied_model_reaches_its_lm_head(found: Found) -> None:
    outputs = [output for _, _, output, _ in found["tied swaps"]["swaps"]]
    assert outputs == [found["tied v1"], found["tied base"]]


def test_a_delta_of_another_base_is_refused_first_of_all_and_later_ones_are_not(found: Found) -> None:
    (refused,) = found["tied swaps"]["first"]
    assert "E404" in refused
    assert len(found["tied swaps"]["swaps"]) == 2


def test_the_engine_reports_the_content_id_as_its_weight_version(found: Found, untied: dict[str, str]) -> None:
    import peraxis_format as pf

    with pf.open(untied["v1.pxd"]) as one, pf.open(untied["v2.pxd"]) as two:
        expected = [one.content_id, "base", two.content_id, one.content_id]
    assert [reported for _, reported, _, _ in found["swaps"]["swaps"]] == expected
    assert [returned for returned, _, _, _ in found["swaps"]["swaps"]] == expected


@pytest.mark.parametrize("way", ["swaps", "variants"])
def test_a_bad_delta_is_refused_and_nothing_else_changes(found: Found, way: str) -> None:
    missing, broken, alien, dressed = found[way]["errors"]
    assert "/no/such.pxd" in missing
    assert "E301" in broken
    assert "lm_head.weight" in alien or "E40" in alien
    assert "chat_template.jinja" in dressed
    assert "extract" in dressed
    before = found[way]["swaps"][-1][2] if way == "swaps" else found[way]["batches"][0]
    assert found[way]["after"] == before


def test_an_exact_update_is_the_trainers_weights_to_the_bit(found: Found) -> None:
    updates = found["updates"]["updates"]
    assert [output for _, _, output, _ in updates] == [found["base"], found["step1"], found["step2"]]
    assert found["base"] != found["step1"] != found["step2"]
    assert [cached for _, _, _, cached in updates] == [found[name][2][0] for name in ("base", "step1", "step2")]


def test_after_an_update_the_engine_reports_its_content_id(found: Found, chain: dict[str, str]) -> None:
    import peraxis_format as pf

    expected = []
    for name in STEPS:
        with pf.open(f"{chain['chain']}/{name}.pxd") as file:
            expected.append(file.content_id)
    assert [reported for _, reported, _, _ in found["updates"]["updates"]] == expected
    assert found["updates"]["version"] == expected[-1]


def test_an_update_that_does_not_fit_is_refused_and_nothing_changes(found: Found) -> None:
    staged, repeated, broken, variant, of_the_old_base = found["updates"]["errors"]
    assert "remove them before an update" in staged
    assert "E405" in repeated
    assert "E301" in broken
    assert "use it as a variant" in variant
    assert "E404" in of_the_old_base
    assert found["updates"]["after"] == found["step2"]


def test_a_mixed_batch_in_exact_mode_is_each_variants_own_model_to_the_bit(found: Found) -> None:
    batches = found["exact"]["batches"]
    assert batches[0] == mixed(found, MIXED)
    assert batches[1] == mixed(found, ["v1", "v1", "v2", "v2", None])
    assert batches[2] == found["v3"]


def test_a_tied_lm_head_is_the_variants_own_in_a_mixed_batch(found: Found) -> None:
    (batch,) = found["tied exact"]["batches"]
    assert batch == mixed(found, ["v1", None, "v1", None, "v1"], "tied ")


def test_a_mixed_batch_by_signs_stays_near_each_variants_own_model(found: Found) -> None:
    batches = found["variants"]["batches"]
    assert batches[2] == found["base"]
    for batch, expected in ((batches[0], mixed(found, MIXED)), (batches[1], found["v2"])):
        for (_, _, own), (_, _, reference) in zip(batch, expected, strict=True):
            # Prompt log-probabilities are of the same text, so only rounding can differ (BF16, two layers).
            assert max(abs(a - b) for a, b in zip(own, reference, strict=True)) < 0.25


def test_a_variant_in_memory_is_an_eighth_of_the_weights(found: Found) -> None:
    # One or two masks of a sixteenth of the weights each, scales, exact norms and biases.
    store = found["exact"]["store"]
    assert set(store["bytes"]) == {"v1", "v2", "v3"}
    assert all(size < store["weights"] / 8 for size in store["bytes"].values())


def test_an_evicted_variant_is_read_again_and_serves_the_same(found: Found) -> None:
    batches, store = found["evicting"]["batches"], found["evicting"]["store"]
    assert batches == [found["v1"], found["v2"], found["v1"]]
    assert store["evictions"] >= 2
    assert store["reads"] >= 3
    assert len(store["bytes"]) == 1


def test_adapters_that_vllm_forgot_keep_no_files_and_others_are_read_by_their_paths_again(found: Found) -> None:
    before, *descriptors = found["evicting"]["descriptors"]
    assert descriptors[-1] <= before + 2  # two variants were loaded before, and four files are the most
    assert descriptors[-1] == descriptors[-5]
    assert found["evicting"]["after"] == found["v1"]  # the first of all, forgotten meanwhile


def test_with_model_runner_v2_a_mixed_batch_is_each_variants_own_model(found: Found, second: Found) -> None:
    for names, batch in zip(TWO_OF_THREE, second["batches"], strict=True):
        for output, expected in zip(batch, mixed(found, names), strict=True):
            assert output[0] == expected[0]
            for own, other in zip(output[1:], expected[1:], strict=True):
                # V2's kernel rounds the logarithm of the same logits in another way than V1.
                assert own == pytest.approx(other, abs=1e-4)


def test_with_model_runner_v2_a_variant_is_evicted_and_read_again(second: Found) -> None:
    assert second["store"]["evictions"] >= 3
    assert set(second["store"]["bytes"]) == {"v1", "v2"}


def test_with_model_runner_v2_a_variant_that_cannot_be_read_fails_its_own_requests_alone(
    found: Found, second: Found
) -> None:
    good = [["length", tokens[:4]] for tokens, _, _ in mixed(found, LAST)]
    assert second["failed"] == [["error", []] if name == "v3" else good[i] for i, name in enumerate(LAST)]
    assert second["repaired"] == good
