"""SPEC.md and the library say the same."""

from __future__ import annotations

import re

import peraxis_format as pxd
from tests.format.spec_example import SPEC, spec_with_example

TEXT = SPEC.read_text("utf-8")


def test_the_worked_example_is_what_the_library_writes() -> None:
    assert spec_with_example(TEXT) == TEXT, "run `python -m tests.format.spec_example`"


def test_the_table_of_codes_is_the_librarys() -> None:
    table = dict(re.findall(r"^\| (E\d{3}) \| ([\d., ]+?) \|", TEXT, re.MULTILINE))
    assert table.keys() == pxd.CODES.keys()
    assert all(pxd.CODES[code].clause == clauses.split(",")[0] for code, clauses in table.items())


def test_every_clause_that_says_must_names_what_holds_to_it() -> None:
    clauses = re.findall(r"^\*\*(\d+\.\d+)\*\* (.*?)(?=^\*\*\d|^#)", TEXT, re.MULTILINE | re.DOTALL)
    bare = [n for n, text in clauses if "MUST" in text and not re.search(r"\[(E\d{3}|apply|encode)", text)]
    assert len(clauses) > 40
    assert bare == []
