"""Inner products of deltas from packed masks, without a dense matrix and without a whole mask in memory.

A delta is a sum of components, D = sum_k b_k o (row_k col_k^T) 2^e_k; a vector that the axis does not have is all ones
(SPEC 5.3). So

    <A_k, B_l> = 2^(e_k + e_l)  sum_i row_k[i] row_l[i]  sum_j col_k[j] col_l[j] b_k[i,j] b_l[i,j]

and the inner sum is over the xor of two masks (ops/mask_compare), by blocks of rows. From these follow, in binary64,

    <A, B> = sum_k,l <A_k, B_l>        ||A||^2 = <A, A>        ||A - B||^2 = ||A||^2 + ||B||^2 - 2 <A, B>

The last difference has cancellation: distances below about 1e-7 of the norm are rounding errors. Equal components are
not computed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_tools.ops.mask_compare import Columns, differing

__all__ = ["Block", "InnerProducts", "PackedComponent", "inner_products", "magnitude", "pack", "row_step", "square"]

# Rows of two masks: U8 [rows, ceil(d_in/8)] each.
Block: TypeAlias = tuple[NDArray[np.uint8], NDArray[np.uint8]]

_BLOCK_BYTES: Final = 1 << 19  # bytes of one mask at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedComponent:
    """One component whose mask is read by rows. rows: those of the whole batch; [..., d_out, d_in] has batch * d_out.

    row: binary64 [batch, d_out], with 2^e folded in. col: binary64 [batch, d_in], None if it is all ones.
    mask(begin, end): U8 [end - begin, ceil(d_in/8)], unused bits zero.
    """

    d_in: int
    row: NDArray[np.float64]
    col: NDArray[np.float64] | None
    mask: Callable[[int, int], NDArray[np.uint8]]


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerProducts:
    """||A||^2, ||B||^2 and <A, B> of one module's two deltas.

    agreement: the share of weights with the same sign in the first masks; None if a side has no mask.
    """

    square_a: float
    square_b: float
    inner: float
    agreement: float | None = None

    @property
    def square_distance(self) -> float:
        """||A - B||^2; a negative value from rounding becomes 0."""
        return max(0.0, self.square_a + self.square_b - 2.0 * self.inner)


def pack(
    exponent: int,
    scales: Mapping[str, NDArray[np.float16]],
    covered: tuple[int, ...],
    mask: Callable[[int, int], NDArray[np.uint8]],
) -> PackedComponent:
    """A component [..., d_out, d_in] for the sums below. scales: those of `row`, `col`, `scalar` that its axis has."""
    row, col = pxd.scale_factors(exponent, scales, covered)
    wide = None if col is None else col.astype(np.float64)
    return PackedComponent(d_in=covered[-1], row=row.astype(np.float64), col=wide, mask=mask)


def row_step(d_in: int) -> int:
    """The number of rows of one block."""
    return max(1, _BLOCK_BYTES // pxd.mask_width(d_in))


def _read_blocks(a: PackedComponent, b: PackedComponent) -> Iterator[Block]:
    step = row_step(a.d_in)
    for begin in range(0, a.row.size, step):
        end = min(begin + step, a.row.size)
        yield a.mask(begin, end), b.mask(begin, end)


def _inner(a: PackedComponent, b: PackedComponent, blocks: Iterable[Block] | None = None) -> tuple[float, int]:
    """<A_k, B_l> and the number of weights whose signs differ. blocks: all rows of both masks, in order."""
    d_in, (_, d_out) = a.d_in, a.row.shape
    rows = (a.row * b.row).reshape(-1)
    inner: list[float] = []
    changed = first = 0
    columns, matrix = None, -1
    for mask_a, mask_b in blocks or _read_blocks(a, b):
        for some in _split(first, len(mask_a), d_out):
            if some.matrix != matrix:
                matrix = some.matrix
                columns = _columns([packed.col[matrix] for packed in (a, b) if packed.col is not None])
            counts, sums = differing(mask_a[some.rows], mask_b[some.rows], columns)
            weights = rows[first + some.rows.start : first + some.rows.stop]
            whole = float(d_in) if columns is None else columns.total
            inner.append(float(weights @ (whole - 2.0 * sums)))
            changed += int(counts.sum())
        first += len(mask_a)
    return math.fsum(inner), changed


def _columns(cols: Sequence[NDArray[np.float64]]) -> Columns | None:
    """The product of the given column scales; None if all are ones."""
    return Columns(math.prod(cols, start=np.ones_like(cols[0]))) if cols else None


@dataclass(frozen=True, slots=True)
class _MatrixRows:
    """The rows of a block that belong to one matrix of the batch."""

    matrix: int
    rows: slice


def _split(first: int, count: int, d_out: int) -> Iterator[_MatrixRows]:
    begin = 0
    while begin < count:
        matrix = (first + begin) // d_out
        end = min(count, (matrix + 1) * d_out - first)
        yield _MatrixRows(matrix, slice(begin, end))
        begin = end


def _own_square(a: PackedComponent) -> float:
    columns = np.full(a.row.shape[0], float(a.d_in)) if a.col is None else np.square(a.col).sum(axis=1)
    return float(np.square(a.row).sum(axis=1) @ columns)


def square(components: Sequence[PackedComponent]) -> float:
    """||A||^2 of a sum of components; for a single one, from its scales alone."""
    own = math.fsum(_own_square(component) for component in components)
    return own + 2.0 * math.fsum(_inner(a, b)[0] for a, b in itertools.combinations(components, 2))


def inner_products(
    a: Sequence[PackedComponent], b: Sequence[PackedComponent], blocks: Iterable[Block] | None = None
) -> InnerProducts:
    """The inner products of two sums of components over the same covered shape.

    blocks: the rows of both masks, if each side has one component and the caller reads them.
    """
    products = [_inner(x, y, blocks) for x, y in itertools.product(a, b)]
    return InnerProducts(
        square_a=square(a),
        square_b=square(b),
        inner=math.fsum(inner for inner, _ in products),
        agreement=1.0 - products[0][1] / (a[0].row.size * a[0].d_in) if products else None,
    )


def magnitude(component: PackedComponent) -> float:
    """The mean of |term| over the weights: mean(row) * mean(col) * 2^e, over the batch."""
    columns = 1.0 if component.col is None else component.col.mean(axis=1)
    return float(np.mean(component.row.mean(axis=1) * columns))
