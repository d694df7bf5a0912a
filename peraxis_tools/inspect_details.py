"""Details of `inspect` beyond the header: scales by depth from the payload, and the errors that the writer noted."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

import peraxis_format as pxd
from peraxis_tools.checkpoints.kinds import group_of, layer_of
from peraxis_tools.deltas.metadata_keys import REPORT_KEY
from peraxis_tools.display.progress import ProgressOf, silent

__all__ = ["Details", "ScaleLine", "details"]

_QUANTILES: Final = (0.05, 0.5, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleLine:
    """Quantiles of the scales of one module's first component, over its rows or columns; the other axis at its mean."""

    name: str
    group: str
    layer: int | None
    low: float
    median: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """The scales of every `sign` module, and errors by module name if the writer noted them.

    errors: mean squared errors of a module's output. relative: these errors divided by the error of the base's own
    weight, so that 0 is the fine-tune and 1 is the base.
    """

    scales: tuple[ScaleLine, ...]
    errors: Mapping[str, float]
    relative: Mapping[str, float]


def details(path: str | Path, *, progress: ProgressOf = silent) -> Details:
    """Read the scales of a local file, as views; masks are not touched. Raises PxdError, OSError."""
    with pxd.open(path) as delta:
        signed = [name for name in delta if delta.entry(name).components]
        sizes = {name: delta.payload_bytes(name) for name in signed}
        scales = []
        with progress("scales", sum(sizes.values())) as step:
            for name in signed:
                scales.append(_scale_line(delta[name]))
                step(sizes[name])
        return Details(
            scales=tuple(scales), errors=_noted_errors(delta.manifest), relative=_relative_errors(delta.manifest)
        )


def _noted_errors(manifest: pxd.Manifest) -> dict[str, float]:
    """The output errors that `compress` wrote into the metadata; empty if there are none, or they cannot be read."""
    return {name: values[0] for name, values in _noted(manifest).items()}


def _relative_errors(manifest: pxd.Manifest) -> dict[str, float]:
    """Output errors divided by the error of the base's own weight, for modules with a noted base error."""
    lines = _noted(manifest).items()
    return {name: values[0] / values[2] for name, values in lines if len(values) > 2 and values[2] > 0.0}


def _noted(manifest: pxd.Manifest) -> dict[str, list[float]]:
    """[error, error of `--fit none`, error of the base's weight] by module, if they are finite numbers."""
    try:
        said: Any = json.loads(manifest.metadata.get(REPORT_KEY, "{}"))
    except (ValueError, RecursionError):
        said = None
    lines = said.get("errors") if isinstance(said, dict) else None
    if not isinstance(lines, list) or len(lines) != len(manifest.modules):
        return {}  # for example in a part
    found: dict[str, list[float]] = {}
    for name, line in zip((module.name for module in manifest.modules), lines, strict=True):
        values = list(itertools.takewhile(_is_number, line)) if isinstance(line, list) else []
        if values:
            found[name] = values
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _scale_line(module: pxd.ModuleDelta) -> ScaleLine:
    component = module.components[0]
    vectors = [scale.astype(np.float64).reshape(-1) for scale in component.scales().values()]
    values = vectors[0] * (vectors[1].mean() if len(vectors) > 1 else 1.0) * 2.0**component.exponent
    low, median, high = (float(value) for value in np.quantile(values, _QUANTILES))
    return ScaleLine(
        name=module.name,
        group=group_of(module.name),
        layer=layer_of(module.name),
        low=low,
        median=median,
        high=high,
    )
