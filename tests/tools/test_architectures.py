"""The checks of docs/architectures.md for a few different families. The benchmark makes the whole table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peraxis

pytest.importorskip("peft")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Each family has a special feature: modules kept in F32; scalars; experts that get sorted rows; a table of positions;
# weights that the parent module reads; a router with a module inside; names that transformers changes on loading.
FAMILIES = ("deepseek_v3", "apertus", "llama4_text", "bart", "falcon_mamba", "ernie4_5_moe", "laguna")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put benchmarks/ on the path, because its modules import each other as scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_of_using_a_delta_is_right(family: str, tmp_path: Path) -> None:
    from architecture_checks import CHECKS, RIGHT, check_family

    found = check_family(family, tmp_path)
    assert found == dict.fromkeys(("build", *CHECKS), RIGHT)


def test_a_wrong_result_is_told_from_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import architecture_checks as checks

    from peraxis_tools.errors import ToolError

    def wrong(_: Any) -> None:
        raise checks.WrongError("logits differ")

    def refused(_: Any) -> None:
        raise ToolError("is\nrefused")

    def broken(_: Any) -> None:
        raise KeyError("name")

    assert checks.outcome(wrong, [None]) == "WRONG: logits differ"
    assert checks.outcome(refused, [None]) == "is refused"
    assert checks.outcome(broken, [None]).startswith("WRONG: KeyError")
    assert checks.outcome(lambda _: None, [None]) == "right"


def test_the_page_numbers_refusals_and_marks_what_is_wrong() -> None:
    from architecture_checks import CHECKS, RIGHT
    from architectures import table

    right = dict.fromkeys(("build", *CHECKS), RIGHT)
    page = table(
        {
            "fine": right,
            "refusing": {**right, "serve BF16": "one variant a batch", "serve F32": "one variant a batch"},
            "bad": {**right, "LoRA": "WRONG: differs | here"},
            "unbuilt": {"build": "ImportError: timm"},
        }
    )
    assert "| fine | right |" in page
    assert page.count("[1](#refusals)") == 2
    assert "1. one variant a batch" in page
    assert "**WRONG: differs \\| here**" in page
    assert "| unbuilt | ImportError: timm |" in page
    assert "3 of 3" in page


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_transformers_reorders_has_no_place_in_the_live_model(tmp_path: Path) -> None:
    import torch
    from architecture_checks import apply_live, compress, outcome, write_pair
    from transformers import CONFIG_MAPPING

    if "inkling2_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers does not have inkling2_text")
    pair = write_pair("inkling2_text", tmp_path, torch.bfloat16)
    assert outcome(compress, [pair]) == "right"
    assert "stores it in several tensors, or in another order" in outcome(apply_live, [pair])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["t5", "bert (masked)"])
def test_a_model_that_is_no_decoder_is_loaded_as_its_configuration_says(family: str, tmp_path: Path) -> None:
    import torch
    from architecture_checks import apply, compress, load, outcome, write_pair

    pair = write_pair(family, tmp_path, torch.bfloat16)
    assert [outcome(check, [pair]) for check in (compress, apply, load)] == ["right"] * 3
    assert type(peraxis.load_model(pair.base, pair.delta)) is pair.kind
