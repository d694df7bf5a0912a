"""The serving kernels give each row its own variant within the bound of float64, including odd shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import peraxis_format as pf
from peraxis_format.ops.rebuild import rebuild_tensor
from peraxis_format.ops.rebuild.torch import ComponentTensors, component_tensors
from peraxis_format.ops.tensors import dtype_of
from peraxis_format.torch.serve.rows import Rows
from tests.loader.support import random_component
from tests.loader.test_fast import module_of

kernels = pytest.importorskip("peraxis_format.ops.rebuild.triton", reason="triton is not installed")
serving = pytest.importorskip("peraxis_format.ops.signed_matmul.triton")
launch = pytest.importorskip("peraxis_format.ops.signed_matmul.launch")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def serving_table(variants: Sequence[Sequence[ComponentTensors]]) -> tuple[Tensor, int]:
    """Return the table of components of signed_matmul/triton.py, and TERMS."""
    table = launch.FactorTable.of(0, 0, dict(enumerate(variants)), DEVICE)
    return table.terms, table.most


class Batched:
    """Random rows of several variants of a random linear: inputs and expected outputs of the serving kernels."""

    def __init__(self, rows: int, d_out: int, d_in: int, dtype: torch.dtype, *, base: bool = True) -> None:
        rng = np.random.default_rng(rows + d_in)
        torch.manual_seed(rows)
        self.weight = torch.randn(d_out, d_in).to(dtype).to(DEVICE)
        shape, kind = (d_out, d_in), dtype_of(self.weight, "weight")
        self.variants = []
        for axes in ((pf.Axis.ROW,), (pf.Axis.ROW, pf.Axis.COL, pf.Axis.TENSOR), (pf.Axis.ROW_COL, pf.Axis.ROW)):
            components = tuple(random_component(rng, axis, shape, 0.1) for axis in axes)
            self.variants.append(component_tensors(module_of(components, shape, kind, kind), DEVICE)[0])
        self.table, self.most = serving_table(self.variants)
        self.ids = [int(v) for v in rng.integers(-1 if base else 0, 3, rows)]
        self.x = torch.randn(rows, d_in).to(dtype).to(DEVICE)
        self.batch = Rows(tuple(self.ids)).batch((rows,), DEVICE)
        self.bits = torch.uint32 if dtype == torch.float32 else torch.uint16
        self.kind = {torch.float32: kernels.F32, torch.bfloat16: kernels.BF16, torch.float16: kernels.F16}[dtype]

    @property
    def present(self) -> list[int]:
        return sorted(set(self.ids) - {-1})

    def exact(self) -> tuple[Tensor, Tensor]:
        """Return the product of each row in float64, and the sum of its magnitudes."""
        total = self.x.double() @ self.weight.double().t()
        size = self.x.double().abs() @ self.weight.double().abs().t()
        for i, v in enumerate(self.ids):
            for t in self.variants[v] if v >= 0 else ():
                dense = t.dense(slice(None)).double()
                total[i] += dense @ self.x[i].double()
                size[i] += dense.abs() @ self.x[i].double().abs()
        return total, size


DTYPES = tuple(ROUNDOFF)


def pairs_of(*columns: Sequence[object]) -> list[tuple[object, ...]]:
    """Rows of one value of each column: any two values of the first two columns meet, and of either with the third."""
    first, second, third = columns
    return [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]


@pytest.mark.parametrize(("shape", "dtype", "tile"), pairs_of(
    [(8, 8, 1), (70, 75, 2), (33, 200, 4), (3, 1033, 2), (33, 384, 2), (40, 128, 1)],
    DTYPES,
    [(1, 16), (33, 16), (50, 64)],
))  # fmt: skip
def test_decode_adds_each_rows_terms_whatever_the_split(
    shape: tuple[int, int, int], dtype: torch.dtype, tile: tuple[int, int]
) -> None:
    (d_out, d_in, split), (rows, height) = shape, tile
    one = Batched(rows, d_out, d_in, dtype, base=rows > 1)
    base = one.x @ one.weight.t()
    out = base.clone()
    tiles = one.batch.tiles(one.present, (height,))
    count = len(tiles.order)
    partial = torch.full((split, count, d_out), torch.nan).to(DEVICE)
    common = {"K": d_in, "TERMS": one.most, "KIND": one.kind, "UPCAST": not out.is_cuda}
    words = d_in % 128 == 0 and dtype != torch.float32
    x = launch._paired(one.x) if words else one.x
    serving.decode_kernel[(-(-d_out // 32), len(tiles.tiles), split)](
        out.view(one.bits), d_out, x.view(one.bits), tiles.order, tiles.tiles, one.table, partial, count, d_out,
        serving.SIGNS, serving.ONES, **common, PLAIN=False, BM=height, BN=32, BG=16, SPLIT=split, ALIGNED=words,
    )  # fmt: skip
    if split > 1:
        assert torch.equal(out, base)
        serving.reduce_kernel[(-(-d_out // 16), count)](
            out.view(one.bits), d_out, partial, tiles.order, count, d_out, KIND=one.kind, SPLIT=split, BN=16,
        )  # fmt: skip
    exact, size = one.exact()
    u = ROUNDOFF[dtype]
    limbs = 0.0 if dtype == torch.float32 else 2.0**-14
    bound = 1.01 * u * (base.double().abs() + exact.abs()) + ((d_in + 4) * 2.0**-24 + limbs) * size
    assert torch.all((out.double() - exact).abs() <= bound)
    for i, v in enumerate(one.ids):
        assert v >= 0 or torch.equal(out[i], base[i])


def test_decode_without_column_scales_takes_inputs_as_they_are() -> None:
    """PLAIN gives the same bits as two halves of x of which one is zero."""
    one = Batched(5, 70, 75, torch.bfloat16, base=False)
    table, most = serving_table([terms[:1] for terms in one.variants[:1]] * 3)
    tiles = one.batch.tiles(one.present, (16,))
    found = []
    for plain in (True, False):
        out = torch.zeros(5, 70, dtype=torch.bfloat16).to(DEVICE)
        serving.decode_kernel[(3, len(tiles.tiles), 1)](
            out.view(torch.uint16), 70, one.x.view(torch.uint16), tiles.order, tiles.tiles, table, out, 5, 70,
            serving.SIGNS, serving.ONES, K=75, TERMS=most, KIND=kernels.BF16, UPCAST=not out.is_cuda, PLAIN=plain,
            BM=16, BN=32, BG=8, SPLIT=1, ALIGNED=False,
        )  # fmt: skip
        found.append(out)
    assert torch.equal(*found)
    assert found[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("shape", "dtype", "bias"), pairs_of([(8, 8), (70, 75), (65, 200), (3, 1033)], DTYPES, [False, True])
)
def test_a_single_row_is_multiplied_in_one_pass(shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    d_out, d_in = shape
    one = Batched(1, d_out, d_in, dtype)
    added = torch.randn(d_out).to(dtype).to(DEVICE)
    for v in range(3):
        one.ids = [v]
        exact, size = one.exact()
        if bias:
            exact, size = exact + added.double(), size + added.double().abs()
        out = torch.empty(1, d_out, dtype=dtype).to(DEVICE)
        serving.single_kernel[(-(-d_out // 8),)](
            out.view(one.bits), one.x.view(one.bits), one.weight.view(one.bits), added.view(one.bits), v, one.table,
            d_out, K=d_in, TERMS=one.most, KIND=one.kind, HAS_BIAS=bias, BN=8, BG=16,
        )  # fmt: skip
        bound = 1.01 * ROUNDOFF[dtype] * exact.abs() + (d_in + 8) * 2.0**-24 * size
        assert torch.all((out.double() - exact).abs() <= bound)


@pytest.mark.parametrize(("shape", "dtype", "rows"), pairs_of([(8, 8), (70, 75), (65, 200)], DTYPES, [1, 5, 33]))
def test_prefill_multiplies_with_the_merged_weights(shape: tuple[int, int], dtype: torch.dtype, rows: int) -> None:
    d_out, d_in = shape
    one = Batched(rows, d_out, d_in, dtype, base=False)
    out = torch.empty(rows, d_out, dtype=dtype).to(DEVICE)
    tiles = one.batch.tiles(one.present, (16,))
    serving.prefill_kernel[(-(-d_out // 32), len(tiles.tiles))](
        out.view(one.bits), d_out, one.x.view(one.bits), one.weight.view(one.bits), one.x.view(one.bits), tiles.order,
        tiles.tiles, one.table, d_out, K=d_in, TERMS=one.most, KIND=one.kind, HAS_BIAS=False, BM=16, BN=32, BG=8,
        UPCAST=dtype == torch.float32 or not out.is_cuda,
    )  # fmt: skip
    for i, v in enumerate(one.ids):
        merged = rebuild_tensor(one.weight, one.variants[v]).double()
        exact, size = merged @ one.x[i].double(), merged.abs() @ one.x[i].double().abs()
        assert torch.all(
            (out[i].double() - exact).abs() <= 1.01 * ROUNDOFF[dtype] * exact.abs() + d_in * 2.0**-24 * size
        )


def test_columns_are_split_until_most_processors_have_a_program() -> None:
    assert launch.split_of(14336, 32, 132) == launch.split_of(4096, 32, 132) == 4
    assert launch.split_of(1024, 32, 132) == 2  # with more programs each would have too few columns
    assert launch.split_of(4096, 128, 132) == 1
    assert launch.split_of(512, 1, 132) == 1
