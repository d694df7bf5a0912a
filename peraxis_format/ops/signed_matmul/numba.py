"""signed_matmul compiled with numba: inputs times the components of a delta, without weights.

    y_mn = row_n * sum over j of s_nj v_mj         v = x * col, s = +1 or -1
         = row_n * (2 * sum over j with s_nj = +1 of v_mj  -  sum over j of v_mj)

The bits of a mask are the lanes of a masked addition: 16 weights per instruction, four sums in parallel. Sums are
binary32, for 2048 columns at a time: 32 lanes (column j in lane j mod 32; fewer last columns in 8), then the lanes are
added as below. Each output belongs to one job, so the number of threads does not change the result. Rejected: tables
of the 256 sums of eight inputs (a table costs as many additions as 32 rows, and eight lookups are slower than one
masked addition).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from peraxis_format.ops.simd import F32, I1, LANES, WIDE, eighths, load, over_groups, same, store, vector
from peraxis_format.thread_pool import run_jobs

if TYPE_CHECKING:
    from torch import Tensor

    from peraxis_format.ops.rebuild.torch import ComponentTensors

numba: Any = import_module("numba")
types: Any = numba.types
intrinsic: Any = import_module("numba.extending").intrinsic
cgutils: Any = import_module("numba.core.cgutils")
ir: Any = import_module("llvmlite.ir")

__all__ = ["Product", "add_products"]

_GROUPS: Final = 256  # columns / 8 at a time, so that four inputs fit into the first-level cache
_JOB: Final = 1 << 24  # weights times inputs: a quarter of a millisecond, more than the start of a thread


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def _positive_sums(context: Any, inputs: Any, masks: Any, lanes: Any, groups: Any) -> Any:
    """The sums of each input over the set bits of each mask, in eight lanes: float32 [masks, inputs, 8].

    inputs, masks: tuples of addresses. lanes: an address, written. groups: columns / 8.
    """
    counts = len(masks), len(inputs)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        inputs, masks, lanes, groups = arguments
        pairs = [(n, m) for n in range(counts[0]) for m in range(counts[1])]
        sums = {wide: {p: cgutils.alloca_once(builder, vector(F32, wide)) for p in pairs} for wide in (WIDE, LANES)}
        for wide, each in sums.items():
            for total in each.values():
                builder.store(same(F32, 0.0, wide), total)

        def step(j: Any, wide: int) -> None:
            values = [load(builder, builder.extract_value(inputs, m), j, vector(F32, wide)) for m in range(counts[1])]
            bits = [load(builder, builder.extract_value(masks, n), j, ir.IntType(wide)) for n in range(counts[0])]
            for (n, m), total in sums[wide].items():
                before = builder.load(total)
                after = builder.fadd(before, values[m])
                builder.store(builder.select(builder.bitcast(bits[n], vector(I1, wide)), after, before), total)

        over_groups(builder, groups, step)
        for i, pair in enumerate(pairs):
            a, b, c, d = eighths(builder, builder.load(sums[WIDE][pair]))
            total = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
            store(builder, builder.fadd(total, builder.load(sums[LANES][pair])), lanes, ir.Constant(groups.type, i))
        return context.get_dummy_value()

    return types.void(inputs, masks, types.intp, types.intp), generate


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator, unused-ignore]
def _add_positive(inputs: Any, mask: Any, begin: Any, length: Any, sums: Any) -> None:
    """Add `length` groups of columns from `begin` on. sums: float32 [n, m], added to. Four sums at a time."""
    (rows, many), lanes = sums.shape, np.empty((4, 8), np.float32)
    a, b, at = inputs.strides[0], mask.strides[0], np.intp(lanes.ctypes.data)
    m = 0
    while m < many:
        x = np.intp(inputs[m, 8 * begin :].ctypes.data)
        across = 4 if many - m >= 4 else (2 if many - m >= 2 else 1)
        n = 0
        while n < rows:
            y = np.intp(mask[n, begin:].ctypes.data)
            down = 4 // across
            if across == 4:
                _positive_sums((x, x + a, x + 2 * a, x + 3 * a), (y,), at, length)
            elif across == 2 and rows - n >= 2:
                _positive_sums((x, x + a), (y, y + b), at, length)
            elif across == 2:
                down = 1
                _positive_sums((x, x + a), (y,), at, length)
            elif rows - n >= 4:
                _positive_sums((x,), (y, y + b, y + 2 * b, y + 3 * b), at, length)
            else:
                down = 1
                _positive_sums((x,), (y,), at, length)
            for k in range(down * across):
                v = lanes[k]
                total = ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]))
                sums[n + k // across, m + k % across] += total
            n += down
        m += across


_f32: Final = types.float32
_signature = types.void(_f32[:, ::1], _f32[::1], types.uint8[:, ::1], _f32[::1], _f32[:, :])


# With a signature, because `out` is sometimes contiguous, and the kernel would be compiled twice.
@numba.njit(_signature, nogil=True, cache=True)  # type: ignore[untyped-decorator, unused-ignore]
def _add_products(inputs: Any, totals: Any, mask: Any, row: Any, out: Any) -> None:
    """inputs: float32 [m, 8 g]; totals: their sums [m]. mask: [n, g]. row: float32 [n]. out: [m, n], added to."""
    groups = mask.shape[1]
    sums = np.zeros((mask.shape[0], inputs.shape[0]), np.float32)
    for begin in range(0, groups, _GROUPS):
        _add_positive(inputs, mask, begin, min(_GROUPS, groups - begin), sums)
    for m in range(out.shape[0]):
        for n in range(out.shape[1]):
            out[m, n] += row[n] * (np.float32(2) * sums[n, m] - totals[m])


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """out += inputs times some components.

    For each component: masks [d_out, ceil(d_in/8)], C-contiguous, unused bits 0; rows [d_out], 2^e folded in; columns
    [d_in]. inputs: [m, d_in]. out: [m, d_out]. All but the masks float32.
    """

    masks: Sequence[NDArray[np.uint8]]
    rows: Sequence[NDArray[np.float32]]
    columns: Sequence[NDArray[np.float32]]
    inputs: NDArray[np.float32]
    out: NDArray[np.float32]

    @classmethod
    def of(cls, x: Tensor, components: Sequence[ComponentTensors], out: Tensor) -> Product:
        """A product of tensors on the CPU, sharing their memory; an x that is not float32 is copied."""
        return cls(
            masks=[component.mask.numpy() for component in components],
            rows=[component.row.numpy() for component in components],
            columns=[component.col.numpy() for component in components],
            inputs=x.detach().float().numpy(),
            out=out.numpy(),
        )

    @property
    def work(self) -> int:
        """Weights times inputs."""
        return sum(mask.size for mask in self.masks) * LANES * len(self.inputs)


def add_products(products: Sequence[Product], *, threads: int | None = None) -> None:
    """Compute all products, on several threads if there is enough work. Their outputs must not overlap."""
    if sum(product.work for product in products) < 2 * _JOB:
        threads = 1
    run_jobs((part for product in products for part in _jobs(product)), threads=threads)


def _jobs(product: Product) -> Iterator[Callable[[], None]]:
    """Blocks of outputs of one product, each with all components in their order."""
    d_out, groups = product.masks[0].shape
    width = product.inputs.shape[1]
    weighted = []
    for column in product.columns:
        scaled = np.zeros((len(product.inputs), groups * LANES), np.float32)
        np.multiply(product.inputs, column, out=scaled[:, :width])
        weighted.append((scaled, scaled.sum(1)))
    step = max(1, d_out * _JOB // max(1, product.work))

    def job(part: slice) -> None:
        for mask, row, (scaled, totals) in zip(product.masks, product.rows, weighted, strict=True):
            _add_products(scaled, totals, mask[part], row[part], product.out[:, part])

    return (partial(job, slice(begin, min(begin + step, d_out))) for begin in range(0, d_out, step))
