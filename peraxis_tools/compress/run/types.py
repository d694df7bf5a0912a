"""The types that the steps of a compression pass to each other. They need no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from peraxis_format import Array, Calibration, Component
from peraxis_tools.compress.plan.plan import Plan

__all__ = ["OPEN_STEPS", "FittedModule", "Fitting", "ModuleReport", "RunFit"]

OPEN_STEPS: Final = 2  # the stage `open` of a fit on text has two steps: read the text, open the models


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """The errors of a fit: mean squares of the module's output over the validation tokens; None: unknown."""

    error: float | None = None
    error_none: float | None = None
    error_same: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedModule:
    """The components of one tensor as the file stores them; an empty tuple means `same` (the base's own weight).

    full: instead of components, the storage array of a full tensor that differs from the fine-tune's.
    """

    name: str
    components: tuple[Component, ...] = ()
    report: ModuleReport
    full: Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFit:
    """All fitted modules, the plan that they follow, and the manifest's record of the text."""

    plan: Plan
    modules: Mapping[str, FittedModule] = field(default_factory=dict)
    calibration: Calibration | None = None
    tokens: int = 0
    unread_tokens: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


class Fitting(Protocol):
    """A way to compute components: without text (streamed.py) or on a text (calibrated.py).

    Life cycle: it is entered; `open` reads the text, so that one that cannot be read is an error before the plan is
    shown; `errors` is called if there is a byte target; `fit` is called once, with the final plan; the process that
    `writes` writes the file; it is left. A run that fails keeps its state, so that it can be resumed.
    """

    def open(self) -> None:
        """Read the inputs beside the pair. Raises OptionError, ToolError."""

    @property
    def writes(self) -> bool:
        """Whether this process writes the file; the others wait for it when they leave."""

    def errors(self, plan: Plan) -> Mapping[str, Sequence[float]]:
        """By module that the byte target may change: the error with 0, 1, 2, ... components."""

    def fit(self, plan: Plan) -> RunFit:
        """Fit every module of the plan."""

    def __enter__(self) -> Fitting: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None: ...
