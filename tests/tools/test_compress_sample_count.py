"""The samples of a calibration text follow from the model where none are asked for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from peraxis_format import DType, TensorInfo
from peraxis_tools.compress.options import CompressOptions
from peraxis_tools.compress.plan.sample_count import sample_count
from peraxis_tools.environment import resolve_dtype


def count(shapes: dict[str, tuple[int, ...]], length: int = 512) -> int:
    file = Path("model.safetensors")
    return sample_count(
        [TensorInfo(name, DType.BF16, shape, file, 0, 2 * math.prod(shape)) for name, shape in shapes.items()], length
    )


def test_a_small_model_gets_the_most() -> None:
    assert count({"model.layers.0.mlp.up_proj.weight": (64, 16)}) == 50


def test_a_large_model_gets_four_thirds_of_its_width() -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (6144, 4096) for i in range(6)}  # 151 million weights
    assert count(shapes) == 16  # 8192 tokens


def test_shorter_samples_are_more() -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (6144, 4096) for i in range(6)}
    assert count(shapes, length=256) == 32


def test_a_table_does_not_count_as_wide() -> None:
    shapes = {"model.embed_tokens.weight": (300000, 500), "model.layers.0.mlp.up_proj.weight": (768, 500)}
    assert count(shapes) == 4  # 2^38 / 150 million weights


def test_samples_that_are_asked_for_are_kept() -> None:
    assert CompressOptions(calibration="c4", calibration_samples=7).text_samples == 7
    assert CompressOptions(calibration="c4").text_samples == 50


@pytest.mark.parametrize(("name", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_blocks_are_computed_in_float32_unless_asked_otherwise(name: str, dtype: torch.dtype) -> None:
    assert resolve_dtype(name) is dtype
