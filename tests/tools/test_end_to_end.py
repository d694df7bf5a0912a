"""Compress, verify and apply on a real pair. The result loads, generates, and is exact bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peraxis_format as pxd
import peraxis_tools
from tests.tools.test_apply import load, oracle, same_bits

CALIBRATION = {"calibration_samples": 6, "sequence_length": 128}


@pytest.fixture(scope="module")
def stories(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """base, fine-tuned and delta of the real pair: width 172, tied embeddings, calibrated on C4."""
    base, tuned = shared / "pairs" / "stories260K", shared / "pairs" / "stories260K-shakespeare"
    delta = tmp_path_factory.mktemp("stories") / "stories.pxd"
    c4 = shared / "c4" / "c4-train.00000-of-01024.json.gz"
    peraxis_tools.compress(base, tuned, delta, calibration=str(c4), **CALIBRATION)
    return base, tuned, delta


def test_the_applied_folder_is_the_specs_arithmetic_to_the_bit(
    stories: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, _, delta = stories
    peraxis_tools.apply(base, delta, tmp_path / "out")
    applied, expected = load(tmp_path / "out"), oracle(delta, load(base))
    assert applied.keys() == expected.keys()
    assert all(same_bits(applied[name], expected[name]) for name in expected)


def test_the_applied_folder_loads_and_generates(stories: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, _, delta = stories
    peraxis_tools.apply(base, delta, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("To be, or not", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert ids.shape[1] == prompt["input_ids"].shape[1] + 12
    direct = peraxis_tools.load_model(base, delta)
    assert direct.dtype == model.dtype == torch.bfloat16
    assert torch.equal(direct(**prompt).logits, model(**prompt).logits)


def test_the_delta_is_far_closer_to_the_fine_tuned_model_than_the_base_is(
    stories: tuple[Path, Path, Path], shared: Path
) -> None:
    from peraxis_tools.evaluate import evaluate

    base, tuned, delta = stories
    text = {"shakespeare": shared / "text" / "tinyshakespeare.txt"}
    found = evaluate(base, tuned, delta, text, samples=8, sequence_length=128, candidates=("base", "merged"))
    kl = {name: fidelity.kl for name, fidelity in found.domains[0].candidates.items()}
    assert kl["merged"] < kl["base"] / 6  # 614 calibration tokens; the README has the figures of a real run
    assert delta.stat().st_size < 520_064 / 4


def test_compressing_twice_gives_the_same_bytes(stories: tuple[Path, Path, Path], tmp_path: Path, shared: Path) -> None:
    base, tuned, delta = stories
    c4 = shared / "c4" / "c4-train.00000-of-01024.json.gz"
    peraxis_tools.compress(base, tuned, tmp_path / "again.pxd", calibration=str(c4), **CALIBRATION)
    assert (tmp_path / "again.pxd").read_bytes() == delta.read_bytes()


def test_tied_embeddings_are_stored_once(stories: tuple[Path, Path, Path]) -> None:
    with pxd.open(stories[2]) as file:
        assert sum("embed" in name or "lm_head" in name for name in file) == 1
