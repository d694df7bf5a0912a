"""What a run writes into the metadata of its file: the plan, and the report of each module."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final

from peraxis_format import canonical_json
from peraxis_tools.compress.plan.plan import Plan
from peraxis_tools.compress.run.types import ModuleReport

__all__ = ["OTHERS", "plan_json", "report_json"]

OTHERS: Final = "all others"


def plan_json(planned: Plan) -> str:
    """The plan for the manifest: predicted bytes, and by choice the modules that it was made for.

    A choice is encoding, masks and axis, or why a module is full. Names are of one string each, and the most frequent
    choice goes without them (OTHERS): in a header of JSON within JSON a quote is four bytes.
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


def report_json(reports: Mapping[str, ModuleReport]) -> str:
    """For the manifest, by module: [error, of `none`, of `same`] to three digits, and a note where there is one."""

    def line(report: ModuleReport) -> list[Any]:
        errors = (report.error, report.error_none, report.error_same)
        known = [] if report.error is None else [value if value is None else float(f"{value:.3g}") for value in errors]
        return [*known, *([report.note] if report.note else [])]

    lines = {name: values for name, report in reports.items() if (values := line(report))}
    return json.dumps(lines, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
