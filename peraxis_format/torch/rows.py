"""Which row of a batch wants which variant, and the tables that kernels read of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peraxis_format.torch.errors import LiveModelError

__all__ = ["Rows", "Tiles"]


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Rows sorted by variant, in tiles of one variant: order int32 [rows], tiles int32 [tiles, 3] (kernels.py)."""

    order: Tensor
    tiles: Tensor


@dataclass(slots=True, eq=False)
class Rows:
    """The variants of one batch: an index per sequence (or per token row of a packed batch), -1 for the base."""

    ids: tuple[int, ...]
    _cache: dict[object, object] = field(default_factory=dict)

    @property
    def variants(self) -> tuple[int, ...]:
        """The variants in the batch, without the base, in order."""
        return tuple(sorted(set(self.ids) - {-1}))

    @property
    def only(self) -> int | None:
        """The one variant (or -1) of every row; None for a mixed batch."""
        return self.ids[0] if len(set(self.ids)) == 1 else None

    def expand(self, shape: Sequence[int]) -> int:
        """How many consecutive rows each id stands for in a tensor of rows: shape [..., width] without the width.

        Raises LiveModelError where the rows of the batch cannot be told apart.
        """
        count = 1
        for d in shape:
            count *= d
        if self.only is not None:
            return -1  # every row, however many
        if len(shape) and shape[0] == len(self.ids):
            return count // len(self.ids)
        if count == len(self.ids):
            return 1
        raise LiveModelError(
            f"a batch of {list(shape)} rows does not tell which of {len(self.ids)} sequences each row belongs to; "
            "give one variant a sequence (dimension 0), or one a token row of a packed batch"
        )

    def groups(self, shape: Sequence[int], device: torch.device) -> dict[int, Tensor]:
        """variant (and -1) -> the indices of its rows, int64, ascending."""
        key = ("groups", tuple(shape), device)
        found = self._cache.get(key)
        if not isinstance(found, dict):
            ids = self._row_ids(shape)
            found = {int(v): torch.nonzero(ids == v).flatten().to(device) for v in torch.unique(ids).tolist()}
            self._cache[key] = found
        return found

    def span(self, shape: Sequence[int], variants: Sequence[int], device: torch.device) -> slice | Tensor:
        """The rows of some variants, one variant's after the other's: a slice where they lie side by side."""
        key = ("span", tuple(shape), tuple(variants), device)
        found = self._cache.get(key)
        if not isinstance(found, slice | Tensor):
            groups = self.groups(shape, torch.device("cpu"))
            rows = torch.cat([groups[v] for v in variants])
            first = int(rows[0])
            beside = torch.equal(rows, torch.arange(first, first + len(rows)))
            found = slice(first, first + len(rows)) if beside else rows.to(device)
            self._cache[key] = found
        return found

    def _row_ids(self, shape: Sequence[int]) -> Tensor:
        count = 1
        for d in shape:
            count *= d
        step = self.expand(shape)
        if step < 0:
            return torch.full((count,), self.ids[0])
        return torch.tensor(self.ids).repeat_interleave(step)

    def index(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """The variant of every row, int64 [rows]; -1 is the base."""
        key = ("index", tuple(shape), device)
        found = self._cache.get(key)
        if not isinstance(found, Tensor):
            found = self._row_ids(shape).to(device)
            self._cache[key] = found
        return found

    def tiles(self, shape: Sequence[int], variants: Sequence[int], height: int, device: torch.device) -> Tiles:
        """Tiles of at most `height` rows for some of the variants."""
        key = ("tiles", tuple(shape), tuple(variants), height, device)
        found = self._cache.get(key)
        if not isinstance(found, Tiles):
            groups = self.groups(shape, torch.device("cpu"))
            order, tiles, first = [], [], 0
            for v in variants:
                rows = groups[v]
                order.append(rows)
                for begin in range(0, len(rows), height):
                    tiles.append((v, first + begin, min(height, len(rows) - begin)))
                first += len(rows)
            found = Tiles(
                torch.cat(order).to(device=device, dtype=torch.int32),
                torch.tensor(tiles, dtype=torch.int32, device=device),
            )
            self._cache[key] = found
        return found
