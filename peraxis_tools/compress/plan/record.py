"""The metadata that a run writes into the manifest: the plan, and the errors and notes of the fit.

Metadata is JSON in a string of the manifest, which is a string of the header, so a quote takes four bytes. Therefore
one string holds the names of many modules, and errors are in the order of the modules, without names.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from peraxis_format import canonical_json
from peraxis_tools.compress.plan.plan import Plan

__all__ = ["PLAN_KEY", "Line", "plan_text", "report_text"]

PLAN_KEY: Final = "peraxis.plan"
_OTHERS: Final = "all others"

# (error of the fit, of `none`, of `same` (None: unknown), a note ("": none))
Line = tuple[float | None, float | None, float | None, str]


def plan_text(planned: Plan) -> str:
    """The plan as JSON: the predicted bytes, and the modules of each choice.

    A choice is encoding, masks and axis, or the reason of a full module. The most frequent one has no names (_OTHERS).
    """
    choices: dict[str, list[str]] = defaultdict(list)
    for module in planned.modules:
        axis = "auto" if module.axis is None else module.axis.value
        signed = f"sign {module.components} {axis}"
        choices[signed if module.components else f"{module.encoding.value}: {module.reason}"].append(module.name)
    frequent = max(choices, key=lambda choice: len(choices[choice]), default=None)
    lines: dict[str, Any] = {
        choice: _OTHERS if choice == frequent else " ".join(names) for choice, names in choices.items()
    }
    return canonical_json({"choices": lines, "payload_bytes": planned.payload_bytes}).decode()


def report_text(names: Sequence[str], reports: Mapping[str, Line]) -> str:
    """The report as JSON: errors to three digits in the order of `names` ([]: none); notes by name. "" for neither."""

    def rounded(name: str) -> list[float | None]:
        errors = reports[name][:3] if name in reports else (None,)
        return [] if errors[0] is None else [None if e is None else float(f"{e:.3g}") for e in errors]

    errors = [rounded(name) for name in names]
    notes = {name: reports[name][3] for name in names if name in reports and reports[name][3]}
    if not any(errors) and not notes:
        return ""
    said = {"errors": errors, "notes": notes}
    return json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
