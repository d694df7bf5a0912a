"""The parts of a delta join to the bytes of the whole in any order, and errors name a wrong set of parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import peraxis_format as pxd
from peraxis_tools.apply import apply
from peraxis_tools.errors import ToolError
from peraxis_tools.merge import merge_parts
from peraxis_tools.split import split
from tests.factories import random_storage, sign_module, write_checkpoint, write_delta
from tests.tools.merge_pairs import BF16, exact


def whole(folder: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    shapes = {"embed.weight": (40, 16), "a.weight": (24, 16), "b.weight": (8, 24), "norm.weight": (16,)}
    base = {name: random_storage(rng, shape) for name, shape in shapes.items()}
    modules = [
        sign_module(rng, "embed.weight", base["embed.weight"], rows=43),
        sign_module(rng, "a.weight", base["a.weight"], axes=(pxd.Axis.ROW_COL, pxd.Axis.TENSOR)),
        exact("norm.weight", base["norm.weight"], random_storage(rng, (16,))),
        sign_module(rng, "b.weight", base["b.weight"], axes=(pxd.Axis.COL,)),
        exact("new.weight", None, random_storage(rng, (5, 3))),
    ]
    return write_delta(
        folder / "whole.pxd",
        modules,
        tied=[("embed.weight", "lm_head.weight")],
        dropped=["old.bias"],
        assets={"config.json": b"{}", "tokenizer.json": b"{1}"},
    )


@given(st.integers(2, 5), st.randoms(use_true_random=False))
@settings(max_examples=15)
def test_parts_in_any_order_join_to_the_bytes_of_the_whole(tmp_path_factory, count, random) -> None:
    folder = tmp_path_factory.mktemp("parts")
    path = whole(folder)
    parts = [part.path for part in split(path, folder / "parts", parts=count).parts]
    assert len(parts) == count
    ids = [part.content_id for part in merge_parts(parts, folder / "ordered.pxd").inputs]
    random.shuffle(parts)
    result = merge_parts(parts, folder / "joined.pxd")
    assert [part.content_id for part in result.inputs] == ids
    assert (folder / "joined.pxd").read_bytes() == path.read_bytes()


def test_a_folder_means_its_parts_in_python_too(tmp_path: Path) -> None:
    path = whole(tmp_path)
    split(path, tmp_path / "parts", parts=3)
    assert merge_parts(tmp_path / "parts", tmp_path / "joined.pxd").bytes == path.stat().st_size
    assert (tmp_path / "joined.pxd").read_bytes() == path.read_bytes()
    merge_parts([str(tmp_path / "parts")], tmp_path / "again.pxd")
    assert (tmp_path / "again.pxd").read_bytes() == path.read_bytes()
    (tmp_path / "none").mkdir()
    with pytest.raises(ToolError, match=r"no \.pxd"):
        merge_parts(tmp_path / "none", tmp_path / "x.pxd")


def test_every_part_is_a_valid_file_that_apply_refuses(tmp_path: Path) -> None:
    path = whole(tmp_path)
    base = write_checkpoint(tmp_path / "base", {"x": (np.zeros(3, np.uint16), BF16)})
    for part in split(path, tmp_path / "parts", parts=3).parts:
        with pxd.open(part.path) as file:
            file.verify()
        with pytest.raises(ToolError, match="is a part with"):
            apply(base, part.path, tmp_path / "out")


def test_a_missing_part_a_doubled_one_and_a_stranger_are_named(tmp_path: Path) -> None:
    parts = [part.path for part in split(whole(tmp_path), tmp_path / "parts", parts=3).parts]
    with pytest.raises(ToolError, match="of 5 modules are in none of the parts"):
        merge_parts(parts[:2], tmp_path / "x.pxd")
    with pytest.raises(ToolError, match="pass each part once"):
        merge_parts([*parts, parts[0]], tmp_path / "x.pxd")
    (tmp_path / "other").mkdir()
    with pxd.open(whole(tmp_path / "other", seed=1)) as other:
        stranger = other.path
    with pytest.raises(ToolError, match="parts"):
        merge_parts([parts[0], stranger], tmp_path / "x.pxd")
