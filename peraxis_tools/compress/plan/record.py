"""What a run writes about itself into the manifest's metadata: the plan, and the errors and notes of the fit.

Metadata is JSON in a string of the manifest, which is a string of the header: a quote there takes four bytes. So names
are of one string for many modules, and errors stand in the order of the modules, without names.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from peraxis_format import canonical_json
from peraxis_tools.compress.plan.plan import Plan

__all__ = ["OTHERS", "PLAN_KEY", "REPORT_KEY", "Line", "plan_text", "report_text"]

PLAN_KEY: Final = "peraxis.plan"
REPORT_KEY: Final = "peraxis.report"
OTHERS: Final = "all others"

# Error of the fit, of `none` and of `same` (None: unknown), and a note ("": none).
Line = tuple[float | None, float | None, float | None, str]


def plan_text(planned: Plan) -> str:
    """The plan: predicted bytes, and by choice the modules that it was made for.

    A choice is encoding, masks and axis, or why a module is full. The most frequent one goes without names (OTHERS).
    """
    choices: dict[str, list[str]] = defaultdict(list)
    for module in planned.modules:
        axis = "auto" if module.axis is None else module.axis.value
        signed = f"sign {module.components} {axis}"
        choices[signed if module.components else f"{module.encoding.value}: {module.reason}"].append(module.name)
    frequent = max(choices, key=lambda choice: len(choices[choice]), default=None)
    lines: dict[str, Any] = {
        choice: OTHERS if choice == frequent else " ".join(names) for choice, names in choices.items()
    }
    return canonical_json({"choices": lines, "payload_bytes": planned.payload_bytes}).decode()


def report_text(names: Sequence[str], reports: Mapping[str, Line]) -> str:
    """Errors to three digits in the order of `names` ([] where there are none), and notes by name. Empty: nothing."""

    def rounded(name: str) -> list[float | None]:
        errors = reports[name][:3] if name in reports else (None,)
        return [] if errors[0] is None else [None if e is None else float(f"{e:.3g}") for e in errors]

    errors = [rounded(name) for name in names]
    notes = {name: reports[name][3] for name in names if name in reports and reports[name][3]}
    if not any(errors) and not notes:
        return ""
    said = {"errors": errors, "notes": notes}
    return json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
