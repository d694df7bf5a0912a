"""The steps of the sign search within one block of columns (compress/fit/signs.py): interface and backends.

    gptq_signs_block            decides the columns one after the other, and passes on the error of each
    coordinate_descent_block    flips every sign that lowers J, column by column

torch is the reference. numba (CPU) and Triton (CUDA) may differ from it in the last bit, and so, rarely, in a sign.
The rows of W are independent.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from peraxis_format.ops.backend import choose

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["block_columns", "coordinate_descent_block", "gptq_signs_block"]

_BLOCK: Final = 128  # columns that are decided before their errors are passed on to all others
_SWEPT: Final = 512  # the same for descent on a CPU, where few changes are passed on


def _steps(tensor: Tensor, backend: str | None) -> Any:
    chosen = choose("sign_search", tensor.numel(), tensor.device.type, backend)
    return import_module(f"peraxis_tools.ops.sign_search.{chosen}")


def block_columns(tensor: Tensor, *, descent: bool = False) -> int:
    """The number of columns of a block, for a matrix on the tensor's device."""
    chosen = choose("sign_search", tensor.numel(), tensor.device.type)
    return _SWEPT if descent and chosen == "numba" else _BLOCK


def gptq_signs_block(
    work: Tensor,
    block: Tensor,
    rows: Tensor,
    cols: Tensor,
    signs: Tensor,
    errors: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Decide the signs of a block's columns; signs and errors are written, work is overwritten.

    work, errors: float32 [d_out, n]; block: upper factor [n, n]; rows: [k, d_out]; cols: [k, n]; signs: bool
    [k, d_out, n]. All contiguous, n at most block_columns. Raises BackendError.
    """
    _steps(work, backend).gptq_signs_block(work, block, rows, cols, signs, errors)


def coordinate_descent_block(
    gradient: Tensor, block: Tensor, values: Tensor, change: Tensor, *, backend: str | None = None
) -> None:
    """Flip signs of a block's columns if that lowers J; gradient and values are updated, change is added to.

    gradient, change: float32 [d_out, n]; block: of H, [n, n]; values: [k, d_out, n], signed. All contiguous.
    Raises BackendError.
    """
    _steps(gradient, backend).coordinate_descent_block(gradient, block, values, change)
