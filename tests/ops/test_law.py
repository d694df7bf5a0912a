"""The law of every operation: each backend gives the bits of the reference, or stays within the stated bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import peraxis_format as pxd
from peraxis_format.manifest import ComponentEntry
from peraxis_format.ops.rebuild import rebuild_tensor
from peraxis_format.ops.rebuild.torch import component_tensors
from peraxis_format.ops.signed_matmul import signed_matmul
from peraxis_format.ops.tensors import TORCH_DTYPES, from_storage, storage_array
from peraxis_tools.compress.model.components import apply_components
from peraxis_tools.ops import merge_rows
from peraxis_tools.ops.delta_sums import delta_sums
from peraxis_tools.ops.mask_compare import Columns, differing
from peraxis_tools.ops.sign_search import coordinate_descent_block, gptq_signs_block
from tests.ops.cases import BITWISE_CASES, FLOATS, base_of, module_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
AXES = [
    (pxd.Axis.ROW,),
    (pxd.Axis.TENSOR, pxd.Axis.COL),
    (pxd.Axis.ROW_COL, pxd.Axis.ROW, pxd.Axis.COL, pxd.Axis.TENSOR),
]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflows are intended


def matrices_by_tensor(module: pxd.ModuleDelta, base: pxd.Array, backend: str) -> bytes:
    """Run rebuild_tensor for each matrix."""
    assert module.base is not None
    device = torch.device("cpu") if backend == "numba" else DEVICE
    weights = from_storage(base.copy(), module.base.dtype).reshape(-1, *base.shape[-2:]).to(device)
    found = torch.empty(weights.shape, dtype=TORCH_DTYPES[module.dtype], device=device)
    for weight, components, out in zip(weights, component_tensors(module, device), found, strict=True):
        rebuild_tensor(weight, components, out=out, backend=backend)
    return storage_array(found.cpu()).tobytes()


def by_transfer(module: pxd.ModuleDelta, base: pxd.Array) -> bytes:
    """Run the kernel that swaps variants, which reads a module as its file stores it."""
    from peraxis_format.ops.rebuild.triton import StoredModule, launches

    data, offsets = bytearray(pxd.ALIGNMENT), {}
    for suffix, array in module.tensors():
        data += bytes(-len(data) % pxd.ALIGNMENT)
        offsets[suffix] = len(data)
        data += array.tobytes()
    live = from_storage(base.copy(), module.dtype).to(DEVICE)
    entries = tuple(ComponentEntry(axis=c.axis, exponent=c.exponent) for c in module.components)
    stored = StoredModule(components=entries, offsets=offsets, base=live.clone(), out=live, dtype=module.dtype)
    for launch in launches([stored], DEVICE):
        launch.run(torch.frombuffer(data, dtype=torch.uint8).to(DEVICE))
    return storage_array(live.cpu()).tobytes()


def by_student(module: pxd.ModuleDelta, base: pxd.Array) -> bytes:
    """Rebuild weights as compression does for its student."""
    assert module.base is not None
    weight = from_storage(base.copy(), module.base.dtype)
    return storage_array(apply_components(weight, module.components, TORCH_DTYPES[module.dtype])).tobytes()


REBUILD: dict[str, tuple[str, Callable[[pxd.ModuleDelta, pxd.Array], bytes]]] = {
    "rebuild numba": ("numba", lambda m, b: pxd.reconstruct(m, b, backend="numba").tobytes()),
    "rebuild_tensor torch": ("torch", lambda m, b: matrices_by_tensor(m, b, "torch")),
    "rebuild_tensor numba": ("numba", lambda m, b: matrices_by_tensor(m, b, "numba")),
    "rebuild_transfer triton": ("triton", by_transfer),
    "the student of compress": ("torch", by_student),
}


@pytest.mark.parametrize("way", REBUILD)
@pytest.mark.parametrize("case", BITWISE_CASES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_backend_rebuilds_the_bits_of_the_reference(way: str, case: str, dtype: pxd.DType) -> None:
    package, rebuilt = REBUILD[way]
    pytest.importorskip(package)
    for base_dtype in (dtype,) if package == "triton" else FLOATS:
        base = base_of(case, base_dtype)
        for axes in AXES:
            module = module_of(case, base, base_dtype, dtype, axes)
            expected = pxd.reconstruct(module, base, backend="numpy")
            assert rebuilt(module, base) == expected.tobytes(), (base_dtype, axes)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_reference_makes_every_nan_canonical_and_meets_ties_and_infinities(dtype: pxd.DType) -> None:
    """The cases have the values of their names, so that the law above covers more than ordinary numbers."""
    canonical = {pxd.DType.BF16: 0x7FC0, pxd.DType.F16: 0x7E00, pxd.DType.F32: 0x7FC00000}[dtype]
    for case in BITWISE_CASES:
        base = base_of(case, dtype)
        out = pxd.reconstruct(module_of(case, base, dtype, dtype, (pxd.Axis.ROW,)), base, backend="numpy")
        values, before = pxd.to_float32(out, dtype), pxd.to_float32(base, dtype)
        assert np.isnan(values).any() == (case == "NaN")
        assert np.isinf(values).any() == (case == "infinite")
        if case == "NaN":
            bits = out.view(f"u{dtype.itemsize}")[np.isnan(values)]
            assert set(bits.tolist()) == {canonical}
        if case == "halfway":
            exact = before.astype(np.float64) + pxd.dense_delta(
                module_of(case, base, dtype, dtype, (pxd.Axis.ROW,))
            ).astype(np.float64)
            assert np.mean(exact != values) > 0.2  # rounded to the even neighbour


@pytest.mark.parametrize("backend", ["torch", "numba", "triton"])
@pytest.mark.parametrize("case", ["finite", "subnormal", "odd width"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_backend_multiplies_with_signs_within_the_bound_of_float64(
    backend: str, case: str, dtype: pxd.DType
) -> None:
    pytest.importorskip(backend)
    base = base_of(case, dtype)
    device = torch.device("cpu") if backend == "numba" else DEVICE
    module = module_of("finite", base, dtype, dtype, AXES[2])
    (components,) = component_tensors(module, device)
    x = from_storage(base_of(case, dtype, seed=5)[:7].copy(), dtype).to(device)
    out = torch.randn(7, base.shape[0]).to(device)
    before = out.clone()
    signed_matmul([(x, components, out)], backend=backend)
    dense = [component.dense(slice(None)).double() for component in components]
    exact = before.double() + x.double() @ sum(dense).T
    size = x.double().abs() @ sum(part.abs() for part in dense).T
    bound = 2.0**-24 * ((base.shape[1] + 8) * size + 2 * len(dense) * (before.double().abs() + size)) + 2.0**-126
    assert torch.all((out.double() - exact).abs() <= bound)
    assert not torch.equal(out, before)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", [case for case in BITWISE_CASES if case != "batch"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_signs_and_sums_of_a_delta_are_the_reference_bits(case: str, dtype: pxd.DType, weighted: bool) -> None:
    pytest.importorskip("numba")
    base, tuned = base_of(case, dtype), base_of(case, dtype, seed=9)
    weights = np.random.default_rng(2).random(base.shape[1]) if weighted else None
    one, two = (
        delta_sums(base, tuned, base_dtype=dtype, dtype=dtype, weights=weights, backend=backend)
        for backend in ("numpy", "numba")
    )
    assert np.array_equal(one.mask, two.mask)
    for a, b in ((one.row, two.row), (one.col, two.col), (one.square, two.square)):
        assert np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize("case", [case for case in BITWISE_CASES if case != "batch"])
def test_what_a_merge_does_to_rows_is_the_reference_bits(case: str) -> None:
    pytest.importorskip("numba")
    blocks = [base_of(case, pxd.DType.F32, seed=seed).astype(np.float32) for seed in range(3)]
    for block, value in zip(blocks, (4.0, 2.0, 0.0), strict=True):
        block[0] = value  # their weighted sum is zero
    rng = np.random.default_rng(4)
    chances = rng.integers(0, 1 << 32, blocks[0].size, np.uint32)
    thresholds = np.array([0.0, 0.1, 0.5], np.float32)
    found: dict[str, list[np.ndarray]] = {}
    for backend in ("numpy", "numba"):
        kept, counts = np.zeros(blocks[0].shape), [np.zeros(merge_rows.HALF, np.int64) for _ in range(2)]
        merge_rows.keep_some(kept, blocks[0], chances, 0.7, 0.4, backend=backend)
        merge_rows.histogram(blocks[0], None, counts[0], backend=backend)
        merge_rows.histogram(blocks[0], int(counts[0].argmax()), counts[1], backend=backend)
        elected = [
            merge_rows.elect(blocks, np.array([0.5, -1.0, 2.0]), thresholds, normalized=n, backend=backend)
            for n in (False, True)
        ]
        rows = np.linspace(0.1, 1.0, len(blocks[0]))
        found[backend] = [kept, *counts, *elected, merge_rows.columns(blocks[0], rows, backend=backend)]
    for a, b in zip(found["numpy"], found["numba"], strict=True):
        assert a.shape == b.shape
        assert np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize("width", [1, 7, 8, 65])
def test_masks_are_compared_alike_by_every_backend(width: int) -> None:
    pytest.importorskip("numba")
    rng = np.random.default_rng(width)
    a, b = (rng.integers(0, 256, (50, width), np.uint8) for _ in range(2))
    weights = rng.random(8 * width)
    exact = np.unpackbits(a ^ b, axis=1, bitorder="little") @ weights
    for backend in ("numpy", "numba"):
        counts, sums = differing(a, b, Columns(weights), backend=backend)
        assert np.array_equal(counts, np.unpackbits(a ^ b, axis=1).sum(axis=1))
        np.testing.assert_allclose(sums, exact, rtol=4e-6)


def signs_of_integers(backend: str, components: int) -> list[Any]:
    """Run both steps on small integers and powers of two. Nothing is rounded, so all backends must give equal bits."""
    device = torch.device("cpu") if backend == "numba" else DEVICE
    generator = torch.Generator().manual_seed(components)

    def integers(*shape: int, low: int = -8) -> torch.Tensor:
        return torch.randint(low, 9, shape, generator=generator).float().to(device)

    d_out, n = 21, 13
    upper = torch.triu(integers(n, n), 1).div(8).sign() + 2 * torch.eye(n, device=device)
    work, errors = 64 * integers(d_out, n), torch.zeros(d_out, n, device=device)
    work[:7, 0] = 0  # the sign of 0 is +1
    signs = torch.zeros(components, d_out, n, dtype=torch.bool, device=device)
    rows, cols = integers(components, d_out, low=1), integers(components, n, low=1)
    gptq_signs_block(work, upper, rows, cols, signs, errors, backend=backend)
    gradient, values = integers(d_out, n), integers(components, d_out, n)
    half = integers(n, n)
    change = torch.zeros(d_out, n, device=device)
    coordinate_descent_block(
        gradient, half + half.T + 16 * torch.eye(n, device=device), values, change, backend=backend
    )
    return [tensor.cpu() for tensor in (signs, errors, gradient, values, change)]


@pytest.mark.parametrize("backend", ["numba", "triton"])
@pytest.mark.parametrize("components", [1, 3])
def test_signs_are_searched_alike_where_nothing_is_rounded(backend: str, components: int) -> None:
    pytest.importorskip(backend)
    expected, found = signs_of_integers("torch", components), signs_of_integers(backend, components)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert expected[0].any()
    assert not expected[0].all()
    assert expected[4].any()
