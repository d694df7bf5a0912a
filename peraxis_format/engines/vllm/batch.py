"""The variant of each row of a step.

vLLM's LoRA support gives it for each scheduled token (index_mapping) and for each sampled row of hidden states
(prompt_mapping). For prompt log-probabilities other rows go through lm_head: a slice of the step's hidden states, which
is found by its address.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from peraxis_format.errors import LiveModelError

__all__ = ["Groups", "StepRows"]

V = TypeVar("V")


@dataclass(frozen=True, slots=True, eq=False)
class Groups(Generic[V]):
    """Variants and their rows, in order of the first row. count: the number of all rows."""

    count: int
    members: tuple[tuple[V, slice | Tensor], ...] = ()

    @property
    def only(self) -> V | None:
        """The variant of every row; None if they differ or some are the base's."""
        if len(self.members) == 1:
            variant, rows = self.members[0]
            if isinstance(rows, slice) and (rows.start, rows.stop) == (0, self.count):
                return variant
        return None


@dataclass(slots=True, eq=False)
class StepRows(Generic[V]):
    """The rows of the current step. hidden: hidden states whose slices go through lm_head, if any."""

    device: torch.device
    token_ids: tuple[int, ...] = ()
    tokens: Groups[V] = field(default_factory=lambda: Groups(0))
    samples: Groups[V] = field(default_factory=lambda: Groups(0))
    hidden: Tensor | None = None
    _variants: Mapping[int, V] = field(default_factory=dict)

    def begin(self, token_ids: Sequence[int], sample_ids: Sequence[int], variants: Mapping[int, V]) -> None:
        """Begin a step. Ids of no variant (0) are the base."""
        self.token_ids, self._variants, self.hidden = tuple(token_ids), variants, None
        self.tokens, self.samples = self._groups(self.token_ids), self._groups(tuple(sample_ids))

    def of_logits(self, x: Tensor) -> Groups[V]:
        """The rows of lm_head's input. Raises LiveModelError if they cannot be identified."""
        if self.hidden is not None:
            size = self.hidden.shape[1] * self.hidden.element_size()
            first, rest = divmod(x.data_ptr() - self.hidden.data_ptr(), size)
            if not rest and first >= 0 and first + len(x) <= len(self.token_ids):
                return self._groups(self.token_ids[first : first + len(x)])
        elif len(x) == self.samples.count or not self.tokens.members:
            return self.samples
        raise LiveModelError(f"{len(x)} rows of logits of unknown requests; this vLLM's sampler is not supported")

    def _groups(self, ids: tuple[int, ...]) -> Groups[V]:
        found: dict[int, list[int]] = {}
        for row, each in enumerate(ids):
            if each in self._variants:
                found.setdefault(each, []).append(row)
        members = tuple((self._variants[each], _rows(rows, self.device)) for each, rows in found.items())
        return Groups(len(ids), members)


def _rows(rows: list[int], device: torch.device) -> slice | Tensor:
    beside = rows[-1] - rows[0] + 1 == len(rows)
    return slice(rows[0], rows[-1] + 1) if beside else torch.tensor(rows, device=device)
