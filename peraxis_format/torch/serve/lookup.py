"""Rows of a variant's merged table, for an embedding that reads few of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from peraxis_format.ops.rebuild import rebuild_tensor
from peraxis_format.ops.rebuild.torch import ComponentTensors

__all__ = ["RowPatch", "patched_rows"]


class RowPatch(Protocol):
    """Rows [begin, end) of a table: components, or the exact rows."""

    @property
    def begin(self) -> int:
        """The first row."""

    @property
    def end(self) -> int:
        """The row after the last one."""

    @property
    def factors(self) -> tuple[ComponentTensors, ...]:
        """Components over these rows; empty if the rows are exact."""

    @property
    def full(self) -> Tensor | None:
        """The exact rows, [end - begin, width]."""


def patched_rows(weight: Tensor, rows: Tensor, patches: Iterable[RowPatch]) -> Tensor:
    """The merged rows as a new tensor, [n, width]. weight: the base's table. rows: int64 [n], without repetitions."""
    table = weight[rows]
    for patch in patches:
        mine = (rows >= patch.begin) & (rows < patch.end)
        local = rows[mine] - patch.begin
        if patch.full is not None:
            table[mine] = patch.full[local]
        else:
            table[mine] = rebuild_tensor(table[mine], [component.part(local) for component in patch.factors])
    return table
