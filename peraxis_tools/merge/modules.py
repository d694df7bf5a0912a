"""Merge one module of several deltas on one base: components are kept, folded, or fitted again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

import peraxis_format as pxd
from peraxis_tools.deltas.factors import joined, module_sum
from peraxis_tools.deltas.fold import fold
from peraxis_tools.deltas.rows import BaseRows, delta_rows, difference, has_delta, row_blocks
from peraxis_tools.errors import ToolError
from peraxis_tools.merge.exact import merge_exact, merge_tails
from peraxis_tools.merge.fit import AnyDense, Dense, fit_masks
from peraxis_tools.merge.methods import Magnitudes, Mixture, make_mixer

__all__ = ["MergedModule", "merge_module", "needs_base", "relative_error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedModule:
    """One merged module. square_error: of the fit. square_norm: the squared norm of the merged delta."""

    name: str
    encoding: str
    components: int
    square_error: float = 0.0
    square_norm: float = 0.0


def merge_module(
    modules: Sequence[pxd.ModuleDelta],
    weights: Sequence[float],
    *,
    mixture: Mixture,
    masks: int | None,
    base: BaseRows | None,
    keys: Sequence[str],
) -> tuple[pxd.ModuleDelta, MergedModule]:
    """Merge the modules of one name. masks: masks to fit the merged delta into; None keeps every component.

    base: rows of the base tensor, for exact tensors. keys: texts that identify the inputs. Raises ToolError.
    """
    first = modules[0]
    plain = mixture.is_sum
    factors = mixture.effective(weights) if plain else tuple(weights)
    if any(module.encoding is pxd.Encoding.FULL for module in modules):
        merged = merge_exact(
            modules, factors, plain=plain, base=base, mixed=lambda: _mixed(modules, weights, mixture, keys, base)
        )
        return merged, MergedModule(name=first.name, encoding="full", components=0)
    tail = merge_tails(modules, factors)
    if not any(module.components for module in modules):
        return replace(first, tail=tail), MergedModule(name=first.name, encoding="same", components=0)
    if masks is None:
        return _kept(modules, factors, tail)
    fitted = fit_masks(_matrices(modules, weights, mixture, keys), first.covered, masks)
    if fitted.square_norm == 0.0:
        return _encoded(first, (), tail)
    merged, found = _encoded(first, fitted.components, tail)
    return merged, replace(found, square_error=fitted.square_error, square_norm=fitted.square_norm)


def needs_base(entries: Sequence[pxd.ModuleEntry], weights: Sequence[float], mixture: Mixture) -> bool:
    """Whether merging the modules of these entries reads the base tensor; the digests alone show that."""
    if not any(entry.encoding is pxd.Encoding.FULL for entry in entries) or not has_delta(entries[0]):
        return False
    if not mixture.is_sum:
        return len(entries) > 1 or weights[0] != 1.0
    factors = mixture.effective(weights)
    moving = [
        (entry, w)
        for entry, w in zip(entries, factors, strict=True)
        if w != 0.0 and entry.encoding is not pxd.Encoding.SAME
    ]
    equal = len({entry.sha256 for entry, _ in moving}) == 1 and moving[0][0].encoding is pxd.Encoding.FULL
    return not (equal and math.isclose(math.fsum(w for _, w in moving), 1.0))


def _matrices(
    modules: Sequence[pxd.ModuleDelta], weights: Sequence[float], mixture: Mixture, keys: Sequence[str]
) -> Callable[[tuple[int, ...]], Dense]:
    """The merged delta of modules that are `sign` or `same`, matrix by matrix."""
    if mixture.is_sum:
        factors = mixture.effective(weights)

        def summed(index: tuple[int, ...]) -> Dense:
            sums = [module_sum(m, index, weight=w) for m, w in zip(modules, factors, strict=True)]
            return joined(sums).dense

        return summed
    mixer = make_mixer(mixture, weights, keys, [_magnitudes(module) for module in modules])

    def mixed(index: tuple[int, ...]) -> Dense:
        sums = [module_sum(module, index) for module in modules]
        return lambda rows: mixer.mix([each.dense(rows) for each in sums], (*index, rows.start))

    return mixed


def _magnitudes(module: pxd.ModuleDelta) -> Magnitudes:
    """The magnitudes of a `sign` or `same` module."""
    matrices = list(np.ndindex(module.covered[:-2]))
    single = len(module.components) == 1

    def products(index: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        first = module_sum(module, index).components[0]
        return first.row.astype(np.float64), first.col.astype(np.float64)

    def blocks() -> Iterator[NDArray[np.float32]]:
        for index in matrices:
            whole = module_sum(module, index)
            for rows in row_blocks(module.covered[-2:]):
                yield whole.dense(rows)

    return Magnitudes(
        count=math.prod(module.covered),
        blocks=blocks,
        products=[products(index) for index in matrices] if single else None,
    )


def _mixed(
    modules: Sequence[pxd.ModuleDelta],
    weights: Sequence[float],
    mixture: Mixture,
    keys: Sequence[str],
    base: BaseRows | None,
) -> AnyDense:
    """The merged delta by ranges of its first dimension, if at least one input is exact; a sum is in binary64."""
    if mixture.is_sum:
        factors = mixture.effective(weights)
        return lambda rows: sum(
            (factor * _unrounded(module, rows, base) for module, factor in zip(modules, factors, strict=True)),
            start=np.zeros(()),
        )
    deltas: list[Dense] = [functools.partial(delta_rows, module, base=base) for module in modules]
    covered = modules[0].covered

    def magnitudes(delta: Dense) -> Magnitudes:
        return Magnitudes(count=math.prod(covered), blocks=lambda: (delta(rows) for rows in row_blocks(covered)))

    mixer = make_mixer(mixture, weights, keys, [magnitudes(delta) for delta in deltas])
    return lambda rows: mixer.mix([delta(rows) for delta in deltas], (rows.start,))


def _unrounded(module: pxd.ModuleDelta, rows: slice, base: BaseRows | None) -> NDArray[np.float64]:
    """`delta_rows` in binary64, where differences of binary32 numbers of like sizes are exact."""
    if module.full is None or base is None:
        return delta_rows(module, rows, base).astype(np.float64)
    full = pxd.to_float32(module.full[rows] if module.shape else module.full, module.dtype)
    return difference(full.astype(np.float64), base(rows).astype(np.float64))


def _kept(
    modules: Sequence[pxd.ModuleDelta], weights: Sequence[float], tail: pxd.Array | None
) -> tuple[pxd.ModuleDelta, MergedModule]:
    components = tuple(
        fold(component, weight, module.shape[-1])
        for module, weight in zip(modules, weights, strict=True)
        if weight != 0.0
        for component in module.components
    )
    if len(components) > pxd.COMPONENTS_MAX:
        raise ToolError(
            f"{modules[0].name}: the sum has {len(components)} masks and a module can have {pxd.COMPONENTS_MAX}; "
            "pass masks (--masks) to fit it into fewer"
        )
    return _encoded(modules[0], components, tail)


def _encoded(
    like: pxd.ModuleDelta, components: tuple[pxd.Component, ...], tail: pxd.Array | None
) -> tuple[pxd.ModuleDelta, MergedModule]:
    encoding = pxd.Encoding.SIGN if components else pxd.Encoding.SAME
    merged = replace(like, encoding=encoding, components=components, tail=tail)
    return merged, MergedModule(name=like.name, encoding=encoding.value, components=len(components))


def relative_error(square_error: float, square_norm: float) -> float:
    """||merged - fit|| / ||merged||."""
    return math.sqrt(square_error / square_norm) if square_norm > 0.0 else 0.0
