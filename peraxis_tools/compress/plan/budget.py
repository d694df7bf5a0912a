"""Spend one byte budget over all modules: each byte goes to the module where it lowers the error most.

The error of each module with 0 (the base's weight), 1 to 8 masks comes from the fit that will run: from the error that
`--fit none` leaves (price.py), or, with a text, from backward passes (sensitivity.py). Without a mask it is 0 only if
the module equals the base's.

If the budget allows it, every changed module gets one mask before any gets a second one, because the estimate of the
error without a mask is not reliable. Then only the points on the lower convex hull of a module's (bytes, error) can be
optimal for some price of a byte. The steps along all hulls are taken in order of steepness while they fit. The result
is optimal up to the last step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peraxis_format import Encoding
from peraxis_tools.compress.options import CompressOptions, OptionError
from peraxis_tools.compress.plan.plan import TABLES, UNCHANGED, Plan, PlannedModule, module_bytes
from peraxis_tools.compress.plan.price import MASKS_MAX
from peraxis_tools.compress.plan.size import predicted_size

__all__ = ["Choice", "allocate", "is_open", "spend", "target_of"]

# Header bytes of a component: its pair in the manifest.
_COMPONENT_TEXT = 20
_CORRECTIONS = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """One encoding of a module. components: the number of masks; 0 for the encodings same and full."""

    encoding: Encoding
    components: int
    size: int
    error: float


def _choices_of(module: PlannedModule, errors: Sequence[float]) -> list[Choice]:
    """The possible encodings of a module: the base's weight, 1 to 8 masks, exact. errors: for 0 to 8 masks; infinite
    for a number of masks that would make a weight infinite."""
    choices = [Choice(Encoding.SAME, 0, module_bytes(module, components=0, axis=None, same=True), errors[0])]
    for k in range(1, min(MASKS_MAX, len(errors) - 1) + 1):
        if math.isinf(errors[k]):
            continue
        size = module_bytes(module, components=k, axis=module.axis) + k * _COMPONENT_TEXT
        choices.append(Choice(Encoding.SIGN, k, size, errors[k]))
    return [*choices, Choice(Encoding.FULL, 0, module_bytes(module, components=0, axis=None), 0.0)]


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of (size, error), in order of size."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.size, c.error)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(left: Choice, right: Choice) -> float:
    return (left.error - right.error) / max(right.size - left.size, 1)


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """A choice for each module within the budget. Raises OptionError if even the smallest choices do not fit."""
    hulls = {name: _hull(options) for name, options in choices.items()}
    chosen = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].size for hull in hulls.values())
    if spent > budget:
        raise OptionError(f"target too small: the tensors take at least {spent} bytes, not {budget}")
    heap = [(-_gain(hull[0], hull[1]), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        hull, at = hulls[name], chosen[name]
        step = hull[at + 1].size - hull[at].size
        if spent + step > budget:
            continue  # a later, smaller step of another module can still fit
        spent += step
        chosen[name] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(heap, (-_gain(hull[at + 1], hull[at + 2]), name))
    return {name: hulls[name][at] for name, at in chosen.items()}


def _with_a_mask(choices: Mapping[str, Sequence[Choice]]) -> dict[str, list[Choice]]:
    """The choices without `same`, except where nothing changed."""
    return {
        name: [c for c in options if c.encoding is not Encoding.SAME or c.error == 0.0 or len(options) == 1]
        for name, options in choices.items()
    }


def _smallest(choices: Mapping[str, Sequence[Choice]]) -> dict[str, Choice]:
    return {name: _hull(options)[0] for name, options in choices.items()}


def target_of(plan: Plan, options: CompressOptions) -> int | None:
    """The most bytes of the file, if the options have a target."""
    if options.target_size is not None:
        return options.target_size
    return None if options.target_ratio is None else int(plan.full_bytes / options.target_ratio)


def spend(plan: Plan, errors: Mapping[str, Sequence[float]], options: CompressOptions) -> Plan:
    """The plan of least error for the bytes of the target. errors: for 0 to 8 masks, of the open modules.

    Raises OptionError for a target that is too small.
    """
    target = target_of(plan, options)
    if target is None:
        target = predicted_size(plan, options)  # of the plan without prices
    choices: Mapping[str, Sequence[Choice]] = {
        module.name: _choices_of(module, errors[module.name])
        if module.name in errors
        else [Choice(module.encoding, module.components, module.payload_bytes, 0.0)]
        for module in plan.modules
    }
    choices = _affordable(plan, choices, target, options)
    best = _spend_corrected(plan, choices, target, options)
    modules = (
        replace(m, reason=UNCHANGED) if m.encoding is Encoding.SAME and errors.get(m.name, (1.0,))[0] == 0.0 else m
        for m in best.modules
    )
    return replace(best, modules=tuple(modules))


def _affordable(
    plan: Plan, choices: Mapping[str, Sequence[Choice]], target: int, options: CompressOptions
) -> Mapping[str, Sequence[Choice]]:
    """The choices to spend a target on: with a mask for every changed module, if the smallest such file fits.

    Raises OptionError if not even the smallest file of all fits.
    """
    size = predicted_size(_with(plan, _smallest(choices)), options)
    if target < size:
        raise OptionError(
            f"target too small: {target} bytes; the smallest possible file has {size} bytes, if every tensor that the "
            "format allows is stored as the base's"
        )
    masked = _with_a_mask(choices)
    if target >= predicted_size(_with(plan, _smallest(masked)), options):
        return masked
    return choices


def _spend_corrected(
    plan: Plan, choices: Mapping[str, Sequence[Choice]], target: int, options: CompressOptions
) -> Plan:
    """The plan of the most payload bytes that were tried and whose file fits the target.

    The header grows with the masks, in steps: spend, compute the size of the file, and correct the budget.
    """
    least = _smallest(choices)
    best = _with(plan, least)
    floor = sum(choice.size for choice in least.values())
    budget = target - (predicted_size(plan, options) - plan.payload_bytes)
    ceiling = target  # the fewest bytes that were too many, so that each correction leads to another choice
    for _ in range(_CORRECTIONS):
        chosen = allocate(choices, max(budget, floor))
        spent = _with(plan, chosen)
        left = target - predicted_size(spent, options)
        if left < 0:
            ceiling = min(ceiling, sum(choice.size for choice in chosen.values()))
        elif spent.payload_bytes > best.payload_bytes:
            best = spent
        budget = min(budget + left, ceiling - 1)
    return best


def _with(plan: Plan, chosen: Mapping[str, Choice]) -> Plan:
    return plan.with_choices({name: (choice.encoding, choice.components) for name, choice in chosen.items()})


def is_open(module: PlannedModule, options: CompressOptions) -> bool:
    """Whether the budget may choose the encoding of this module: compressible, and not requested as exact."""
    return (
        module.compressible
        and not (module.kind in TABLES and options.embeddings == "full")
        and (module.encoding is Encoding.SIGN)
    )
