"""SPEC.md and the library agree."""

from __future__ import annotations

import re

import numpy as np

import peraxis_format as pxd
from peraxis_format.dtypes import DType
from peraxis_format.ops.exact import apply, encode
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


def test_the_exact_block_of_the_worked_example_is_what_the_library_writes_and_reads() -> None:
    lines = TEXT.split("<!-- exact:begin -->")[1].split("<!-- exact:end -->")[0].strip().splitlines()[1:-1]
    old = np.array([int(word, 16) for word in lines[0].split()], np.uint16)
    cells = [lines[1].ljust(len(lines[0]))[5 * i : 5 * i + 4].strip() for i in range(old.size)]
    new = np.array([int(cell, 16) if cell else word for cell, word in zip(cells, old, strict=True)], np.uint16)
    backends: tuple[str, ...] = ("numpy", "numba")
    for backend in backends:
        index, data = encode(old, new, DType.BF16, backend=backend)
        assert data.tobytes() == bytes.fromhex(lines[2])
        assert f"[0x{int(index[0]):08x}]" in TEXT
        weights = old.copy()
        apply(weights, index, data, DType.BF16, backend=backend)
        assert weights.tobytes() == new.tobytes()
