"""The variant of each row of a batch, and the tables of it for kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peraxis_format.errors import LiveModelError
from peraxis_format.ops.signed_matmul.tiles import Tiles

__all__ = ["Batch", "Rows"]


class Batch:
    """The rows of a tensor [..., width], flattened to [rows, width], by variant. Tables are made on first use."""

    def __init__(self, ids: Tensor, device: torch.device) -> None:
        self._device = device
        self._host = {int(v): torch.nonzero(ids == v).flatten() for v in torch.unique(ids).tolist()}
        self._spans: dict[tuple[int, ...], slice | Tensor] = {}
        self._tiles: dict[tuple[tuple[int, ...], tuple[int, ...]], Tiles] = {}
        self.groups: Mapping[int, Tensor] = {v: rows.to(device) for v, rows in self._host.items()}
        """Variant (and -1) -> the indices of its rows, int64, ascending."""

    def span(self, variants: Sequence[int]) -> slice | Tensor:
        """The rows of some variants, variant by variant; a slice if they are contiguous."""
        key = tuple(variants)
        if key not in self._spans:
            rows = torch.cat([self._host[v] for v in variants])
            first, end = int(rows[0]), int(rows[0]) + len(rows)
            beside = torch.equal(rows, torch.arange(first, end))
            self._spans[key] = slice(first, end) if beside else rows.to(self._device)
        return self._spans[key]

    def tiles(self, variants: Sequence[int], heights: Sequence[int]) -> Tiles:
        """Tiles for some variants; their height is the first of `heights` that fits all rows of each, else the last."""
        key = tuple(variants), tuple(heights)
        if key not in self._tiles:
            most = max(len(self._host[v]) for v in variants)
            height = next((h for h in heights if h >= most), heights[-1])
            tiles, first = [], 0
            for v in variants:
                count = len(self._host[v])
                tiles += [(v, first + at, min(height, count - at)) for at in range(0, count, height)]
                first += count
            order = torch.cat([self._host[v] for v in variants])
            self._tiles[key] = Tiles(
                order.to(device=self._device, dtype=torch.int32),
                torch.tensor(tiles, dtype=torch.int32, device=self._device),
                height,
            )
        return self._tiles[key]


@dataclass(slots=True, eq=False)
class Rows:
    """The variants of one batch: an index per sequence (or per token row of a packed batch), -1 for the base.

    every: `ids` is one variant for any number of rows. lead: (sequences, tokens) of the model's own input, once it is
    known; it identifies the rows if a module flattens them.
    """

    ids: tuple[int, ...]
    every: bool = False
    lead: tuple[int, int] | None = None
    _batches: dict[tuple[tuple[int, ...], torch.device], Batch] = field(default_factory=dict)

    @property
    def variants(self) -> tuple[int, ...]:
        """The variants in the batch, without the base, in order."""
        return tuple(sorted(set(self.ids) - {-1}))

    @property
    def only(self) -> int | None:
        """The one variant (or -1) of every row; None for a mixed batch."""
        return self.ids[0] if len(set(self.ids)) == 1 else None

    def begin(self, shape: Sequence[int]) -> None:
        """Begin a forward of the model on an input of this shape (without the width).

        Raises LiveModelError if it does not match the given variants.
        """
        sequences, tokens = int(shape[0]), math.prod(shape[1:])
        if not self.every and len(self.ids) not in (sequences, sequences * tokens):
            raise LiveModelError(
                f"a batch of {list(shape)} does not match variants for {len(self.ids)} sequences; give one for each "
                "(dimension 0), or one per token row of a packed batch"
            )
        self.lead = sequences, tokens

    def batch(self, shape: Sequence[int], device: torch.device) -> Batch:
        """The rows of a tensor of this shape (without the width).

        Raises LiveModelError if the rows of the batch cannot be identified.
        """
        key = tuple(shape), device
        if key not in self._batches:
            self._batches[key] = Batch(self._row_ids(shape), device)
        return self._batches[key]

    def _row_ids(self, shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        if self.only is not None:
            return torch.full((count,), self.ids[0])
        if len(shape) and shape[0] == len(self.ids):
            return torch.tensor(self.ids).repeat_interleave(count // len(self.ids))
        if count == len(self.ids):
            return torch.tensor(self.ids)
        if (
            len(shape) == 1
            and self.lead is not None
            and self.lead[0] == len(self.ids)
            and count == math.prod(self.lead)
        ):
            return torch.tensor(self.ids).repeat_interleave(self.lead[1])  # the tokens of each sequence in turn
        raise LiveModelError(
            f"a batch of {list(shape)} rows does not show to which of {len(self.ids)} sequences each row belongs; "
            "give one variant per sequence (dimension 0), or one per token row of a packed batch"
        )
