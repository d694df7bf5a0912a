"""What an estimate is made of: the samples of a run, and the memory and the work of each stage."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SampleCounts", "StageWork"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCounts:
    """The samples of a run. samples: of the text; generated: of the model; distilled: for distillation alone.

    length: tokens in each. value_bytes, sampled_bytes: of a computed value, in the fit and in the generation. together:
    samples that are generated at a time.
    """

    samples: int
    generated: int
    length: int
    value_bytes: int
    distilled: int = 0
    sampled_bytes: int = 4
    together: int = 32

    @property
    def calibrating(self) -> int:
        """The generated samples of the fit; distillation alone has the others (calibration/partition.py)."""
        return round(self.generated * self.samples / (self.samples + self.distilled))

    @property
    def tokens(self) -> int:
        """The tokens of all samples of the fit."""
        return (self.samples + self.calibrating) * self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """The memory and the work of one stage.

    memory: bytes beyond the imports.
    products: float32 operations of products.
    passes: tokens through a layer.
    sums: (tokens, width) of each input whose moments are summed.
    steps: steps of generation, through `layers` layers each.
    fits: operations of fits.
    matrices: (rows, width, masks) of each matrix that is fitted.
    priced: weights whose price is measured.
    builds: (weights, masks, times) of each matrix that distillation builds.
    reductions: the same of each whose gradient it reduces to those of its scales (distill/parametrization.py).
    losses: logits of a loss and of its gradient.
    """

    name: str
    memory: int
    products: float = 0.0
    passes: float = 0.0
    sums: tuple[tuple[int, int], ...] = ()
    steps: int = 0
    layers: int = 0
    fits: float = 0.0
    matrices: tuple[tuple[int, int, int], ...] = ()
    priced: int = 0
    builds: tuple[tuple[int, int, float], ...] = ()
    reductions: tuple[tuple[int, int, float], ...] = ()
    losses: float = 0.0
