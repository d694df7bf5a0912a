"""In which order the modules of a block can be fitted: stages, from the products that one forward pass shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peraxis_tools.compress.fit.moments.recorder import Call

__all__ = ["Key", "Stage", "key_of", "stages_of"]

Key = tuple[str, int | None]  # parameter, batch element


@dataclass(slots=True)
class Stage:
    """Parameters whose inputs are ready at the same moment.

    leader: whose input's sums a key shares. energy: the largest sum of squares of an input's column in that pass.
    """

    parameters: list[str] = field(default_factory=list)
    leader: dict[Key, Key] = field(default_factory=dict)
    transposed: dict[str, bool] = field(default_factory=dict)
    experts: bool = False
    energy: float = 0.0

    @property
    def leaders(self) -> set[Key]:
        """The keys whose inputs have to be seen."""
        return set(self.leader.values())

    @property
    def waits(self) -> bool:
        """Whether a pass that has come to the stage's one input has computed none of its products yet."""
        return not self.experts and len(self.leaders) == 1

    def to_json(self) -> dict[str, Any]:
        """For another process; `from_json` gives it back."""
        return {
            "parameters": self.parameters,
            "leader": [[*key, *leading] for key, leading in self.leader.items()],
            "transposed": self.transposed,
            "experts": self.experts,
            "energy": self.energy,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Stage:
        leader = {(a, b): (c, d) for a, b, c, d in values["leader"]}
        return cls(values["parameters"], leader, values["transposed"], values["experts"], values["energy"])


def key_of(call: Call) -> Key:
    """The matrix that a call is about."""
    return call.parameter, call.index[0] if call.index else None


def stages_of(calls: Sequence[Call]) -> list[Stage]:
    """Group the calls of one forward pass: products with one input are one stage, and so are a parameter's experts."""
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
        leading = of_source.setdefault(call.source, (stage, key))
        stage.leader.setdefault(key, leading[1] if leading[0] is stage else key)
        stage.transposed[call.parameter] = call.transposed
        stage.experts = stage.experts or bool(call.index)
        if leading[1] == key and call.inputs.numel():
            stage.energy = max(stage.energy, float(call.inputs.float().square().sum(dim=0).max()))
    return stages
