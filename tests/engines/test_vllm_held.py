"""Components in memory: the bytes of the file, and for kernels the exact scales in binary32."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import peraxis_format as pf
from peraxis_format.engines.vllm.held import HeldComponent
from peraxis_format.engines.vllm.patches import patch_of
from peraxis_format.ops.rebuild.torch import component_tensors
from tests.loader.support import random_module

AXES = tuple(pf.Axis)
BOXES = [((0, 24), (0, 43)), ((6, 18), (0, 43)), ((0, 24), (11, 29)), ((4, 7), (16, 43)), ((0, 24), (0, 41))]


def module_of(*axes: pf.Axis) -> pf.ModuleDelta:
    torch.manual_seed(3)
    weight = torch.randn(24, 43).to(torch.bfloat16)
    return random_module("w", weight, np.random.default_rng(5), axes, pf.Encoding.SIGN)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("box", BOXES)
def test_what_kernels_get_is_the_box_of_the_components_to_the_bit(
    axis: pf.Axis, box: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    module = module_of(axis, pf.Axis.ROW_COL)
    (components,) = component_tensors(module, torch.device("cpu"))
    rows, columns = slice(*box[0]), slice(*box[1])
    for own, whole in zip(patch_of(module, box, (0, 24)).factors, components, strict=True):
        assert torch.equal(own.row, whole.row[rows])
        assert torch.equal(own.col, whole.col[columns])
        assert torch.equal(own.dense(slice(None)), whole.dense(rows)[:, columns])
        assert own.plain == whole.plain
        assert (own.row.dtype, own.col.dtype) == (torch.float32, torch.float32)
        unused = pf.unpack_signs(own.mask.numpy(), 8 * own.mask.shape[1])[:, columns.stop - columns.start :]
        assert not unused.any()  # kernels add the inputs of unused bits, too


@pytest.mark.parametrize("exponent", [-64, -20, 0, 63])
def test_scales_are_exact_for_every_exponent(exponent: int) -> None:
    (component,) = module_of(pf.Axis.ROW).components
    smallest = np.full_like(component.row, np.float16(2.0**-24))
    extreme = dataclasses.replace(component, exponent=exponent, row=smallest)
    wide = HeldComponent.of(extreme, ((0, 24), (0, 43)), 43).wide()
    assert wide.row.double().tolist() == [2.0 ** (exponent - 24)] * 24


@pytest.mark.parametrize("axis", AXES)
def test_a_patch_takes_the_bytes_of_its_module_in_the_file(axis: pf.Axis) -> None:
    module = module_of(axis, pf.Axis.ROW_COL)
    stored = sum(array.nbytes for name, array in module.tensors() if not name.endswith("scalar"))
    assert patch_of(module, ((0, 24), (0, 43)), (0, 24)).nbytes == stored


def test_a_patch_has_its_own_memory() -> None:
    module = module_of(pf.Axis.ROW_COL)
    patch = patch_of(module, ((0, 24), (0, 43)), (0, 24))
    before = [tensor.clone() for tensor in (patch.factors[0].mask, patch.factors[0].row, patch.factors[0].col)]
    for _, array in module.tensors():
        array[...] = 0
    after = patch.factors[0]
    assert all(map(torch.equal, before, (after.mask, after.row, after.col)))
