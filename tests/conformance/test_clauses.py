"""Every MUST of SPEC.md has a tag, and every tag a case."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from peraxis_conformance import Case, Corpus

from tests.conformance.helpers import SPEC

TAG = re.compile(r"\[((?:E\d{3}|apply|encode)(?:, (?:E\d{3}|apply|encode))*)\]")


def clauses() -> dict[str, str]:
    """Return number -> text of every clause, from its bold number to the next clause or section."""
    body = SPEC.read_text(encoding="utf-8").partition("## 2 Container")[2]
    parts = re.split(r"^(?:\*\*(\d+\.\d+)\*\*|## .*)", body, flags=re.MULTILINE)
    return {number: text for number, text in zip(parts[1::2], parts[2::2], strict=True) if number}


CLAUSES = clauses()
MUSTS = [(number, i, text) for number, text in CLAUSES.items() for i in range(len(re.findall(r"\bMUST\b", text)))]
CORPUS = Corpus()
OPERATIONS = {"apply": "apply", "encode": "encode"}


def tags(text: str) -> set[str]:
    return {tag for group in TAG.findall(text) for tag in group.split(", ")}


def covers(case: Case, number: str, tag: str) -> bool:
    """Whether a case covers a tag: for an error a rejection that names it, for apply and encode an accepted case."""
    if tag in OPERATIONS:
        return case.clause == number and case.operation == tag
    return not case.accepts and tag in case.codes and (case.codes[0] == tag or case.clause == number)


def missing() -> list[str]:
    """Return the sorted tags that no case covers."""
    wanted = sorted((number, tag) for number, text in CLAUSES.items() for tag in tags(text))
    return [f"{number} [{tag}]" for number, tag in wanted if not any(covers(c, number, tag) for c in CORPUS.cases)]


def test_every_must_stands_in_a_clause_with_a_tag() -> None:
    untagged = sorted({number for number, _, text in MUSTS if not tags(text)})
    assert untagged == [], f"clauses that say MUST without a tag: {untagged}"


def test_every_tag_has_a_case() -> None:
    operations = Counter(case.operation for case in CORPUS.cases)
    folders = Counter(case.id.partition("/")[0] for case in CORPUS.cases)
    print(f"\n{len(CORPUS.cases)} cases for {len(MUSTS)} MUSTs in {len({n for n, _, _ in MUSTS})} clauses")
    print(", ".join(f"{count} {name}" for name, count in [*operations.items(), *folders.items()]))
    absent = missing()
    for entry in absent:
        print(f"no case: {entry}")
    assert absent == []


def test_every_error_code_has_a_case_and_every_case_a_known_code() -> None:
    table = set(re.findall(r"^\| (E\d{3}) \|", SPEC.read_text(encoding="utf-8"), flags=re.MULTILINE))
    used = {case.codes[0] for case in CORPUS.cases if case.codes}
    assert sorted(table - used) == []
    assert sorted({code for case in CORPUS.cases for code in case.codes} - table) == []


def test_every_case_names_a_clause_of_the_specification() -> None:
    assert sorted({case.clause for case in CORPUS.cases} - set(CLAUSES)) == []


def test_a_tag_without_a_case_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tuple(case for case in CORPUS.cases if "E304" not in case.codes)
    monkeypatch.setattr(CORPUS, "cases", kept)
    assert missing() == ["4.5 [E304]"]
