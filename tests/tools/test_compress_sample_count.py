"""The samples of a calibration text follow from the model where none are asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peraxis_format import DType, TensorInfo
from peraxis_tools.checkpoints.checkpoint import open_checkpoint
from peraxis_tools.checkpoints.environment import resolve_dtype
from peraxis_tools.compress import options_file
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.plan import pair_plan
from peraxis_tools.compress.plan.sample_count import sample_count
from peraxis_tools.compress.run.inputs import generated_count
from tests.tools.compress_pairs import llama_config, write_pair


def count(shapes: dict[str, tuple[int, ...]], length: int = 512) -> int:
    file = Path("model.safetensors")
    return sample_count(
        [TensorInfo(name, DType.BF16, shape, file, 0, 2 * math.prod(shape)) for name, shape in shapes.items()], length
    )


def test_a_small_model_gets_the_most() -> None:
    assert count({"model.layers.0.mlp.up_proj.weight": (64, 16)}) == 50


def test_a_large_model_gets_four_thirds_of_its_width() -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (4096, 6144) for i in range(6)}  # 151 million weights
    assert count(shapes) == 16  # 8192 tokens


def test_shorter_samples_are_more() -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (4096, 6144) for i in range(6)}
    assert count(shapes, length=256) == 32


def test_a_table_does_not_count_as_wide() -> None:
    shapes = {"model.embed_tokens.weight": (300000, 500), "model.layers.0.mlp.up_proj.weight": (768, 500)}
    assert count(shapes) == 4  # 2^38 / 150 million weights


def test_an_output_does_not_count_as_wide() -> None:
    shapes = {f"model.layers.{i}.mlp.gate_up_proj.weight": (32768, 1536) for i in range(3)}
    assert count(shapes) == 4


def test_experts_get_the_most() -> None:
    shapes = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": (4096, 6144) for i in range(6)}
    assert count(shapes) == 50


def test_long_samples_are_four_at_least() -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (4096, 6144) for i in range(6)}
    assert count(shapes, length=8192) == 4


@pytest.mark.parametrize(
    ("given", "samples"),
    [
        ({}, 4),
        ({"calibration_samples": 7}, 7),
        ({"distill_samples": 10}, 50),  # steps follow from the samples
        ({"fit": "adamw"}, 50),
    ],
)
def test_a_run_has_the_samples_of_its_model(
    given: dict[str, Any], samples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_plan, "sample_count", lambda *_: 4)
    write_pair(tmp_path, llama_config(), dtype=torch.float32)
    with open_checkpoint(tmp_path / "tuned") as tuned:
        assert pair_plan.with_text(CompressOptions(calibration="c4", **given), tuned).calibration_samples == samples


def test_options_of_an_earlier_file_without_a_text_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.dumps({"fit": "none", "calibration": None, "calibration_samples": 50})

    @contextmanager
    def earlier(_: Path) -> Iterator[Any]:
        yield SimpleNamespace(manifest=SimpleNamespace(metadata={"peraxis.config": said}))

    monkeypatch.setattr(options_file, "is_delta", lambda _: True)
    monkeypatch.setattr(options_file, "open_delta", earlier)
    options = options_file.options_of(tmp_path / "earlier.pxd", {})
    assert options.resolved_fit == "none"


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({"calibration_samples": 4}, 4),
        ({"calibration_samples": 40}, 16),
        ({"calibration_samples": 40, "generated_samples": 3}, 3),
        ({"calibration_samples": 16, "distill_samples": 28}, 44),
        ({"calibration_samples": 16, "fit": "adamw"}, 0),
        ({"calibration_samples": 16, "hidden_limit": 99}, 0),
    ],
)
def test_the_model_writes_as_many_samples_as_the_text_has(given: dict[str, Any], count: int) -> None:
    checkpoint: Any = SimpleNamespace(full_bytes=100)
    assert generated_count(checkpoint, CompressOptions(calibration="c4", **given)) == count


def test_samples_that_are_asked_for_are_kept() -> None:
    assert CompressOptions(calibration="c4", calibration_samples=7).text_samples == 7
    assert CompressOptions(calibration="c4").text_samples == 50


@pytest.mark.parametrize(("name", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_blocks_are_computed_in_float32_unless_asked_otherwise(name: str, dtype: torch.dtype) -> None:
    assert resolve_dtype(name) is dtype
