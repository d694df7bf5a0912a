"""The order in which the modules of a block can be fitted: stages, from the recorded products of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peraxis_tools.compress.fit.moments.recorder import Call

__all__ = ["Key", "Stage", "key_of", "stages_of"]

Key = tuple[str, int | None]  # parameter, batch element


@dataclass(slots=True)
class Stage:
    """Parameters whose inputs are ready at the same time.

    input_of: the key whose input a key shares; the first key maps to itself. energy: the largest sum of squares of an
    input's column in that pass.
    """

    parameters: list[str] = field(default_factory=list)
    input_of: dict[Key, Key] = field(default_factory=dict)
    transposed: dict[str, bool] = field(default_factory=dict)
    experts: bool = False
    energy: float = 0.0

    @property
    def observed(self) -> set[Key]:
        """The keys whose inputs have to be recorded: one for each input."""
        return set(self.input_of.values())

    @property
    def can_suspend(self) -> bool:
        """Whether a pass that has reached the stage's input has not computed any of its products yet."""
        return not self.experts and len(self.observed) == 1

    def to_json(self) -> dict[str, Any]:
        """JSON values for another process. Law: from_json(s.to_json()) == s."""
        return {
            "parameters": self.parameters,
            "input_of": [[*key, *shared] for key, shared in self.input_of.items()],
            "transposed": self.transposed,
            "experts": self.experts,
            "energy": self.energy,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Stage:
        input_of = {(a, b): (c, d) for a, b, c, d in values["input_of"]}
        return cls(values["parameters"], input_of, values["transposed"], values["experts"], values["energy"])


def key_of(call: Call) -> Key:
    """The key of the call's matrix."""
    return call.parameter, call.index[0] if call.index else None


def stages_of(calls: Sequence[Call]) -> list[Stage]:
    """Group the calls of one forward pass: products with one input form a stage, and so do a parameter's experts."""
    stages: list[Stage] = []
    of_source: dict[tuple[int, int, int], tuple[Stage, Key]] = {}
    of_parameter: dict[str, Stage] = {}
    for call in calls:
        key = key_of(call)
        stage = of_parameter.get(call.parameter)
        if stage is None:
            stage = of_source[call.source][0] if call.source in of_source else Stage()
            if stage not in stages:
                stages.append(stage)
            of_parameter[call.parameter] = stage
            stage.parameters.append(call.parameter)
        first_stage, first = of_source.setdefault(call.source, (stage, key))
        stage.input_of.setdefault(key, first if first_stage is stage else key)
        stage.transposed[call.parameter] = call.transposed
        stage.experts = stage.experts or bool(call.index)
        if first == key and call.inputs.numel():
            stage.energy = max(stage.energy, float(call.inputs.float().square().sum(dim=0).max()))
    return stages
