"""`verify --max-error` passes for the fine-tune of a delta alone, whatever else a checkpoint changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peraxis
import peraxis_format as pxd
from peraxis_tools.chain import update
from peraxis_tools.diff import diff_checkpoint
from peraxis_tools.errors import CheckFailedError, ToolError
from tests.factories import sign_module, write_checkpoint, write_delta

Tensors = dict[str, tuple[np.ndarray, pxd.DType]]
Q, EMBEDDING, NORM, IDS = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "norm.weight", "ids"


def values(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def base() -> Tensors:
    return {
        EMBEDDING: (values(1, (16, 32)), pxd.DType.F32),
        Q: (values(2, (32, 32)), pxd.DType.F32),
        NORM: (values(3, (32,)), pxd.DType.F32),
        IDS: (np.arange(4, dtype=np.int64), pxd.DType.I64),
    }


@pytest.fixture
def tuned(base: Tensors) -> Tensors:
    grown = np.concatenate([base[EMBEDDING][0] + 0.01, values(4, (3, 32))])
    changed = {Q: base[Q][0] + 0.01 * values(5, (32, 32)), EMBEDDING: grown}
    return {name: (changed.get(name, array), dtype) for name, (array, dtype) in base.items()}


def checked(tmp_path: Path, delta: Path, wanted: Tensors, bound: float) -> Any:
    write_checkpoint(tmp_path / "wanted", wanted)
    return peraxis.verify(delta, base=tmp_path / "base", fine_tuned=tmp_path / "wanted", max_error=bound)


@pytest.fixture
def lossless(tmp_path: Path, base: Tensors, tuned: Tensors) -> Path:
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned)
    update(tmp_path / "base", tmp_path / "tuned", tmp_path / "u.pxd")
    return tmp_path / "u.pxd"


def test_a_lossless_delta_has_no_error(tmp_path: Path, lossless: Path, tuned: Tensors) -> None:
    assert checked(tmp_path, lossless, tuned, 0.0)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (EMBEDDING, lambda x: np.concatenate([x[:17], 2 * x[17:]]), "2 of 3 new rows differ"),
        (EMBEDDING, lambda x: x[:17], "shape 19x32 -> 17x32"),
        (IDS, lambda x: x + 1, "compared bit by bit"),
        (NORM, lambda x: x.astype(np.float16), "dtype F32 -> F16"),
        (NORM, lambda x: 2 * x, "relative error"),
        (Q, lambda x: np.where(x == x.max(), np.nan, x), "a weight that is not finite differs"),
    ],
)
def test_another_checkpoint_fails(
    tmp_path: Path, lossless: Path, tuned: Tensors, name: str, change: Any, said: str
) -> None:
    array = change(tuned[name][0])
    other = tuned | {name: (array, pxd.DType.F16 if array.dtype == np.float16 else tuned[name][1])}
    with pytest.raises(CheckFailedError, match=said):
        checked(tmp_path, lossless, other, 0.0)


def test_the_same_odd_values_are_no_error(tmp_path: Path, base: Tensors, tuned: Tensors) -> None:
    odd = np.array([np.nan, np.inf, -np.inf, -0.0], np.float32)
    before, after = base[NORM][0].copy(), base[NORM][0].copy()
    before[:2], after[:4] = odd[:2], odd
    write_checkpoint(tmp_path / "base", base | {NORM: (before, pxd.DType.F32)})
    wanted = tuned | {NORM: (after, pxd.DType.F32)}
    write_checkpoint(tmp_path / "tuned", wanted)
    update(tmp_path / "base", tmp_path / "tuned", tmp_path / "u.pxd")
    assert checked(tmp_path, tmp_path / "u.pxd", wanted, 0.0)


def test_a_weight_that_rounding_makes_infinite_is_an_infinite_error(tmp_path: Path) -> None:
    base = np.full((8, 64), 65000, np.float16)
    tuned = (base.astype(np.float32) + np.where(values(6, (8, 64)) > 0, 504, -504)).astype(np.float16)
    write_checkpoint(tmp_path / "base", {Q: (base, pxd.DType.F16)})
    write_checkpoint(tmp_path / "tuned", {Q: (tuned, pxd.DType.F16)})
    signs = sign_module(np.random.default_rng(7), Q, base, base_dtype=pxd.DType.F16, axes=(pxd.Axis.TENSOR,))
    (component,) = signs.components
    large = replace(component, exponent=11, scalar=np.ones(1, np.float16))
    write_delta(tmp_path / "d.pxd", [replace(signs, components=(large,))])
    (found,) = diff_checkpoint(tmp_path / "d.pxd", tmp_path / "tuned", base=tmp_path / "base").modules
    assert found.distance is None
    assert not found.identical
    with pytest.raises(CheckFailedError, match="a weight that is not finite differs"):
        peraxis.verify(tmp_path / "d.pxd", base=tmp_path / "base", fine_tuned=tmp_path / "tuned", max_error=10.0)


def test_a_delta_without_changes_passes_for_its_base_alone(tmp_path: Path, base: Tensors, tuned: Tensors) -> None:
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "same", base)
    update(tmp_path / "base", tmp_path / "same", tmp_path / "u.pxd")
    assert checked(tmp_path, tmp_path / "u.pxd", base, 0.0)
    with pytest.raises(CheckFailedError, match="relative error 1 "):
        checked(tmp_path, tmp_path / "u.pxd", base | {Q: tuned[Q]}, 0.5)


def test_a_tied_tensor_is_compared_with_its_own_in_the_checkpoint(
    tmp_path: Path, base: Tensors, tuned: Tensors
) -> None:
    head = {"lm_head.weight": tuned[EMBEDDING]}
    write_checkpoint(tmp_path / "base", base | {"lm_head.weight": base[EMBEDDING]})
    write_checkpoint(tmp_path / "tuned", tuned | head)
    update(tmp_path / "base", tmp_path / "tuned", tmp_path / "u.pxd")
    with pxd.open(tmp_path / "u.pxd") as file:
        assert file.manifest.tied
    assert checked(tmp_path, tmp_path / "u.pxd", tuned | head, 0.0)
    other = {"lm_head.weight": (2 * tuned[EMBEDDING][0], pxd.DType.F32)}
    with pytest.raises(CheckFailedError, match=r"(relative error|new rows differ)"):
        checked(tmp_path, tmp_path / "u.pxd", tuned | other, 0.1)
    assert not diff_checkpoint(tmp_path / "u.pxd", tmp_path / "wanted", base=tmp_path / "base").equal
    write_checkpoint(tmp_path / "wanted", tuned)
    with pytest.raises(CheckFailedError, match=r"same tensors .* lm_head\.weight"):
        peraxis.verify(tmp_path / "u.pxd", base=tmp_path / "base", fine_tuned=tmp_path / "wanted", max_error=0.1)


def test_an_alias_of_a_module_with_signs_is_compared_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    base = {EMBEDDING: (values(1, (16, 32)), pxd.DType.F32)}
    head = {"lm_head.weight": base[EMBEDDING]}
    write_checkpoint(tmp_path / "base", base | head)
    module = sign_module(rng, EMBEDDING, base[EMBEDDING][0], base_dtype=pxd.DType.F32)
    write_delta(tmp_path / "d.pxd", [module], tied=[(EMBEDDING, "lm_head.weight")])
    wanted = {EMBEDDING: (pxd.reconstruct(module, base[EMBEDDING][0]), pxd.DType.F32)}
    assert checked(tmp_path, tmp_path / "d.pxd", wanted | {"lm_head.weight": wanted[EMBEDDING]}, 0.01)
    with pytest.raises(CheckFailedError, match=r"(relative error|the base.s)"):
        checked(tmp_path, tmp_path / "d.pxd", wanted | head, 0.01)


def test_a_bound_of_zero_sees_the_sign_of_a_zero(tmp_path: Path, base: Tensors) -> None:
    zeros = np.zeros(32, np.float32)
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", base | {NORM: (-zeros, pxd.DType.F32)})
    update(tmp_path / "base", tmp_path / "tuned", tmp_path / "u.pxd")
    assert checked(tmp_path, tmp_path / "u.pxd", base | {NORM: (-zeros, pxd.DType.F32)}, 0.0)
    with pytest.raises(CheckFailedError, match="in bits that no distance shows"):
        checked(tmp_path, tmp_path / "u.pxd", base | {NORM: (zeros, pxd.DType.F32)}, 0.0)


def test_an_update_that_follows_another_is_not_compared_with_a_fine_tune(
    tmp_path: Path, base: Tensors, tuned: Tensors, lossless: Path
) -> None:
    write_checkpoint(tmp_path / "next", tuned | {NORM: (2 * tuned[NORM][0], pxd.DType.F32)})
    update(tmp_path / "tuned", tmp_path / "next", tmp_path / "v.pxd")
    with pytest.raises(ToolError, match=r"follows u\.pxd; .* apply the chain"):
        peraxis.verify(
            [tmp_path / "v.pxd", lossless], base=tmp_path / "base", fine_tuned=tmp_path / "next", max_error=0.0
        )
    assert peraxis.verify(tmp_path / "v.pxd", base=tmp_path / "tuned", fine_tuned=tmp_path / "next", max_error=0.0)
