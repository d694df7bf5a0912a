"""x times the sum of components, without the weights: interface and backends.

    y += sum over k of row_k o ((x o col_k) B_k^T)        binary32; o: elementwise

Backends sum in different orders and agree within the error of binary32 sums (numba.py specifies its order). With many
rows of x a product with signs costs more, so weights are rebuilt instead (ops/rebuild).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from peraxis_format.ops.backend import choose

if TYPE_CHECKING:
    from torch import Tensor

    from peraxis_format.ops.rebuild.torch import ComponentTensors

    Product: TypeAlias = tuple[Tensor, Sequence[ComponentTensors], Tensor]

__all__ = ["signed_matmul"]


def signed_matmul(products: Sequence[Product], *, backend: str | None = None) -> None:
    """out += x (sum of components)^T for each (x, components, out).

    x: [rows, d_in] of any float type. components: those of a matrix [d_out, d_in]. out: float32 [rows, d_out]; outputs
    must not overlap. backend: torch, numba or triton; None chooses by the number of weights of the largest matrix.
    Raises BackendError.
    """
    if not products:
        return
    size = max((len(c.row) * len(c.col) for _, components, _ in products for c in components), default=0)
    chosen = choose("signed_matmul", size, products[0][0].device.type, backend)
    if chosen == "numba":
        from peraxis_format.ops.signed_matmul.numba import Product, add_products

        add_products([Product.of(x, components, out) for x, components, out in products if components])
    elif chosen == "triton":
        from peraxis_format.ops.signed_matmul.launch import signed_matmul as launched

        for x, components, out in products:
            launched(x, components, out)
    else:
        from peraxis_format.ops.signed_matmul.torch import project

        for x, components, out in products:
            out += project(x, components, len(out.T))
