"""In which order the modules of a block can be fitted: stages, from the products that one forward pass shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peraxis_tools.compress.observe import Call

__all__ = ["Key", "Stage", "stages_of"]

Key = tuple[str, int | None]  # parameter, batch element


@dataclass(slots=True)
class Stage:
    """Parameters whose inputs are ready at the same moment. leader: whose input's sums a key shares."""

    parameters: list[str] = field(default_factory=list)
    leader: dict[Key, Key] = field(default_factory=dict)
    transposed: dict[str, bool] = field(default_factory=dict)
    experts: bool = False


def stages_of(calls: Sequence[Call]) -> list[Stage]:
    """Group the calls of one forward pass: products with one input are one stage, and so are a parameter's experts."""
    stages: list[Stage] = []
    of_source: dict[tuple[int, int, int], tuple[Stage, Key]] = {}
    of_parameter: dict[str, Stage] = {}
    for call in calls:
        key: Key = (call.parameter, call.index[0] if call.index else None)
        stage = of_parameter.get(call.parameter)
        if stage is None:
            stage = of_source[call.source][0] if call.source in of_source else Stage()
            if stage not in stages:
                stages.append(stage)
            of_parameter[call.parameter] = stage
            stage.parameters.append(call.parameter)
        leading = of_source.setdefault(call.source, (stage, key))
        stage.leader.setdefault(key, leading[1] if leading[0] is stage else key)
        stage.transposed[call.parameter] = call.transposed
        stage.experts = stage.experts or bool(call.index)
    return stages
