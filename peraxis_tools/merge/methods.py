"""How several dense deltas become one: the methods that mergekit made known, by blocks of rows.

With deltas d_i = fine-tuned_i - base, weights w_i and density p:

    linear   sum w_i d_i                                               divided by sum w_i if normalised (the default)
    ties     d_i keeps its p largest magnitudes, the rest is 0; the sign s of sum w_i d_i is elected for each weight;
             sum of w_i d_i over those i with that sign,               divided by their sum w_i if normalised (default)
    dare     each weight of d_i is kept with probability p and divided by p; sum w_i d_i    (not normalised by default)

A sign delta has one magnitude a row or so, and many weights may equal the threshold of `ties`: all of these are kept,
where a sort would keep the first of them. The chance of `dare` comes from seed, input and position alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from peraxis_tools.merge.fit import Dense
from peraxis_tools.rows import row_blocks

__all__ = ["Method", "Mixture", "mixed_rows"]

Method: TypeAlias = Literal["sum", "linear", "ties", "dare"]

_NORMALISED: Final[dict[str, bool]] = {"sum": False, "linear": True, "ties": True, "dare": False}
_HALF: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What is done with the deltas. normalize None: the method's default. `sum` is the plain weighted sum."""

    method: Method = "sum"
    density: float = 0.5
    normalize: bool | None = None
    seed: int = 0

    @property
    def normalized(self) -> bool:
        """Whether the sum is divided by the weights."""
        return _NORMALISED[self.method] if self.normalize is None else self.normalize

    @property
    def is_sum(self) -> bool:
        """Whether the result is a weighted sum of the deltas, which components can hold exactly."""
        return self.method in ("sum", "linear")

    def effective(self, weights: Sequence[float]) -> tuple[float, ...]:
        """The weights of a plain sum that `sum` or `linear` comes to."""
        total = math.fsum(weights)
        return tuple(w / total for w in weights) if self.normalized and abs(total) > 1e-8 else tuple(weights)


def mixed_rows(
    deltas: Sequence[Dense],
    weights: Sequence[float],
    shape: tuple[int, ...],
    mixture: Mixture,
    keys: Sequence[str],
) -> Dense:
    """The rows of the mixed delta. shape: of each delta; keys: text that stands for each input and module."""
    if mixture.is_sum:
        factors = mixture.effective(weights)
        return lambda rows: _weighted([delta(rows) for delta in deltas], factors)
    if mixture.method == "dare":
        chances = [_seed(mixture.seed, key) for key in keys]

        def dropped(rows: slice) -> NDArray[np.float32]:
            kept = [_drop(d(rows), mixture.density, [*s, rows.start]) for d, s in zip(deltas, chances, strict=True)]
            return _weighted(kept, Mixture(normalize=mixture.normalized).effective(weights))

        return dropped
    thresholds = [_threshold(delta, shape, mixture.density) for delta in deltas]

    def elected(rows: slice) -> NDArray[np.float32]:
        trimmed = [_trim(delta(rows), t) for delta, t in zip(deltas, thresholds, strict=True)]
        return _elect(trimmed, weights, normalized=mixture.normalized)

    return elected


def _weighted(blocks: Sequence[NDArray[np.float32]], weights: Sequence[float]) -> NDArray[np.float32]:
    total = np.zeros(blocks[0].shape)
    for block, weight in zip(blocks, weights, strict=True):
        total += weight * block.astype(np.float64)
    return total.astype(np.float32)


def _trim(block: NDArray[np.float32], threshold: float) -> NDArray[np.float32]:
    return np.where(np.abs(block) >= np.float32(threshold), block, np.float32(0.0))


def _drop(block: NDArray[np.float32], density: float, seed: list[int]) -> NDArray[np.float32]:
    kept = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed))).random(block.shape) < density
    return np.where(kept, block / np.float32(density), np.float32(0.0))


def _seed(seed: int, key: str) -> list[int]:
    digest = hashlib.sha256(key.encode()).digest()
    return [seed, *np.frombuffer(digest[:16], "<u4").tolist()]


def _elect(blocks: Sequence[NDArray[np.float32]], weights: Sequence[float], *, normalized: bool) -> NDArray[np.float32]:
    parts = [weight * block.astype(np.float64) for block, weight in zip(blocks, weights, strict=True)]
    positive = np.sum(parts, axis=0) >= 0.0
    total = np.zeros(positive.shape)
    divisor = np.zeros(positive.shape)
    for part, weight in zip(parts, weights, strict=True):
        agrees = (part > 0.0) == positive
        agrees &= part != 0.0
        total += np.where(agrees, part, 0.0)
        divisor += np.where(agrees, weight, 0.0)
    if normalized:
        total /= np.where(np.abs(divisor) > 1e-8, divisor, 1.0)
    return total.astype(np.float32)


def _threshold(delta: Dense, shape: tuple[int, ...], density: float) -> float:
    """The density * n-th largest magnitude, exactly: positive binary32 sort as their bits do, counted by halves."""
    wanted = int(density * math.prod(shape))
    if wanted <= 0:
        return math.inf
    high, above = _descend(_histogram(delta, shape, None), wanted)
    low, _ = _descend(_histogram(delta, shape, high), wanted - above)
    return float(np.uint32(high << 16 | low).view(np.float32))


def _histogram(delta: Dense, shape: tuple[int, ...], high: int | None) -> NDArray[np.int64]:
    counts = np.zeros(_HALF, np.int64)
    for rows in row_blocks(shape):
        bits = np.abs(delta(rows)).reshape(-1).view(np.uint32)
        halves = bits >> np.uint32(16)
        chosen = halves if high is None else bits[halves == high] & np.uint32(_HALF - 1)
        counts += np.bincount(chosen, minlength=_HALF)
    return counts


def _descend(counts: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """The bin of the wanted-th largest, and how many lie above it."""
    from_top = np.cumsum(counts[::-1])
    position = int(np.searchsorted(from_top, wanted))
    above = int(from_top[position - 1]) if position else 0
    return _HALF - 1 - position, above
