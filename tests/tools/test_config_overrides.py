"""An option of the command line wins over `--config`: it drops the options of the file that contradict it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peraxis_tools.compress.options import CompressOptions, OptionError
from peraxis_tools.compress.options_file import options_of

CONFIGS: list[dict[str, Any]] = [
    {"target-ratio": 8},
    {"target-size": "1MB", "calibration": "c4"},
    {"masks": 2, "exact": "norm", "prefer": "speed"},
    {"exact": ".*", "prefer": "speed"},
    {"fit": "none"},
    {"fit": "adamw", "masks": 1, "calibration": "c4"},
    {"fit": "closed-form", "calibration": "c4"},
    {"recipe": "best", "calibration": ["c4", "org/chat"], "seed": 3, "device": "cpu", "refine-rounds": 2},
    {"recipe": "quick", "axis": "row", "embeddings": "full", "masks": 2},
]
GIVEN: list[dict[str, Any]] = [
    {"target_size": 200_000},
    {"target_ratio": 12.0},
    {"masks": 2},
    {"exact": ".*"},
    {"exact": "norm"},
    {"fit": "none"},
    {"fit": "adamw", "calibration": "c4"},
    {"fit": "closed-form", "calibration": "c4"},
    {"calibration": "c4"},
    {"calibration": "c4", "refine_rounds": 2},
    {"distill_samples": 0},
    {"axis": "row"},
    {"embeddings": "sign"},
]


def write(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_each_option_of_the_command_line_wins_over_each_config(
    config: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    options = options_of(write(tmp_path / "a.yaml", config), given)
    assert {name: getattr(options, name) for name in given} == given


def test_the_options_of_a_config_that_contradict_nothing_are_kept(tmp_path: Path) -> None:
    config = write(tmp_path / "a.yaml", {"recipe": "best", "calibration": "c4", "masks": 2, "seed": 3})
    kept = options_of(config, {"target_ratio": 12.0})
    assert (kept.calibration, kept.seed, kept.distill_samples, kept.masks) == ("c4", 3, 550, "auto")
    plain = options_of(config, {"fit": "none"})
    assert plain == CompressOptions(fit="none", masks=2)
    assert options_of(config, {"distill_samples": 0}).distill_lr == CompressOptions().distill_lr
    assert options_of(config, {"masks": "auto"}).masks == "auto"


@pytest.mark.parametrize(
    "given",
    [
        {"target_size": 200_000, "target_ratio": 12.0},
        {"target_size": 200_000, "masks": 2},
        {"fit": "none", "calibration": "c4"},
        {"exact": ".*", "axis": "row"},
        {"distill_samples": 0, "distill_lr": 0.5},
    ],
    ids=str,
)
def test_two_options_of_the_command_line_that_contradict_each_other_are_refused_beside_a_config(
    given: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(OptionError) as caught:
        options_of(write(tmp_path / "a.yaml", {"recipe": "best", "calibration": "c4"}), given)
    assert "a.yaml" not in str(caught.value)


def test_a_text_of_a_config_that_is_not_there_is_named_with_the_config(tmp_path: Path) -> None:
    config = tmp_path / "options.yaml"
    config.write_text("calibration: not-here.jsonl\n")
    with pytest.raises(OptionError, match=rf"^{config}: text not-here\.jsonl: no such file.*--calibration\)$"):
        options_of(config, {})
    text = tmp_path / "text.txt"
    text.write_text("text")
    assert options_of(config, {"calibration": (str(text),)}).calibration == str(text)
