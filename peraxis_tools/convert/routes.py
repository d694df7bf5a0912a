"""Choose how each tensor of a delta is stored in a PEFT adapter, or why it cannot be.

ADAPT   low-rank factors of a linear, Conv1D or embedding layer's weight
WHOLE   all tensors of the layer through modules_to_save, because PEFT loads such a layer whole
BIAS    a bias alone, under bias="all"
LEAVE   the tensor is left out, with a reason
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

import peraxis_format as pxd
from peraxis_tools.convert.targets import LayerKind, ParameterPlace, Targets

__all__ = ["Route", "RouteKind", "routes_of"]


class RouteKind(Enum):
    """The four ways of the table above."""

    ADAPT = "adapt"
    WHOLE = "whole"
    BIAS = "bias"
    LEAVE = "leave"


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """place: None if the model has none. reason: why it is left out. parts: a whole layer's (parameter, name)."""

    kind: RouteKind
    place: ParameterPlace | None = None
    reason: str = ""
    parts: tuple[tuple[str, str], ...] = ()


_TIED: Final = "is tied, and PEFT would adapt only one of the two"
_FUSED: Final = "is no parameter of transformers' model (unknown, or a part of fused experts); PEFT cannot adapt it"


def _unchanged(entry: pxd.ModuleEntry) -> bool:
    """Whether the module equals the base's."""
    return entry.encoding is pxd.Encoding.SAME and entry.tensor() is None


def routes_of(entries: Mapping[str, pxd.ModuleEntry], targets: Targets, base: Collection[str]) -> dict[str, Route]:
    """The route of every changed module. base: the names of the base's tensors; empty without a base."""
    routes = {name: _alone(entry, targets.places.get(name)) for name, entry in entries.items() if not _unchanged(entry)}
    names = {(place.layer, place.parameter): name for name, place in targets.places.items()}
    for name, route in list(routes.items()):
        if route.kind is RouteKind.WHOLE and route.place is not None:
            routes[name] = _whole(route.place, routes, entries, names, base)
    layers = {place.layer for place in targets.places.values()} | targets.modules
    inside = {
        place.layer for place in targets.places.values() if place.kind in (LayerKind.PARAMETER, LayerKind.EXPERTS)
    }
    routes = {name: _outside(route, inside) for name, route in routes.items()}
    return {name: _unambiguous(route, layers) for name, route in routes.items()}


def _alone(entry: pxd.ModuleEntry, place: ParameterPlace | None) -> Route:
    """The route of a module without regard to the others."""

    def leave(reason: str) -> Route:
        return Route(kind=RouteKind.LEAVE, place=place, reason=reason)

    if place is None:
        return leave(_FUSED)
    if place.tied:
        return leave(_TIED)
    # The delta of an exact update is known with the base, so a matrix can have factors.
    whole = entry.encoding is pxd.Encoding.FULL or (
        entry.encoding is pxd.Encoding.EXACT and (len(entry.shape) != 2 or place.kind is LayerKind.OTHER)
    )
    if whole and place.kind is LayerKind.EXPERTS:
        return leave("is an exact part of fused experts, which can only have low-rank factors")
    if whole:
        if entry.base is None or entry.base.shape != entry.shape:
            return leave("has another shape than in the base, or is new")
        if place.parameter == "bias":
            return Route(kind=RouteKind.BIAS, place=place)
        return Route(kind=RouteKind.WHOLE, place=place)
    if entry.parts()[-1][0] == "tail":
        return leave("has more rows than in the base")
    if entry.base is not None and entry.shape[:1] < entry.base.shape[:1]:
        return leave("has fewer rows than in the base")
    if len(entry.shape) != 2:
        return leave("is a stack of matrices" if len(entry.shape) > 2 else "is not a matrix")
    if place.kind is LayerKind.EXPERTS:
        return Route(kind=RouteKind.ADAPT, place=place)
    if place.kind is LayerKind.OTHER or place.parameter != "weight":
        return leave(f"is in a {place.class_name}, which LoRA cannot adapt")
    if place.lost:
        return leave(f"would be loaded by PEFT as {place.lost}, because transformers renames it")
    return Route(kind=RouteKind.ADAPT, place=place)


def _whole(
    place: ParameterPlace,
    routes: Mapping[str, Route],
    entries: Mapping[str, pxd.ModuleEntry],
    names: Mapping[tuple[str, str], str],
    base: Collection[str],
) -> Route:
    """The route of a layer that is saved whole: the source of each of its tensors, or the missing one."""

    def leave(reason: str) -> Route:
        return Route(kind=RouteKind.LEAVE, place=place, reason=reason)

    if not place.leaf:
        return leave(f"is a parameter of a {place.class_name} with layers of its own, which PEFT cannot save alone")
    parts = []
    for parameter in place.siblings:
        name = names.get((place.layer, parameter))
        entry = None if name is None else entries[name]
        if name is None or entry is None:
            return leave(f"belongs to a layer whose {parameter} is not in the checkpoint")
        if entry.encoding is pxd.Encoding.SAME and name not in base:
            return leave(f"belongs to a layer that PEFT saves whole, and its {parameter} is the base's: pass --base")
        if entry.encoding is not pxd.Encoding.SAME and routes[name].kind not in (RouteKind.WHOLE, RouteKind.BIAS):
            return leave(f"belongs to a layer whose {parameter} {routes[name].reason or 'is low-rank'}")
        parts.append((parameter, name))
    return Route(kind=RouteKind.WHOLE, place=place, parts=tuple(parts))


def _outside(route: Route, wrapped: Collection[str]) -> Route:
    """Leave out layers inside a module that PEFT wraps for target_parameters, because their names change."""
    layer = "" if route.place is None else route.place.layer
    around = next((name for name in wrapped if layer.startswith(f"{name}.")), None)
    if around is None or route.kind is RouteKind.LEAVE:
        return route
    return Route(kind=RouteKind.LEAVE, place=route.place, reason=f"lies inside {around}, which PEFT wraps")


def _unambiguous(route: Route, layers: Collection[str]) -> Route:
    """Leave out layers whose name is the end of another's, because PEFT finds layers by the ends of their names."""
    if route.kind not in (RouteKind.WHOLE, RouteKind.ADAPT) or route.place is None:
        return route
    if route.place.kind is LayerKind.EXPERTS:
        return route
    layer = route.place.layer
    ends = layer if route.kind is RouteKind.WHOLE else f".{layer}"
    other = next((name for name in layers if name != layer and name.endswith(ends)), None)
    if other is None:
        return route
    return Route(kind=RouteKind.LEAVE, place=route.place, reason=f"cannot be distinguished from {other} by PEFT")
