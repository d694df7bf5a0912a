"""What the steps of a compression hand to each other; no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peraxis_format import Array, Calibration, Component
from peraxis_tools.compress.plan.plan import Plan

__all__ = ["FittedModule", "ModuleReport", "RunFit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """What the fit saw. Errors are mean squares of the module's output over the tokens that judged; None: unknown."""

    error: float | None = None
    error_none: float | None = None
    error_same: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedModule:
    """Components of one tensor as they will be stored; none at all means `same` (the base's own weight).

    full: instead of components, the storage array of a full tensor that differs from the fine-tune's own.
    """

    name: str
    components: tuple[Component, ...] = ()
    report: ModuleReport
    full: Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFit:
    """All fitted modules, the plan that they follow, and what the manifest says about the text.

    leader: whether this process writes the file (others wait in `close` until it is there).
    """

    plan: Plan
    modules: Mapping[str, FittedModule] = field(default_factory=dict)
    calibration: Calibration | None = None
    tokens: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    work: Path | None = None
    is_main_process: bool = True
    close: Callable[[], None] | None = None
