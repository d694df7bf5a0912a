"""The weights that distillation trains: their values, their gradients, and what the graph keeps of them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from peraxis_format import Axis, Component, ModuleDelta, pack_signs
from peraxis_format.delta import BaseRef, Encoding
from peraxis_format.dtypes import DType
from peraxis_format.ops.rebuild import reconstruct
from peraxis_format.ops.tensors import TORCH_DTYPES, storage_array
from peraxis_tools.checkpoints.parameter_names import ParameterSlice
from peraxis_tools.compress.distill.latents import SignLatents
from peraxis_tools.compress.distill.parametrization import BuiltWeights, DeltaParametrization, TrainedComponent

BATCHES: list[tuple[int, ...]] = [(), (3,)]


def component(axis: Axis, covered: tuple[int, ...], seed: int) -> Component:
    draw = np.random.default_rng(seed)
    mask = pack_signs(draw.random(covered) < 0.5)
    row = draw.uniform(0.5, 2.0, covered[:-1]).astype(np.float16)
    col = draw.uniform(0.5, 2.0, (*covered[:-2], covered[-1])).astype(np.float16)
    scales: dict[Axis, dict[str, Any]] = {
        Axis.ROW: {"row": row},
        Axis.COL: {"col": col},
        Axis.ROW_COL: {"row": row, "col": col},
        Axis.TENSOR: {"scalar": np.array([0.75], np.float16)},
    }
    return Component(axis=axis, exponent=-3, mask=mask, **scales[axis])


def parametrized(
    components: list[Component], covered: tuple[int, ...], dtype: DType, *, signs: bool = False
) -> tuple[DeltaParametrization, BuiltWeights, list[TrainedComponent]]:
    trained = [TrainedComponent(c, covered, signs=signs, device=torch.device("cpu")) for c in components]
    built = BuiltWeights()
    piece = ParameterSlice("w", "w")
    return (
        DeltaParametrization([(piece, covered[0], nn.ModuleList(trained))], TORCH_DTYPES[dtype], torch.float32, built),
        built,
        trained,
    )


def base_of(shape: tuple[int, ...], dtype: DType) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(TORCH_DTYPES[dtype])


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32])
@pytest.mark.parametrize(("axis", "batch"), list(itertools.product(Axis, BATCHES)))
@pytest.mark.parametrize("signs", [False, True])
def test_a_weight_in_training_has_the_bits_that_apply_writes(
    dtype: DType, axis: Axis, batch: tuple[int, ...], signs: bool
) -> None:
    covered = (*batch, 5, 11)
    components = [component(axis, covered, seed) for seed in (2, 3)]
    base = base_of(covered, dtype)
    parametrization, _, _ = parametrized(components, covered, dtype, signs=signs)
    module = ModuleDelta(
        name="w",
        shape=covered,
        dtype=dtype,
        encoding=Encoding.SIGN,
        base=BaseRef(dtype=dtype, shape=covered, sha256="0" * 64),
        components=tuple(components),
    )
    expected = reconstruct(module, storage_array(base))
    assert np.array_equal(storage_array(parametrization(base).to(base.dtype)), expected)


def test_rows_beyond_the_base_do_not_change() -> None:
    covered = (4, 16)
    parametrization, _, _ = parametrized([component(Axis.ROW_COL, covered, 2)], covered, DType.BF16)
    base = base_of((7, 16), DType.BF16)
    weight = parametrization(base)
    assert torch.equal(weight[4:], base[4:].float())
    assert not torch.equal(weight[:4], base[:4].float())


def dense(base: Tensor, components: list[TrainedComponent], latents: list[Tensor] | None = None) -> Tensor:
    """The weight in plain torch operations, without rounding: its gradients are torch's own."""
    total = base.float()
    for k, each in enumerate(components):
        row, col = each.factors()
        signs = torch.stack([each.signs(e, slice(0, row.shape[1])) for e in range(len(row))])
        if latents is not None:
            soft = latents[k].clamp(-3.0, 3.0)
            signs = soft + (signs - soft).detach()
        total = total + (signs * (row.unsqueeze(-1) * col.unsqueeze(-2))).reshape(base.shape)
    return total


def latents_of(component: TrainedComponent) -> SignLatents:
    assert component.latents is not None
    return component.latents


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize(("axis", "batch"), list(itertools.product(Axis, BATCHES)))
def test_gradients_are_those_of_plain_operations(axis: Axis, batch: tuple[int, ...], signs: bool) -> None:
    covered = (*batch, 6, 13)
    parametrization, _, trained = parametrized(
        [component(axis, covered, seed) for seed in (2, 3)], covered, DType.BF16, signs=signs
    )
    latents = None
    if signs:
        draw = np.random.default_rng(4)
        for each in trained:  # some of them beyond the clip
            state = latents_of(each).arrays()
            state["value"] = draw.integers(-32767, 32768, state["value"].shape, np.int16)
            latents_of(each).restore({**state, "mask": pack_signs(state["value"] >= 0)})
        latents = [latents_of(each).values().requires_grad_() for each in trained]
    base, weights = base_of(covered, DType.BF16), torch.randn(covered)
    parameters = [p for each in trained for p in each.parameters()]
    found = torch.autograd.grad((parametrization(base) * weights).sum(), parameters)
    expected = torch.autograd.grad((dense(base, trained, latents) * weights).sum(), [*parameters, *(latents or ())])
    for a, b in zip(found, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for each, b in zip(trained if signs else (), expected[len(found) :], strict=True):
        assert (b == 0).any()
        mean = torch.from_numpy(latents_of(each).arrays()["mean"]).view(torch.bfloat16).float()
        torch.testing.assert_close(mean, 0.1 * b, rtol=2**-8, atol=0.0)


def test_the_graph_keeps_no_built_weight_and_gives_the_same_gradients() -> None:
    covered = (24, 32)
    parametrization, built, trained = parametrized([component(Axis.ROW_COL, covered, 2)], covered, DType.BF16)
    base = base_of(covered, DType.BF16)
    x = torch.randn(3, 32, requires_grad=True)
    parameters = [x, *(p for each in trained for p in each.parameters())]

    def kept_and_gradients(forgotten: bool) -> tuple[list[int], tuple[Tensor, ...]]:
        kept: list[int] = []

        def pack(saved: Tensor) -> Tensor:
            kept.append(saved.untyped_storage().nbytes())
            return saved

        def run() -> Tensor:
            hidden = functional.linear(x, parametrization(base))
            return functional.linear(hidden @ parametrization(base), parametrization(base).clone()).square().sum()

        if forgotten:
            with saved_tensors_hooks(pack, lambda saved: saved), built.forgotten():
                loss = run()
        else:
            with saved_tensors_hooks(pack, lambda saved: saved):
                loss = run()
        return kept, torch.autograd.grad(loss, parameters)

    weight = 4 * covered[0] * covered[1]
    plain, expected = kept_and_gradients(forgotten=False)
    without, found = kept_and_gradients(forgotten=True)
    assert weight in plain
    assert without.count(weight) <= 1  # the copy that the model made itself
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_experts_of_one_parameter_are_built_once_for_all_that_read_them() -> None:
    covered = (4, 6, 16)
    parametrization, built, trained = parametrized([component(Axis.ROW_COL, covered, 2)], covered, DType.BF16)
    base, x = base_of(covered, DType.BF16), torch.randn(4, 3, 16)
    parameters = [p for each in trained for p in each.parameters()]

    def loss() -> Tensor:
        return torch.stack([functional.linear(x[e], parametrization(base)[e]).square().sum() for e in range(4)]).sum()

    builds, build = [], parametrization.build
    parametrization.build = lambda value: (builds.append(1), build(value))[1]  # type: ignore[method-assign]
    with built.forgotten():
        found = torch.autograd.grad(loss(), parameters)
    assert len(builds) == 1
    plain = dense(base, trained)
    rounded = plain + (parametrization(base) - plain).detach()
    expected = torch.autograd.grad(torch.einsum("eod,end->eno", rounded, x).square().sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    built.clear()
    parametrization(base)
    assert len(builds) == 2
