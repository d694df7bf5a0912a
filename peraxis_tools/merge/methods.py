"""The methods of mergekit that merge several dense deltas, by blocks of rows.

With deltas d_i = fine-tuned_i - base, weights w_i and density p:

    linear   sum w_i d_i                                               divided by sum w_i if normalised (the default)
    ties     d_i keeps its p largest magnitudes, the rest is 0; the sign s of sum w_i d_i is elected for each weight;
             sum of w_i d_i over those i with that sign,               divided by their sum w_i if normalised (default)
    dare     each weight of d_i is kept with probability p and divided by p; sum w_i d_i    (not normalised by default)

A sign delta has about one magnitude per row, so many weights may equal the threshold of `ties`: all of these are kept;
a sort would keep only the first of them. The random numbers of `dare` depend on seed, input and position alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from peraxis_tools.arguments import check_choice, check_least
from peraxis_tools.errors import OptionError
from peraxis_tools.ops.merge_rows import HALF, elect, histogram, keep_some

__all__ = ["SUM_MIN", "Magnitudes", "Method", "Mixer", "Mixture", "make_mixer", "threshold"]

Method: TypeAlias = Literal["sum", "linear", "ties", "dare"]
SUM_MIN: Final = 1e-8  # a sum of weights of at most this magnitude counts as 0, and nothing is divided by it

_NORMALISED: Final[dict[str, bool]] = {"sum": False, "linear": True, "ties": True, "dare": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """A merge method. `sum` is the plain weighted sum. normalize: None takes the default of the method.

    Raises ToolError for a value that is not allowed.
    """

    method: Method = "sum"
    density: float = 0.5
    normalize: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(Method))
        check_least("seed", self.seed, 0)
        if not 0.0 < self.density <= 1.0:
            raise OptionError(f"density {self.density}: must be above 0 and at most 1")

    @property
    def normalized(self) -> bool:
        """Whether the sum is divided by the weights."""
        return _NORMALISED[self.method] if self.normalize is None else self.normalize

    @property
    def is_sum(self) -> bool:
        """Whether the result is a weighted sum of the deltas, which components can represent exactly."""
        return self.method in ("sum", "linear")

    def effective(self, weights: Sequence[float]) -> tuple[float, ...]:
        """The weights of the plain sum that equals `sum` or `linear`."""
        total = math.fsum(weights)
        return tuple(w / total for w in weights) if self.normalized and abs(total) > SUM_MIN else tuple(weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixer:
    """The method's arithmetic on blocks: one block of each delta, of the same rows.

    weights: the user's weights. thresholds: of `ties`; smaller magnitudes count as 0. seeds: of `dare`, one per delta.
    """

    mixture: Mixture
    weights: tuple[float, ...]
    thresholds: tuple[float, ...] = ()
    seeds: tuple[tuple[int, ...], ...] = ()

    def mix(self, blocks: Sequence[NDArray[np.float32]], place: tuple[int, ...]) -> NDArray[np.float32]:
        """Merge blocks. place: the position of these rows, for the random numbers of `dare`."""
        if self.mixture.method == "ties":
            thresholds = np.array(self.thresholds, np.float32)
            return elect(list(blocks), np.array(self.weights), thresholds, normalized=self.mixture.normalized)
        total = np.zeros(blocks[0].shape)
        if self.mixture.method == "dare":
            factors = Mixture(normalize=self.mixture.normalized).effective(self.weights)
            for block, weight, seed in zip(blocks, factors, self.seeds, strict=True):
                keep_some(total, block, _chances(block.shape, (*seed, *place)), weight, self.mixture.density)
        else:
            for block, weight in zip(blocks, self.mixture.effective(self.weights), strict=True):
                total += weight * block.astype(np.float64)
        return total.astype(np.float32)


def make_mixer(
    mixture: Mixture,
    weights: Sequence[float],
    keys: Sequence[str],
    magnitudes: Sequence[Magnitudes],
) -> Mixer:
    """keys: texts that identify each input and module. magnitudes: those of each delta; only `ties` uses them."""
    return Mixer(
        mixture=mixture,
        weights=tuple(weights),
        thresholds=tuple(threshold(each, mixture.density) for each in magnitudes) if mixture.method == "ties" else (),
        seeds=tuple(_seed(mixture.seed, key) for key in keys),
    )


def _chances(shape: tuple[int, ...], seed: tuple[int, ...]) -> NDArray[np.uint32]:
    count = math.prod(shape)
    raw = np.random.SFC64(np.random.SeedSequence(seed)).random_raw((count + 1) // 2)
    return raw.astype("<u8", copy=False).view("<u4")[:count]


def _seed(seed: int, key: str) -> tuple[int, ...]:
    digest = hashlib.sha256(key.encode()).digest()
    return (seed, *np.frombuffer(digest[:16], "<u4").tolist())


# --- the threshold of ties: the p n-th largest magnitude of a delta, exactly ---------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Magnitudes:
    """The magnitudes of one delta: as blocks, or as rank-1 matrices row_i * col_j if each has one component.

    blocks: called once or twice. products: (binary64 row, binary64 col) of each matrix, or None.
    """

    count: int
    blocks: Callable[[], Iterator[NDArray[np.float32]]]
    products: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]] | None = None


def threshold(of: Magnitudes, density: float) -> float:
    """The threshold that density * count magnitudes reach; inf if that is none."""
    wanted = int(density * of.count)
    if wanted <= 0:
        return math.inf
    if of.products is not None:
        return _threshold_of_products(of.products, wanted)
    # Positive binary32 values sort like their bits: count by the upper halves of the bits, then by the lower ones.
    high, above = _descend(_histogram(of, None), wanted)
    low, _ = _descend(_histogram(of, high), wanted - above)
    return float(np.uint32(high << 16 | low).view(np.float32))


def _threshold_of_products(products: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], wanted: int) -> float:
    """Bisection over the bit patterns of binary32, which contain every product of two F16 and a power of two.

    A quotient t / row_i is rounded to 2^-53, and col_j either equals it or differs by 2^-24, so the comparison is
    exact.
    """
    sorted_columns = [(row[row > 0.0], np.sort(col)) for row, col in products]

    def count_from(bits: int) -> int:
        least = float(np.uint32(bits).view(np.float32))
        return sum(
            row.size * col.size - int(np.searchsorted(col, least / row, side="left").sum())
            for row, col in sorted_columns
        )

    low, high = 0, 0x7F800000  # at least `wanted` are >= the pattern `low`, fewer are >= `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count_from(middle) >= wanted else (low, middle)
    return float(np.uint32(low).view(np.float32))


def _histogram(of: Magnitudes, high: int | None) -> NDArray[np.int64]:
    counts = np.zeros(HALF, np.int64)
    for block in of.blocks():
        histogram(block, high, counts)
    return counts


def _descend(counts: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """The bin of the wanted-th largest, and the number of values above it."""
    from_top = np.cumsum(counts[::-1])
    position = int(np.searchsorted(from_top, wanted))
    above = int(from_top[position - 1]) if position else 0
    return HALF - 1 - position, above
