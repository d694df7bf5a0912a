"""A summary as text, JSON or JUnit XML; only this module of the kit writes to the terminal."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any
from xml.sax.saxutils import quoteattr

from .cases import Case
from .run import Outcome, Summary

__all__ = ["as_dict", "as_junit", "badge", "escaped", "show", "show_case", "show_codes", "show_list", "show_summary"]


def escaped(text: str) -> str:
    """Text from an adapter or a file, safe to show: control and direction characters become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def badge(summary: Summary) -> str:
    """One line, fit for a badge: `PXD 1.0 conformance | 412 of 412`."""
    run = len(summary.outcomes) - summary.count("skipped")
    spec = escaped(", ".join(summary.caps.spec))
    return f"PXD {spec} conformance | {summary.count('passed')} of {run}"


def show(text: str) -> None:
    """One line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def show_case(outcome: Outcome, *, verbose: bool) -> None:
    """Show a finished case: always if it failed, otherwise on request."""
    if outcome.status == "failed":
        note = f" ({outcome.case.note})" if outcome.case.note else ""
        show(f"FAIL {outcome.case.id}  SPEC {outcome.case.clause}: {escaped(outcome.detail)}{note}")
    elif verbose:
        show(f"{outcome.status} {outcome.case.id}")


def show_summary(summary: Summary) -> None:
    """Show totals, equal failures, the cases that were not run with the reason, and the badge line."""
    named = f"{escaped(summary.caps.implementation)} {escaped(summary.caps.version)}"
    parts = [f"{summary.count(status)} {status}" for status in ("passed", "failed", "unsupported", "skipped")]
    show(f"{named}: {', '.join(parts)} in {summary.seconds:.1f} s")
    for status in ("failed", "unsupported", "skipped"):
        reasons = Counter(o.detail for o in summary.outcomes if o.status == status)
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
            if count > 1 or status != "failed":  # each failure has its own line already
                show(f"  {status}: {count} ({escaped(reason)})")
    if summary.other_codes:
        show(
            f"  {summary.other_codes} rejections in the right phase name another code than SPEC 8 recommends "
            "(--verbose-codes lists them)"
        )
    show(badge(summary))


def show_codes(outcomes: Iterable[Outcome]) -> None:
    """Rejections whose code is not a recommended one."""
    for outcome in outcomes:
        if outcome.status == "passed" and not outcome.code_matches:
            show(f"code {outcome.case.id}: {escaped(str(outcome.code))}, recommended {' or '.join(outcome.case.codes)}")


def show_list(cases: Iterable[Case], *, as_json: bool) -> None:
    """The cases that would run."""
    for case in cases:
        if as_json:
            show(
                json.dumps(
                    {
                        "id": case.id,
                        "clause": case.clause,
                        "operation": case.operation,
                        "expectation": "accept" if case.accepts else "reject",
                        "phase": case.phase,
                        "codes": case.codes,
                        "features": case.features,
                    }
                )
            )
        else:
            verdict = "accept" if case.accepts else f"reject {case.phase or ''} {' '.join(case.codes)}".rstrip()
            show(f"{case.id}  {case.clause}  {case.operation}  {verdict}")


def as_dict(summaries: Iterable[Summary]) -> dict[str, Any]:
    """The report as JSON, version 1."""
    return {"report": 1, "adapters": [adapter_dict(summary) for summary in summaries]}


def adapter_dict(summary: Summary) -> dict[str, Any]:
    return {
        "implementation": summary.caps.implementation,
        "version": summary.caps.version,
        "spec": list(summary.caps.spec),
        "passed": summary.passed,
        "badge": badge(summary),
        "seconds": round(summary.seconds, 3),
        "counts": {status: summary.count(status) for status in ("passed", "failed", "unsupported", "skipped")},
        "cases": [
            {
                "id": o.case.id,
                "clause": o.case.clause,
                "status": o.status,
                "detail": o.detail,
                "code": o.code,
                "code_matches": o.code_matches,
                "seconds": round(o.seconds, 4),
                "peak_mib": o.mib,
            }
            for o in summary.outcomes
        ],
    }


def as_junit(summaries: Iterable[Summary]) -> str:
    """JUnit XML: one suite for each adapter, one test case for each case."""
    suites = [line for summary in summaries for line in junit_suite(summary)]
    return "\n".join(['<?xml version="1.0" encoding="UTF-8"?>', "<testsuites>", *suites, "</testsuites>", ""])


def junit_suite(summary: Summary) -> list[str]:
    skipped = summary.count("skipped") + summary.count("unsupported")
    name = quoteattr("PXD conformance: " + escaped(summary.caps.implementation))
    lines = [
        f'<testsuite name={name} tests="{len(summary.outcomes)}" failures="{summary.count("failed")}" errors="0" '
        f'skipped="{skipped}" time="{summary.seconds:.3f}">'
    ]
    for o in summary.outcomes:
        head = f'  <testcase classname="SPEC {o.case.clause}" name={quoteattr(o.case.id)} time="{o.seconds:.4f}"'
        inner = {"failed": "failure", "unsupported": "skipped", "skipped": "skipped"}.get(o.status)
        message = quoteattr(escaped(o.detail))
        lines.append(f"{head}/>" if inner is None else f"{head}><{inner} message={message}/></testcase>")
    return [*lines, "</testsuite>"]
