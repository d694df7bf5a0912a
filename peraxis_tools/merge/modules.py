"""One module of several deltas on one base, merged: components kept, folded, or fitted anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import peraxis_format as pxd
from peraxis_tools.errors import ToolError
from peraxis_tools.merge.exact import merge_exact, merge_tails
from peraxis_tools.merge.fit import Dense, fit_masks
from peraxis_tools.merge.fold import fold
from peraxis_tools.merge.methods import Mixture, mixed_rows
from peraxis_tools.rows import BaseRows, delta_rows

__all__ = ["MergedModule", "merge_module", "relative_error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedModule:
    """What became of one module. square_error of square_norm: what the fit lost of the merged delta's square norm."""

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
    bits: int | None,
    base: BaseRows | None,
    keys: Sequence[str],
) -> tuple[pxd.ModuleDelta, MergedModule]:
    """Merge the modules of one name. bits: masks to fit the merged delta into; None keeps every component.

    base: rows of the base tensor, for what is stored exactly. keys: texts that stand for the inputs. Raises ToolError.
    """
    first = modules[0]
    plain = mixture.is_sum
    factors = mixture.effective(weights) if plain else tuple(weights)

    def mixed() -> Dense:
        return mixed_rows([_dense(module, base) for module in modules], weights, first.covered, mixture, keys)

    if any(module.encoding is pxd.Encoding.FULL for module in modules):
        merged = merge_exact(modules, factors, plain=plain, base=base, mixed=mixed)
        return merged, MergedModule(name=first.name, encoding="full", components=0)
    tail = merge_tails(modules, factors)
    if not any(module.components for module in modules):
        return replace(first, tail=tail), MergedModule(name=first.name, encoding="same", components=0)
    if bits is None:
        return _kept(modules, factors, tail)
    fitted = fit_masks(mixed(), first.covered, bits)
    if fitted.square_norm == 0.0:
        return _encoded(first, (), tail)
    merged, found = _encoded(first, fitted.components, tail)
    return merged, replace(found, square_error=fitted.square_error, square_norm=fitted.square_norm)


def _dense(module: pxd.ModuleDelta, base: BaseRows | None) -> Dense:
    if module.full is not None and base is None:
        raise ToolError(f"{module.name}: is stored exactly; pass --base to merge it")
    return lambda rows: delta_rows(module, rows, base)


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
            f"{modules[0].name}: the sum has {len(components)} masks and a module holds {pxd.COMPONENTS_MAX}; "
            "pass --bits to fit it into fewer"
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
