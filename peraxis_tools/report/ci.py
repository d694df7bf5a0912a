"""Verdicts in the formats of CI systems: JUnit XML, SARIF 2.1.0, GitHub's workflow commands.

Equal reports give equal text, because it has no times and no hosts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, Final
from urllib.parse import quote
from xml.sax.saxutils import escape as xml_text
from xml.sax.saxutils import quoteattr

import peraxis_format as pxd
from peraxis_format.urls import is_url
from peraxis_tools.display.shown import visible, visible_lines
from peraxis_tools.verify_files import Check, FileVerdict, Status, VerifyResult

__all__ = ["github", "junit", "sarif"]

_SARIF_SCHEMA: Final = "https://json.schemastore.org/sarif-2.1.0.json"


def _sentence(check: Check) -> str:
    where = [place for place in (check.field, None if check.offset is None else f"offset {check.offset}") if place]
    parts = [
        f"{check.code}: " if check.code else "",
        check.message or check.status.value,
        f" (at {', '.join(where)})" if where else "",
        f" (SPEC {check.clause})" if check.clause else "",
        f"; {check.remedy}" if check.remedy else "",
    ]
    return "".join(parts)


def _bad(report: VerifyResult) -> Iterator[tuple[FileVerdict, Check]]:
    for verdict in report.files:
        for check in verdict.checks:
            if check.status is not Status.PASSED:
                yield verdict, check


def junit(report: VerifyResult) -> str:
    """A suite for each file, a case for each check. A failed check is a failure; any other outcome is an error."""
    lines = ['<?xml version="1.0" encoding="UTF-8"?>']
    failures = sum(check.status is Status.FAILED for _, check in _bad(report))
    errors = sum(check.status is not Status.FAILED for _, check in _bad(report))
    total = sum(len(verdict.checks) for verdict in report.files)
    lines.append(f'<testsuites name="peraxis verify" tests="{total}" failures="{failures}" errors="{errors}">')
    for verdict in report.files:
        name = quoteattr(visible(verdict.path))
        failed = sum(check.status is Status.FAILED for check in verdict.checks)
        bad = sum(check.status is not Status.PASSED for check in verdict.checks)
        lines.append(
            f'  <testsuite name={name} tests="{len(verdict.checks)}" failures="{failed}" errors="{bad - failed}">'
        )
        for check in verdict.checks:
            case = f'    <testcase classname={name} name="{check.name}"'
            if check.status is Status.PASSED:
                lines.append(f"{case}/>")
                continue
            kind = "failure" if check.status is Status.FAILED else "error"
            sentence = visible(_sentence(check))
            shown = f"<{kind} type={quoteattr(check.code or check.status.value)} message={quoteattr(sentence)}>"
            lines.append(f"{case}>\n      {shown}{xml_text(sentence)}</{kind}>\n    </testcase>")
        lines.append("  </testsuite>")
    lines.append("</testsuites>")
    return "\n".join(lines) + "\n"


def _rule_id(check: Check) -> str:
    return check.code or f"peraxis/{check.name.replace(' ', '-')}"


# The remedy for each check that is not a clause of SPEC 8.
_HELP: Final = {
    "structure": "Check the path and the permission to read it.",
    "payload": "Check the path and the permission to read it.",
    "content id": "Fetch the file that the pinned content ID names, or pin the new one if the change is meant.",
    "signature": "Fetch file and bundle again, and check that the key is the publisher's.",
    "base": "Pass the base checkpoint that `inspect` names, in the same revision.",
    "chain": "Add the update that is missing; of two that the message names, leave one out or write it again with "
    "`update --after`.",
    "error": "Compress again with more masks, or raise the bound.",
    "kl": "Compress again with a calibration text or more masks, or raise the bound.",
}


def _rule(check: Check) -> dict[str, Any]:
    known = pxd.CODES.get(_rule_id(check))
    short = known.meaning if known else f"the check of the {check.name} did not pass"
    full = f"SPEC {known.clause} does not hold: {known.meaning}." if known else f"{short[0].upper()}{short[1:]}."
    return {
        "id": _rule_id(check),
        "shortDescription": {"text": short},
        "fullDescription": {"text": full},
        "help": {"text": known.remedy if known else _HELP.get(check.name, "See `peraxis-tools verify --help`.")},
    }


def _uri(file: str) -> str:
    return file if is_url(file) else quote(os.fsencode(PurePath(file).as_posix()))


def sarif(report: VerifyResult) -> str:
    """SARIF 2.1.0 with a result for each check that did not pass; rules are the codes of SPEC 8."""
    rules: dict[str, dict[str, Any]] = {}
    results = []
    for verdict, check in _bad(report):
        rule = _rule_id(check)
        rules.setdefault(rule, _rule(check))
        # GitHub uses only the line of a result, and a binary file has one line; the byte offset is for the reader.
        region = {"startLine": 1, "byteOffset": check.offset or 0, "byteLength": 0}
        place = {"artifactLocation": {"uri": _uri(verdict.path)}, "region": region}
        results.append(
            {
                "ruleId": rule,
                "ruleIndex": list(rules).index(rule),
                "level": "warning" if check.status is Status.NOT_VERIFIABLE else "error",
                "message": {"text": visible(_sentence(check))},
                "locations": [{"physicalLocation": place}],
            }
        )
    driver = {
        "name": "peraxis-tools",
        "version": pxd.__version__,
        "semanticVersion": pxd.__version__,
        "rules": list(rules.values()),
    }
    run = {
        "tool": {"driver": driver},
        "artifacts": [{"location": {"uri": _uri(verdict.path)}} for verdict in report.files],
        "results": results,
    }
    return json.dumps({"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _command_text(value: str) -> str:
    """The text of a workflow command: GitHub's escapes for what would end its line, ours for what nobody sees."""
    return visible_lines(value.replace("%", "%25")).replace("\r", "%0D").replace("\n", "%0A")


def _command_value(value: str) -> str:
    """The value of a property of a workflow command."""
    return _command_text(value).replace(":", "%3A").replace(",", "%2C")


def github(report: VerifyResult) -> str:
    """An annotation for each check that did not pass, a notice for each file that did."""
    lines = []
    for verdict in report.files:
        file = _command_value(verdict.path)
        if verdict.status is Status.PASSED:
            checks = ", ".join(check.name for check in verdict.checks)
            lines.append(f"::notice file={file},title=verified::{verdict.content_id} ({checks})")
        for check in verdict.checks:
            if check.status is Status.PASSED:
                continue
            level = "warning" if check.status is Status.NOT_VERIFIABLE else "error"
            title = _command_value(f"{check.name}: {check.status.value}")
            lines.append(f"::{level} file={file},title={title}::{_command_text(_sentence(check))}")
    return "\n".join(lines) + "\n"
